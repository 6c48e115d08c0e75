from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from test_stages import _trace
from torch import nn

from attnviz.probes import Curves, average_drop, deletion_curves, occlude
from attnviz.stages import staged


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.rand(3, 3, 16, 16, generator=generator, dtype=torch.float64)


@pytest.fixture
def maps(generator):
    return torch.rand(3, 16, 16, generator=generator, dtype=torch.float64)


def _replica(net, image, number, map, steps, fill, canvas):
    """Both curves of one image, one pixel and one forward pass after the other."""
    height, width = image.shape[-2:]
    everywhere = torch.ones(1, height, width, dtype=image.dtype)
    grounds = [occlude(net, image[None], everywhere, fill=kind)[0] for kind in (fill, canvas)]
    places = [(r, c) for r in range(height) for c in range(width)]
    places.sort(key=lambda place: -map[place].item())  # stable: ties stay row by row
    length = int(np.ceil(len(places) / steps))
    counts = sorted({*range(0, len(places), length), len(places)})
    curves = []
    for start, end in ((image, grounds[0]), (grounds[1], image)):
        points = []
        for count in counts:
            mixed = start.clone()
            for row, column in places[:count]:
                mixed[:, row, column] = end[:, row, column]
            points.append(net(mixed[None]).softmax(dim=1)[0, number].item())
        curves.append(points)
    return [count / len(places) for count in counts], *curves


@pytest.mark.parametrize(
    ("steps", "fill", "canvas"), [(20, "mean", "blur"), (7, "black", "grey"), (1, "blur", "mean")]
)
def test_curves_equal_those_pixel_by_pixel(net, images, maps, steps, fill, canvas):
    maps = (maps * 5).floor()  # with ties
    ids = [2, 0, 3]
    curves = deletion_curves(net, images, ids, maps, steps=steps, fill=fill, canvas=canvas)
    for i, number in enumerate(ids):
        shares, deletion, insertion = _replica(
            net, images[i], number, maps[i], steps, fill, canvas
        )
        assert curves.shares.tolist() == pytest.approx(shares)
        assert curves.deletion[i].tolist() == pytest.approx(deletion)
        assert curves.insertion[i].tolist() == pytest.approx(insertion)


