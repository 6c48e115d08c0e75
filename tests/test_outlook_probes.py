import math

import numpy as np
import pandas as pd
import pytest
import torch
from test_stages import _trace
from torch import nn
from torch.nn import functional
from torchvision.ops import SqueezeExcitation

from attnviz.data.scenes import Scenes
from attnviz.networks import load_network
from attnviz.probes.concepts import concept_direction, concept_sensitivity
from attnviz.probes.gates import ConstantGates, completeness
from attnviz.probes.groups import group_effects
from attnviz.probes.importance import channel_importance
from attnviz.probes.preferences import FEATURES, attended_features, local_features
from attnviz.probes.presence import lacks_object, object_signs
from attnviz.stages import staged


class _Net(nn.Module):
    """Two stages, then `inside` and a pooled head without bias."""

    def __init__(self, inside, channels=8):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 2, 1, bias=False), nn.ReLU())
        self.inside, self.fc = inside, nn.Linear(channels, 4, bias=False)

    def forward(self, images):
        return self.fc(self.inside(self.second(self.first(images))).mean((2, 3)))


def _net(inside):
    torch.manual_seed(3)
    made = _Net(inside).double()
    return staged(made, ["first", "second"], image_size=(16, 16), mean=[0.0] * 3, std=[1.0] * 3)


class _Attention(nn.Module):
    """Single-head attention between places, its weights by softmax or by torch's own function."""

    def __init__(self, fused):
        super().__init__()
        self.mixed, self.fused = nn.Linear(8, 24, bias=False), fused

    def forward(self, x):
        query, key, value = self.mixed(x.flatten(2).transpose(1, 2)).chunk(3, dim=2)
        if self.fused:
            y = functional.scaled_dot_product_attention(query, key, value)
        else:
            y = (query @ key.transpose(1, 2) / 8**0.5).softmax(dim=-1) @ value
        return y.transpose(1, 2).unflatten(2, x.shape[2:])


class _LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------- gates

PARTS = {
    "GELU": lambda: nn.GELU(),
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "Hardswish": lambda: nn.Hardswish(),
    "ReLU6": lambda: nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.ReLU6()),
    "squeeze and excitation": lambda: SqueezeExcitation(8, 2),
    "layer norm": lambda: nn.Sequential(_LayerNorm(8), nn.Conv2d(8, 8, 1, bias=False)),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1, bias=False)),
    "instance norm": lambda: nn.Sequential(
        nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False)
    ),
    "instance norm that has learned": lambda: nn.Sequential(
        nn.InstanceNorm2d(8, track_running_stats=True), nn.GELU()
    ),
    "attention": lambda: _Attention(fused=False),
    "fused attention": lambda: _Attention(fused=True),
}


@pytest.mark.parametrize("part", PARTS)
def test_with_constant_gates_the_maps_sum_to_the_score(part, generator):
    net = _net(PARTS[part]())
    images = 3 * torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    table = completeness(net, images, [0, 2], stages=[2])
    assert (table["gates"] - 1).abs().max() < 1e-10
    if part != "ReLU6":  # whose gradient is 0 only where it is cut
        assert (table["gradient"] - 1).abs().max() > 1e-3
    else:
        assert (table["gradient"] - 1).abs().max() > 0


def test_a_bias_is_what_constant_gates_leave_unexplained(generator):
    net = _net(nn.GELU())
    net.model.fc = nn.Linear(8, 4).double()
    net = staged(net.model, ["first", "second"])
    images = torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64)
    [row] = completeness(net, images, [1], stages=[2]).to_dict("records")
    assert row["score"] * (1 - row["gates"]) == pytest.approx(net.model.fc.bias[1].item())


@pytest.mark.parametrize("part", PARTS)
def test_gates_change_no_value(part, generator):
    net = _net(PARTS[part]())
    images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    plain = net(images)
    with ConstantGates():
        gated = net(images)
    torch.testing.assert_close(gated, plain, rtol=1e-12, atol=1e-14)


