import numpy as np
import pytest
from PIL import Image

from attnviz.data.folder import LabeledImage
from attnviz.data.masks import voc_colors
from attnviz.data.voc import VOC_CLASS_NAMES, load_voc

IDS = ["2007_000032", "2007_000039", "2007_000063"]
SIZE = (32, 24)  # width, height
AEROPLANE, PERSON = 0, 14


def _labels(*class_ids):
    """A mask: a stripe of each class, and a row to be left out of scores."""
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    for k, class_id in enumerate(class_ids):
        mask[4 * k + 2 : 4 * k + 5, 3:20] = 1 + class_id
    mask[0] = 255
    return mask


def _palette_picture(mask, order=None):
    """Saves labels by index; `order` gives the palette's colors another order."""
    order = np.arange(256) if order is None else order
    picture = Image.fromarray(np.argsort(order).astype(np.uint8)[mask])
    picture.putpalette(voc_colors()[order].tobytes())
    return picture


def _xml(*names):
    objects = "".join(
        f"<object><name>{name}</name><difficult>{k}</difficult><part><name>head</name></part>"
        "</object>"
        for k, name in enumerate(names)
    )
    return f"<annotation><filename>x.jpg</filename>{objects}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """Three pictures: an aeroplane with a person, a person, nothing."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "Annotations"):
        (folder / name).mkdir(parents=True)
    classes = [(AEROPLANE, PERSON), (PERSON,), ()]
    for image_id, class_ids in zip(IDS, classes, strict=True):
        Image.new("RGB", SIZE, (9, 9, 9)).save(folder / "JPEGImages" / f"{image_id}.jpg")
        _palette_picture(_labels(*class_ids)).save(
            folder / "SegmentationClass" / f"{image_id}.png"
        )
        names = [VOC_CLASS_NAMES[class_id] for class_id in class_ids]
        (folder / "Annotations" / f"{image_id}.xml").write_text(_xml(*names, *names))
    _list(folder, "train", IDS[:2])
    _list(folder, "val", IDS)
    return folder


def _list(folder, split, lines):
    path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def test_the_published_folder_is_read(voc):
    for root in (voc, voc.parent, voc.parent.parent):
        data = load_voc(root, "val")
        assert [(item.image_id, item.class_ids) for item in data] == [
            (IDS[0], (AEROPLANE, PERSON)),
            (IDS[1], (PERSON,)),
            (IDS[2], ()),
        ]
        assert data.problems == []
    assert (data.split, data.ignore, data.class_names[PERSON]) == ("val", 255, "person")
    assert len(data.class_names) == 20
    assert data[0].read().size == SIZE
    assert data[0].size == SIZE[::-1]
    mask = data[0].read_mask()
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, _labels(AEROPLANE, PERSON))
    assert [item.image_id for item in load_voc(voc, "train", limit=1)] == IDS[:1]
    part = data[1:]
    assert (len(part), part[0].image_id, part.mask_count) == (2, IDS[1], 2)


