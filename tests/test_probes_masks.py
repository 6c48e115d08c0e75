import numpy as np
import pytest
import torch
from test_stages import _trace
from torch import nn

from attnviz.labels import superpixels
from attnviz.probes.masks import (
    lime,
    meaningful_perturbation,
    prediction_difference,
    rise,
    sliding_occlusion,
)
from attnviz.stages import staged


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.rand(3, 3, 16, 12, generator=generator, dtype=torch.float64)


class Patch(nn.Module):
    """Scores the brightness of one rectangle of the picture; nothing else counts."""

    def __init__(self, gain):
        super().__init__()
        self.first, self.gain = nn.Conv2d(3, 1, 1, bias=False), gain
        self.first.weight.data.fill_(1 / 3)

    def forward(self, images):
        bright = self.gain * self.first(images)[:, 0, 4:10, 2:8].mean((1, 2))
        return torch.stack([bright, 0 * bright], dim=1)


def patch(gain):
    return staged(Patch(gain).double(), ["first"], image_size=(16, 12))


INSIDE = torch.zeros(16, 12, dtype=torch.bool)
INSIDE[4:10, 2:8] = True


def _probability(net, image, number):
    return net(image[None]).softmax(dim=1)[0, number].item()


def _starts(side, size, stride):
    found, start = [], 0
    while start + size < side:
        found.append(start)
        start += stride
    return [*found, side - size]


@pytest.mark.parametrize(
    ("size", "stride", "fill"), [(5, 3, "mean"), (4, 4, "black"), (12, 9, "blur")]
)
def test_sliding_occlusion_equals_one_square_after_the_other(net, images, size, stride, fill):
    from attnviz.probes import occlude

    found = sliding_occlusion(
        net, images, [0, 1, 2], size=size, stride=stride, fill=fill, batch_size=7
    )
    for row, number in enumerate((0, 1, 2)):
        whole = torch.ones(1, 16, 12, dtype=torch.float64)
        ground = occlude(net, images[row : row + 1], whole, fill=fill)[0]
        drops = [[[] for _ in range(12)] for _ in range(16)]
        for y in _starts(16, size, stride):
            for x in _starts(12, size, stride):
                changed = images[row].clone()
                changed[:, y : y + size, x : x + size] = ground[:, y : y + size, x : x + size]
                lost = _probability(net, images[row], number) - _probability(net, changed, number)
                for i in range(y, y + size):
                    for j in range(x, x + size):
                        drops[i][j].append(lost)
        expected = torch.tensor([[np.mean(place) for place in line] for line in drops])
        torch.testing.assert_close(found[row], expected)


def test_prediction_difference_equals_one_sample_after_the_other(net, images, generator):
    others = torch.rand(2, 3, 16, 12, generator=generator, dtype=torch.float64)
    found = prediction_difference(net, images[:1], others, 3, size=12, stride=4, batch_size=4)

    def bits(p):
        return np.log2(p / (1 - p))

    values = {}
    for y in (0, 4):
        changed = images[0].repeat(2, 1, 1, 1)
        changed[:, :, y : y + 12] = others[:, :, y : y + 12]
        without = np.mean([_probability(net, image, 3) for image in changed])
        values[y] = bits(_probability(net, images[0], 3)) - bits(without)
    column = [values[0]] * 4 + [np.mean([*values.values()])] * 8 + [values[4]] * 4
    torch.testing.assert_close(found[0], torch.tensor(column)[:, None].expand(16, 12))
    itself = prediction_difference(net, images, images[:1], 1)
    assert itself[0].abs().max() < 1e-9
    assert itself[1].abs().max() > 1e-6


def _mean_resized(cells, size):
    """Bilinear with half-pixel centers, one pixel after the other."""
    found = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            places = []
            for at, side, count in ((i, size[0], cells.shape[0]), (j, size[1], cells.shape[1])):
                x = min(max((at + 0.5) * count / side - 0.5, 0), count - 1)
                low = min(int(x), count - 1)
                places.append((low, min(low + 1, count - 1), x - low))
            (a, b, s), (c, d, t) = places
            upper = cells[a, c] * (1 - t) + cells[a, d] * t
            found[i, j] = upper * (1 - s) + (cells[b, c] * (1 - t) + cells[b, d] * t) * s
    return found


def test_rise_equals_one_mask_after_the_other(net, images):
    found = rise(net, images[:2], [2, 0], masks=5, grid=3, keep=0.4, batch_size=2, seed=9)
    generator = torch.Generator().manual_seed(9)
    cells = (torch.rand(5, 3, 3, generator=generator) < 0.4).double().numpy()
    shifts = [torch.randint(0, cell, (5,), generator=generator) for cell in (6, 4)]
    for row, number in enumerate((2, 0)):
        total = np.zeros((16, 12))
        for k in range(5):
            y, x = int(shifts[0][k]), int(shifts[1][k])
            mask = _mean_resized(cells[k], (24, 16))[y : y + 16, x : x + 12]
            total += _probability(net, images[row] * torch.from_numpy(mask), number) * mask
        torch.testing.assert_close(found[row], torch.from_numpy(total / (5 * 0.4)))


