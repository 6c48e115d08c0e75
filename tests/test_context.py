import struct

import numpy as np
import pytest
import scipy.io
from PIL import Image

from attnviz.data.context import load_context

IDS = ["2008_000002", "2008_000003"]
SIZE = (24, 32)  # height, width
LONG = [f"thing {k}" for k in range(1, 460)]
LONG[2], LONG[397], LONG[19] = "sky", "table", "bedclothes"
SHORT = ["diningtable", "sky", "bedcloth"]


def _names(path, names):
    path.write_text("".join(f"{k}: {name}\n" for k, name in enumerate(names, start=1)))


def _labels():
    labels = np.zeros(SIZE, np.uint16)
    labels[0:4], labels[4:9], labels[9:12], labels[12:20] = 3, 398, 20, 459
    return labels


def _save(path, labels, **options):
    scipy.io.savemat(path, {"other": np.eye(2), "LabelMap": labels}, **options)


@pytest.fixture
def context(tmp_path):
    """The whole set; `trainval` alone makes the smaller ones."""
    root = tmp_path / "context"
    (root / "trainval").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    for image_id in IDS:
        Image.new("RGB", SIZE[::-1]).save(root / "JPEGImages" / f"{image_id}.jpg")
        _save(root / "trainval" / f"{image_id}.mat", _labels(), do_compression=True)
    _names(root / "labels.txt", LONG)
    _names(root / "59_labels.txt", SHORT)
    return root


def test_all_459_labels_need_sixteen_bits(context):
    data = load_context(context, labels=459)
    assert [item.image_id for item in data] == IDS
    assert (len(data.class_names), data.class_names[397], data.ignore) == (459, "table", 65_535)
    assert np.array_equal(data[0].read_mask(), _labels())
    assert data[0].class_ids == ()
    assert data[0].read().size == SIZE[::-1]


def test_a_smaller_set_is_made_by_name(context):
    data = load_context(context, labels=59)
    want = np.zeros(SIZE, np.uint8)
    want[4:9], want[0:4], want[9:12] = 1, 2, 3  # by their place in 59_labels.txt
    assert (data.class_names, data.ignore, data.problems) == (tuple(SHORT), 255, [])
    assert np.array_equal(data[0].read_mask(), want)
    _names(context / "59_labels.txt", ["sky", "unicorn"])
    data = load_context(context, labels=59)
    assert data.problems == ["labels that labels.txt does not have: unicorn"]


def test_drawn_maps_come_first(context):
    maps = context / "33_context_labels"
    maps.mkdir()
    _names(context / "33_labels.txt", ["a", "b"])
    drawn = (np.arange(SIZE[0])[:, None] % 3 * np.ones(SIZE[1])).astype(np.uint8)
    Image.fromarray(drawn).save(maps / f"{IDS[0]}.png")
    Image.fromarray(drawn + 1).save(maps / f"{IDS[1]}.png")
    data = load_context(context, labels=33)
    assert data.class_names == ("a", "b")
    assert np.array_equal(data[0].read_mask(), drawn)
    with pytest.raises(ValueError, match="labels 0 to 2 or 255 .* got 3"):
        data[1].read_mask()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, float])
@pytest.mark.parametrize("compressed", [True, False])
def test_matrices_of_every_kind_are_read_as_scipy_reads_them(context, kind, compressed):
    labels = np.random.default_rng(0).integers(0, 256, SIZE).astype(kind)
    path = context / "trainval" / f"{IDS[0]}.mat"
    _save(path, labels, do_compression=compressed)
    mask = load_context(context, labels=459)[0].read_mask()
    assert np.array_equal(mask, scipy.io.loadmat(path)["LabelMap"])


def _element(order, kind, data):
    return struct.pack(f"{order}II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def test_a_file_of_the_other_byte_order_is_read(context):
    labels = _labels()
    parts = [
        _element(">", 6, struct.pack(">II", 11, 0)),
        _element(">", 5, struct.pack(">ii", *SIZE)),
        _element(">", 1, b"LabelMap"),
        _element(">", 4, labels.astype(">u2").tobytes(order="F")),
    ]
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(">H", 0x0100) + b"MI"
    path = context / "trainval" / f"{IDS[0]}.mat"
    path.write_bytes(header + _element(">", 14, b"".join(parts)))
    assert np.array_equal(load_context(context, labels=459)[0].read_mask(), labels)


def test_damaged_files_are_one_line_whatever_is_wrong(context):
    """Cut and changed at random: a mask or one clear line, never anything else."""
    rng = np.random.default_rng(0)
    path = context / "trainval" / f"{IDS[0]}.mat"
    item, lines = load_context(context, labels=459)[0], []
    for compressed in (True, False):
        _save(path, _labels(), do_compression=compressed)
        whole = path.read_bytes()
        for trial in range(150):
            data = bytearray(whole)
            if trial % 2:
                data = data[: rng.integers(len(data))]
            else:
                for _ in range(3):
                    data[rng.integers(len(data))] = rng.integers(256)
            path.write_bytes(data)
            try:
                assert item.read_mask().shape == SIZE
            except ValueError as error:
                lines.append(str(error))
    assert len(lines) > 100
    assert all(line.startswith("expected") and "\n" not in line for line in lines)


def test_wrong_matrices_are_one_line(context):
    path = context / "trainval" / f"{IDS[0]}.mat"
    item = load_context(context, labels=459)[0]
    for labels, line in (
        (_labels()[:5], "a mask of 24 x 32 .* got 5 x 32"),
        (_labels() + 1, "labels 0 to 459 .* got 460"),
        (_labels() + 0.5, "no whole numbers"),
        (np.full(SIZE, np.nan), "no whole numbers"),
        (_labels()[None], "no matrix of numbers"),
    ):
        _save(path, labels)
        with pytest.raises(ValueError, match=line):
            item.read_mask()
    scipy.io.savemat(path, {"Other": _labels()})
    with pytest.raises(ValueError, match="no such matrix"):
        item.read_mask()


def test_lists_and_pictures(context):
    (context / "val.txt").write_text(f"{IDS[1]}\n2008_999999\n")
    (context / "train.txt").write_text(f"{IDS[0]}\n")
    data = load_context(context, "val")
    assert [item.image_id for item in data] == IDS[1:]
    assert len(data.problems) == 2
    with pytest.raises(FileNotFoundError, match=r"'all' or .*test.txt.* there: train, val"):
        load_context(context, "test")
    (context / "JPEGImages" / f"{IDS[0]}.jpg").unlink()
    data = load_context(context)
    assert data.problems == [f"pictures that are not there: {IDS[0]}"]
    (context / "JPEGImages").rename(context / "elsewhere")
    with pytest.raises(FileNotFoundError, match="PASCAL VOC 2012 into the folder voc2012"):
        load_context(context)
    assert len(load_context(context, pictures=context / "elsewhere")) == 1
    (context.parent / "voc2012").mkdir()
    (context / "elsewhere").rename(context.parent / "voc2012" / "JPEGImages")
    assert len(load_context(context)) == 1


def test_what_is_missing_is_said(context):
    with pytest.raises(ValueError, match=r"`labels` in \(33, 59, 459\), got 60"):
        load_context(context, labels=60)
    with pytest.raises(FileNotFoundError, match="33_labels.txt"):
        load_context(context, labels=33)
    (context / "labels.txt").write_text("2: b\n")
    with pytest.raises(ValueError, match="lines such as '1: accordion'"):
        load_context(context, labels=459)
    (context / "trainval").rename(context / "no")
    with pytest.raises(FileNotFoundError, match="59_context_labels or trainval"):
        load_context(context)
