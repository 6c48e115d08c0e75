import json

import numpy as np
import pytest
from PIL import Image

from attnviz.data.coco import decode_runs, fill_polygons, load_coco

SIZE = (20, 30)  # height, width
CATEGORIES = [  # numbers have gaps and no order, as the real ones
    {"id": 90, "name": "toothbrush"},
    {"id": 1, "name": "person"},
    {"id": 18, "name": "dog"},
]
PERSON, DOG, TOOTHBRUSH = 0, 1, 2


def _runs(mask):
    """Lengths of the runs down the columns, counted one by one."""
    runs, inside = [0], False
    for value in mask.T.ravel():
        if value != inside:
            runs.append(0)
            inside = value
        runs[-1] += 1
    return runs


def _packed(runs):
    """COCO's compressed form, by its description: differences, five bits at a time."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            digit, value = value & 31, value >> 5
            last = value == (-1 if digit & 16 else 0)
            text += chr(48 + digit + (0 if last else 32))
            if last:
                break
    return text


def _in_polygon(x, y, polygon):
    """Whether a ray to the right crosses the border an odd number of times."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if (y0 <= y) != (y1 <= y):
            crossings += x0 + (y - y0) / (y1 - y0) * (x1 - x0) > x
    return crossings % 2 == 1


def _box(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def _table():
    crowd = np.zeros(SIZE, bool)
    crowd[10:18, 2:28] = True
    packed = np.zeros(SIZE, bool)
    packed[1:4, 20:25] = True
    rows = [
        (1, 18, 0, [_box(5, 11, 9, 15)]),
        (1, 1, 0, [_box(0, 0, 10, 16), _box(12, 0, 14, 2)]),  # larger: below the dog
        (1, 18, 1, {"size": SIZE, "counts": _runs(crowd)}),
        (1, 90, 0, {"size": SIZE, "counts": _packed(_runs(packed))}),
        (3, 90, 1, {"size": SIZE, "counts": _runs(crowd)}),
    ]
    areas = [16, 164, 208, 15, 208]
    return {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for i in (3, 1, 2)
        ],
        "categories": CATEGORIES,
        "annotations": [
            {
                "id": 10 + k, "image_id": image, "category_id": category, "iscrowd": crowd,
                "segmentation": region, "area": areas[k], "bbox": [0, 0, 1, 1],
            }
            for k, (image, category, crowd, region) in enumerate(rows)
        ],
    }  # fmt: skip


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for i in (1, 2, 3):
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "val2017" / f"{i:012d}.jpg")
    _write(tmp_path, _table())
    return tmp_path


def _write(root, table):
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(table))


def test_classes_are_contiguous_and_masks_are_drawn(coco):
    data = load_coco(coco)
    assert data.class_names == ("person", "dog", "toothbrush")
    assert [item.image_id for item in data] == ["000000000001", "000000000002", "000000000003"]
    assert [item.class_ids for item in data] == [(PERSON, DOG, TOOTHBRUSH), (), (TOOTHBRUSH,)]
    assert data.problems == []
    want = np.zeros(SIZE, np.uint8)
    want[10:18, 2:28] = 255  # the crowd lies below everything
    want[0:16, 0:10] = 1 + PERSON
    want[0:2, 12:14] = 1 + PERSON
    want[11:15, 5:9] = 1 + DOG
    want[1:4, 20:25] = 1 + TOOTHBRUSH
    assert np.array_equal(data[0].read_mask(), want)
    assert not data[1].read_mask().any()
    assert data[0].read().size == SIZE[::-1]
    assert len(load_coco(coco, limit=2)) == 2


def test_runs_of_every_form_give_the_mask_back():
    rng = np.random.default_rng(0)
    for density in (0, 0.02, 0.5, 1):
        mask = rng.random((40, 70)) < density
        runs = _runs(mask)
        assert np.array_equal(decode_runs(np.array(runs), mask.shape), mask)


def test_compressed_runs_mean_the_same(coco):
    rng = np.random.default_rng(1)
    table = _table()
    for density in (0.01, 0.3, 0.97):
        mask = rng.random(SIZE) < density
        mask[0, 0] = density > 0.9  # a first run of zero
        table["annotations"] = [
            table["annotations"][0]
            | {"segmentation": {"size": SIZE, "counts": _packed(_runs(mask))}}
        ]
        _write(coco, table)
        assert np.array_equal(load_coco(coco)[0].read_mask() == 1 + DOG, mask)


def test_compressed_runs_by_hand():
    # the lengths 6, 1, 40, 4, 5, 4, 5, 4, 21 of COCO's own description
    assert _packed([6, 1, 40, 4, 5, 4, 5, 4, 21]) == "61X13mN000`0"