def test_the_score_of_a_normalized_network_has_no_gradient_along_its_activation():
    # Behind a layer norm the score does not depend on the activation's length: Euler's sum is 0.
    net = load_network("convnext_tiny", "random")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name, parameter in net.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    table = completeness(net, images, [3], stages=[3, 4])
    assert table["gradient"].abs().max() < 1e-3
    assert (table["gates"] - 1).abs().max() < 1e-3


def test_networks_of_relus_are_decomposed_as_without_gates(tiny, generator):
    net = staged(tiny)
    images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    with ConstantGates():
        gated = channel_importance(net, images, [1, 3], stage=2)
    assert torch.equal(gated, channel_importance(net, images, [1, 3], stage=2))


# ---------------------------------------------------------------------------------------- groups


class _Redundant(nn.Module):
    """Channels 0 and 1 see the same and stand in for one another; 2 and 3 add up."""

    def __init__(self):
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 4, 1, bias=False), nn.ReLU()
        weight = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
        self.first.weight.data = weight[:, :, None, None]

    def forward(self, images):
        means = self.relu(self.first(images)).mean((2, 3))
        enough = (means[:, 0] + means[:, 1]).clamp(max=0.05)  # either one is nearly enough
        leaky = 0.01 * (means[:, 0] + means[:, 1])
        return torch.stack([enough + leaky + means[:, 2] + means[:, 3], means[:, 2]], dim=1)


def _squares():
    image = torch.zeros(1, 3, 8, 8)
    image[0, 0, :2, :2], image[0, 1, 4:, :4], image[0, 2, 4:, 4:] = 1.0, 1.0, 1.0
    return image


def test_channels_that_stand_in_for_one_another_lose_more_together():
    net = staged(_Redundant(), ["relu"])
    table = group_effects(net, _squares(), [0], stage=1, seed=1)
    [group] = table[table["chosen"] == "overlap"].to_dict("records")
    assert sorted(group["channels"]) == [0, 1]
    mean = 4 / 64
    assert group["together"] == pytest.approx(0.05 + 0.02 * mean)
    assert group["alone"] == pytest.approx(0.02 * mean, abs=1e-6)
    [drawn] = table[table["chosen"] == "random"].to_dict("records")
    assert drawn["size"] == 2


def test_before_a_pooled_linear_head_together_is_the_sum():
    net = load_network("scenes_conv")
    scenes = list(Scenes("val", count=3))
    images = torch.cat([net.preprocess(scene.image) for scene in scenes])
    ids = [scene.class_ids[0] for scene in scenes]
    table = group_effects(net, images, ids, stage=5)
    assert len(table) > 4
    assert (table["size"] > 1).all()
    np.testing.assert_allclose(table["together"], table["alone"], rtol=1e-3, atol=1e-4)
    assert table.equals(group_effects(net, images, ids, stage=5))
    sizes = table.groupby(["image", "chosen"])["size"].apply(sorted).unstack()
    assert (sizes["overlap"] == sizes["random"]).all()


# -------------------------------------------------------------------------------------- concepts


def test_the_direction_of_a_concept_is_fishers(generator):
    activations = torch.randn(5, 4, 6, 6, generator=generator, dtype=torch.float64)
    masks = torch.rand(5, 6, 6, generator=generator) > 0.7
    activations[:, 1] += 2.0 * masks
    found = concept_direction(activations, masks, ridge=1e-9)
    rows = np.array([
        activations[b, :, i, j].numpy() for b in range(5) for i in range(6) for j in range(6)
    ])  # fmt: skip
    labels = masks.flatten().numpy()
    centered = rows - np.where(labels[:, None], rows[labels].mean(0), rows[~labels].mean(0))
    direction = np.linalg.solve(
        centered.T @ centered, rows[labels].mean(0) - rows[~labels].mean(0)
    )
    np.testing.assert_allclose(found, direction / np.linalg.norm(direction), atol=1e-7)
    assert found.argmax() == 1
    assert concept_direction(activations, masks & False).isnan().all()


