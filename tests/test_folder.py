import numpy as np
import pytest
from PIL import Image

from attnviz.data.folder import (
    LabeledImage,
    PictureNames,
    Problems,
    fit_all,
    load_folder,
    read_box_list,
)


def _picture(path, size=(40, 30), exif=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(
        np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size[::-1], 3)
    )
    image.save(path, **({"exif": exif} if exif else {}))
    return path


def _turned(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def test_class_folders_give_numbers_in_the_order_of_their_names(tmp_path):
    _picture(tmp_path / "dog" / "b.png")
    _picture(tmp_path / "cat" / "a.jpg")
    _picture(tmp_path / "cat" / ".hidden.jpg")
    (tmp_path / "cat" / "notes.txt").touch()
    data = load_folder(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert [(item.image_id, item.class_id) for item in data] == [("a", 0), ("b", 1)]
    assert data[0].read().size == (40, 30)
    assert data[0].size == (30, 40)
    assert data.problems == []
    assert data[-1].boxes == ()


def test_a_slice_is_a_data_set(tmp_path):
    for name in "abc":
        _picture(tmp_path / "x" / f"{name}.png")
    part = load_folder(tmp_path)[1:]
    assert [item.image_id for item in part] == ["b", "c"]
    assert part.class_names == ("x",)
    assert [item.image_id for item in load_folder(tmp_path, limit=1)] == ["a"]
    with pytest.raises(IndexError):
        part[2]
    with pytest.raises(ValueError, match="`limit` of at least 1, got 0"):
        load_folder(tmp_path, limit=0)


def test_a_flat_folder_has_no_classes(tmp_path):
    _picture(tmp_path / "a.png")
    data = load_folder(tmp_path)
    assert data[0].class_id is None
    assert data.class_names == ()
    assert data.class_count == 0


def test_boxes_are_read_cut_and_reported(tmp_path):
    for name in ("a.png", "b.png"):
        _picture(tmp_path / name)
    (tmp_path / "boxes.csv").write_text(
        "\ufeffimage,x0,y0,x1,y1,class\n"
        "a.png,1,2,10.5,20,cat\n"
        "a.png,30,0,60,30,cat\n"
        "b,5,5,5,9,dog\n"
        "b,50,5,60,9,dog\n"
        "b,0,nan,1,1,dog\n"
        "gone.png,1,1,2,2,dog\n"
        "b,1,1,x,2,dog\n",
        encoding="utf-8",
    )
    data = load_folder(tmp_path)
    assert data[0].boxes == ((1, 2, 10.5, 20), (30, 0, 40, 30))
    assert data[1].boxes == ()
    assert data.class_names == ("cat", "dog")
    assert [item.class_id for item in data] == [0, 1]
    assert sorted(data.problems) == [
        "boxes that are no numbers, left out: b.png",
        "boxes that leave the picture, cut: a.png",
        "boxes without area or outside the picture, left out: b.png, b.png",
        "lines of boxes.csv that are no box, left out: line 8",
        "pictures of boxes.csv that are not there: gone.png",
    ]
    assert load_folder(tmp_path, boxes=None).box_count == 0


def test_boxes_of_another_size_are_scaled(tmp_path):
    _picture(tmp_path / "x" / "a.png", (400, 200))
    (tmp_path / "boxes_100x50.csv").write_text("image;x0;y0;x1;y1\nx/a.png;10;10;100;50\n")
    assert load_folder(tmp_path)[0].boxes == ((40, 40, 400, 200),)


def test_numbers_stay_numbers_and_other_classes_are_reported(tmp_path):
    _picture(tmp_path / "flat" / "a.png")
    (tmp_path / "flat" / "boxes.csv").write_text("image,x0,y0,x1,y1,label\na.png,0,0,9,9,7\n")
    data = load_folder(tmp_path / "flat")
    assert data[0].class_id == 7
    assert data.class_names == ()
    _picture(tmp_path / "tree" / "cat" / "a.png")
    _picture(tmp_path / "tree" / "beside.png")
    (tmp_path / "tree" / "b.csv").write_text("image,x0,y0,x1,y1,class\ncat/a.png,0,0,9,9,dog\n")
    data = load_folder(tmp_path / "tree", boxes=tmp_path / "tree" / "b.csv")
    assert [item.class_id for item in data] == [None, 0]
    assert data.problems == [
        "pictures of another class in b.csv than their folder's: cat/a.png",
        "pictures beside the class folders, without a class: beside.png",
    ]


def test_one_name_with_two_suffixes_stays_apart(tmp_path):
    _picture(tmp_path / "a.png")
    _picture(tmp_path / "a.jpg")
    assert [item.image_id for item in load_folder(tmp_path)] == ["a.jpg", "a.png"]
    names = PictureNames(["a.jpg", "a.png", "x/b.png", "y/b.png", "y/c.JPEG"])
    found = [names.find(name) for name in ("a.png", "a", "b.png", "y/b.png", "val/c", "val/y/c")]
    assert found == [1, None, None, 3, 4, 4]


def test_published_boxes_count_stored_pixels(tmp_path):
    upright = _picture(tmp_path / "upright.png")
    for orientation in range(1, 9):
        path = _picture(tmp_path / f"{orientation}.png", exif=_turned(orientation))
        stored = LabeledImage("a", path, 0, (), upright=False)
        assert np.array_equal(np.asarray(stored.read()), np.asarray(Image.open(upright)))
        assert stored.size == (30, 40)
        shown = LabeledImage("a", path, 0, ())
        assert shown.size == shown.read().size[::-1]


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder of pictures, got"):
        load_folder(tmp_path / "no")
    with pytest.raises(ValueError, match="got none"):
        load_folder(tmp_path)
    _picture(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="expected a list of boxes"):
        load_folder(tmp_path, boxes=tmp_path / "no.csv")
    (tmp_path / "boxes.csv").write_text("file,left,top\n")
    with pytest.raises(ValueError, match=r"first line with image,x0.*got 'file,left,top'"):
        load_folder(tmp_path)
    (tmp_path / "boxes.csv").write_bytes(b"image,x0,y0,x1,y1\n\xff\xfe,1,1,2,2\n")
    with pytest.raises(ValueError, match="expected text in UTF-8"):
        read_box_list(tmp_path / "boxes.csv", Problems())


def test_a_damaged_picture_with_boxes_is_left_out(tmp_path):
    _picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\na.png,0,0,9,9\nb.png,0,0,9,9\n")
    data = load_folder(tmp_path)
    assert [item.image_id for item in data] == ["a"]
    assert data.problems == ["pictures that cannot be read: b.png"]


def test_pictures_without_boxes_are_never_opened(tmp_path):
    missing = ["never-there.png"]
    assert fit_all(tmp_path, missing, [[]], [None], Problems(), upright=True) == [()]


def test_many_problems_of_a_kind_make_one_line():
    problems = Problems()
    problems.add_all("pictures gone", (f"{i}.png" for i in range(1200)))
    assert problems.lines() == ["pictures gone: 1,200, first 0.png, 1.png, 2.png"]


def test_links_that_lead_back_end(tmp_path):
    _picture(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "up").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(_picture(tmp_path.parent / "elsewhere" / "c.png").parent)
    assert [item.image_id for item in load_folder(tmp_path)] == ["a", "c"]
