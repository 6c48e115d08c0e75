"""Readers meet damaged files: what cannot be read is said in one line, or left out and named.

``ATTNVIZ_DAMAGED`` is about how many damaged files each reader sees: 43 times as many in all.
"""

import json
import os
import random
import signal
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import damage
import numpy as np
import pytest
import safetensors.torch
import scipy.io
import torch
from PIL import Image, ImageDraw
from recorded import record
from tiny import Tiny

import attnviz
from attnviz.data.coco import load_coco
from attnviz.data.context import load_context
from attnviz.data.cub import load_cub
from attnviz.data.dagm import load_dagm
from attnviz.data.folder import LabeledImage, load_folder
from attnviz.data.imagenet import load_imagenet
from attnviz.data.masks import read_label_picture, voc_colors
from attnviz.data.surface import load_magnetic_tile
from attnviz.data.voc import load_voc
from attnviz.deeplab import load_segmentation, segmentation_network
from attnviz.evolution import load_evolution
from attnviz.images import MAX_PIXELS, read_image
from attnviz.memory import FILE, AttentionMemory
from attnviz.networks import FiveStage, load_network, oaa_network
from attnviz.probes.channels import index_channels
from attnviz.training import runs
from attnviz.training.integral import read_config

COUNT = int(os.environ.get("ATTNVIZ_DAMAGED", "48"))
SECONDS = 10
SIZE = (48, 32)  # width, height
WNIDS = [f"n{i:08d}" for i in range(1000)]


class Hangs(BaseException):
    """Nothing in the package may catch it."""


@contextmanager
def _awake():
    def raise_it(number, frame):
        raise Hangs

    before = signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _complaint(read):
    """What a reader says to a file, None where it reads it."""
    try:
        with _awake(), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", module="PIL")  # the pixels are right
            read()
    except (ValueError, FileNotFoundError, KeyError) as error:
        return str(error.args[0])
    return None


def _survives(targets, read, seed, count=COUNT):
    """Damages one file at a time; `read` reads it, or says what is wrong in one clear line."""
    source = random.Random(seed)
    good = {path: path.read_bytes() for path in targets}
    read()
    refused = 0
    for number in range(count):
        path = source.choice(list(targets))
        bad = targets[path](good[path], source)
        path.write_bytes(bad)
        try:
            said = _complaint(read)
        except BaseException as error:
            error.add_note(f"{number}: {path.name}: {bad[:3000]!r}")
            raise
        if said is not None:
            clear = said.startswith("expected ") and said.isprintable() and len(said) < 600
            assert clear, (said, number, path.name, bad[:3000])
            refused += 1
        path.write_bytes(good[path])
    return refused


