"""Masks from a segmentation network, against slow replicas, and what they are worth, by hand."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate, pad

from attnviz.data.masks import read_label_picture
from attnviz.deeplab import segmentation_network
from attnviz.labels import dense_crf
from attnviz.segment import SCALES, evaluate, segment, write_submission

SIDE = 32
COLORS = np.array([(128, 128, 128), (250, 10, 10), (10, 250, 10)], np.uint8)


@dataclass(frozen=True)
class Picture:
    image_id: str
    pixels: np.ndarray
    mask: np.ndarray | Exception | None = None

    def read(self):
        return Image.fromarray(self.pixels)

    def read_mask(self):
        if isinstance(self.mask, Exception):
            raise self.mask
        return self.mask


def _picture(labels, image_id="a", mask=None):
    labels = np.asarray(labels, np.uint8)
    return Picture(image_id, COLORS[labels], labels if mask is None else mask)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = segmentation_network("scenes", 2, "random").eval()
    network.head.score.weight.data *= 200  # so that scores vary
    return network


@pytest.fixture
def colored():
    """Says background for grey, the first class for red, the second for green."""
    network = segmentation_network("scenes", 2, "random")
    network.backbone, network.head, network.stride = nn.Identity(), nn.Conv2d(3, 3, 1), 1
    network.head.weight.data = torch.tensor(
        [[0.0, 0, 0], [20, -20, 0], [-20, 20, 0]]
    )[:, :, None, None]  # fmt: skip
    network.head.bias.data = torch.tensor([5.0, 0, 0])
    network.class_names = ("red", "green")
    return network


def _images(generator, *sizes):
    return [
        torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).numpy()
        for size in sizes
    ]


def _windows(length):
    # Two thirds of a window after another; the last one ends at the border.
    found = [0]
    while found[-1] + SIDE < length:
        found.append(min(found[-1] + SIDE * 2 // 3, length - SIDE))
    return found


@torch.no_grad()
def _slowly(network, pixels, scales):
    # One window after another, one pixel's average after another.
    total = 0
    whole = network.normalized(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    for scale in scales:
        size = [round(side * scale) for side in pixels.shape[:2]]
        image = interpolate(whole, size, mode="bilinear")
        values = [[[] for _ in range(size[1])] for _ in range(size[0])]
        for top in _windows(size[0]):
            for left in _windows(size[1]):
                window = image[:, :, top : top + SIDE, left : left + SIDE]
                height, width = window.shape[2:]
                window = pad(window, (0, SIDE - width, 0, SIDE - height))
                found = network.enlarged(network(window), (SIDE, SIDE))[0].softmax(dim=0)
                for y in range(height):
                    for x in range(width):
                        values[top + y][left + x].append(found[:, y, x])
        mean = torch.stack([torch.stack([sum(v) / len(v) for v in row]) for row in values])
        total = total + interpolate(
            mean.permute(2, 0, 1)[None], pixels.shape[:2], mode="bilinear"
        )[0]  # fmt: skip
    return total / len(scales)


# ------------------------------------------------------------------------------ probabilities


def test_several_scales_equal_a_slow_replica(network, generator):
    image = _images(generator, (40, 57))[0]
    found = next(segment(network, [image], window=SIDE))
    expected = _slowly(network, image, SCALES)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found.std(dim=(1, 2)).min() > 0.01


def test_one_scale_brings_the_long_side_to_the_window(network, generator):
    for image in _images(generator, (40, 57), (20, 12), (SIDE, SIDE)):
        found = next(segment(network, [image], "single", window=SIDE))
        expected = _slowly(network, image, [SIDE / max(image.shape)])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("test", ["single", "multi"])
def test_batches_of_windows_change_neither_order_nor_values(network, generator, test):
    images = _images(generator, (33, 40), (50, 20), (16, 16), (41, 41))
    one, many = (
        list(segment(network, iter(images), test, batch_size=size, window=SIDE)) for size in (1, 7)
    )
    assert [tuple(found.shape[1:]) for found in many] == [image.shape[:2] for image in images]
    for a, b in zip(one, many):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.sum(dim=0), torch.ones(a.shape[1:]))


def test_scores_that_see_nothing_give_their_softmax_everywhere(network, generator):
    weight, bias = network.head.score.weight.data.clone(), network.head.score.bias.data.clone()
    network.head.score.weight.data.zero_()
    network.head.score.bias.data = torch.tensor([0.0, 1.0, 3.0])
    try:
        found = next(segment(network, _images(generator, (45, 70)), window=SIDE))
    finally:
        network.head.score.weight.data, network.head.score.bias.data = weight, bias
    total = 1 + math.e + math.e**3
    expected = torch.tensor([1 / total, math.e / total, math.e**3 / total])
    torch.testing.assert_close(found, expected[:, None, None].expand_as(found))


def test_pictures_are_read_only_when_they_are_needed(network, generator):
    images, read = _images(generator, *[(20, 20)] * 9), []

    def reading():
        for image in images:
            read.append(image)
            yield image

    next(segment(network, reading(), "single", batch_size=2, window=SIDE))
    assert len(read) == 2


def test_segmenting_leaves_no_trace(network, generator):
    network.train()
    network.head.eval()
    before = [module.training for module in network.modules()]
    images = _images(generator, (20, 20))
    statistics = {k: v.clone() for k, v in network.state_dict().items()}
    next(segment(network, images, "single", window=SIDE))

    def broken(images):
        raise RuntimeError("no more")

    network.head.forward, kept = broken, network.head.forward
    with pytest.raises(RuntimeError, match="no more"):
        next(segment(network, images, "single", window=SIDE))
    network.head.forward = kept
    assert [module.training for module in network.modules()] == before
    assert all(torch.equal(v, statistics[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    network.eval()


def test_what_cannot_be_asked_for_says_so(network):
    with pytest.raises(ValueError, match=r"expected `test` in \('single', 'multi'\), got 'both'"):
        next(segment(network, [], "both"))
    with pytest.raises(ValueError, match="expected `batch_size` of at least 1, got 0"):
        next(segment(network, [], batch_size=0))


# ------------------------------------------------------------------------------------- scores


def _half(mask=None, image_id="a"):
    labels = np.zeros((24, 24), np.uint8)
    labels[:, 12:] = 1
    return _picture(labels, image_id, mask)


def test_scores_of_two_pictures_by_hand(colored):
    # First: right, but for 24 of 288 red pixels whose truth is green and 24 that do not count.
    truth = np.zeros((24, 24), np.uint8)
    truth[:, 12:] = 1
    truth[:, 12], truth[:, 13] = 2, 255
    second = np.full((24, 24), 2, np.uint8)
    items = [_half(truth), _picture(second, "b")]
    scores = evaluate(colored, items, "single", None, window=24, progress=False)
    table = scores.table()["plain"]
    assert table["background"] == 1
    assert table["red"] == pytest.approx(240 / 264)
    assert table["green"] == pytest.approx(576 / 600)
    assert scores.mean_iou() == pytest.approx((1 + 240 / 264 + 576 / 600) / 3)
    assert scores.table()["pixels"].tolist() == [288, 240, 600]
    assert scores.image_ids == ("a", "b")
    assert scores.crf is None
    assert scores.to_json()["plain"]["classes"]["red"] == pytest.approx(240 / 264)
    assert scores.init == "random"


def test_interval_holds_the_mean_and_is_a_point_for_equal_pictures(colored):
    wrong = np.ones((24, 24), np.uint8)
    items = [_half(image_id=str(i)) for i in range(6)]
    mixed = items + [_half(wrong, f"wrong {i}") for i in range(6)]
    scores = evaluate(colored, mixed, "single", None, window=24, progress=False)
    low, high = scores.interval()
    assert 0 < low < scores.mean_iou() < high < 1
    # 12 pictures, each either right or half wrong: a resample with n wrong ones has the IoU of
    # background (12 - n) / 12 and of red 12 / (12 + n)
    exact = [((12 - n) / 12 + 12 / (12 + n)) / 2 for n in range(13)]
    chances = np.array([math.comb(12, n) / 2**12 for n in range(13)])[::-1].cumsum()
    assert low == pytest.approx(exact[::-1][np.searchsorted(chances, 0.025)], abs=0.03)
    assert high == pytest.approx(exact[::-1][np.searchsorted(chances, 0.975)], abs=0.03)
    same = [_half(wrong, str(i)) for i in range(3)]
    scores = evaluate(colored, same, "single", None, window=24, progress=False)
    assert scores.interval() == (scores.mean_iou(), scores.mean_iou())


def test_pictures_that_do_not_count_are_listed(colored):
    items = [
        _half(),
        _half(np.zeros((24, 23), np.uint8), "small"),
        _half(np.full((24, 24), 3, np.uint8), "other"),
        Picture("bare", _half().pixels),
        _half(ValueError("expected a mask, got a damaged one"), "damaged"),
        _half(np.full((24, 24), -2, np.int16), "negative"),
        _half(np.full((24, 24), 0.5), "share"),
    ]
    scores = evaluate(colored, items, "single", None, window=24, progress=False)
    assert scores.image_ids == ("a",)
    assert [line.split(":")[0] for line in scores.problems] == [
        "small", "other", "bare", "damaged", "negative", "share"
    ]  # fmt: skip
    assert "24 x 24, the picture's size, got 24 x 23" in scores.problems[0]
    assert "expected labels 0 to 2 or 255, got 3" in scores.problems[1]
    with pytest.raises(ValueError, match="got none of 2: small: expected labels of 24 x 24"):
        evaluate(colored, items[1:3], "single", None, window=24, progress=False)


def test_grey_pictures_are_read_as_any_other(colored, tmp_path):
    class Grey(Picture):
        def read(self):
            return Image.fromarray(self.pixels[..., 0])

    grey = Grey("../grey", _half().pixels, np.zeros((24, 24), np.uint8))
    scores = evaluate(colored, [_half(), grey], "single", None, window=24, progress=False)
    assert scores.image_ids == ("a", "../grey")
    folder = write_submission(colored, [grey], tmp_path / "out", "single", None, window=24)
    assert [path.name for path in folder.rglob("*.png")] == ["..%2Fgrey.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    with pytest.raises(ValueError, match="expected at least one picture in `items`, got none"):
        write_submission(colored, [], tmp_path / "none", "single", None)


def test_a_class_of_few_pictures_does_not_lift_the_interval(colored):
    # green is in one picture of eight and never found: a sample without it knows no IoU of 0
    rare = _half(np.full((24, 24), 2, np.uint8), "rare")
    items = [_half(image_id=str(i)) for i in range(7)] + [rare]
    scores = evaluate(colored, items, "single", None, window=24, progress=False)
    low, high = scores.interval()
    assert low <= scores.mean_iou() <= high


def test_scores_with_crf_stand_beside_those_without(colored, generator):
    labels = np.zeros((24, 30), np.uint8)
    labels[6:18, 8:22] = 2
    pixels = COLORS[labels]
    pixels[::5, ::5] = (140, 122, 122)  # red, says the network, but hardly another color
    item = Picture("a", pixels, labels)
    scores = evaluate(colored, [item], "single", "maps", window=30, progress=False)
    assert list(scores.confusions) == ["plain", "crf"]
    probabilities = next(segment(colored, [pixels], "single", window=30))
    refined = dense_crf(item.pixels, probabilities, "maps").argmax(dim=0).numpy()
    confusion = np.zeros((3, 3), int)
    for truth, found in zip(labels.ravel(), refined.ravel()):
        confusion[truth, found] += 1
    assert (scores.confusions["crf"][0] == confusion).all()
    assert scores.mean_iou("crf") > scores.mean_iou("plain")
    assert set(scores.to_json()) == {"images", "test", "crf", "init", "plain"}


def test_processes_find_the_same(colored):
    items = [_half(image_id=str(i)) for i in range(5)]
    one, two = (
        evaluate(colored, items, "single", "oaa_caffe", window=24, workers=workers, progress=False)
        for workers in (0, 1)
    )
    assert one.image_ids == two.image_ids
    for kind in ("plain", "crf"):
        assert (one.confusions[kind] == two.confusions[kind]).all()


# --------------------------------------------------------------------------------- submission


def test_submission_has_the_servers_layout_and_goes_on(colored, tmp_path):
    items = [_half(image_id=f"2008_{i:06d}") for i in range(4)]
    options = {"test": "single", "crf": None, "window": 24, "progress": False}
    write_submission(colored, items[:2], tmp_path, **options)
    folder = tmp_path / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls"
    kept, cut = folder / "2008_000000.png", folder / "2008_000001.png"
    Image.new("P", (5, 4)).save(kept)  # no mask of the network's
    before, whole = kept.read_bytes(), cut.read_bytes()
    cut.write_bytes(whole[:-9])
    assert write_submission(colored, items, tmp_path, **options) == tmp_path / "results"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"2008_{i:06d}.png" for i in range(4)
    ]
    assert (kept.read_bytes(), cut.read_bytes()) == (before, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"results", "submission.json"}
    assert not [path for path in (tmp_path / "results").rglob("*.json")]
    with Image.open(folder / "2008_000003.png") as picture:
        assert picture.mode == "P"
        assert picture.getpalette()[3:6] == [128, 0, 0]
    labels = read_label_picture(folder / "2008_000003.png")
    assert (labels == _half().mask).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": "multi"}, r"\(test 'single'\), got test 'multi'; name another folder"),
        ({"crf": None}, r"\(crf 'oaa_caffe'\), got crf None; name another folder"),
        ({"window": 32}, r"\(window 24\), got window 32; name another folder"),
        ({"weight": 2}, r"\(sha256 '\w+'\), got sha256 '\w+'; name another folder"),
    ],
)
def test_a_submission_made_in_another_way_is_refused(colored, tmp_path, changes, message):
    options = {"test": "single", "crf": "oaa_caffe", "window": 24, "progress": False}
    write_submission(colored, [_half()], tmp_path, **options)
    path = next(tmp_path.rglob("*.png"))
    before = path.stat().st_mtime_ns
    colored.head.weight.data *= changes.pop("weight", 1)
    with pytest.raises(ValueError, match=f"^expected masks as in .*{message}"):
        write_submission(colored, [_half(), _half(image_id="b")], tmp_path, **options | changes)
    assert (path.stat().st_mtime_ns, len(list(tmp_path.rglob("*.png")))) == (before, 1)


def test_a_submission_without_its_record_or_in_a_file_is_refused(colored, tmp_path):
    options = {"test": "single", "crf": None, "window": 24, "progress": False}
    write_submission(colored, [_half()], tmp_path / "out", **options)
    (tmp_path / "out" / "submission.json").unlink()
    with pytest.raises(ValueError, match=r"^expected the record submission\.json of the masks"):
        write_submission(colored, [_half()], tmp_path / "out", **options)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="^expected a folder for masks, got the file"):
        write_submission(colored, [_half()], tmp_path / "file", **options)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"crf": "x"}, r"expected `crf` in \(None, 'oaa_caffe', .*\), got 'x'"),
        ({"test": "both"}, r"expected `test` in \('single', 'multi'\), got 'both'"),
    ],
)
def test_settings_are_checked_before_any_picture(colored, tmp_path, odd, message, untyped):
    class Unread(Picture):
        def read(self):
            raise AssertionError("it was read")

    items = [Unread("a", _half().pixels, _half().mask)]
    with pytest.raises(ValueError, match=message):
        evaluate(colored, items, progress=False, **odd)
    with pytest.raises(ValueError, match=message):
        write_submission(colored, items, tmp_path / "out", progress=False, **odd)
    assert not (tmp_path / "out").exists()