def test_rise_tends_to_the_probability_of_a_network_that_sees_nothing(images):
    found = rise(patch(0.0), images, 0, masks=4000, grid=4)
    # one mask has a mean square of at most its mean, keep: a standard error of at most 0.008
    torch.testing.assert_close(found, torch.full_like(found, 0.5), atol=0.04, rtol=0)


def test_lime_finds_the_weights_of_an_additive_network(generator):
    images = torch.rand(2, 3, 16, 12, generator=generator, dtype=torch.float64)
    net = patch(1e-4)  # so flat that the softmax is linear: p = 1/2 + score / 4
    found = lime(net, images, 0, regions=6, samples=200, ridge=0.0)
    mean, std = (torch.tensor(p, dtype=torch.float64)[:, None, None] for p in (net.mean, net.std))
    for image, map in zip(images, found, strict=True):
        pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        regions = superpixels(pixels, count=6)
        for number in range(regions.max() + 1):
            here = torch.from_numpy(regions == number)
            share = (image.mean(0) * (here & INSIDE)).sum().item() / INSIDE.sum().item()
            assert map[here].numpy() == pytest.approx(1e-4 * share / 4, rel=1e-3, abs=1e-9)


def test_lime_equals_scikit_learns_ridge(net, images):
    linear = pytest.importorskip("sklearn.linear_model")
    found = lime(net, images[:1], 2, regions=8, samples=60, width=0.3, ridge=0.7, seed=4)[0]
    mean, std = (torch.tensor(p, dtype=torch.float64)[:, None, None] for p in (net.mean, net.std))
    pixels = ((images[0] * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    regions = superpixels(pixels, count=8)
    generator = torch.Generator().manual_seed(4)
    shown = (torch.rand(60, regions.max() + 1, generator=generator) < 0.5).numpy()
    shown[0] = True
    values, weights = [], []
    for row in shown:
        values.append(_probability(net, images[0] * torch.from_numpy(row[regions]), 2))
        cosine = row.sum() / (np.sqrt(row.sum()) * np.sqrt(len(row))) if row.any() else 0
        weights.append(np.exp(-((1 - cosine) ** 2) / 0.3**2))
    fit = linear.Ridge(alpha=0.7).fit(shown.astype(float), values, weights)
    torch.testing.assert_close(found, torch.from_numpy(fit.coef_[regions]))


def test_the_map_is_where_the_network_looks(generator):
    images = torch.rand(1, 3, 16, 12, generator=generator, dtype=torch.float64) + 1
    net = patch(1.0)
    for factor, map in (  # of RISE all places have the mean probability, and the inside more
        (2, sliding_occlusion(net, images, 0, size=4, stride=2)),
        (2, prediction_difference(net, images, images - 1.5, 0, size=4, stride=2)),
        (1.01, rise(net, images, 0, masks=3000, grid=8)),
        (2, meaningful_perturbation(net, images, 0, grid=8, steps=60, area=0.3, fill="mean")),
    ):
        assert map.shape == (1, 16, 12)
        assert map[0][INSIDE].mean() > factor * map[0][~INSIDE].mean()
        assert INSIDE[divmod(map[0].argmax().item(), 12)]


def test_meaningful_perturbation_lowers_its_own_objective(net, images):
    hidden = meaningful_perturbation(
        net, images, [0, 1, 2], grid=6, steps=80, area=0.1, fill="mean"
    )
    assert hidden.min() >= 0
    assert hidden.max() <= 1
    for row in range(3):
        alone = meaningful_perturbation(
            net, images[row : row + 1], row, grid=6, steps=80, area=0.1, fill="mean"
        )
        torch.testing.assert_close(alone[0], hidden[row])
        covered = _probability(net, images[row] * (1 - hidden[row]), row)
        half = _probability(net, images[row] / 2, row)
        assert covered < min(half, _probability(net, images[row], row))
    # what hides costs so much that nothing is hidden
    costly = meaningful_perturbation(net, images, 0, grid=6, area=10.0, steps=40)
    assert costly.max() == 0


CALLS = {
    "occlusion": sliding_occlusion,
    "difference": lambda net, images, ids=None, **options: prediction_difference(
        net, images, images.flip(3), ids, **options
    ),
    "rise": lambda *args, **options: rise(*args, masks=20, **options),
    "lime": lambda *args, **options: lime(*args, samples=20, regions=5, **options),
    "perturbation": lambda *args, **options: meaningful_perturbation(*args, steps=3, **options),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_is_left_behind(net, images, call):
    before = images.clone()
    trace, state = _trace(net.model), torch.get_rng_state()
    with torch.inference_mode():
        first = call(net, images)
    assert torch.equal(first, call(net, images, net(images).argmax(dim=1)))
    assert first.shape == (3, 16, 12)
    assert first.dtype == images.dtype
    assert not first.requires_grad
    assert first.isfinite().all()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before, images)
    assert _trace(net.model) == trace


def test_a_network_of_several_labels_has_a_sigmoid_for_each(tiny, images):
    net = staged(tiny, multilabel=True)
    found = sliding_occlusion(net, images[:1], 1, size=12, stride=12)
    changed = images[:1].clone()
    changed[:, :, :12] = 0
    lost = net(images[:1]).sigmoid()[0, 1] - net(changed).sigmoid()[0, 1]
    torch.testing.assert_close(found[0, 0, 0], lost.detach())


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (sliding_occlusion, {"size": 13}, "`size` of at most the short side, 12, got 13"),
        (sliding_occlusion, {"stride": 0}, "`stride` of at least 1"),
        (sliding_occlusion, {"size": 4, "stride": 5}, "`stride` of at most `size`, 4, .* got 5"),
        (sliding_occlusion, {"fill": "white"}, "`fill` in"),
        (rise, {"masks": 0}, "`masks` of at least 1"),
        (rise, {"keep": 1.0}, "`keep` from 0.001 to 0.999, got 1.0"),
        (lime, {"width": 1e-200}, "`width` from 0.001 to 1000"),
        (lime, {"ridge": float("inf")}, "`ridge` from 0 to 1000000.0, got inf"),
        (rise, {"seed": 2**70}, "`seed` below 2\\*\\*63"),
        (lime, {"samples": 0}, "`samples` of at least 1"),
        (meaningful_perturbation, {"area": float("inf")}, "`area` from 0 to"),
        (meaningful_perturbation, {"class_ids": 4}, "classes from 0 to 3"),
        (CALLS["difference"], {"batch_size": 0}, "`batch_size` of at least 1"),
    ],
)
def test_bad_arguments_are_named(untyped, net, images, call, options, message):
    with pytest.raises(ValueError, match=message):
        call(net, images, **options)


