"""Numbers that other packages publish in their own tests, as facts about ours.

captum 0.9 (LayerGradCam, LayerGradientXActivation) and torchcam 0.5 (its two faithfulness
metrics) state them for small networks of literal weights, which are built anew here. captum's
fully connected network becomes one of 1x1 convolutions on a single pixel.
"""

import pytest
import torch
from torch import nn

from attnviz import cam, stage_maps
from attnviz.probes import average_drop, deletion_curves
from attnviz.stages import staged

# ------------------------------------------------------------------------------------- captum


class _OneConvolution(nn.Module):
    """The sum of 3 x 3 pixels, less 50 and less 75; then five weights of 1, three of -1."""

    def __init__(self, inplace):
        super().__init__()
        self.first = nn.Identity()
        self.conv = nn.Conv2d(1, 2, 3)
        self.relu = nn.ReLU(inplace=inplace)
        self.fc = nn.Linear(8, 4)
        self.last = nn.ReLU(inplace=inplace)
        self.conv.weight.data.fill_(1.0)
        self.conv.bias.data = torch.tensor([-50.0, -75.0])
        self.fc.weight.data = torch.tensor([1.0] * 5 + [-1.0] * 3).repeat(4, 1)
        self.fc.bias.data.zero_()

    def forward(self, images):
        x = self.relu(self.conv(self.first(images)))
        return self.last(self.fc(x.flatten(1)))


class _Layers(nn.Module):
    """Identity, then ones with biases -10, 1, 1, 1, then ones with biases -1, 1."""

    def __init__(self, inplace):
        super().__init__()
        weights = {
            "linear0": torch.eye(3),
            "linear1": torch.ones(4, 3),
            "linear2": torch.ones(2, 4),
        }
        biases = {"linear0": [0.0] * 3, "linear1": [-10.0, 1.0, 1.0, 1.0], "linear2": [-1.0, 1.0]}
        for name, weight in weights.items():
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
            layer.weight.data, layer.bias.data = (
                weight[..., None, None],
                torch.tensor(biases[name]),
            )
            self.add_module(name, layer)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, images):
        return self.linear2(self.relu(self.linear1(self.linear0(images)))).flatten(1)


@pytest.fixture(params=[False, True], ids=["", "inplace"])
def inplace(request):
    return request.param


def _counted():
    return torch.arange(16.0).reshape(1, 1, 4, 4)


def _gradcam(model, stage, images):
    return stage_maps(staged(model.eval(), [stage], image_size=4), images, 0, ("gradcam",))[
        "gradcam"
    ][0][0]


@pytest.mark.parametrize(
    ("stage", "added", "published"),
    [
        ("conv", 0.0, [[11.25, 13.5], [20.25, 22.5]]),
        ("relu", 0.0, [[0.0, 4.0], [28.0, 32.5]]),
        ("conv", 1.0, [[14.5, 19.0], [32.5, 37.0]]),  # there a second picture of ones
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradcam_gives_captums_values(stage, added, published, frozen):
    model = _OneConvolution(inplace=False).requires_grad_(not frozen)
    found = _gradcam(model, stage, _counted() + added)
    torch.testing.assert_close(found, torch.tensor(published))


def test_gradcam_of_the_picture_itself_with_and_without_the_last_relu(inplace):
    model, images = _OneConvolution(inplace), _counted()
    images[0, 0, 1, 1] = -4.0
    expected = 0.5625 * images[0, 0]
    torch.testing.assert_close(_gradcam(model, "first", images), expected.relu())
    net = staged(model.eval(), ["first"], image_size=4)
    signed = stage_maps(net, images, 0, ("cam",))["cam"][0][0] / 16  # a sum, captum's a mean
    torch.testing.assert_close(signed, expected)


@pytest.mark.parametrize(
    ("stage", "pixel", "published"),
    [
        ("linear0", (0.0, 100.0, 0.0), [0.0, 400.0, 0.0]),
        ("linear1", (0.0, 100.0, 0.0), [90.0, 101.0, 101.0, 101.0]),
        ("linear2", (0.0, 100.0, 0.0), [392.0, 0.0]),
        ("relu", (3.0, 4.0, 0.0), [0.0, 8.0, 8.0, 8.0]),
    ],
)
def test_gradient_times_activation_gives_captums_values(stage, pixel, published):
    net = staged(_Layers(inplace=False).eval(), [stage], image_size=1)
    with torch.no_grad():
        pieces = net.differentiable(torch.tensor(pixel).reshape(1, 3, 1, 1), [1])
    (gradient,) = torch.autograd.grad(pieces.output[0, 0], pieces.activations)
    channels = zip(pieces.activations[0].unbind(1), gradient.unbind(1), strict=True)
    found = [cam.layercam_normal(a[:, None], g[:, None]).item() for a, g in channels]
    assert found == pytest.approx(published)


def test_gradcam_of_one_pixel_gives_captums_value(inplace):
    images = torch.tensor([0.0, 100.0, 0.0]).reshape(1, 3, 1, 1)
    assert _gradcam(_Layers(inplace), "linear0", images).item() == pytest.approx(400.0)


# ----------------------------------------------------------------------------------- torchcam


class _Sum(nn.Module):
    """Class 0 has the sum of the pixels as its probability."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 1, 1, bias=False, dtype=torch.float64)
        self.first.weight.data.fill_(1.0)

    def forward(self, images):
        share = self.first(images).flatten(1).sum(dim=1).clamp(0, 1)
        return torch.stack((share, 1 - share), dim=1).log()


def _sum(images):
    return staged(_Sum(), ["first"], image_size=tuple(images.shape[-2:]), mean=[0.0], std=[1.0])


@pytest.mark.parametrize(
    ("pixels", "steps", "shares", "deletion", "insertion", "areas"),
    [
        ([[0.4, 0.3], [0.2, 0.1]], 2, [0, 0.5, 1], [1, 0.3, 0], [0, 0.7, 1], (0.4, 0.6)),
        (
            [[0.3, 0.25, 0.2, 0.15, 0.1]],
            3,
            [0, 0.4, 0.8, 1],
            [1, 0.45, 0.1, 0],
            [0, 0.55, 0.9, 1],
            (0.41, 0.59),
        ),
    ],
)
def test_deletion_and_insertion_give_torchcams_curves(
    pixels, steps, shares, deletion, insertion, areas
):
    images = torch.tensor([[pixels]], dtype=torch.float64)
    net = _sum(images)
    curves = deletion_curves(net, images, 0, images[:, 0], steps=steps, canvas="mean")
    assert curves.shares.tolist() == pytest.approx(shares)
    assert curves.deletion[0].tolist() == pytest.approx(deletion)
    assert curves.insertion[0].tolist() == pytest.approx(insertion)
    assert tuple(curves.areas().iloc[0]) == pytest.approx(areas)


def test_average_drop_gives_torchcams_value():
    images = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]], dtype=torch.float64)
    maps = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    found = average_drop(_sum(images), images, 0, maps)
    assert found["drop"].mean() == pytest.approx(0.6)
    assert found["increase"].mean() == 0
