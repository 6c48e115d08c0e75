import pytest
import torch

from attnviz import gap
from attnviz.cam import gradcam
from attnviz.stages import staged


def _random(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _decomposed(net, image, class_id):
    """Attention maps of a class at every stage, by autograd on the whole network."""
    activations, output = net.activations(image.requires_grad_())
    gradients = torch.autograd.grad(output[0, class_id], activations)
    pairs = zip(activations, gradients, strict=True)
    return output[0, class_id], [gap.attention(a.detach()[0], g[0]) for a, g in pairs], gradients


@pytest.mark.parametrize("score", ["AA", "MA", "AG", "MG"])
def test_scores_are_means_and_maxima_of_attention_and_gradient(score, generator):
    activation, gradient = _random(generator, 3, 4, 5).relu(), _random(generator, 3, 4, 5)
    found = gap.channel_scores(activation, gradient, score)
    for channel in range(3):
        values = [
            (float(activation[channel, i, j]) if score[1] == "A" else 1.0)
            * float(gradient[channel, i, j])
            for i in range(4)
            for j in range(5)
        ]
        expected = sum(values) / 20 if score[0] == "A" else max(values)
        assert float(found[channel]) == pytest.approx(expected, rel=1e-14)


def test_unknown_score_is_refused(untyped):
    with pytest.raises(ValueError, match="expected `score` in .*'AA'.* got 'XX'"):
        gap.channel_scores(torch.ones(1, 2, 2), torch.ones(1, 2, 2), "XX")


def test_maps_of_every_stage_sum_to_the_decision_without_biases(tiny, generator):
    image = _random(generator, 1, 3, 16, 16)
    for class_id in range(4):
        score, maps, _ = _decomposed(staged(tiny), image, class_id)
        for stage in maps:
            torch.testing.assert_close(stage.sum(), score.detach(), rtol=1e-12, atol=1e-14)
            fraction = gap.explained_fraction(stage, score.detach())
            assert float(fraction) == pytest.approx(1, rel=1e-12)
            total = gap.contributions(stage).sum() * stage[0].numel()  # (5.4) is a mean
            torch.testing.assert_close(total, score.detach(), rtol=1e-12, atol=1e-14)


def test_a_bias_is_what_the_maps_leave_unexplained(tiny, generator):
    tiny.fc = torch.nn.Linear(6, 4).double()
    image = _random(generator, 1, 3, 16, 16)
    score, maps, _ = _decomposed(staged(tiny), image, 2)
    left = score.detach() * (1 - gap.explained_fraction(maps[-1], score.detach()))
    torch.testing.assert_close(left, tiny.fc.bias[2].detach(), rtol=1e-10, atol=1e-12)


def test_positive_part_of_the_summed_maps_is_gradcam_on_a_pooled_head(tiny, generator):
    net, image = staged(tiny), _random(generator, 1, 3, 16, 16)
    _, maps, gradients = _decomposed(net, image, 1)
    activation = net.activations(image)[0][-1].detach()
    expected = gradcam(activation, gradients[-1])[0]
    torch.testing.assert_close(maps[-1].sum(dim=0).relu(), expected)  # (5.11)


def test_peak_is_the_first_of_the_largest_places():
    assert gap.peak(torch.tensor([[0.0, 2, 1], [1, 2, 0]])) == (0, 1)
    assert gap.peak(-torch.arange(1.0, 7).flip(0).reshape(2, 3)) == (1, 2)


def test_shares_are_of_the_positive_part():
    found = gap.shares(torch.tensor([3.0, -5, 1, 0]))
    torch.testing.assert_close(found, torch.tensor([0.75, 0, 0.25, 0]))
    assert gap.shares(torch.tensor([-1.0, 0])).tolist() == [0, 0]


def test_channels_that_light_up_the_same_places_are_merged_into_the_strongest():
    block = torch.zeros(4, 5, 5)
    block[0, :3, :3] = 2
    block[1, :3, :3] = 1  # the same nine places
    block[2, :3, :4] = 1  # nine of twelve
    block[3, 4, 4] = 1
    alphas = torch.tensor([0.2, 0.5, 0.3, -1.0])
    assert gap.suppress(block, alphas) == (1, 2)
    assert gap.suppress(block, alphas, threshold=0.7) == (1,)  # 9 / 12 = 0.75
    assert gap.suppress(block, alphas, threshold=0.75) == (1, 2)
    assert gap.suppress(block, alphas.abs(), most=2) == (3, 1)


def test_places_below_half_of_the_maximum_are_not_compared():
    maps = torch.tensor([[[1.0, 0.49]], [[1.0, 0.5]]])
    assert gap.suppress(maps, torch.tensor([2.0, 1.0])) == (0, 1)
    assert gap.suppress(maps[:, :, :1], torch.tensor([2.0, 1.0])) == (0,)