def test_others_of_another_size_are_named(untyped, net, images):
    with pytest.raises(
        ValueError, match="`others` of shape \\(n, 3, 16, 12\\), got \\(3, 3, 16, 10\\)"
    ):
        prediction_difference(net, images, images[..., :10])


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (None, "got NoneType"), ([[1.0]], "got list"), (torch.zeros(0, 3, 16, 12), "got \\(0, "),
        (torch.full((1, 3, 16, 12), torch.nan), "without NaN"),
        (torch.ones(1, 3, 16, 12, dtype=torch.uint8), "normalized as `images`"),
    ],
)  # fmt: skip
def test_others_that_are_no_pictures_are_named(untyped, net, images, others, message):
    with pytest.raises(ValueError, match=f"expected `others` .*{message}"):
        prediction_difference(net, images, others)


@pytest.mark.parametrize("call", [rise, lime, meaningful_perturbation])
@pytest.mark.parametrize("seed", ["a", 1.5, None, True])
def test_a_seed_is_a_whole_number(untyped, net, images, call, seed):
    with pytest.raises(TypeError, match="expected `seed` as a whole number, got"):
        call(net, images, seed=seed)


def test_one_class_may_be_a_number_of_numpy_or_torch(untyped, net, images):
    expected = sliding_occlusion(net, images, 2)
    for class_id in (np.int64(2), torch.tensor(2), np.array(2), [2, 2, 2], np.full(3, 2)):
        assert torch.equal(sliding_occlusion(net, images, class_id), expected)
    for wrong in (True, torch.tensor(2.0), "2", [0.5] * 3):
        with pytest.raises(TypeError, match="`class_ids` as whole numbers"):
            sliding_occlusion(net, images, wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_the_mask_of_full_precision(images, dtype):
    options = {"class_ids": 0, "grid": 8, "steps": 80, "area": 0.3, "fill": "mean"}
    expected = meaningful_perturbation(patch(8.0), images, **options)
    found = meaningful_perturbation(patch(8.0).to(dtype), images.to(dtype), **options)
    assert found.dtype == dtype
    assert expected.std() > 0.1
    torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_have_any_number_of_channels(channels, generator):
    parts = nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = staged(nn.Sequential(*parts), ["1"], image_size=12)
    images = torch.rand(2, channels, 12, 12, generator=generator)
    for call in CALLS.values():
        assert call(net, images).shape == (2, 12, 12)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_map_does_not_depend_on_the_images_beside(net, images, call):
    if call is CALLS["difference"]:
        images = images[:1].expand(3, -1, -1, -1).clone()  # whose others are the images
    torch.testing.assert_close(call(net, images, 1)[1:2], call(net, images[1:2], 1))
