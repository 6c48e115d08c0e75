import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import attnviz
from attnviz.cam import fuse, normalize
from attnviz.data.masks import read_label_picture, voc_colors
from attnviz.data.scenes import Scenes
from attnviz.labels import detect_saliency, saliency_labels, superpixels
from attnviz.memory import AttentionMemory
from attnviz.networks import oaa_network
from attnviz.oaa import attention
from attnviz.segment.pseudo import (
    LabelConfig,
    fused_maps,
    label_file,
    label_picture,
    memory_maps,
    network_maps,
    write_labels,
)

FAST = LabelConfig(rule="constant", least=0.0)


@dataclass(frozen=True)
class Drawn:
    image_id: str
    class_ids: tuple[int, ...]
    image: np.ndarray


def drawn(count, size=(24, 36)):
    random = np.random.default_rng(0)
    return [
        Drawn(f"p{i}", (3, 11), random.integers(0, 256, (*size, 3), dtype=np.uint8))
        for i in range(count)
    ]


def halves(item):
    # Left class 3, right class 11, with background between them.
    return torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]])


# ----------------------------------------------------------------------------------- one picture


def test_positions_in_the_maps_become_the_classes_of_the_picture():
    image = drawn(1)[0].image
    found = label_picture(image, halves(None), (3, 11), FAST)
    assert found.shape == (24, 36)
    assert (found[:, 0] == 4).all()
    assert (found[:, -1] == 12).all()
    assert set(np.unique(found)) == {0, 4, 12}


def test_the_first_rule_is_that_of_the_released_labels_with_built_in_saliency():
    scene = Scenes(count=1, size=80)[0]
    maps = torch.rand(len(scene.class_ids), 10, 10, generator=torch.Generator().manual_seed(0))
    found = label_picture(scene.image, maps, scene.class_ids)
    whole = torch.nn.functional.interpolate(maps[None], (80, 80), mode="bilinear")[0]
    plain = saliency_labels(whole, detect_saliency(scene.image))
    for position, class_id in enumerate(scene.class_ids):
        np.testing.assert_array_equal(found == 1 + class_id, plain == 1 + position)
    np.testing.assert_array_equal(found == 255, plain == 255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "grabcut"}, r"`rule` in \('saliency', .*, got 'grabcut'"),
        ({"crf": "deeplab"}, r"`crf` in \(None, 'oaa_caffe'.*, got 'deeplab'"),
        ({"superpixels": "mcg"}, r"`superpixels` in \(None, 'slic', 'felzenszwalb'\), got 'mcg'"),
        ({"rule": "superpixels"}, r"`superpixels` in \('slic', .* for their rule, got None"),
        ({"least": 1.5}, r"`least` from 0 to 1, got 1.5"),
        ({"count": 0}, r"`count` of at least 1, got 0"),
        ({"strength": -1.0}, r"`strength` of at least 0, got -1.0"),
    ],
)
def test_a_config_that_means_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LabelConfig(**changes)


def test_maps_that_do_not_fit_the_picture_are_refused():
    image, maps = drawn(1)[0].image, halves(None)
    with pytest.raises(ValueError, match="a map for each of 1 classes, got 2"):
        label_picture(image, maps, (3,))
    with pytest.raises(ValueError, match="finite maps"):
        label_picture(image, maps * torch.nan, (3, 11))
    with pytest.raises(ValueError, match="saliency of 24 x 36, the picture's size, got 36 x 24"):
        label_picture(image, maps, (3, 11), saliency=torch.zeros(36, 24))
    with pytest.raises(ValueError, match="classes from 0 to 253, got 254"):
        label_picture(image, maps, (3, 254))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((24, 36, 3))}, "picture of uint8, got float64; attnviz.images.to_pix"),
        ({"image": torch.zeros(24, 36, 3)}, "picture as an array of uint8, got Tensor"),
        ({"maps": np.ones((2, 1, 3))}, "`maps` as a tensor, got ndarray; torch.from_numpy makes"),
        ({"maps": torch.ones(2, 3)}, r"`maps` of shape \(k, h, w\), got \(2, 3\)"),
        ({"saliency": np.ones((24, 36))}, "`saliency` as a tensor, got ndarray"),
        ({"class_ids": [0.5, 1]}, r"classes as whole numbers, got \[0.5, 1\]"),
        ({"class_ids": None}, "classes as whole numbers, got None"),
        ({"class_ids": [3, 3]}, r"each class once, got \[3, 3\]; join the maps of a class"),
    ],
)
def test_what_is_no_picture_map_or_class_is_refused_in_one_line(changes, message, untyped):
    given = {"image": drawn(1)[0].image, "maps": halves(None), "class_ids": (3, 11), **changes}
    for config in (FAST, replace(FAST, crf="maps")):
        with pytest.raises((TypeError, ValueError), match=f"^expected .*{message}"):
            label_picture(config=config, **given)