def test_colors_are_those_of_the_devkit():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128)}
    known |= {8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    colors = voc_colors()
    assert {label: tuple(colors[label].tolist()) for label in known} == known
    assert len(np.unique(colors, axis=0)) == 256


@pytest.mark.parametrize(
    "form", ["palette", "shuffled palette", "grey ramp", "grey", "rgb", "rgba", "rgb grey", "16"]
)
def test_a_mask_means_the_same_in_every_form(voc, form):
    mask = _labels(AEROPLANE, PERSON)
    colored = Image.fromarray(voc_colors()[mask])
    ramp = Image.fromarray(mask).convert("P")  # Pillow's palette for grey: not VOC's colors
    shuffled = np.random.default_rng(0).permutation(256)
    picture = {
        "palette": _palette_picture(mask),
        "shuffled palette": _palette_picture(mask, shuffled),
        "grey ramp": ramp,
        "grey": Image.fromarray(mask),
        "rgb": colored,
        "rgba": colored.convert("RGBA"),
        "rgb grey": Image.fromarray(mask).convert("RGB"),
        "16": Image.fromarray(mask.astype(np.uint16)),
    }[form]
    picture.save(voc / "SegmentationClass" / f"{IDS[0]}.png")
    assert np.array_equal(load_voc(voc, "val")[0].read_mask(), mask)


def test_classes_come_from_list_boxes_or_masks(voc):
    for labels in ("boxes", "masks"):
        data = load_voc(voc, "val", labels=labels)
        assert [item.class_ids for item in data] == [(AEROPLANE, PERSON), (PERSON,), ()]
    (voc / "val_cls.txt").write_text(f"{IDS[0]} 14 3 3\n{IDS[1]}\n{IDS[2]} 0\n")
    data = load_voc(voc, "val")
    assert [item.class_ids for item in data] == [(3, 14), (), (0,)]
    assert data.sources["labels"].endswith("val_cls.txt")


def test_the_augmented_list_takes_the_augmented_masks(voc):
    other = _labels(AEROPLANE)
    Image.fromarray(other).save(voc / "SegmentationClassAug" / f"{IDS[0]}.png")
    lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png" for i in IDS[:2]]
    _list(voc, "trainaug", lines)
    data = load_voc(voc, "train_aug")
    assert np.array_equal(data[0].read_mask(), other)
    assert np.array_equal(data[1].read_mask(), _labels(PERSON))  # only the official one is there
    assert np.array_equal(load_voc(voc, "train")[0].read_mask(), _labels(AEROPLANE, PERSON))
    chosen = load_voc(voc, "val", masks="SegmentationClassAug")
    assert chosen.mask_count == 1
    assert load_voc(voc, "val", masks="none")[0].read_mask() is None


def test_the_test_split_has_neither_classes_nor_masks(voc):
    _list(voc, "test", ["2008_000006"])
    Image.new("RGB", SIZE).save(voc / "JPEGImages" / "2008_000006.jpg")
    (voc / "Annotations").rename(voc / "no")
    data = load_voc(voc, "test")
    assert (data[0].class_ids, data[0].read_mask(), data.problems) == ((), None, [])


def test_what_is_missing_is_reported_and_left_out(voc):
    (voc / "SegmentationClass" / f"{IDS[0]}.png").unlink()
    (voc / "JPEGImages" / f"{IDS[1]}.jpg").unlink()
    (voc / "Annotations" / f"{IDS[2]}.xml").write_text("<annotation><object>")
    _list(voc, "val", [*IDS, IDS[0]])
    data = load_voc(voc, "val")
    assert [item.image_id for item in data] == [IDS[0]]
    assert data[0].read_mask() is None
    assert data.problems == [
        "names that come twice in val.txt: 1",
        f"pictures of val.txt that are not there: {IDS[1]}",
        f"masks of val.txt that are not there: {IDS[0]}",
        f"annotations that cannot be read: {IDS[2]}.xml",
        f"pictures without classes, left out: {IDS[2]}",
    ]


def test_a_bad_list_of_classes_is_reported(voc):
    (voc / "val_cls.txt").write_text(f"{IDS[0]} 20\n{IDS[1]} cat\n\n{IDS[2]} 0\n")
    data = load_voc(voc, "val")
    assert [item.image_id for item in data] == [IDS[2]]
    assert data.problems == [
        "classes outside 0 to 19 in val_cls.txt, left out: line 1",
        "lines of val_cls.txt that are no classes, left out: line 2",
        f"pictures without classes, left out: {IDS[0]}, {IDS[1]}",
    ]
    (voc / "Annotations" / f"{IDS[0]}.xml").write_text(_xml("person", "unicorn"))
    data = load_voc(voc, "val", labels="boxes")
    assert data[0].class_ids == (PERSON,)
    assert data.problems == [f"objects of other classes than VOC's: {IDS[0]}.xml (unicorn)"]


def test_bad_masks_are_one_line_when_read_and_left_out_when_checked(voc):
    folder = voc / "SegmentationClass"
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(folder / f"{IDS[0]}.png")
    Image.fromarray(np.full(SIZE[::-1], 77, np.uint8)).save(folder / f"{IDS[1]}.png")
    whole = (folder / f"{IDS[2]}.png").read_bytes()
    (folder / f"{IDS[2]}.png").write_bytes(whole[:-40])
    data = load_voc(voc, "val")
    assert data.problems == []
    for item, line in zip(
        data,
        [r"a mask of 24 x 32 .* got 5 x 7", "labels 0 to 20 or 255 .* got 77", "is it damaged"],
        strict=True,
    ):
        with pytest.raises(ValueError, match=line):
            item.read_mask()
    (voc / "JPEGImages" / f"{IDS[2]}.jpg").write_bytes(b"no picture")
    checked = data.checked()
    assert [item.image_id for item in checked] == IDS[:2]
    assert [item.read_mask() for item in checked] == [None, None]
    assert checked[0].class_ids == (AEROPLANE, PERSON)
    kinds = [line.partition(":")[0] for line in checked.problems]
    assert kinds == [
        "masks that cannot be used, left out",
        "pictures that cannot be read, left out",
    ]
    Image.new("1", (10_001, 10_000)).save(folder / f"{IDS[2]}.png")
    with pytest.raises(ValueError, match="at most 100 million pixels, got"):
        data[2].read_mask()
    Image.new("RGB", SIZE[::-1], (1, 2, 3)).save(folder / f"{IDS[1]}.png")
    with pytest.raises(ValueError, match=r"VOC's colors .* got \(1, 2, 3\)"):
        data[1].read_mask()


def test_a_turned_picture_stays_with_its_mask(voc):
    path = voc / "JPEGImages" / f"{IDS[0]}.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", SIZE).save(path, exif=exif)
    item = load_voc(voc, "val")[0]
    assert item.read().size == SIZE
    assert item.read_mask().shape == item.size
    upright = LabeledImage("x", path, None, ())
    assert upright.read().size == SIZE[::-1]  # the same file as anyone's photograph


