import numpy as np
import pytest
import torch
from test_stages import _trace
from torch import nn

from attnviz.probes.visualization import _amplitude, activation_maximization, invert
from attnviz.stages import staged


@pytest.fixture
def net(tiny):
    return staged(tiny.float())


class Colors(nn.Module):
    """Stage: two weighted sums of the colors. Scores: brightness of each half of the picture."""

    def __init__(self, bias=0.0):
        super().__init__()
        self.mix, self.relu = nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True)
        self.mix.weight.data = torch.tensor([[1.0, -1.0, 2.0], [-1.0, 0.5, -1.0]])[..., None, None]
        self.mix.bias.data.fill_(bias)

    def forward(self, images):
        kept = 0 * self.relu(self.mix(images)).mean((1, 2, 3))
        halves = images[:, :, :8], images[:, :, 8:]
        return torch.stack([half.mean((1, 2, 3)) + kept for half in halves], dim=1)


def colors(cut="relu", bias=0.0):
    return staged(Colors(bias), [cut], image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_a_channel_of_color_sums_gets_its_color():
    made = activation_maximization(colors("mix"), 1, [0, 1], steps=200, decay=0.0)
    # the largest value of w x over pixels from -1 to 1 is the sum of |w|: 4 and 2.5
    assert 0.65 * 4 < made.values[0] < 4
    assert 0.65 * 2.5 < made.values[1] < 2.5
    for picture, color in zip(made.pictures, ((255, 0, 255), (0, 255, 0)), strict=True):
        assert np.abs(picture.reshape(-1, 3).mean(axis=0) - color).max() < 60


def test_a_class_gets_what_its_score_is_made_of():
    made = activation_maximization(colors(), None, [0, 1], steps=200, decay=0.0, jitter=0)
    for row, picture in enumerate(made.pictures.astype(float)):
        halves = picture[:8].mean(), picture[8:].mean()
        assert halves[row] > 220
        assert halves[1 - row] < 128  # of which nothing is said
    torch.testing.assert_close(made.values, colors()(made.images)[[0, 1], [0, 1]])


def test_a_silent_channel_is_woken():
    # so much less that the noise it begins with excites no place
    net = colors(bias=-1.9)
    assert activation_maximization(net, 1, 1, steps=1, decay=0.0).values == 0
    made = activation_maximization(net, 1, 1, steps=400, decay=0.0)
    assert 0.3 < made.values.item() < 0.6
    dead = activation_maximization(colors(bias=-9.0), 1, 1, steps=5)
    assert dead.values.item() == 0


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU6(), nn.ReLU6(inplace=True)], ids=repr)
def test_every_relu_leaks(relu):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), relu, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 16, 16))
    model[0].bias.data.fill_(-50)
    net = staged(model, ["1"], image_size=16)
    few, many = (activation_maximization(net, 1, 0, steps=n, decay=0.0) for n in (1, 30))
    assert few.values == many.values == 0
    assert (few.images - many.images).abs().max() > 0.5


def test_values_are_those_of_the_images(net):
    made = activation_maximization(net, 2, [1, 3], size=(20, 24), steps=6)
    assert made.images.shape == (2, 3, 20, 24)
    activation = net.activations(made.images)[0][1]
    for row, channel in enumerate((1, 3)):
        assert made.values[row].item() == pytest.approx(activation[row, channel].mean().item())
    mean, std = (np.array(part)[:, None, None] for part in (net.mean, net.std))
    shown = (made.images.numpy() * std + mean).transpose(0, 2, 3, 1) * 255
    assert np.abs(shown - made.pictures).max() <= 0.51


def test_classes_have_names_and_come_in_any_container(untyped, tiny):
    net = staged(tiny.float(), class_names=["cat", "dog", "ox", "ram"])
    expected = activation_maximization(net, None, [2, 1], size=(16, 16), steps=2).images
    for ids in (["ox", "dog"], torch.tensor([2, 1]), np.array([2, 1]), (2, torch.tensor(1))):
        made = activation_maximization(net, None, ids, size=(16, 16), steps=2)
        assert torch.equal(made.images, expected)
    one = activation_maximization(net, None, torch.tensor(2), size=(16, 16), steps=2)
    assert one.images.shape == (1, 3, 16, 16)


def test_an_image_hardly_depends_on_those_beside_it(net):
    together = activation_maximization(net, None, [0, 2], size=(16, 16), steps=5)
    alone = activation_maximization(net, None, 2, size=(16, 16), steps=5)
    torch.testing.assert_close(together.images[1:], alone.images)
    again = activation_maximization(net, None, 2, size=(16, 16), steps=5, seed=1)
    assert not torch.equal(again.images, alone.images)


def test_decay_keeps_the_spectrum_low(net):
    spread = [
        activation_maximization(net, None, 0, size=(32, 32), steps=60, decay=decay).pictures.std()
        for decay in (0.0, 1.0, 8.0)
    ]
    assert spread[0] > 1.3 * spread[1] > 1.6 * spread[2]