def test_a_saliency_that_is_no_name_is_refused(untyped):
    for value in (3, None, Path("saliency")):
        with pytest.raises(TypeError, match="^expected `saliency` as 'detect' or the name of a"):
            LabelConfig(saliency=value)


@pytest.mark.parametrize("kind", ["slic", "felzenszwalb"])
def test_superpixels_keep_a_label_within_their_borders(kind):
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 41:] = 220
    y, x = torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 60), indexing="ij")
    maps = (1 - (x + y) / 2)[None]  # its borders are slanted
    config = replace(FAST, strength=0.5, superpixels=kind, count=30)
    regions = superpixels(image, kind, 30)
    plain = label_picture(image, maps, (0,), replace(config, superpixels=None))
    means = label_picture(image, maps, (0,), config)
    votes = label_picture(image, maps, (0,), replace(config, rule="superpixels", threshold=0.5))

    def broken(labels):
        return sum(len(np.unique(labels[regions == r])) > 1 for r in range(regions.max() + 1))

    assert broken(plain) > 0
    assert broken(means) == broken(votes) == 0
    assert set(np.unique(votes)) == {0, 1}


# ------------------------------------------------------------------------------------ a data set


def test_label_pictures_have_vocs_colors_and_read_back(tmp_path):
    run = write_labels(drawn(2), halves, tmp_path / "out", FAST, progress=False)
    assert (run.written, run.kept, run.problems) == (2, 0, {})
    path = label_file(run.folder, "p1")
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert picture.getpalette()[12:15] == voc_colors()[4].tolist()
    wanted = label_picture(drawn(2)[1].image, halves(None), (3, 11), FAST)
    np.testing.assert_array_equal(read_label_picture(path), wanted)


@pytest.mark.slow
def test_processes_write_the_same_labels_as_one(tmp_path):
    config = LabelConfig(superpixels="slic", count=50, crf="maps", least=0.0)
    items = [*Scenes(count=4, size=64)]

    def maps(item):
        seed = torch.Generator().manual_seed(int(item.image_id[-6:]))
        count = len(item.class_ids) + (item is items[2])  # one too many
        return torch.rand(count, 8, 8, generator=seed)

    one, two = (
        write_labels(items, maps, tmp_path / str(n), config, workers=n, progress=False)
        for n in (0, 2)
    )
    assert one.written == two.written == 3
    assert one.problems == two.problems
    assert list(one.problems) == [items[2].image_id]
    for path in one.folder.glob("*.png"):
        assert path.read_bytes() == (two.folder / path.name).read_bytes()


def test_a_finished_label_is_not_made_again(tmp_path):
    asked = []

    def maps(item):
        asked.append(item.image_id)
        return halves(item)

    write_labels(drawn(2), maps, tmp_path, FAST, progress=False)
    before = label_file(tmp_path, "p0").stat().st_mtime_ns
    (tmp_path / ".p2.png.77.part").write_bytes(b"half")
    run = write_labels(drawn(4), maps, tmp_path, FAST, progress=False)
    assert (run.written, run.kept) == (2, 2)
    assert asked == ["p0", "p1", "p2", "p3"]
    assert label_file(tmp_path, "p0").stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".*"))


def test_labels_made_in_another_way_are_refused(tmp_path):
    write_labels(drawn(1), halves, tmp_path, FAST, progress=False)
    with pytest.raises(ValueError, match=r"\(strength None\), got strength 0\.3; name another"):
        write_labels(drawn(2), halves, tmp_path, replace(FAST, strength=0.3), progress=False)
    with pytest.raises(ValueError, match=r"maps\.maps 'halves'.* got maps\.maps '<lambda>'"):
        write_labels(drawn(2), lambda item: halves(item), tmp_path, FAST, progress=False)
    assert not label_file(tmp_path, "p1").exists()
    (tmp_path / "labels.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged; delete the folder"):
        write_labels(drawn(1), halves, tmp_path, FAST, progress=False)
    (tmp_path / "labels.json").unlink()
    with pytest.raises(ValueError, match=r"record labels\.json of the labels in .*, found none"):
        write_labels(drawn(1), halves, tmp_path, FAST, progress=False)


class Halves:
    def __call__(self, item):
        return halves(item)


