from types import SimpleNamespace

import pytest
import torch
from test_stages import _trace
from torch import nn

from attnviz.probes.importance import (
    channel_importance,
    propagated_importance,
    removal_curve,
)
from attnviz.probes.intervene import intervene, keep_channels
from attnviz.stages import staged


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.rand(5, 3, 16, 16, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------------- intervene


def test_without_a_change_the_output_is_the_networks_from_every_stage(net, images):
    activations, output = net.activations(images)
    assert torch.equal(intervene(net, images), output)
    for stage, activation in enumerate(activations, start=1):
        assert torch.equal(intervene(net, activation, after=stage), output)


def test_channels_removed_equal_a_forward_by_hand(net, tiny, images):
    kept = {1: torch.tensor([True, False, True, True]), 3: torch.arange(6) != 2}
    change = keep_channels({stage: mask.expand(5, -1) for stage, mask in kept.items()})
    found = intervene(net, images, change)
    x = images
    for stage, (convolution, relu) in enumerate(zip(tiny.convolutions, tiny.relus), start=1):
        x = relu(convolution(tiny.pool(x) if stage > 1 else x))
        if stage == 1:
            x[:, 1] = 0
        if stage == 3:
            x[:, 2] = 0
    torch.testing.assert_close(found, tiny.fc(x.mean((2, 3))).detach())


class _Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(2, 2)

    def forward(self, x):
        a = self.a(x)
        return self.fc((a + self.b(a)).mean((2, 3)))


def test_a_stage_that_is_bypassed_is_refused():
    net = staged(_Skipping(), ["b"], image_size=8)
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"pass through it, but _Skipping needs \['a'\]"):
        intervene(net, net.activations(images)[0][0], after=1)


# ---------------------------------------------------------------------------------- importance


def test_conductance_of_all_units_sums_to_the_difference_of_scores(net, images):
    class_ids = [0, 1, 2, 3, 0]
    picked = net(images)[range(5), class_ids]  # no bias: 0 for the mean color
    for stage in (1, 2, 3):
        found = channel_importance(net, images, class_ids, "conductance", stage=stage, steps=200)
        torch.testing.assert_close(found.sum(dim=1), picked, atol=2e-3, rtol=0)


class _Modules(nn.Sequential):
    # A network with biases whose every step but the last is a module that captum has a rule for.
    def __init__(self, *layers):
        generator = torch.Generator().manual_seed(2)
        super().__init__(*(layers or (
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(),
            nn.Conv2d(5, 6, 1), nn.AdaptiveAvgPool2d(1),
        )))  # fmt: skip
        for parameter in () if layers else self.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = values / 2

    def forward(self, x):
        return super().forward(x).flatten(1)


def test_internal_influence_is_the_mean_gradient_on_the_way(images):
    net = staged(_Modules(), ["1", "4"], image_size=16)
    found = channel_importance(net, images, 2, "internal_influence", stage=1, steps=100)
    total, ends = torch.zeros_like(found), []
    for step in range(400):
        pieces = net.differentiable(images * (step + 0.5) / 400, [1])
        (gradient,) = torch.autograd.grad(pieces.output[:, 2].sum(), pieces.activations)
        ends.append(gradient.sum((2, 3)))
        total += ends[-1] / 400
    torch.testing.assert_close(found, total, atol=0.01, rtol=0.01)
    assert (ends[-1] - total).abs().max() > 0.05  # the gradient at the image is another


def test_lrp_by_the_epsilon_rule_is_gradient_times_activation(images):
    from captum.attr import LRP

    model = _Modules()
    net = staged(model, ["1", "4"], image_size=16)
    for stage, cut in ((1, 2), (2, 5)):
        activation = net.activations(images)[0][stage - 1].detach().requires_grad_()
        expected = LRP(_Modules(*model[cut:])).attribute(activation, target=3).sum((2, 3))
        found = channel_importance(net, images, 3, "lrp", stage=stage)
        torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-6)


def test_importance_of_a_batch_equals_single_images(net, images):
    for method in ("lrp", "conductance", "internal_influence"):
        together = channel_importance(net, images, None, method, stage=2, steps=10)
        for row in range(5):
            alone = channel_importance(net, images[row : row + 1], None, method, stage=2, steps=10)
            torch.testing.assert_close(together[row : row + 1], alone)