def test_bad_arguments_are_one_line(voc, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"list x.txt .* there: train, val"):
        load_voc(voc, "x")
    with pytest.raises(FileNotFoundError, match=r"JPEGImages of PASCAL VOC .* unpack"):
        load_voc(tmp_path / "no")
    with pytest.raises(ValueError, match=r"`labels` in .* got 'xml'"):
        load_voc(voc, "val", labels="xml")
    with pytest.raises(ValueError, match=r"`limit` of at least 1, got 0"):
        load_voc(voc, "val", limit=0)
    with pytest.raises(FileNotFoundError, match="val_cls.txt"):
        load_voc(voc, "val", labels="list")
    _list(voc, "val", ["2009_1"])
    with pytest.raises(FileNotFoundError, match="pictures of val.txt .* found none"):
        load_voc(voc, "val")


def test_listing_opens_neither_pictures_nor_masks(tmp_path):
    ids = [f"2008_{i:06d}" for i in range(500)]
    for place, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        (tmp_path / place).mkdir()
        for image_id in ids:
            (tmp_path / place / f"{image_id}.{suffix}").touch()  # empty: cannot be opened
    _list(tmp_path, "train_aug", ids)
    (tmp_path / "train_aug_cls.txt").write_text("".join(f"{i} 0 14\n" for i in ids))
    data = load_voc(tmp_path, "train_aug")
    assert (len(data), data.mask_count, data.problems) == (500, 500, [])
    assert len(data[:3].checked()) == 0


@pytest.mark.real
def test_genuine_pictures_and_masks_agree_with_their_lists(real_data):
    counts = {"train_aug": 400, "val": 223}
    for split, count in counts.items():
        data = load_voc(real_data / "voc2012", split)
        assert (len(data), data.mask_count, data.problems) == (count, count, [])
        for item in data[::10]:
            labels = set(np.unique(item.read_mask()).tolist()) - {0, 255}
            assert tuple(sorted(label - 1 for label in labels)) == item.class_ids
