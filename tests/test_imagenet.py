import numpy as np
import pytest
import torch
from PIL import Image

from attnviz.data.imagenet import load_imagenet

WNIDS = [f"n{i:08d}" for i in range(1000)]
SIZE = (500, 375)  # width, height
BOXES = {1: [(0, 0, 499, 374)], 2: [(45, 49, 499, 162), (2, 69, 437, 207)]}
WHOLE = {1: ((0, 0, 500, 375),), 2: ((45, 49, 500, 163), (2, 69, 438, 208))}


def _name(number):
    return f"ILSVRC2012_val_{number:08d}"


def _pictures(folder, numbers=(1, 2), size=SIZE, by_class=False):
    for number in numbers:
        path = folder / (WNIDS[number * 10] if by_class else "") / f"{_name(number)}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)


def _words(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{wnid} thing {i}, other\n" for i, wnid in enumerate(WNIDS)))


def _labels(path, numbers=(1, 2)):
    path.write_text("".join(f"{_name(number)}.JPEG {number * 10}\n" for number in numbers))


def _annotations(folder, size=SIZE):
    folder.mkdir(parents=True)
    for number, boxes in BOXES.items():
        objects = "".join(
            f"<object><name>{WNIDS[number * 10]}</name><bndbox><xmin>{x0}</xmin>"
            f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for x0, y0, x1, y1 in boxes
        )
        (folder / f"{_name(number)}.xml").write_text(
            f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"
            f"{objects}</annotation>"
        )


def _solution(path):
    lines = ["ImageId,PredictionString"]
    for number, boxes in BOXES.items():
        words = " ".join(f"{WNIDS[number * 10]} {a} {b} {c} {d}" for a, b, c, d in boxes)
        lines.append(f"{_name(number)},{words} ")
    path.write_text("\n".join(lines) + "\n")


def _official(root):
    _pictures(root / "val")
    _labels(root / "val_labels.txt")
    _words(root / "synset_words.txt")
    _annotations(root / "Annotations" / "CLS-LOC" / "val")


def _kaggle(root):
    _pictures(root / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    _words(root / "LOC_synset_mapping.txt")
    _solution(root / "LOC_val_solution.csv")


def _wsol(root):
    _pictures(root / "val")
    lists = root / "metadata" / "ILSVRC" / "test"
    lists.mkdir(parents=True)
    (lists / "class_labels.txt").write_text(
        "".join(f"val/{_name(number)}.JPEG,{number * 10}\n" for number in BOXES)
    )
    (lists / "localization.txt").write_text(
        "".join(
            f"val/{_name(number)}.JPEG,{','.join(map(str, box))}\n"
            for number, boxes in BOXES.items()
            for box in boxes
        )
    )
    (lists / "image_sizes.txt").write_text(
        "".join(f"val/{_name(number)}.JPEG,{SIZE[0]},{SIZE[1]}\n" for number in BOXES)
    )


def _class_folders(root):
    _pictures(root / "val", by_class=True)
    torch.save(({wnid: (f"thing {i}",) for i, wnid in enumerate(WNIDS)}, []), root / "meta.bin")
    _annotations(root / "Annotations" / "val")


def _devkit(root):
    savemat = pytest.importorskip("scipy.io").savemat
    _pictures(root / "ILSVRC2012_img_val")
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    kinds = [("ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("children", "O")]
    rows = [(1000 - i, wnid, f"thing {i}, other", "", 0) for i, wnid in enumerate(WNIDS)]
    rows.append((1001, "n99999999", "group", "", 4))
    savemat(kit / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    ids = [1000 - number * 10 for number in BOXES]
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, ids)))
    _annotations(root / "ILSVRC2012_bbox_val_v3" / "val")


@pytest.mark.parametrize("layout", [_official, _kaggle, _wsol, _class_folders, _devkit])
def test_every_layout_gives_the_same(tmp_path, layout):
    layout(tmp_path)
    data = load_imagenet(tmp_path)
    assert [(item.image_id, item.class_id) for item in data] == [(_name(1), 10), (_name(2), 20)]
    assert [item.boxes for item in data] == [WHOLE[1], WHOLE[2]]
    assert data.problems == []
    assert layout is _wsol or data.class_names[20] == "thing 20"
    assert len(data.class_names) == 1000
    assert set(data.sources) >= {"images", "labels", "boxes"}


def test_squeezed_pictures_get_scaled_boxes(tmp_path):
    _official(tmp_path)
    _pictures(tmp_path / "val", size=(250, 125))
    assert load_imagenet(tmp_path)[0].boxes == ((0, 0, 250, 125),)
    (tmp_path / "boxes_227.csv").write_text(
        f"image,label,x0,y0,x1,y1\n{_name(1)}.JPEG,10,0,0,113.5,227\n"
    )
    data = load_imagenet(tmp_path, boxes=tmp_path / "boxes_227.csv")
    assert data[0].boxes == ((0, 0, 125, 125),)
    assert data.problems == [f"pictures without a box: {_name(2)}.JPEG"]


def test_a_part_of_the_pictures_is_enough(tmp_path):
    _official(tmp_path)
    _labels(tmp_path / "val_labels.txt", (1, 2, 3, 4, 5, 6))
    data = load_imagenet(tmp_path)
    assert data.problems == [
        f"pictures of val_labels.txt that are not there: 4, first "
        f"{_name(3)}.JPEG, {_name(4)}.JPEG, {_name(5)}.JPEG"
    ]
    assert len(load_imagenet(tmp_path, limit=1)) == 1


def test_without_boxes_no_picture_is_opened(tmp_path):
    _official(tmp_path)
    (tmp_path / "val" / f"{_name(1)}.JPEG").write_bytes(b"no picture")
    assert len(load_imagenet(tmp_path, boxes=None)) == 2
    data = load_imagenet(tmp_path)
    assert len(data) == 1
    assert data.problems == [f"pictures that cannot be read: {_name(1)}.JPEG"]


def test_training_folders(tmp_path):
    path = tmp_path / "train" / WNIDS[7] / f"{WNIDS[7]}_12.JPEG"
    path.parent.mkdir(parents=True)
    Image.new("RGB", SIZE).save(path)
    _words(tmp_path / "synset_words.txt")
    folder = tmp_path / "Annotations" / "CLS-LOC" / "train" / WNIDS[7]
    _annotations(folder)
    (folder / f"{_name(1)}.xml").rename(folder / f"{WNIDS[7]}_12.xml")
    data = load_imagenet(tmp_path, "train")
    assert data[0].class_id == 7
    assert data[0].boxes == WHOLE[1]
    kind = "pictures of another class in the boxes than in the labels"
    assert data.problems == [f"{kind}: {WNIDS[7]}/{WNIDS[7]}_12.JPEG"]


def test_faults_of_lists_are_reported_with_their_lines(tmp_path):
    _pictures(tmp_path / "val", (1, 2, 3))
    (tmp_path / "val.txt").write_text(
        f"{_name(1)}.JPEG 10\n{_name(2)}.JPEG 1000\n{_name(3)}.JPEG dog\n"
    )
    _solution(tmp_path / "LOC_val_solution.csv")
    with (tmp_path / "LOC_val_solution.csv").open("a") as file:
        file.write(f"{_name(1)},{WNIDS[10]} 1 2 three 4\n{_name(9)},{WNIDS[10]} 1 2 3 4\n")
    data = load_imagenet(tmp_path)
    assert [item.image_id for item in data] == [_name(1)]
    assert sorted(data.problems) == [
        "classes outside 0 to 999 in val.txt: line 2 (1000)",
        "lines of LOC_val_solution.csv that are no boxes, left out: line 4",
        "lines of val.txt without a class: line 3 ('dog')",
        f"pictures of LOC_val_solution.csv that are not there: {_name(2)}, {_name(9)}",
        f"pictures without a class, left out: {_name(2)}.JPEG, {_name(3)}.JPEG",
    ]


def test_classes_from_1_are_refused(tmp_path):
    _pictures(tmp_path / "val")
    (tmp_path / "val.txt").write_text(f"{_name(1)}.JPEG 1\n{_name(2)}.JPEG 1000\n")
    with pytest.raises(ValueError, match=r"classes 0 to 999 .* got 1 to 1000; subtract 1"):
        load_imagenet(tmp_path)


def test_class_folders_need_all_names(tmp_path):
    _pictures(tmp_path / "val", by_class=True)
    with pytest.raises(FileNotFoundError, match=r"numbers of classes like 'n00000010'.*put one"):
        load_imagenet(tmp_path)
    (tmp_path / "synset_words.txt").write_text("n00000010 tench\nn00000020 shark\n")
    with pytest.raises(ValueError, match=r"1000 WordNet ids in alphabetical order .* got 2;"):
        load_imagenet(tmp_path)
    (tmp_path / "synset_words.txt").write_text("tench, Tinca tinca\n")
    with pytest.raises(ValueError, match=r"got 'tench, Tinca tinca' in line 1"):
        load_imagenet(tmp_path)


def test_what_was_searched_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder of ILSVRC 2012"):
        load_imagenet(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"searched val, .*ILSVRC/Data/CLS-LOC/val"):
        load_imagenet(tmp_path)
    _pictures(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none of val_labels.txt, val.txt, .*one line a"):
        load_imagenet(tmp_path)
    (tmp_path / "val.txt").write_text("other.JPEG 3\n")
    with pytest.raises(ValueError, match=r"got 1 lines, none for a picture like 'ILSVRC2012_val"):
        load_imagenet(tmp_path)
    _labels(tmp_path / "val_labels.txt")
    data = load_imagenet(tmp_path)
    assert [item.class_id for item in data] == [10, 20]
    assert data.problems[0].startswith("no boxes: searched Annotations/CLS-LOC/val")
    with pytest.raises(FileNotFoundError, match="a folder of XML files or a list"):
        load_imagenet(tmp_path, boxes=tmp_path / "no.csv")


def test_damaged_annotations_are_left_out(tmp_path):
    _official(tmp_path)
    folder = tmp_path / "Annotations" / "CLS-LOC" / "val"
    (folder / f"{_name(1)}.xml").write_text("<annotation><object>")
    data = load_imagenet(tmp_path)
    assert data[0].boxes == ()
    assert data[1].boxes == WHOLE[2]
    assert f"XML files that cannot be read, left out: {_name(1)}.xml" in data.problems


@pytest.mark.real
def test_genuine_pictures(real_data):
    data = load_imagenet(real_data / "ilsvrc")
    assert len(data) == 650
    assert data.box_count == 1018
    assert data.problems == []
    assert len(data.class_names) == 1000
    assert data.class_names[0] == "tench"
    item = data[0]
    assert (item.image_id, data.class_names[item.class_id]) == (_name(347), "canoe")
    assert item.read().size == (227, 227)
    assert item.boxes[0] == (9.08, 105.93, 50.39, 176.76)
    for item in data:
        for x0, y0, x1, y1 in item.boxes:
            assert 0 <= x0 < x1 <= 227
            assert 0 <= y0 < y1 <= 227