def _tree(edges):
    nodes = {}
    for _, child, *_ in edges:
        stage, channel = child.split("@")[0].split(":")
        nodes[child] = SimpleNamespace(stage=int(stage), channel=int(channel))
    made = [SimpleNamespace(parent=p, child=c, contribution=a, share=s) for p, c, a, s in edges]
    return SimpleNamespace(nodes=nodes, edges=made)


def test_importance_is_handed_down_in_shares():
    tree = _tree([
        ("3:0@0,0", "2:1@0,0", 9.0, 0.5), ("3:0@0,0", "2:2@0,0", 9.0, 0.25),
        ("class", "3:0@0,0", 2.0, 0.6), ("class", "3:4@1,1", 1.0, 0.3),
        ("3:4@1,1", "2:1@0,0", 7.0, 0.1), ("3:4@1,1", "2:1@5,5", 7.0, 0.9),
        ("2:1@0,0", "1:0@2,2", 4.0, 1.0),
    ])  # fmt: skip
    # by hand: 2:1@0,0 gets 2 * 0.5 + 1 * 0.1, 2:1@5,5 gets 0.9, both are channel 1
    assert propagated_importance(tree, 3, 5).tolist() == [2, 0, 0, 0, 1]
    assert propagated_importance(tree, 2, 3).tolist() == pytest.approx([0, 2.0, 0.5])
    assert propagated_importance(tree, 1, 1).tolist() == pytest.approx([1.1])


# ------------------------------------------------------------------------------------- removal


def test_removal_equals_a_loop_over_images(net, images):
    generator = torch.Generator().manual_seed(1)
    importance = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    class_ids = net(images).argmax(1)
    curve = removal_curve(
        net, images, class_ids, {"random": importance}, stage=2, counts=[1, 3, 5]
    ).set_index("removed")
    assert curve.loc[0, "accuracy"] == 1
    for count in (1, 3, 5):
        hits, scores, gone = [], [], []
        for row in range(5):
            order = sorted(range(5), key=lambda k: -importance[row, k].item())
            chosen = [k for k in order[:count] if importance[row, k] > 0]
            activation = net.activations(images[row : row + 1])[0][1].clone()
            activation[:, chosen] = 0
            output = intervene(net, activation, after=2)[0]
            hits.append(output.argmax().item() == class_ids[row])
            scores.append(output[class_ids[row]].item())
            gone.append(len(chosen))
        assert curve.loc[count, "accuracy"] == pytest.approx(sum(hits) / 5)
        assert curve.loc[count, "score"] == pytest.approx(sum(scores) / 5)
        assert curve.loc[count, "removed_mean"] == pytest.approx(sum(gone) / 5)


def test_with_average_pooling_the_score_falls_by_what_is_removed(net, images):
    class_ids = [1, 1, 1, 1, 1]
    importance = channel_importance(net, images, 1, stage=3)
    curve = removal_curve(net, images, class_ids, {"lrp": importance}, stage=3, counts=[1, 2])
    largest = importance.relu().sort(dim=1, descending=True).values
    for count in (1, 2):
        fall = curve["score"][0] - curve["score"][count]
        assert fall == pytest.approx(largest[:, :count].sum(1).mean().item())


def test_no_trace_is_left(net, tiny, images):
    tiny.train()
    before = _trace(tiny)
    with torch.inference_mode():
        for method in ("lrp", "conductance", "internal_influence"):
            channel_importance(net, images, None, method, stage=1, steps=3)
        removal_curve(net, images, [0] * 5, {"x": torch.rand(5, 4)}, stage=1, counts=[1])
    with pytest.raises(ValueError, match="from 1 to 3"):
        channel_importance(net, images, 0, stage=4)
    assert _trace(tiny) == before


def test_bad_arguments_say_what_is_expected(net, images, untyped):
    with pytest.raises(ValueError, match=r"`method` in \('lrp', .*\), got 'LRP'"):
        channel_importance(net, images, 0, "LRP", stage=1)
    with pytest.raises(ValueError, match=r"shape \(5, 4\) for stage 1, got \(5, 3\) of 'x'"):
        removal_curve(net, images, [0] * 5, {"x": torch.rand(5, 3)}, stage=1)
