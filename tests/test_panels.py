import base64
import io
import json
import os
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from traitlets import TraitError

from attnviz import cam, colors, localize, staged
from attnviz.panels import LayerCAMPanel, explore_stages
from attnviz.panels.panel import source

CLASSES = [(7, "heron", 12.0), (2, "boat", 9.0)]
SIZES = [(12, 16), (6, 8), (3, 4)]


def _maps(seed):
    generator = np.random.default_rng(seed)
    return {
        name: [generator.random(size).astype(np.float32) ** 3 for size in SIZES]
        for name in ("layercam", "gradcam")
    }


def _picture(height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _panel(**settings):
    return LayerCAMPanel(_picture(), CLASSES, [_maps(1), _maps(2)], **settings)


def _two(**settings):
    maps = [_maps(1), _maps(2)]
    return LayerCAMPanel(
        [_picture(), _picture(30, 20)], [CLASSES, CLASSES[1:]], [maps, maps[1:]], **settings
    )


# ---------------------------------------------------------------------------------------- traits


def test_panel_opens_on_the_best_class_and_the_deepest_three_stages():
    panel = _panel()
    assert (panel.class_id, panel.class_name, panel.method) == (7, "heron", "layercam")
    assert (panel.stages, panel.gamma, panel.scaled) == ([1, 2, 3], 2.0, "shallow")
    assert repr(panel) == (
        "LayerCAMPanel(1 picture, 'heron', layercam, stages [1, 2, 3], gamma 2)"
    )


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("gamma", -1.0, r"expected `gamma` in \(0, 8\], got -1; the thesis"),
        ("gamma", float("nan"), r"expected `gamma` in \(0, 8\], got nan"),
        ("stages", [0], r"expected `stages` from 1 to 3, got \[0\]; 1 is the shallowest"),
        ("stages", [1, 4], r"expected `stages` from 1 to 3, got \[1, 4\]"),
        ("opacity", 1.5, r"expected `opacity` in \[0, 1\], got 1.5"),
        ("threshold", 1.0, r"expected `threshold` in \[0, 1\), got 1; it is a share"),
        ("scaling", "log", r"expected `scaling` in \('none', 'tanh', 'sqrt', 'tan'\), got 'log'"),
        ("scaled", "some", r"expected `scaled` in \('shallow', 'all', 'none'\), got 'some'"),
        ("palette", "rainbow", r"expected `palette` in \('inferno', .*got 'rainbow'"),
        ("method", "lrp", r"expected `method` in \('layercam', 'gradcam'\), got 'lrp'"),
        ("class_id", 9, r"expected `class_id` in \[7, 2\], got 9; explore_stages takes"),
        ("image_index", 1, r"expected `image_index` in \[0, 1\), got 1; the panel has 1 picture"),
        ("box", None, "box.*read-only"),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(setting, value, message):
    panel = _panel()
    before = getattr(panel, setting)
    with pytest.raises(TraitError, match=message):
        setattr(panel, setting, value)
    assert getattr(panel, setting) == before


def test_wrong_settings_are_refused_by_the_constructor():
    with pytest.raises(TraitError, match=r"expected `gamma` in \(0, 8\], got 9"):
        _panel(gamma=9)
    with pytest.raises(TypeError, match=r"got `gama`; the nearest are \['gamma'\]"):
        _panel(gama=2)
    with pytest.raises(TypeError, match="expected a setting of the panel, got `box`"):
        _panel(box=(0, 0, 1, 1))


def test_stages_are_sorted_once_and_may_be_empty():
    panel = _panel(stages=[3, 1, 3])
    assert panel.stages == [1, 3]
    panel.stages = []
    np.testing.assert_array_equal(panel.fused(), np.zeros((24, 32)))
    assert panel.box is None


def test_another_picture_without_the_class_shows_its_first_class():
    panel = _two()
    panel.image_index = 1
    assert (panel.class_id, panel.class_name) == (2, "boat")
    assert panel.render().shape == (30, 20, 3)
    assert _two(image_index=1).class_id == 2


def test_browser_state_is_taken_as_one_change():
    panel = _two()
    panel.set_state({"image_index": 1, "class_id": 2, "gamma": 3, "threshold": 0.5})
    assert (panel.image_index, panel.class_id, panel.gamma) == (1, 2, 3)
    assert panel.box == _box(panel)


# --------------------------------------------------------------------------------- what is drawn


def _box(panel):
    fused = torch.from_numpy(panel.fused())
    return localize.map_to_box(fused, panel.threshold)


def test_render_is_the_fusion_of_the_maps_up_to_8_bits():
    for settings in (
        {},
        {"gamma": 6.0, "scaled": "all", "stages": [1, 2]},
        {"scaling": "sqrt", "scaled": "none", "method": "gradcam", "palette": "jet"},
        {"scaling": "tan", "scaled": "all", "class_id": 2, "opacity": 0.3},
    ):
        panel = _panel(**settings)
        raw = _maps(1 if panel.class_id == 7 else 2)[panel.method]
        chosen = [torch.from_numpy(raw[stage - 1])[None] for stage in panel.stages]
        fused = cam.normalize(
            cam.fuse(chosen, panel.gamma, (24, 32), scaling=panel.scaling, scaled=panel.scaled)
        )[0].numpy()
        np.testing.assert_allclose(panel.fused(), fused, atol=0.025)
        expected = colors.overlay(
            _picture(), panel.fused(), opacity=panel.opacity, palette=panel.palette
        )
        np.testing.assert_array_equal(panel.render(), expected)


def test_box_follows_the_settings():
    panel = _panel()
    assert panel.box == _box(panel)
    seen = []
    panel.observe(lambda change: seen.append(change.new), "box")
    panel.threshold = 0.6
    assert panel.box == _box(panel)
    assert seen == [panel.box]


def test_large_pictures_are_reduced_and_boxes_keep_their_own_pixels():
    maps = {"layercam": [np.pad(np.ones((2, 2), np.float32), ((0, 2), (0, 2)))]}
    panel = LayerCAMPanel(_picture(600, 900), CLASSES[:1], [maps], threshold=0.5)
    assert panel.render().shape == (299, 448, 3)
    np.testing.assert_allclose(panel.box, (0, 0, 450, 300), atol=2)


def test_zero_map_leaves_the_picture_and_has_no_box():
    maps = {"layercam": [np.zeros(size, np.float32) for size in SIZES]}
    panel = LayerCAMPanel(_picture(), CLASSES[:1], [maps])
    np.testing.assert_array_equal(panel.render(), _picture())
    assert panel.box is None


def test_negative_values_of_a_map_count_as_zero():
    maps = {"cam": [np.array([[-5.0, 1.0]], np.float32)]}
    panel = LayerCAMPanel(_picture(), CLASSES[:1], [maps], stages=[1])
    assert panel.fused()[0, 0] == 0


# ----------------------------------------------------------------------------------- what is sent


def test_maps_are_sent_once_as_8_bit_levels_of_their_maximum():
    panel = _two()
    record = panel.state["_data"]["pictures"][0]
    block = np.frombuffer(zlib.decompress(record["maps"]), np.uint8)
    assert len(block) == 2 * 2 * sum(height * width for height, width in SIZES)
    assert record["sizes"] == [list(size) for size in SIZES]
    raw = _maps(1)["layercam"][0]
    np.testing.assert_array_equal(
        block[: raw.size].reshape(raw.shape), np.floor(raw / raw.max() * 255 + 0.5)
    )
    second = _maps(2)["layercam"][0]
    difference = block[raw.size : 2 * raw.size].reshape(raw.shape)
    restored = (block[: raw.size].reshape(raw.shape) + difference).astype(np.uint8)
    np.testing.assert_array_equal(restored, np.floor(second / second.max() * 255 + 0.5))


def test_setting_a_trait_sends_no_data_again():
    panel = _panel()
    sent = []
    panel.send_state = lambda key=None: sent.append(key)
    panel.gamma = 3.0
    assert "_data" not in repr(sent)


def test_notebook_keeps_a_picture_beside_the_widget():
    panel = _panel(boxes=[(2, 3, 20, 19)])
    bundle, _ = panel._repr_mimebundle_()
    assert bundle["text/plain"] == repr(panel)
    assert "0x" not in bundle["text/plain"]
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"])))
    assert picture.size == (320, 240)  # 32 x 24, ten times as large
    drawn = panel.picture()
    assert (drawn[30, 20:200] == 255).all()
    assert "application/vnd.jupyter.widget-view+json" in bundle


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [_picture()] * 2}, "expected 2 entries in `classes`.*got 1"),
        ({"images": []}, "expected at least one picture in `images`"),
        ({"images": [_picture()[..., :2]]}, r"expected pictures of shape \(height, width, 3\)"),
        ({"maps": [[_maps(1)]]}, "expected one entry in `maps` for each class of picture 0"),
        ({"maps": [[_maps(1), {"layercam": _maps(1)["layercam"]}]]}, "expected 3 stage maps for"),
        (
            {"maps": [[_maps(1), {k: v[::-1] for k, v in _maps(1).items()}]]},
            "expected the maps of a stage in one size",
        ),
        (
            {"maps": [[_maps(1), {k: [x * np.nan for x in v] for k, v in _maps(1).items()}]]},
            "expected finite maps",
        ),
        ({"stage_names": ["one"]}, "expected 3 names in `stage_names`.*got 1"),
        ({"boxes": [[(5, 5, 5, 9)]]}, "expected `boxes` of .* with x0 < x1"),
    ],
)
def test_data_that_does_not_fit_is_refused(change, message):
    good = {"images": [_picture()], "classes": [CLASSES], "maps": [[_maps(1), _maps(2)]]}
    with pytest.raises(ValueError, match=message):
        LayerCAMPanel(**good | change)