def test_labels_of_a_function_without_a_name_are_not_kept(tmp_path):
    for number, make in enumerate([lambda item: halves(item), partial(halves), Halves()]):
        out = tmp_path / str(number)
        write_labels(drawn(1), make, out, FAST, progress=False)
        with pytest.raises(ValueError, match="^expected maps of a function with a name for the"):
            write_labels(drawn(2), make, out, FAST, progress=False)
    named = Halves()
    named.provenance = {"kind": "halves"}
    for kept in (0, 1):
        run = write_labels(drawn(1), named, tmp_path / "named", FAST, progress=False)
        assert run.kept == kept


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_label_that_was_damaged_is_made_again(tmp_path, damage):
    write_labels(drawn(2), halves, tmp_path, FAST, progress=False)
    path = label_file(tmp_path, "p0")
    whole = path.read_bytes()
    middle = whole.index(b"IDAT") + 10
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes(
        {"cut": whole[:-9], "empty": b"", "flipped": flipped, "text": b"label"}[damage]
    )
    run = write_labels(drawn(2), halves, tmp_path, FAST, progress=False)
    assert (run.written, run.kept) == (1, 1)
    assert path.read_bytes() == whole
    wrong = [replace(drawn(1)[0], image=None)]
    path.write_bytes(whole[:-9])
    assert list(write_labels(wrong, halves, tmp_path, FAST, progress=False).problems) == ["p0"]
    assert not path.exists()  # what no reader could read


def test_a_picture_that_comes_twice_counts_once(tmp_path):
    run = write_labels(drawn(2) + drawn(2), halves, tmp_path, FAST, progress=False)
    assert (run.written, run.kept) == (2, 0)
    run = write_labels(drawn(3) + drawn(1), halves, tmp_path, FAST, progress=False)
    assert (run.written, run.kept) == (1, 2)


def test_pictures_with_problems_stop_nothing_and_are_tried_again(tmp_path):
    items = drawn(5)
    saliency = tmp_path / "saliency"
    saliency.mkdir()
    for item in items:
        Image.fromarray(np.full((24, 36), 200, np.uint8)).save(saliency / f"{item.image_id}.png")
    (saliency / "p0.png").unlink()
    (saliency / "p1.png").write_bytes((saliency / "p2.png").read_bytes()[:40])
    Image.fromarray(np.zeros((36, 24), np.uint8)).save(saliency / "p2.png")

    def maps(item):
        if item.image_id == "p3":
            raise KeyError("expected an image of this memory, got 'p3'")
        return halves(item)

    config = LabelConfig(saliency=str(saliency))
    out = tmp_path / "out"
    run = write_labels(items, maps, out, config, progress=False)
    assert (run.written, sorted(run.problems)) == (1, ["p0", "p1", "p2", "p3"])
    assert "expected the saliency of 'p0', found no" in run.problems["p0"]
    assert "damaged" in run.problems["p1"]
    assert "saliency of 24 x 36, the picture's size, got 36 x 24" in run.problems["p2"]
    assert run.problems["p3"] == "expected an image of this memory, got 'p3'"
    assert json.loads((out / "problems.json").read_text()) == run.problems
    Image.fromarray(np.full((24, 36), 200, np.uint8)).save(saliency / "p0.png")
    again = write_labels(items, maps, out, config, progress=False)
    assert (again.written, again.kept, len(again.problems)) == (1, 1, 3)


def test_no_kind_of_problem_ends_a_run(tmp_path):
    wrong = {
        "p0": lambda item: np.ones((2, 1, 3), np.float32),  # an array is as good as a tensor
        "p1": lambda item: torch.ones(2, 0, 4),
        "p2": lambda item: torch.ones(2, 3) @ torch.ones(2, 3),
        "p3": halves,
        "p4": halves,
    }
    items = drawn(5)
    items[3] = replace(items[3], class_ids=(-1, 2))
    items[4] = replace(items[4], image=None)
    run = write_labels(items, lambda item: wrong[item.image_id](item), tmp_path, FAST)
    assert (run.written, sorted(run.problems)) == (1, ["p1", "p2", "p3", "p4"])
    assert run.problems["p3"] == "expected classes from 0 to 253, got -1"


def test_a_second_run_in_a_folder_is_kept_out(tmp_path):
    def maps(item):
        with pytest.raises(FileExistsError, match="expected no other label run in"):
            write_labels(drawn(1), halves, tmp_path, FAST, progress=False)
        return halves(item)

    assert write_labels(drawn(1), maps, tmp_path, FAST, progress=False).written == 1


def test_a_saliency_folder_counts_as_the_saliency_it_holds(tmp_path):
    item = drawn(1)[0]
    values = np.random.default_rng(5).integers(0, 256, (24, 36), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "p0.png")
    config = LabelConfig(saliency=str(tmp_path))
    write_labels([item], halves, tmp_path / "out", config, progress=False)
    wanted = label_picture(
        item.image, halves(item), (3, 11), saliency=torch.from_numpy(values / 255).float()
    )
    np.testing.assert_array_equal(read_label_picture(tmp_path / "out" / "p0.png"), wanted)


