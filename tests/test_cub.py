import pytest
from PIL import Image

from attnviz.data.cub import load_cub

FILES = [
    "001.Black_footed_Albatross/a.jpg",
    "001.Black_footed_Albatross/b.jpg",
    "002.Laysan/c.jpg",
]


@pytest.fixture
def cub(tmp_path):
    folder = tmp_path / "CUB_200_2011"
    for file in FILES:
        (folder / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40)).save(folder / "images" / file)
    _write(folder / "images.txt", [f"{i} {file}" for i, file in enumerate(FILES, 1)])
    _write(folder / "train_test_split.txt", ["1 1", "2 0", "3 0"])
    _write(folder / "image_class_labels.txt", ["1 1", "2 1", "3 2"])
    _write(folder / "bounding_boxes.txt", ["1 6.0 2.5 30.0 20.0", "2 0 0 50 40", "3 1 1 60 10"])
    _write(folder / "classes.txt", ["1 001.Black_footed_Albatross", "2 002.Laysan"])
    return folder


def _write(path, lines):
    path.write_text("\n".join(lines) + "\n")


def test_splits_boxes_and_names(cub):
    train, test = load_cub(cub, "train"), load_cub(cub.parent)
    assert [(item.image_id, item.class_id) for item in test] == [("b", 0), ("c", 1)]
    assert train[0].boxes == ((6, 2.5, 36, 22.5),)
    assert train.problems == []
    assert test[1].boxes == ((1, 1, 50, 11),)
    assert test.problems == ["boxes that leave the picture, cut: 002.Laysan/c.jpg"]
    assert test.class_names == ("Black footed Albatross", "Laysan")
    assert test[0].read().size == (50, 40)
    assert len(load_cub(cub, "all")) == 3
    assert len(load_cub(cub, "all", limit=2)) == 2


def test_faults_are_reported_and_left_out(cub):
    (cub / "images" / FILES[2]).unlink()
    _write(cub / "bounding_boxes.txt", ["1 6 2 30 20", "2 1 1 x 3"])
    _write(cub / "image_class_labels.txt", ["1 9", "2 1", "3 2"])
    data = load_cub(cub, "all")
    assert [item.image_id for item in data] == ["b"]
    assert data[0].boxes == ()
    assert sorted(data.problems) == [
        "classes outside 1 to 2 in image_class_labels.txt: picture 1 (9)",
        "lines of bounding_boxes.txt without 5 values, left out: line 2",
        "pictures that are not there: 002.Laysan/c.jpg",
        "pictures without a box: 001.Black_footed_Albatross/b.jpg",
    ]
    with pytest.raises(FileNotFoundError, match="pictures of train .* found none"):
        load_cub(cub, "train")


def test_what_is_missing_is_said(cub, tmp_path):
    with pytest.raises(ValueError, match=r"`split` in \('train', 'test', 'all'\), got 'val'"):
        load_cub(cub, "val")
    with pytest.raises(FileNotFoundError, match=r"images.txt of CUB-200-2011 .* unpack"):
        load_cub(tmp_path / "no")
    _write(cub / "classes.txt", ["1 a", "3 b"])
    with pytest.raises(ValueError, match=r"classes 1 to 3 .* got 2"):
        load_cub(cub)
    _write(cub / "classes.txt", [""])
    with pytest.raises(ValueError, match="lines of 2 values"):
        load_cub(cub)
    (cub / "train_test_split.txt").unlink()
    with pytest.raises(FileNotFoundError, match="train_test_split.txt"):
        load_cub(cub)