def test_sensitivity_is_the_change_of_the_score_along_the_direction(tiny, generator):
    net = staged(tiny)
    images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    direction = torch.randn(6, generator=generator, dtype=torch.float64)
    table = concept_sensitivity(net, images, [1, 3], {"it": direction}, stage=3)
    activation = net.activations(images)[0][2]
    step = 1e-6
    for row, class_id in enumerate((1, 3)):
        moved = activation + step * direction[:, None, None]  # behind it all is linear
        change = (tiny.fc(moved.mean((2, 3))) - tiny.fc(activation.mean((2, 3)))) / step
        cells = activation[0, 0].numel()
        assert table.loc[row, "it"] == pytest.approx(
            change[row, class_id].item() / cells, rel=1e-6
        )
    assert table["class_id"].tolist() == [1, 3]


# ----------------------------------------------------------------------------------- preferences


def test_edges_have_the_direction_in_which_they_run():
    down, right = np.mgrid[:32, :32]
    at = {name: FEATURES.index(name) for name in FEATURES}
    for name, values in (
        ("vertical edges", right), ("horizontal edges", down),
        ("rising edges", right + down), ("falling edges", right - down + 31),
    ):  # fmt: skip
        picture = np.repeat((3 * values).astype(np.uint8)[..., None], 3, axis=2)
        edges = local_features(picture)[at["vertical edges"] : at["falling edges"] + 1]
        shares = edges.sum(axis=(1, 2)) / edges.sum()
        assert shares[FEATURES.index(name) - at["vertical edges"]] > 0.99


def test_attention_on_a_red_square_prefers_red():
    picture = np.full((16, 16, 3), 90, np.uint8)
    picture[:4, :4] = (200, 90, 90)
    map = torch.zeros(8, 8)
    map[:1, :1] = 1.0
    found = attended_features(picture, map)
    red = local_features(picture)[0]
    weights = functional.interpolate(map[None, None], (16, 16), mode="bilinear")[0, 0].numpy()
    mean = sum(w * f for w, f in zip(weights.flat, red.flat)) / weights.sum()
    assert found["red"] == pytest.approx((mean - red.mean()) / red.std(), rel=1e-6)
    assert found["red"] > 3
    assert found["green"] == 0  # it is the same everywhere
    even = attended_features(picture, torch.ones(8, 8))
    np.testing.assert_allclose(even, 0, atol=1e-9)
    assert attended_features(picture, map * 0).isna().all()


# -------------------------------------------------------------------------------------- presence


def test_spread_and_energy_by_hand(tiny):
    net = staged(tiny)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    signs = object_signs(net, images, [0, 1, 2])
    scores = net(images)
    activation = net.activations(images)[0][2]
    for row, class_id in enumerate((0, 1, 2)):
        energy = math.log(sum(math.exp(score) for score in scores[row].tolist()))
        assert signs.loc[row, "energy"] == pytest.approx(energy)
        weights = tiny.fc.weight[class_id].detach().clamp_min(0)  # the gradient's positive part
        map = sum(float(w) * channel for w, channel in zip(weights, activation[row]))
        shares = (map / map.sum()).flatten().tolist()
        entropy = -sum(q * math.log(q) for q in shares if q > 0) / math.log(len(shares))
        assert signs.loc[row, "spread"] == pytest.approx(entropy)
    tiny.fc.weight.data[:] = -1.0
    assert (object_signs(net, images, 0)["spread"] == 1).all()  # a map of zeros


def test_limits_accuse_the_given_share_of_the_reference():
    generator = np.random.default_rng(0)
    values = pd.DataFrame(generator.normal(size=(2000, 2)), columns=["energy", "spread"])
    for rate in (0.05, 0.2):
        assert lacks_object(values, values, rate).mean() == pytest.approx(rate, rel=0.1)
    alike = pd.DataFrame({"energy": [0.0, -9.0, 0.0], "spread": [0.0, 0.0, 9.0]})
    assert lacks_object(alike, values).tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"`rate` in \(0, 1\), got 1.0"):
        lacks_object(alike, values, 1.0)
    with pytest.raises(ValueError, match="with an object in `reference`, got none"):
        lacks_object(alike, values[:0])