def test_areas_are_sums_of_trapezoids():
    shares = torch.tensor([0.0, 0.25, 0.75, 1.0], dtype=torch.float64)
    deletion = torch.tensor([[1.0, 0.6, 0.2, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    areas = Curves(shares, deletion, 1 - deletion).areas()
    assert areas["deletion"].tolist() == pytest.approx([0.2 + 0.2 + 0.025, 1.0])
    assert areas["insertion"].tolist() == pytest.approx([0.575, 0.0])
    assert len(pd.concat([areas, areas])) == 4


class _Weighted(nn.Module):
    """The probability of class 0 is a weighted sum of pixels, so that the best map is known."""

    def __init__(self, weights):
        super().__init__()
        self.first = nn.Conv2d(1, 1, 1, bias=False, dtype=weights.dtype)
        self.first.weight.data.fill_(1.0)
        self.register_buffer("weights", weights / weights.sum())

    def forward(self, images):
        share = (self.first(images)[:, 0] * self.weights).sum(dim=(1, 2)).clamp(0, 1)
        return torch.stack((share, 1 - share), dim=1).log()


def test_no_map_beats_the_weights_of_a_linear_probability(generator):
    weights = torch.rand(8, 8, generator=generator, dtype=torch.float64)
    net = staged(_Weighted(weights), ["first"], image_size=8, mean=[0.0], std=[1.0])
    images = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    measure = partial(deletion_curves, net, images, 0, steps=64, canvas="mean")
    best = measure(weights[None])
    # Sorted weights, summed: deletion is what remains, insertion what is there.
    there = weights.flatten().sort(descending=True).values.cumsum(0) / weights.sum()
    torch.testing.assert_close(best.insertion[0, 1:], there)
    torch.testing.assert_close(best.deletion[0, 1:], 1 - there, atol=1e-12, rtol=1e-9)
    worst = measure(-weights[None]).areas()
    for _ in range(20):
        areas = measure(torch.rand(1, 8, 8, generator=generator, dtype=torch.float64)).areas()
        assert best.areas()["deletion"][0] < areas["deletion"][0] < worst["deletion"][0]
        assert worst["insertion"][0] < areas["insertion"][0] < best.areas()["insertion"][0]


def test_only_the_order_of_a_map_matters_and_no_batch(net, images, maps):
    whole = deletion_curves(net, images, None, maps)
    assert torch.equal(whole.insertion[:, -1], whole.deletion[:, 0])  # the image itself
    parts = [deletion_curves(net, images[i : i + 1], None, maps[i : i + 1]) for i in range(3)]
    for other in (
        deletion_curves(net, images, None, maps.exp() * 1e-3),
        deletion_curves(net, images, None, maps, batch_size=1),
        Curves(
            parts[0].shares,
            torch.cat([part.deletion for part in parts]),
            torch.cat([part.insertion for part in parts]),
        ),
    ):
        torch.testing.assert_close(other.deletion, whole.deletion)
        torch.testing.assert_close(other.insertion, whole.insertion)


def test_average_drop_by_hand():
    net = staged(_Weighted(torch.ones(2, 2)), ["first"], image_size=2, mean=[0.0], std=[1.0])
    images = torch.tensor([[1.0, 0.6, 0.4, 0.0], [0.8] * 4, [0.0] * 4]).reshape(3, 1, 2, 2)
    maps = torch.tensor([[4.0, 2.0, -1.0, 0.0], [3.0] * 4, [1.0] * 4]).reshape(3, 2, 2)
    found = average_drop(net, images, 0, maps)
    assert found["confidence"].tolist() == pytest.approx([0.5, 0.8, 0.0])
    assert found["confidence_masked"].tolist() == pytest.approx([0.325, 0.8, 0.0])
    assert found["drop"].tolist() == pytest.approx([0.35, 0.0, 0.0])
    assert found["increase"].tolist() == [False] * 3
    images = torch.tensor([1.0, -0.5, 0.5, 0.0]).reshape(1, 1, 2, 2)
    maps = torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(1, 2, 2)
    assert average_drop(net, images, 0, maps)["increase"].tolist() == [True]  # 0.25 to 0.375


def test_several_right_classes_have_probabilities_of_their_own(tiny, images, maps):
    single, several = staged(tiny), staged(tiny, multilabel=True)
    scores = single(images)
    for net, expected in ((single, scores.softmax(dim=1)), (several, scores.sigmoid())):
        found = average_drop(net, images, 1, maps)["confidence"]
        assert found.tolist() == pytest.approx(expected[:, 1].tolist())


@pytest.mark.parametrize("steps", [3, 20])
def test_torchcam_agrees(tiny, images, steps):
    metrics = pytest.importorskip("torchcam.metrics")
    methods = pytest.importorskip("torchcam.methods")
    net = staged(tiny.eval())
    softmax = partial(torch.softmax, dim=-1)
    with methods.LayerCAM(tiny, "relus.1") as extractor:
        maps = extractor([0, 1, 2], softmax(tiny(images)))[0]  # their maps, of probabilities
        theirs = metrics.DeletionInsertionMetric(extractor, softmax, steps=steps)
        theirs.update(images, class_idx=[0, 1, 2])
        drops = metrics.ClassificationMetric(extractor, softmax)
        drops.update(images, class_idx=[0, 1, 2])
    ours = deletion_curves(net, images, [0, 1, 2], maps, steps=steps, canvas="mean").areas()
    assert ours["deletion"].mean() == pytest.approx(theirs.summary()["deletion_auc"], abs=1e-6)
    assert ours["insertion"].mean() == pytest.approx(theirs.summary()["insertion_auc"], abs=1e-6)
    table = average_drop(net, images, [0, 1, 2], maps)
    assert table["drop"].mean() == pytest.approx(drops.summary()["avg_drop"], abs=1e-6)
    assert table["increase"].mean() == drops.summary()["conf_increase"]


def test_network_and_arguments_are_left_as_they_were(net, images, maps):
    before, kept = _trace(net.model), (images.clone(), maps.clone())
    deletion_curves(net, images, None, maps, steps=2)
    average_drop(net, images, None, maps)
    with pytest.raises(ValueError, match="classes from 0 to 3, got 9"):
        deletion_curves(net, images, 9, maps)
    assert _trace(net.model) == before
    assert torch.equal(images, kept[0])
    assert torch.equal(maps, kept[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "expected `steps` of at least 1, got 0"),
        ({"batch_size": -1}, "expected `batch_size` of at least 1, got -1"),
        ({"fill": "white"}, "expected `fill` in .*'blur'.*, got 'white'"),
        ({"maps": torch.zeros(2, 4, 4)}, "expected one map per image, got 2 for 3"),
        ({"maps": torch.full((3, 4, 4), torch.nan)}, "expected maps without NaN"),
    ],
)
def test_bad_arguments_are_named(net, images, maps, change, message, untyped):
    options = {"maps": maps} | change
    with pytest.raises(ValueError, match=message):
        deletion_curves(net, images, None, **options)
