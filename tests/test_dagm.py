from collections import Counter
from pathlib import PurePosixPath

import numpy as np
import pytest
from PIL import Image

from attnviz.data.dagm import load_dagm
from attnviz.data.surface import TILE_DEFECTS, load_magnetic_tile

SIZE = (24, 32)  # height, width


def _grey(path, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", SIZE[::-1], value).save(path)


def _region():
    mask = np.zeros(SIZE, np.uint8)
    mask[5:9, 10:20] = 255
    mask[4, 10:20] = 100  # a soft border, outside
    return mask


def _mask(path, mask=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_region() if mask is None else mask).save(path)


@pytest.fixture
def dagm(tmp_path):
    """Surfaces 1 and 10; of each split three pictures, the second with a defect."""
    root = tmp_path / "dagm2007"
    for surface in ("Class1", "Class10"):
        for part in ("Train", "Test"):
            folder = root / surface / part
            for k in (1, 2, 3):
                _grey(folder / f"{k:04d}.PNG")
            _mask(folder / "Label" / "0002_label.PNG")
            lines = ["1", "1\t0\t0001.PNG\t0\t0", "2\t1\t0002.PNG\t1\t0002_label.PNG"]
            lines.append("3\t0\t0003.PNG\t0\t0")
            (folder / "Label" / "Labels.txt").write_text("\n".join(lines))
    return root


def test_defects_are_the_only_class(dagm):
    data = load_dagm(dagm)
    names = ["Class1/Test/0001", "Class1/Test/0002", "Class1/Test/0003", "Class10/Test/0001"]
    assert [item.image_id for item in data][:4] == names
    assert [item.class_ids for item in data] == [(), (0,), ()] * 2
    assert (data.class_names, data.problems) == (("defect",), [])
    assert np.array_equal(data[1].read_mask(), _region() > 127)
    assert data[0].read_mask().shape == SIZE
    assert not data[0].read_mask().any()
    assert data[0].read().mode == "RGB"


def test_splits_surfaces_and_limits(dagm):
    assert [len(load_dagm(dagm, split)) for split in ("train", "test", "all")] == [6, 6, 12]
    assert {item.image_id[:8] for item in load_dagm(dagm, surfaces=[10])} == {"Class10/"}
    few = [item.image_id for item in load_dagm(dagm, limit=2)]
    assert few == ["Class1/Test/0001", "Class10/Test/0001"]
    assert len(load_dagm(dagm.parent)) == 6  # one folder up


def test_labels_decide_where_there_are_some(dagm):
    folder = dagm / "Class1" / "Test"
    (folder / "Label" / "Labels.txt").write_text(
        "1 1 0001.PNG 1 0001_label.PNG\n2 0 0002.PNG 0 0\nx ? 9"
    )
    _mask(folder / "Label" / "0009_label.PNG")
    data = load_dagm(dagm, surfaces=[1])
    assert [item.class_ids for item in data] == [(0,), (), ()]
    assert data[0].read_mask() is None
    assert not data[1].read_mask().any()
    assert sorted(data.problems) == [
        "lines of Labels.txt that are neither 0 nor 1: Class1/Test line 3",
        "masks of defects that are not there: Class1/Test/0001.PNG",
        "masks of pictures that are not there: Class1/Test/Label/0009_label.PNG",
        "pictures that Labels.txt does not name: Class1/Test/0003.PNG",
        "pictures with a mask but no defect in Labels.txt: Class1/Test/0002.PNG",
    ]
    (folder / "Label" / "Labels.txt").unlink()
    assert [item.class_ids for item in load_dagm(dagm, surfaces=[1])] == [(), (0,), ()]


def test_bad_masks_are_one_line(dagm):
    labels = dagm / "Class1" / "Test" / "Label"
    _mask(labels / "0002_label.PNG", np.zeros((30, 30), np.uint8))
    (dagm / "Class10" / "Test" / "Label" / "0002_label.PNG").write_bytes(b"no picture")
    data = load_dagm(dagm)
    with pytest.raises(ValueError, match="a mask of 24 x 32 .* got 30 x 30"):
        data[1].read_mask()
    with pytest.raises(ValueError, match="expected a picture"):
        data[4].read_mask()
    assert data.checked().mask_count == 4


def test_what_is_missing_is_said(dagm, tmp_path):
    with pytest.raises(ValueError, match=r"`split` in \('train', 'test', 'all'\), got 'val'"):
        load_dagm(dagm, "val")
    with pytest.raises(FileNotFoundError, match="Class1 to Class10 of DAGM 2007"):
        load_dagm(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="Class1/Test/0576.PNG"):
        load_dagm(dagm, surfaces=[4])
    with pytest.raises(ValueError, match="`limit` of at least 1"):
        load_dagm(dagm, limit=0)


# ------------------------------------------------------------------------------ magnetic tiles


@pytest.fixture
def tiles(tmp_path):
    """Four tiles a folder, each under two exposures some frames apart."""
    root = tmp_path / "magnetic_tile"
    for kind in (*TILE_DEFECTS, "Free"):
        for tile in range(4):
            for exposure in (1, 2):
                path = root / f"MT_{kind}" / f"exp{exposure}_num_{tile * 1000 + exposure * 100}"
                _grey(path.with_suffix(".jpg"))
                _mask(path.with_suffix(".png"), None if kind != "Free" else np.zeros(SIZE, "u1"))
    return root


def _tile(item):
    path = PurePosixPath(item.image_id)
    return path.parent, int(path.name.rpartition("_")[2]) // 1000


def test_tiles_have_one_kind_of_defect_or_none(tiles):
    data = load_magnetic_tile(tiles)
    assert Counter(item.class_ids for item in data) == {(k,): 8 for k in range(5)} | {(): 8}
    for item in data:
        label = 1 + item.class_ids[0] if item.class_ids else 0
        assert np.array_equal(item.read_mask(), np.where(_region() > 127, label, 0))


def test_exposures_of_a_tile_stay_together(tiles):
    train, test = load_magnetic_tile(tiles, "train"), load_magnetic_tile(tiles, "test")
    assert {_tile(item) for item in train} & {_tile(item) for item in test} == set()
    assert len(train) + len(test) == len(load_magnetic_tile(tiles))
    assert len(test) == 6 * 2
    assert len({item.class_ids for item in test}) == 6


def test_faults_of_tiles_are_reported(tiles):
    (tiles / "MT_Crack" / "exp1_num_100.png").unlink()
    (tiles / "MT_Fray").rename(tiles / "other")
    data = load_magnetic_tile(tiles)
    assert sorted(data.problems) == [
        "folders that are not there: MT_Fray",
        "masks that are not there: MT_Crack/exp1_num_100.jpg",
    ]
    lost = next(item for item in data if item.image_id == "MT_Crack/exp1_num_100")
    assert lost.read_mask() is None
    with pytest.raises(FileNotFoundError, match="MT_Crack/exp1_num_3191.jpg"):
        load_magnetic_tile(tiles / "no")
    with pytest.raises(ValueError, match="got 'val'"):
        load_magnetic_tile(tiles, "val")


@pytest.mark.real
def test_genuine_tiles_are_read(real_data):
    data = load_magnetic_tile(real_data / "magnetic_tile")
    counts = Counter(item.class_ids for item in data)
    assert counts == {(0,): 77, (1,): 57, (2,): 38, (3,): 22, (4,): 69, (): 100}
    assert data.problems == []
    checked = data.checked()
    assert (len(checked), checked.mask_count, checked.problems) == (363, 363, [])
