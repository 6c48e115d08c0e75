import hashlib
import subprocess
import sys

import numpy as np
import pytest

from attnviz.data import defects
from attnviz.data.defects import DEFECT_KINDS, SURFACE_NAMES, Defects, draw_defect

_PINNED = {  # index, split, seed, size: every surface and kind
    (0, "train", 0, 112): "069e07c0696dd6be298e1c5ac2e6cf2f",
    (0, "val", 3, 64): "1f8e3ac437c49a8fa7877f3f532cd892",
    (0, "test", 0, 200): "efeb1c1d0cf642a42da729665366449b",
    (1, "train", 0, 112): "f58156e54c6df07cb7b969db916cefb3",
    (1, "test", 0, 200): "6da0f42bb6a2450d86cb3ba1bad8f710",
    (2, "test", 0, 200): "6e7882b8444da44d731b3f4dbb6872c8",
    (3, "val", 3, 64): "660bf598db61fea983208d2cedacc3c6",
    (5, "test", 0, 200): "6ede20973e9e0716fbbcbc0c1922561e",
    (6, "train", 0, 112): "bfbb069d2acfb33233917067ad1ebabe",
}


def _digest(index, split, seed, size):
    item = draw_defect(index, split=split, seed=seed, size=size)
    parts = (item.image.tobytes(), np.packbits(item.mask), np.packbits(item.ellipse))
    return hashlib.sha256(b"".join(bytes(part) for part in parts)).hexdigest()[:32]


@pytest.fixture(scope="module")
def items():
    return list(Defects(count=300))


def test_the_bytes_are_pinned():
    assert {key: _digest(*key) for key in _PINNED} == _PINNED


def test_another_process_draws_the_same_bytes():
    key = (11, "val", 2, 96)
    code = (
        "import hashlib, sys; sys.path.insert(0, 'tests'); import test_defects;"
        f"print(test_defects._digest(*{key}))"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == _digest(*key)


def test_order_and_neighbors_do_not_matter():
    data = Defects("val", count=5)
    backwards = [data[i].image for i in (4, 3, 2, 1, 0)][::-1]
    for item, image in zip(data, backwards, strict=True):
        assert np.array_equal(item.image, image)
    assert np.array_equal(data[-1].image, backwards[4])


def test_index_split_and_seed_give_other_pictures():
    keys = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "test", 0), (0, "train", 1)]
    assert len({_digest(*key, 64) for key in keys}) == len(keys)


def test_pictures_are_grey_and_a_defect_is_the_only_class(items):
    assert Defects.class_names == ("defect",)
    for item in items[:50]:
        assert item.image.dtype == np.uint8
        assert (item.image == item.image[:, :, :1]).all()
        assert item.class_ids == (() if item.kind is None else (0,))
        assert item.read().mode == "RGB"
        assert np.array_equal(np.asarray(item.read()), item.image)
        assert set(np.unique(item.read_mask())) == ({0} if item.kind is None else {0, 1})
    assert items[12].image_id == "defects-train-000012"


def test_surfaces_and_kinds_are_independent_and_half_have_a_defect(items):
    pairs = {(item.surface, item.kind) for item in items}
    assert pairs == {(s, k) for s in SURFACE_NAMES for k in (None, *DEFECT_KINDS)}
    assert 0.4 < np.mean([item.kind is not None for item in items]) < 0.6


@pytest.mark.parametrize("size", [64, 112, 300])
def test_the_ellipse_holds_the_mask_and_is_coarse(items, size):
    if size != 112:
        items = [draw_defect(i, split="test", size=size) for i in range(60)]
    for item in items:
        assert item.mask.any() == item.ellipse.any() == (item.kind is not None)
        assert not (item.mask & ~item.ellipse).any()
        if item.kind is not None:
            assert item.mask.sum() < item.ellipse.sum() < 0.5 * size**2


def test_the_ellipse_is_convex_and_follows_a_line():
    mask = np.zeros((90, 90), bool)
    np.fill_diagonal(mask[20:60, 25:65], True)
    ellipse = defects._ellipse(mask)
    rows, columns = np.nonzero(ellipse)
    axes = np.linalg.eigh(np.cov(columns, rows))[1]
    assert abs(axes[0, 1] * axes[1, 1] - 0.5) < 0.02  # the long axis goes down to the right
    y, x = rows.mean(), columns.mean()
    assert abs(y - 39.5) < 1
    assert abs(x - 44.5) < 1
    for row in np.unique(rows):  # no gap in any row
        inside = columns[rows == row]
        assert inside.max() - inside.min() + 1 == len(inside)


def test_a_defect_changes_its_mask_and_little_else(monkeypatch, items):
    """Each defect against the same picture without: where it changed is the mask."""
    found = [i for i, item in enumerate(items) if item.kind in ("scratch", "spots")][:20]
    for i in found:
        item = items[i]
        with monkeypatch.context() as patch:
            nothing = np.zeros(item.mask.shape, np.int32)
            patch.setitem(defects._DRAWERS, item.kind, lambda *_, n=nothing: (n, n))
            patch.setattr(defects, "_ellipse", lambda mask: mask)
            plain = draw_defect(i)
        change = np.abs(item.image[:, :, 0].astype(int) - plain.image[:, :, 0])
        assert change[item.mask].mean() > 8
        assert change[~item.mask].mean() < 0.2
        assert change[~item.ellipse].max() <= 12


def test_darkness_alone_does_not_tell(items):
    means = np.array([item.image.mean() for item in items])
    has = np.array([item.kind is not None for item in items])
    order = means.argsort().argsort()
    above = (order[has].mean() - (has.sum() - 1) / 2) / (~has).sum()  # area under the ROC curve
    assert 0.35 < above < 0.65


def test_surfaces_repeat_without_a_seam():
    for number in range(len(SURFACE_NAMES)):
        tile = defects._tile(number)[:512, :512].astype(int)
        for axis in (0, 1):
            steps = np.abs(np.diff(tile, axis=axis)).mean()
            seam = np.abs(np.take(tile, 0, axis) - np.take(tile, -1, axis)).mean()
            assert seam < 2 * steps + 5


def test_bad_arguments_are_one_line():
    with pytest.raises(ValueError, match=r"`split` in \{'train', 'val', 'test'\}, got 'x'"):
        Defects("x")
    with pytest.raises(ValueError, match="`size` >= 64, got 32"):
        draw_defect(0, size=32)
    with pytest.raises(ValueError, match="`size` <= 512, got 600"):
        draw_defect(0, size=600)
    with pytest.raises(ValueError, match="`index` >= 0, got -1"):
        draw_defect(-1)
    with pytest.raises(TypeError, match="`count` to be an integer, got float"):
        Defects(count=2.0)
    with pytest.raises(IndexError, match=r"\[-2, 2\), got 2"):
        Defects(count=2)[2]