def _picture(path, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    picture.save(path, **options)
    return path


def _labels(path, values=(0, 1, 15, 255), mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.resize(np.repeat(np.array(values, np.uint8), 8), (SIZE[1], SIZE[0]))
    picture = Image.fromarray(labels)
    if mode != "L":
        picture.putpalette(voc_colors().tobytes())
    picture.convert(mode).save(path)
    return path


def _text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _boxes_inside(data):
    assert all("\n" not in line for line in data.problems)
    for item in data:
        height, width = item.size
        for x0, y0, x1, y1 in item.boxes:
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
        assert item.class_id is None or item.class_id >= 0


def _masks_fit(data):
    # Opens masks as a run does that must not stop.
    sound = data.checked(pictures=False)
    assert all("\n" not in line for line in sound.problems)
    for item in sound:
        assert all(0 <= class_id < item.class_count for class_id in item.class_ids)
        mask = item.read_mask()
        if mask is not None:
            assert mask.shape == item.size
            assert np.isin(mask, [*range(1 + item.class_count), sound.ignore]).all()


# ------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    ("suffix", "mode", "options"),
    [
        ("png", "RGB", {}), ("png", "P", {}), ("png", "RGBA", {}), ("png", "I;16", {}),
        ("jpg", "RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}),
        ("jpg", "CMYK", {"progressive": True}), ("gif", "P", {}), ("webp", "RGB", {}),
        ("bmp", "RGB", {}), ("tif", "RGB", {"compression": "tiff_lzw"}), ("tif", "F", {}),
        ("ppm", "RGB", {}), ("pgm", "L", {}),
    ],
)  # fmt: skip
def test_damaged_pictures(tmp_path, suffix, mode, options):
    path = tmp_path / f"a.{suffix}"
    if mode == "I;16":
        ramp = np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[::-1]) * 40
        Image.fromarray(ramp).save(path)
    else:
        _picture(path, mode, **options)

    def read():
        image = read_image(path)
        assert image.mode == "RGB"
        assert image.width * image.height <= MAX_PIXELS

    _survives({path: damage.damage_png if suffix == "png" else damage.damage}, read, suffix)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_damaged_label_pictures(tmp_path, mode):
    path = _labels(tmp_path / "a.png", mode=mode)

    def read():
        assert read_label_picture(path).dtype in (np.uint8, np.uint16)

    _survives({path: damage.damage_png}, read, mode)


# ----------------------------------------------------------------------------- boxes and classes


def test_a_damaged_box_list(tmp_path):
    for name in ("cat/a.png", "dog/b.png"):
        _picture(tmp_path / name)
    rows = "image,x0,y0,x1,y1,class\ncat/a.png,1,2,30,20.5,cat\nb,5,5,20,31,dog\nb,0,0,9,9,dog\n"
    boxes = _text(tmp_path / "boxes_48x32.csv", rows)
    _survives({boxes: damage.damage_text}, lambda: _boxes_inside(load_folder(tmp_path)), 1)


def _imagenet(root):
    for number in (1, 2):
        _picture(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    words = "".join(f"{wnid} thing {i}, other\n" for i, wnid in enumerate(WNIDS))
    return _text(root / "synset_words.txt", words)


def _imagenet_labels(root):
    lines = (f"ILSVRC2012_val_{number:08d}.JPEG {10 * number}\n" for number in (1, 2))
    return _text(root / "val_labels.txt", "".join(lines))


def test_damaged_lists_and_annotations_of_imagenet(tmp_path):
    words, labels = _imagenet(tmp_path), _imagenet_labels(tmp_path)
    box = "<object><name>n00000010</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax>"
    box = f"<annotation><size><width>48</width><height>32</height></size>{box}"
    box += "<ymax>20</ymax></bndbox></object></annotation>"
    annotation = _text(tmp_path / "Annotations" / "ILSVRC2012_val_00000001.xml", box)
    targets = dict.fromkeys((words, labels, annotation), damage.damage_text)
    _survives(targets, lambda: _boxes_inside(load_imagenet(tmp_path)), 2)


def test_damaged_solutions_of_imagenet(tmp_path):
    _imagenet(tmp_path)
    lines = "ImageId,PredictionString\nILSVRC2012_val_00000001,n00000010 1 2 30 20 n00000010 "
    lines += "5 6 7 8 \nILSVRC2012_val_00000002,n00000020 0 0 47 31 \n"
    solution = _text(tmp_path / "LOC_val_solution.csv", lines)
    _survives({solution: damage.damage_text}, lambda: _boxes_inside(load_imagenet(tmp_path)), 3)


def test_damaged_lists_of_other_evaluations(tmp_path):
    _imagenet(tmp_path)
    name = "val/ILSVRC2012_val_0000000"
    lists = {
        "class_labels.txt": f"{name}1.JPEG,10\n{name}2.JPEG,20\n",
        "localization.txt": f"{name}1.JPEG,1,2,30,20\n{name}2.JPEG,0,0,5,5\n",
        "image_sizes.txt": f"{name}1.JPEG,48,32\n{name}2.JPEG,96,64\n",
    }
    targets = {_text(tmp_path / name, text): damage.damage_text for name, text in lists.items()}
    _survives(targets, lambda: _boxes_inside(load_imagenet(tmp_path)), 4)


def test_a_damaged_meta_bin(tmp_path):
    _imagenet(tmp_path).unlink()
    _imagenet_labels(tmp_path)
    meta = tmp_path / "meta.bin"
    torch.save(({wnid: ("thing", "other") for wnid in WNIDS}, WNIDS[:5]), meta)
    read = lambda: _boxes_inside(load_imagenet(tmp_path, boxes=None))  # noqa: E731
    _survives({meta: damage.damage_zip}, read, 5)


def test_a_damaged_meta_mat(tmp_path):
    _imagenet(tmp_path).unlink()
    kit = "".join(f"{i}\n" for i in (11, 21))
    kit = _text(tmp_path / "data" / "ILSVRC2012_validation_ground_truth.txt", kit)
    rows = np.zeros(1000, [(name, object) for name in ("ID", "WNID", "words", "gloss", "n")])
    rows[:] = [(1 + i, wnid, "thing, other", "a thing", 0) for i, wnid in enumerate(WNIDS)]
    meta = tmp_path / "data" / "meta.mat"
    scipy.io.savemat(meta, {"synsets": rows})
    read = lambda: _boxes_inside(load_imagenet(tmp_path, boxes=None))  # noqa: E731
    _survives({meta: damage.damage, kit: damage.damage_text}, read, 6, count=COUNT // 4)


def test_damaged_lists_of_cub(tmp_path):
    files = ["001.A/a.jpg", "001.A/b.jpg", "002.B/c.jpg"]
    for file in files:
        _picture(tmp_path / "images" / file)
    lists = {
        "images.txt": "".join(f"{i} {file}\n" for i, file in enumerate(files, 1)),
        "train_test_split.txt": "1 1\n2 0\n3 0\n",
        "image_class_labels.txt": "1 1\n2 1\n3 2\n",
        "bounding_boxes.txt": "1 6.0 2.5 30.0 20.0\n2 0 0 48 32\n3 1 1 60 10\n",
        "classes.txt": "1 001.Black_footed\n2 002.Laysan\n",
    }
    targets = {_text(tmp_path / name, text): damage.damage_text for name, text in lists.items()}
    _survives(targets, lambda: _boxes_inside(load_cub(tmp_path, "all")), 7, count=2 * COUNT)


# --------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("labels", ["list", "boxes", "masks"])
def test_damaged_lists_annotations_and_masks_of_voc(tmp_path, labels):
    ids = ["2007_000032", "2007_000039"]
    names = "<object><name>aeroplane</name></object><object><name>person</name></object>"
    targets = {}
    for image_id in ids:
        _picture(tmp_path / "JPEGImages" / f"{image_id}.jpg")
        targets[_labels(tmp_path / "SegmentationClass" / f"{image_id}.png")] = damage.damage_png
        path = tmp_path / "Annotations" / f"{image_id}.xml"
        targets[_text(path, f"<annotation>{names}</annotation>")] = damage.damage_text
    listed = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    targets[_text(listed, "\n".join(ids) + "\n")] = damage.damage_text
    classes = "".join(f"{image_id} 0 14\n" for image_id in ids)
    targets[_text(tmp_path / "val_cls.txt", classes)] = damage.damage_text
    _survives(targets, lambda: _masks_fit(load_voc(tmp_path, labels=labels)), labels)


def _packed(runs):
    """Runs as COCO packs them: differences, five bits at a time."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text += chr(48 + digit + 32 * more)
            if not more:
                break
    return text


def _coco_table():
    outline = [2, 2, 30, 2, 30, 20, 2, 20]
    rows = [
        ([outline, [35, 5, 45, 5, 40, 30]], 0), ({"size": [32, 48], "counts": [5, 100, 1431]}, 1),
        ({"size": [32, 48], "counts": _packed([900, 20, 12, 20, 584])}, 0),
    ]  # fmt: skip
    return {
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": 32, "width": 48} for i in (1, 2)
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"id": k, "image_id": 1 + k % 2, "category_id": (90, 1)[k % 2], "iscrowd": crowd,
             "segmentation": region, "area": 100.0, "bbox": [2, 2, 28, 18]}
            for k, (region, crowd) in enumerate(rows)
        ],
    }  # fmt: skip


def test_damaged_instances_of_coco(tmp_path):
    for number in (1, 2):
        _picture(tmp_path / "val2017" / f"{number:012d}.jpg")
    path = _text(tmp_path / "annotations/instances_val2017.json", json.dumps(_coco_table()))

    def read():
        data = load_coco(tmp_path)
        _masks_fit(data)
        for item in data:  # by itself, each says what is wrong with it
            item.read_mask()

    _survives({path: damage.damage_json}, read, 9, count=4 * COUNT)


def test_damaged_maps_of_context(tmp_path):
    _picture(tmp_path / "JPEGImages" / "2008_000002.jpg")
    names = [f"thing{k}" for k in range(1, 460)]
    long = _text(tmp_path / "labels.txt", "".join(f"{k}: {n}\n" for k, n in enumerate(names, 1)))
    short = _text(tmp_path / "59_labels.txt", "1: thing7\n2: thing20\n")
    maps = tmp_path / "trainval" / "2008_000002.mat"
    maps.parent.mkdir()
    values = np.resize(np.arange(0, 460, 7, np.uint16), (SIZE[1], SIZE[0]))
    scipy.io.savemat(maps, {"other": np.eye(2), "LabelMap": values})
    targets = {maps: damage.damage, long: damage.damage_text, short: damage.damage_text}

    def read():
        data = load_context(tmp_path, labels=59)
        _masks_fit(data)
        data[0].read_mask()

    _survives(targets, read, 10, count=2 * COUNT)


def test_damaged_labels_of_surfaces(tmp_path):
    part, tiles = tmp_path / "Class1" / "Test", tmp_path / "tiles" / "MT_Crack"
    for folder, names in ((part, ("0001.PNG", "0002.PNG")), (tiles, ("exp1_num_1.jpg",))):
        for name in names:
            _picture(folder / name, "L")
    mask = Image.new("L", SIZE)
    ImageDraw.Draw(mask).ellipse((5, 5, 20, 25), fill=255)
    (part / "Label").mkdir()
    drawn = [part / "Label" / "0002_label.PNG", tiles / "exp1_num_1.png"]
    for path in drawn:
        mask.save(path)
    listed = "1\n1\t0\t0001.PNG\t0\t0\n2\t1\t0002.PNG\t1\t0002_label.PNG\n"
    listed = _text(part / "Label" / "Labels.txt", listed)
    targets = {listed: damage.damage_text} | dict.fromkeys(drawn, damage.damage_png)

    def read():
        _masks_fit(load_dagm(tmp_path))
        _masks_fit(load_magnetic_tile(tmp_path / "tiles"))

    _survives(targets, read, 11)


# ----------------------------------------------------------------------- what attnviz wrote itself


def test_a_damaged_memory(tmp_path):
    memory = AttentionMemory(
        {"a": (2, 3), "ö": (4, 4)}, {"a": [4, 0], "ö": [7]}, run_id="r", keep_last=True
    )
    memory.update("a", 4, torch.rand(2, 3))
    memory.save(tmp_path)

    def read():
        found = AttentionMemory.load(tmp_path)
        for key in found:
            assert ((found[key] >= 0) & (found[key] <= 1)).all()

    refused = _survives({tmp_path / FILE: damage.damage_tensors}, read, 12, count=2 * COUNT)
    assert refused > 1.9 * COUNT  # a checksum covers every byte; few changes make the same JSON


def test_a_damaged_recording(tmp_path):
    run = record(tmp_path / "run", epochs=2, history=True)
    kinds = {
        ".npz": damage.damage_zip, ".json": damage.damage_json, ".csv": damage.damage_text,
        ".png": damage.damage_png, ".jpg": damage.damage,
    }  # fmt: skip
    targets = {path: kinds[path.suffix] for path in run.rglob("*") if path.is_file()}

    def read():
        found = load_evolution(run)
        assert all("\n" not in line for line in found.skipped)
        for number, watched in enumerate(found.watched):
            assert found.maps[number].shape == (len(found.epochs), *watched.grid)
            found.picture(number)
            found.mask(number)

    _survives(targets, read, 13, count=2 * COUNT)


@dataclass(frozen=True)
class _Config:
    batch_size: int = 4
    device: str = "cpu"
    precision: str = "32"
    threads: int = 1
    network: str = "scenes"


def test_a_damaged_checkpoint(tmp_path):
    fabric = runs.start_fabric(_Config())
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    state = {"config": asdict(_Config()), "history": [{"epoch": 1, "loss": 0.5}], "epoch": 1}
    runs.save_run(tmp_path, state, task=layer, optimizer=optimizer)

    def read():
        runs.open_run(_Config(), tmp_path, True, fabric, ("task", "optimizer", "epoch"))

    _survives({tmp_path / "checkpoint.pt": damage.damage_zip}, read, 14, count=2 * COUNT)


def test_a_damaged_config_of_a_run(tmp_path):
    (tmp_path / "memory").mkdir()
    _text(tmp_path / "metrics.json", "{}")
    run = Path(__file__).parent.parent / "data" / "runs" / "oaa"
    config = _text(tmp_path / "config.json", (run / "config.json").read_text())
    _survives({config: damage.damage_json}, lambda: read_config(tmp_path), 15)


def test_a_damaged_index_of_channels(tmp_path):
    net, path = attnviz.staged(Tiny()), tmp_path / "index.npz"
    items = [LabeledImage(f"{i}", _picture(tmp_path / f"{i}.png"), i, ()) for i in range(2)]

    def read():
        index = index_channels(net, items, top=2, cache=path, progress=False)
        assert len(index.sizes) == 2

    read()
    _survives({path: damage.damage_zip}, read, 16)


# ------------------------------------------------------------------------------------- networks


def test_damaged_weights(tmp_path):
    network, plain = oaa_network("scenes", 3), FiveStage(1, "conv").state_dict()
    tensors, saved = tmp_path / "a.safetensors", tmp_path / "b.pth"
    facts = network.metadata(["a", "b", "c"])
    safetensors.torch.save_file(network.state_dict(), tensors, facts)
    torch.save({f"module.{key}": value for key, value in plain.items()}, saved)

    def read():
        assert len(load_network("oaa", tensors).class_names) == 3
        oaa_network("scenes", 3, saved)

    targets = {tensors: damage.damage_tensors, saved: damage.damage_zip}
    _survives(targets, read, 17, count=COUNT // 4)


def test_a_damaged_segmentation_network(tmp_path):
    network = segmentation_network("scenes", 3, "random")
    path = tmp_path / "network.safetensors"
    facts = network.metadata(["a", "b", "c"])
    safetensors.torch.save_file(network.state_dict(), path, facts)

    def read():
        assert load_segmentation(tmp_path).class_count == 3

    _survives({path: damage.damage_tensors}, read, 18, count=COUNT // 4)