def test_scenery_and_noise_are_told_from_scenes():
    net = load_network("scenes_conv")
    shown = {"known": [], "new": [], "empty": []}
    for number, scene in enumerate(Scenes("test", count=60, objects="few")):
        shown["new" if number % 2 else "known"].append(scene.image)
    for scene in Scenes("test", count=12, size=224):
        objects = np.any([item.mask for item in scene.objects], axis=0)
        for window in (np.s_[y : y + 80, x : x + 80] for y in (0, 72, 144) for x in (0, 72, 144)):
            if not objects[window].any():
                shown["empty"].append(scene.image[window])
    noise = np.random.default_rng(0).integers(0, 256, (20, 112, 112, 3), np.uint8)
    batches = {
        name: torch.cat([net.preprocess(image) for image in images])
        for name, images in (shown | {"noise": noise}).items()
    }
    signs = {name: object_signs(net, batch) for name, batch in batches.items()}
    reference = signs.pop("known")
    warned = {name: lacks_object(each, reference).mean() for name, each in signs.items()}
    assert len(shown["empty"]) >= 15
    assert warned["new"] < 0.25
    assert warned["empty"] > 0.8
    assert warned["noise"] > 0.8
    assert signs["noise"]["energy"].mean() > reference["energy"].mean()  # one sign is not enough


# ----------------------------------------------------------------------------------- no trace


def test_no_trace_is_left(tiny, untyped):
    net = staged(tiny)
    tiny.train()
    before = _trace(tiny)
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    completeness(net, images)
    group_effects(net, images, stage=2)
    object_signs(net, images)
    concept_sensitivity(net, images, 0, {"it": torch.ones(5)}, stage=2)
    for call in (
        lambda: completeness(net, images, 9),
        lambda: group_effects(net, images, [9], stage=2),
        lambda: concept_sensitivity(net, images, 9, {}, stage=2),
    ):
        with pytest.raises(ValueError, match="expected classes from 0 to 3, got 9"):
            call()
    assert _trace(tiny) == before


def test_bad_input_of_outlook_probes_is_named(untyped):
    values, masks = torch.rand(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, :4] = True
    for ridge in (-1, 0, float("nan")):
        with pytest.raises(ValueError, match="expected `ridge` above 0"):
            concept_direction(values, masks, ridge)
    with pytest.raises(ValueError, match="expected a mask for each of 2 pictures, got 1"):
        concept_direction(values, masks[:1])
    assert concept_direction(torch.ones(2, 3, 4, 4), masks).isnan().all()
    signs = pd.DataFrame({"energy": [1.0, 2.0], "spread": [0.1, 0.2]})
    with pytest.raises(ValueError, match="expected `signs` with numbers .* got NaN"):
        lacks_object(signs * np.nan, signs)
    with pytest.raises(ValueError, match="`reference` .* got none for energy"):
        lacks_object(signs, signs.drop(columns="energy"))
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="expected `image` as bytes"):
        attended_features(picture / 255, torch.ones(4, 4))
    with pytest.raises(ValueError, match="expected `map` finite and at least 0"):
        attended_features(picture, -torch.ones(4, 4))


def test_attention_called_by_names_is_constant_too():
    query, key, value = torch.rand(3, 1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    with ConstantGates():
        found = functional.scaled_dot_product_attention(query=query, key=key, value=value)
    weights = (query @ key.transpose(-1, -2) / 2).softmax(dim=-1).detach()
    torch.testing.assert_close(found, weights @ value)
    grown = torch.autograd.grad(found.sum(), (query, key, value), allow_unused=True)
    assert grown[:2] == (None, None)
    torch.testing.assert_close(grown[2], weights.sum(dim=-2)[..., None].expand_as(value))