def test_amplitudes_fall_with_frequency_and_keep_the_variance(generator):
    amplitude = _amplitude(32, 48)
    assert amplitude.shape == (32, 25)
    assert amplitude[0, 4] / amplitude[0, 8] == pytest.approx(2)
    assert amplitude[4, 0] / amplitude[28, 0] == pytest.approx(1)  # the frequencies 4 and -4
    noise = torch.randn(200, 32, 25, 2, generator=generator)
    waves = torch.view_as_complex(noise) * amplitude
    assert 0.5 < torch.fft.irfft2(waves, s=(32, 48), norm="ortho").var() < 2


def test_inversion_finds_the_picture_where_nothing_is_lost(generator):
    image = torch.rand(1, 3, 16, 16, generator=generator) * 1.6 - 0.8
    net = colors("mix")  # two sums of three colors: the third color stays open
    made = invert(net, image, 1, steps=400, decay=0.0)
    assert made.values.item() < 0.01
    mixed = [net.activations(each)[0][0] for each in (made.images, image)]
    assert torch.corrcoef(torch.stack([each.flatten() for each in mixed]))[0, 1] > 0.99


def test_inversion_error_is_what_is_left(net, generator):
    image = torch.rand(1, 3, 16, 24, generator=generator)
    for stage in (1, 3, None):
        few, many = (invert(net, image, stage, steps=steps) for steps in (1, 80))
        assert many.values < few.values
        made = net.activations(many.images) if stage else (None, net(many.images))
        true = net.activations(image) if stage else (None, net(image))
        found, wanted = (each[0][stage - 1] if stage else each[1] for each in (made, true))
        error = (found - wanted).square().sum() / wanted.square().sum()
        assert many.values.item() == pytest.approx(error.item(), rel=1e-4)


def test_nothing_is_left_behind(net, tiny, generator):
    tiny.train()
    image = torch.rand(1, 3, 16, 16, generator=generator)
    before, state, kept = _trace(tiny), torch.get_rng_state(), image.clone()
    with torch.inference_mode():
        for made in (activation_maximization(net, 1, 0, steps=2), invert(net, image, 2, steps=2)):
            assert not made.images.requires_grad
            assert not made.values.requires_grad
    assert _trace(tiny) == before
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(image, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_precision_are_looked_at_in_theirs(tiny, dtype):
    made = activation_maximization(staged(tiny.to(dtype)), 1, [0, 1], size=(16, 16), steps=3)
    assert made.images.dtype == dtype
    assert made.values.isfinite().all()


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ((9, 0), {}, ValueError, "`stages` from 1 to 3"),
        (("1", 0), {}, TypeError, "`stage` as a whole number, got '1'"),
        ((1, 400), {}, ValueError, "channels from 0 to 3, got 400"),
        ((None, 4), {}, ValueError, "classes from 0 to 3, got 4"),
        ((1, -1), {}, ValueError, "`ids` of at least 0, got -1"),
        ((1, []), {}, ValueError, "at least one channel or class"),
        ((1, "a"), {}, TypeError, "`ids` as a whole number, got 'a'"),
        ((None, "ox"), {}, ValueError, "number of a class, got 'ox'"),
        ((1, 0), {"size": (True, 8)}, ValueError, "`size` as \\(height, width\\)"),
        ((1, 0), {"jitter": 2**60}, ValueError, "`jitter` of at most 16, the side"),
        ((1, 0), {"size": 16}, ValueError, "`size` as \\(height, width\\)"),
        ((1, 0), {"steps": 0}, ValueError, "`steps` of at least 1"),
        ((1, 0), {"decay": float("nan")}, ValueError, "`decay` from 0 to 20"),
        ((1, 0), {"jitter": -1}, ValueError, "`jitter` of at least 0"),
        ((1, 0), {"seed": None}, TypeError, "`seed` as a whole number"),
    ],
)
def test_bad_arguments_are_named(untyped, net, given, options, error, message):
    with pytest.raises(error, match=f"expected .*{message}"):
        activation_maximization(net, *given, **{"size": (16, 16), "steps": 1} | options)


def test_images_that_cannot_be_inverted_are_named(untyped, net):
    with pytest.raises(ValueError, match="one image \\(1, c, h, w\\), got \\(2, 3, 16, 16\\)"):
        invert(net, torch.zeros(2, 3, 16, 16), 1)
    with pytest.raises(ValueError, match="finite activation that is not 0"):
        invert(net, torch.zeros(1, 3, 16, 16), 1)  # no bias
    with pytest.raises(ValueError, match="finite"):
        invert(net, torch.full((1, 3, 16, 16), torch.nan), 1)
    with pytest.raises(TypeError, match="expected a network from attnviz.staged"):
        invert(net.model, torch.zeros(1, 3, 16, 16), 1)
