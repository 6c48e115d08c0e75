import math

import pytest
import torch
from scipy.stats import spearmanr
from test_stages import _trace
from torch import nn

from attnviz.data.scenes import Scenes
from attnviz.probes.saliency import gradient, pixel_map
from attnviz.probes.sanity import (
    compare_maps,
    data_randomization,
    evidence_maps,
    hog_correlation,
    memorize,
    parameter_randomization,
    randomized,
    spearman,
    structural_similarity,
    weighted_layers,
)
from attnviz.stages import staged
from attnviz.tree import evidence


@pytest.fixture
def maps(generator):
    return torch.randn(2, 4, 24, 20, generator=generator, dtype=torch.float64).unbind()


def _saliency(net, images, class_ids):
    return pixel_map(gradient(net, images, class_ids))


def test_spearman_equals_scipy_with_ties_signs_and_absolute_values(maps):
    a, b = (m.mul(2).round() for m in maps)
    for absolute in (False, True):
        found = spearman(a, b, absolute=absolute)
        for row in range(4):
            pair = (a[row].abs(), b[row].abs()) if absolute else (a[row], b[row])
            expected = spearmanr(*(m.flatten().numpy() for m in pair)).statistic
            assert found[row].item() == pytest.approx(expected)


def test_spearman_sees_order_only(maps):
    a = maps[0]
    torch.testing.assert_close(spearman(a, a.exp()), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(spearman(a, -(a**3)), -torch.ones(4, dtype=torch.float64))
    same = spearman(a, -a, absolute=True)
    torch.testing.assert_close(same, torch.ones(4, dtype=torch.float64))
    assert spearman(a, torch.ones_like(a)).isnan().all()


def test_structural_similarity_equals_its_definition_in_one_window(generator):
    a, b = torch.rand(2, 1, 7, 7, generator=generator, dtype=torch.float64).unbind()
    for m in (a, b):
        m[0, 0, 0], m[0, 6, 6] = 0.0, 1.0  # so that scaling changes nothing
    covariance = ((a - a.mean()) * (b - b.mean())).sum() / 48
    top = (2 * a.mean() * b.mean() + 0.01**2) * (2 * covariance + 0.03**2)
    low = (a.mean() ** 2 + b.mean() ** 2 + 0.01**2) * (a.var() + b.var() + 0.03**2)
    assert structural_similarity(a, b).item() == pytest.approx((top / low).item())


def test_similarities_of_equal_maps_are_1_and_units_do_not_count(maps):
    table = compare_maps(maps[0], 5 * maps[0] + 3)
    assert table.drop(columns="spearman_absolute").to_numpy() == pytest.approx(1.0)
    other = compare_maps(*maps)
    assert other.abs().to_numpy().max() < 0.5
    assert list(other.columns) == ["spearman", "spearman_absolute", "ssim", "hog"]


def test_histograms_of_gradients_tell_stripes_apart():
    line = torch.arange(32.0).mul(0.8).sin()
    across, down = line.expand(1, 32, 32), line[:, None].expand(1, 32, 32)
    assert hog_correlation(across, down).item() < 0
    assert hog_correlation(across, across.roll(1, 2)).item() > 0.9


def test_layers_are_named_from_the_scores_down(tiny):
    names = weighted_layers(staged(tiny))
    assert names == ("fc", "convolutions.2", "convolutions.1", "convolutions.0")


def _normed():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip
        for layer in (model[1], model[4]):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                tensor.data.uniform_(0.5, 1)
    return model.eval()


def test_cascading_keeps_layers_random_and_independent_restores_them():
    model = _normed()
    net = staged(model, ["2", "5"], image_size=16)
    before = _trace(model)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    assert weighted_layers(net) == ("8", "3", "0")
    for mode, changed in (
        ("cascading", [{"8"}, {"8", "3", "4"}, {"8", "3", "4", "0", "1"}]),
        ("independent", [{"8"}, {"3", "4"}, {"0", "1"}]),
    ):
        for (name, copy), expected in zip(randomized(net, mode), changed, strict=True):
            state = copy.model.state_dict()
            moved = {k.split(".")[0] for k, v in state.items() if not torch.equal(v, original[k])}
            assert moved == expected
            assert name in expected
            for norm in expected & {"1", "4"}:
                assert (state[f"{norm}.weight"] == 1).all()
                assert (state[f"{norm}.bias"] == 0).all()
                assert torch.equal(state[f"{norm}.running_var"], original[f"{norm}.running_var"])
            images = torch.ones(1, 3, 16, 16)
            assert torch.equal(copy(images), copy.model(images))  # the stages run the new weights
    assert _trace(model) == before


def test_random_weights_follow_the_seed_and_leave_the_random_state():
    net = staged(_normed(), ["2", "5"], image_size=16)
    state = torch.get_rng_state()
    weights = [
        next(randomized(net, seed=seed))[1].model[8].weight.detach().clone() for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    bound = 1 / math.sqrt(4)  # torch's default for a linear layer of four inputs
    assert weights[0].abs().max() <= bound
    assert torch.equal(state, torch.get_rng_state())


def test_a_map_of_the_image_alone_fails_the_test_and_the_gradient_passes(tiny, generator):
    images = torch.rand(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    maps = {"edges": lambda net, images, ids: images.diff(dim=2)[..., 1:].abs().sum(1),
            "gradient": _saliency}  # fmt: skip
    table = parameter_randomization(staged(tiny), images, maps)
    assert len(table) == 2 * 4 * 3
    means = table.groupby(["method", "position"])[["spearman", "ssim", "hog"]].mean()
    assert means.loc["edges"].to_numpy() == pytest.approx(1.0)
    assert means.loc[("gradient", 4), "spearman"] < 0.5
    blocks = parameter_randomization(staged(tiny), images, maps, layers=["fc", "convolutions"])
    assert blocks["layer"].unique().tolist() == ["fc", "convolutions"]


def test_the_map_of_one_leaf_is_its_gradient(tiny, generator):
    images = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    net = staged(tiny)
    found = evidence_maps(net, images, torch.tensor([0, 1]), top=1, weighted=False)
    for row in range(2):
        tree = evidence(net, images[row : row + 1], row, 1)
        leaf = list(tree.nodes.values())[-1]
        assert leaf.stage == 1
        image = images[row : row + 1].clone().requires_grad_()
        net.activations(image)[0][0][0, leaf.channel, *leaf.peak].backward()
        torch.testing.assert_close(found[row], image.grad[0].abs().sum(0))


def test_permuted_labels_can_be_learned_and_change_the_gradient(generator):
    scenes = Scenes("train", 24, size=48, objects="few")
    items = [scenes.training_item(i) for i in range(24)]
    pixels, targets = (torch.stack([item[k] for item in items]) for k in (0, 1))
    order = torch.randperm(24, generator=generator)
    state = torch.get_rng_state()
    nets = [memorize(pixels, labels, epochs=25) for labels in (targets, targets[order])]
    assert torch.equal(state, torch.get_rng_state())
    for net, labels in zip(nets, (targets, targets[order])):
        known = net(torch.cat([net.preprocess(p.permute(1, 2, 0).numpy()) for p in pixels])) > 0
        share = (known == labels.bool()).all(1).float().mean().item()
        assert float(net.provenance["training_accuracy"]) == pytest.approx(share, abs=1e-3)
        assert share > 0.9
    test = Scenes("test", 6, size=48, objects="few")
    images = torch.cat([nets[0].preprocess(scene.image) for scene in test])
    table = data_randomization(*nets, images, {"gradient": _saliency})
    assert len(table) == 6
    assert table["spearman"].mean() < 0.9
    same = data_randomization(nets[0], nets[0], images, {"gradient": _saliency})
    assert same[["spearman", "ssim", "hog"]].to_numpy() == pytest.approx(1.0)


class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


def test_bad_arguments_say_what_is_expected(tiny, maps, untyped):
    net = staged(tiny)
    with pytest.raises(ValueError, match=r"`mode` in \('cascading', .*\), got 'all'"):
        next(randomized(net, "all"))
    with pytest.raises(ValueError, match=r"`layers` of Tiny, such as \('fc', .*got 'fc2'"):
        next(randomized(net, layers=["fc2"]))
    with pytest.raises(ValueError, match=r"at least 8 x 8, got \(4, 24, 20\) and \(4, 7, 20\)"):
        compare_maps(maps[0], maps[1][:, :7])
    odd = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), _Scaled(), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`reset_parameters`, got _Scaled"):
        list(randomized(staged(odd, ["1"], image_size=3)))