@pytest.mark.usefixtures("untyped")
def test_pictures_of_another_type_are_refused():
    with pytest.raises(TypeError, match="expected pictures as uint8 arrays, got float64"):
        LayerCAMPanel([_picture() / 255], [CLASSES], [[_maps(1), _maps(2)]])


# ------------------------------------------------------------------------------- the saved page


def test_saved_page_holds_everything_and_asks_for_nothing(tmp_path):
    panel = LayerCAMPanel(
        _picture(), [(7, "</script><b>heron", 1.0)], [_maps(1)], gamma=3.5, network="net <1>"
    )
    path = panel.save_html(tmp_path / "panel.html")
    assert path == tmp_path / "panel.html"
    text = path.read_text("utf-8")
    assert re.findall(r"https?://[\w.]*", text.replace("http://www.w3.org/2000/svg", "")) == []
    assert not re.search(r"<(link|img|iframe)|\ssrc=|@import|url\(", text)
    assert "default-src 'none'" in text
    assert "unsafe" not in text
    assert text.count("</script>") == 2
    assert "<title>LayerCAMPanel(net &lt;1&gt;" in text
    data = json.loads(re.search(r'id="data">(.*)</script>', text)[1])
    state = data["panels"][0]["state"]
    assert state["gamma"] == 3.5
    assert state["box"] == list(panel.box)
    assert not any(name in state for name in ("_esm", "layout", "_model_module"))
    assert [file.name for file in tmp_path.iterdir()] == ["panel.html"]