def test_a_run_that_cannot_work_says_so_before_it_starts(tmp_path, monkeypatch):
    config = LabelConfig(saliency=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="folder of saliency pictures, got '.*nowhere'"):
        write_labels(drawn(1), halves, tmp_path / "out", config)
    with pytest.raises(ValueError, match="at least one picture in `items`, got none"):
        write_labels([], halves, tmp_path / "out", FAST, progress=False)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(NotADirectoryError, match="^expected a folder for labels, got the fi"):
            write_labels(drawn(1), halves, out, FAST, progress=False)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ImportError, match="pydensecrf2"):
        write_labels(drawn(1), halves, tmp_path / "other", LabelConfig(crf="maps"))
    assert not (tmp_path / "other").exists()


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
from test_segment_pseudo import FAST, drawn, slowly
from attnviz.segment.pseudo import write_labels
if __name__ == "__main__":
    write_labels(drawn(100), slowly, sys.argv[1], FAST, workers=1, progress=False)
"""


def slowly(item):
    time.sleep(0.05)
    return halves(item)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX")
def test_a_killed_run_leaves_whole_labels_and_no_process_and_goes_on(tmp_path):
    out, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(SCRIPT)
    call = [sys.executable, str(script), str(out), str(Path(__file__).parent)]
    child = subprocess.Popen(call, start_new_session=True)
    try:
        wait_until(lambda: len(list(out.glob("*.png"))) > 5)
        child.send_signal(signal.SIGKILL)
        child.wait()
        wait_until(lambda: not group_alive(child.pid))
    finally:
        if group_alive(child.pid):
            os.killpg(child.pid, signal.SIGKILL)
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 5 < len(there) < 100
    for name in there:
        assert read_label_picture(out / name).shape == (24, 36)
    run = write_labels(drawn(100), slowly, out, FAST, progress=False)
    assert (run.kept, run.written) == (len(there), 100 - len(there))
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there


def wait_until(done, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def group_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ---------------------------------------------------------------------------- where maps come from


def test_accumulated_maps_come_in_the_order_of_the_classes(tmp_path):
    memory = AttentionMemory({"p0": (2, 3)}, {"p0": [3, 11]}, run_id="a")
    left, right = torch.eye(2, 3), torch.eye(2, 3).flip(1)
    memory.update("p0", 3, left)
    memory.update("p0", 11, right)
    memory.save(tmp_path / "memory")
    maps_of = memory_maps(tmp_path)
    item = drawn(1)[0]
    assert torch.equal(maps_of(item), torch.stack([left, right]))
    assert torch.equal(maps_of(replace(item, class_ids=(11,))), right[None])
    assert maps_of(replace(item, class_ids=())).shape[0] == 0
    assert maps_of.provenance["run_id"] == "a"
    with pytest.raises(KeyError, match="got 'p7'"):
        maps_of(replace(item, image_id="p7"))


def test_fused_maps_are_those_of_the_pictures_own_classes():
    net = attnviz.load_network("scenes_conv")
    scene = next(scene for scene in Scenes(count=20) if len(scene.class_ids) > 1)
    found = fused_maps(net, "layercam", stages=[3, 4])(scene)
    image = net.preprocess(scene.image)
    for position, class_id in enumerate(scene.class_ids):
        maps = attnviz.stage_maps(net, image, class_id, stages=[3, 4])["layercam"]
        torch.testing.assert_close(found[position], fuse(maps)[0])
    single = fused_maps(net, "gradcam", stages=[5])(scene)
    maps = attnviz.stage_maps(net, image, [list(scene.class_ids)], ("gradcam",), stages=[5])
    torch.testing.assert_close(single, normalize(maps["gradcam"][0][0]))
    with pytest.raises(ValueError, match="`method` in .*, got 'gradcam\\+\\+'"):
        fused_maps(net, "gradcam++")


@pytest.mark.parametrize("integral", [False, True])
def test_the_network_of_a_run_gives_its_class_maps(tmp_path, integral):
    torch.manual_seed(0)
    network = oaa_network("scenes", 6, "random").eval()
    run = tmp_path / "run"
    run.mkdir()
    safetensors.torch.save_file(
        network.state_dict(), run / "network.safetensors", network.metadata()
    )
    source = {"size": 96, "fit": "aspect"}
    if integral:
        (tmp_path / "config.json").write_text(json.dumps(source))
        source = {"run": str(tmp_path)}
    (run / "config.json").write_text(json.dumps(source))
    maps_of = network_maps(run)
    scene = Scenes(count=1, size=96)[0]
    mean, std = (torch.tensor(part)[:, None, None] for part in (network.mean, network.std))
    image = (torch.from_numpy(scene.image).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        wanted = attention(network.class_maps(image[None]))[0, list(scene.class_ids)]
    assert wanted.max() == 1
    torch.testing.assert_close(maps_of(scene), wanted)