def test_polygons_hold_the_pixels_whose_centers_are_inside():
    rng = np.random.default_rng(0)
    for _ in range(20):
        polygon = rng.uniform(-6, 40, (rng.integers(3, 9), 2)) + 1e-3
        filled = fill_polygons([polygon], SIZE)
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                assert filled[y, x] == _in_polygon(x + 0.5, y + 0.5, polygon.tolist())


def test_polygons_of_one_object_are_joined():
    first, second = (
        np.array(_box(*sides)).reshape(-1, 2) for sides in ((0, 0, 5, 5), (3, 3, 9, 9))
    )
    both = fill_polygons([first, second], SIZE)
    assert both.sum() == 25 + 36 - 4
    assert not fill_polygons([], SIZE).any()
    assert not fill_polygons([np.zeros((0, 2))], SIZE).any()


def test_faulty_objects_are_reported_and_left_out(coco):
    table = _table()
    rows = table["annotations"]
    rows[0]["category_id"], rows[1]["image_id"] = 5, 77
    rows[3]["segmentation"] = []
    (coco / "val2017" / "000000000003.jpg").unlink()
    _write(coco, table)
    data = load_coco(coco)
    assert [item.class_ids for item in data] == [(DOG,), ()]
    assert data.problems == [
        "objects of unknown classes in instances_val2017.json: object 10",
        "objects of unknown pictures in instances_val2017.json: object 11",
        "objects without a region in instances_val2017.json: object 13",
        "pictures of instances_val2017.json that are not there: 000000000003.jpg",
    ]


@pytest.mark.parametrize(
    "region",
    [
        [[1, 2, 3]],
        [[1, 2, 3, float("nan"), 5, 6]],
        {"size": [20, 30], "counts": [5, 5]},
        {"size": [20, 30], "counts": [700, -100]},
        {"size": [30, 20], "counts": [600]},
        {"size": [20, 30], "counts": "\x01"},
        {"size": [20, 30], "counts": "P"},
        {"size": [20, 30], "counts": "o" * 60 + "0"},
        {"size": [20, 30]},
    ],
)
def test_a_region_that_is_none_is_one_line_and_left_out_when_checked(coco, region):
    table = _table()
    table["annotations"][0]["segmentation"] = region
    _write(coco, table)
    data = load_coco(coco)
    with pytest.raises(ValueError, match=r"polygons or runs for object 0 of '0+1', got others"):
        data[0].read_mask()
    checked = data.checked()
    assert checked[0].read_mask() is None
    assert len(checked.problems) == 1


def test_a_picture_of_another_size_is_one_line(coco):
    table = _table()
    table["images"][1] |= {"height": 21}
    _write(coco, table)
    with pytest.raises(ValueError, match=r"runs of \(20, 30\) in a picture of \(21, 30\)"):
        load_coco(coco)[0].read_mask()
    table["images"][1] |= {"height": 10**12}
    _write(coco, table)
    with pytest.raises(ValueError, match="expected a size"):
        load_coco(coco)[0].read_mask()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"images": 3}',
        "nonsense",
        '{"images": [{"id": 1}]}',
        "[" * 100_000,
        '{"counts": [1' + "0" * 30 + "]}",
    ],
)
def test_another_file_is_one_line(coco, text):
    (coco / "annotations" / "instances_val2017.json").write_text(text)
    with pytest.raises(ValueError, match=r"COCO's instances in .* got something else") as error:
        load_coco(coco)
    assert "\n" not in str(error.value)


def test_names_that_lead_outside_are_refused(coco):
    table = _table()
    table["images"][0]["file_name"] = "../../secret.jpg"
    _write(coco, table)
    with pytest.raises(ValueError, match="expected names of files"):
        load_coco(coco)


def test_what_is_missing_is_said(coco, tmp_path):
    with pytest.raises(ValueError, match=r"`split` in \('train', 'val'\), got 'test'"):
        load_coco(coco, "test")
    with pytest.raises(FileNotFoundError, match=r"instances_train2017.json .* fetch coco"):
        load_coco(coco, "train")
    (coco / "val2017").rename(coco / "other")
    with pytest.raises(FileNotFoundError, match="unpack val2017.zip"):
        load_coco(coco)


@pytest.mark.real
def test_genuine_masks_have_the_annotated_areas(real_data):
    for split in ("train", "val"):
        data = load_coco(real_data / "coco", split)
        assert (len(data), len(data.class_names), data.problems) == (50, 80, [])
        path = real_data / "coco" / "annotations" / f"instances_{split}2017.json"
        for row in json.loads(path.read_bytes())["annotations"]:
            if isinstance(row["segmentation"], list) and row["area"] > 2000:
                polygons = [np.array(points).reshape(-1, 2) for points in row["segmentation"]]
                area = fill_polygons(polygons, (700, 700)).sum()
                assert abs(area / row["area"] - 1) < 0.15  # their parts may overlap
        for item in data[:10]:
            labels = set(np.unique(item.read_mask()).tolist()) - {0, 255}
            assert {label - 1 for label in labels} <= set(item.class_ids)