def test_saved_page_replaces_the_old_one(tmp_path):
    path = tmp_path / "panel.html"
    path.write_text("old")
    _panel().save_html(str(path))
    assert path.read_text("utf-8").startswith("<!doctype html>")


def test_page_that_cannot_be_saved_leaves_nothing(tmp_path, monkeypatch):
    panel = _panel()
    missing = tmp_path / "missing" / "panel.html"
    with pytest.raises(FileNotFoundError, match=r"an existing folder, got .*; create '.*missing'"):
        panel.save_html(missing)
    with pytest.raises(IsADirectoryError, match="expected a file in `path`, got the folder"):
        panel.save_html(tmp_path)
    target = tmp_path / "panel.html"
    target.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"writable folder, got .* \(No space left.*\); save"):
        panel.save_html(target)
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["panel.html"]


def test_folder_that_is_read_only_is_named(tmp_path, monkeypatch):
    def refuse(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"`path` in a writable folder, got .*denied"):
        _panel().save_html(tmp_path / "panel.html")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- explore_stages


@pytest.fixture
def net(tiny):
    return staged(tiny, class_names=["cat", "dog", "owl", "eel"], image_size=(32, 40))


def test_explore_stages_shows_the_maps_of_stage_maps(net):
    from attnviz import stage_maps

    image = _picture(32, 40)
    panel = explore_stages(net, image, "owl", classes=2, gamma=3.0)
    entries = panel.state["_data"]["pictures"][0]["classes"]
    scores = net(net.preprocess(image))[0]
    assert panel.class_id == entries[0]["id"] == 2
    assert entries[0]["name"] == "owl"
    assert [entry["score"] for entry in entries] == [
        float(scores[entry["id"]]) for entry in entries
    ]
    assert {2, *scores.topk(2).indices.tolist()} == {entry["id"] for entry in entries}
    found = stage_maps(net, net.preprocess(image), [2])["layercam"]
    fused = cam.normalize(cam.fuse([stage.float() for stage in found], 3.0, (32, 40)))[0]
    np.testing.assert_allclose(panel.fused(), fused.numpy(), atol=0.02)


def test_explore_stages_takes_what_people_have(net, tmp_path):
    Image.fromarray(_picture(32, 40)).save(tmp_path / "pond.png")
    image = _picture(32, 40, seed=1)
    pictures = [tmp_path / "pond.png", image, Image.fromarray(image)]
    panel = explore_stages(net, pictures, [3, None, ["cat", 1]], methods=["gradcam"])
    records = panel.state["_data"]["pictures"]
    assert [record["name"] for record in records] == ["pond", "picture 2", "picture 3"]
    assert records[0]["classes"][0]["id"] == 3
    assert [entry["id"] for entry in records[2]["classes"]][:2] == [0, 1]
    assert panel.method == "gradcam"


def test_explore_stages_turns_a_tensor_back_into_pixels(net):
    image = _picture(32, 40)
    panel = explore_stages(net, net.preprocess(image), opacity=0.0)
    np.testing.assert_allclose(panel.render().astype(int), image, atol=1)


def test_explore_stages_refuses_what_it_cannot_show(net):
    with pytest.raises(TypeError, match="got `gama`"):
        explore_stages(net, _picture(), gama=2)
    with pytest.raises(ValueError, match="expected 2 entries in `class_ids`"):
        explore_stages(net, [_picture(), _picture()], [1])


# ----------------------------------------------------------------------------------- JavaScript


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_functions_in_javascript():
    script = Path(__file__).with_name("panels.test.mjs")
    result = subprocess.run(
        ["node", "--test", str(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_every_control_keeps_its_keys_from_the_notebook():
    module = source("layercam")
    assert '["input", "select", "button"].includes(name)' in module
    created = set(re.findall(r"document\.createElement\w*\((.*?)\)", module))
    assert created == {"name", '"http://www.w3.org/2000/svg", name'}
