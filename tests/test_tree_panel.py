import base64
import copy
import io
import json
import re
import shutil
import subprocess
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from traitlets import TraitError

from attnviz import cam, cli, colors, evidence, explore_evidence, explore_stages, staged
from attnviz.panels.panel import source
from attnviz.panels.tree import crop_map, crop_picture

NAMES = ["cat", "dog", "</script><img src=x onerror=alert(1)>", "eel"]


def _picture(height=32, width=40, seed=0):
    generator = np.random.default_rng(seed)
    rough = generator.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height)))


@pytest.fixture
def net(tiny):
    return staged(tiny, class_names=NAMES, image_size=(32, 40), name="tiny")


@pytest.fixture
def panel(net):
    return explore_evidence(net, _picture(), "cat", classes=4)


def _served(panel):
    """Collects what the panel sends, and waits for its thread."""
    sent = []
    panel.send = lambda content, buffers=None: sent.append((content, buffers))

    def ask(**request):
        panel._asked(panel, {"class_id": 0, **request}, [])
        panel._worker.submit(lambda: None).result(10)
        return sent

    return ask


def _families(panel):
    """All families that were sent, with their maps put back on the whole stage."""
    data = panel.state["_data"]
    sizes = {stage["stage"]: stage["size"] for stage in data["stages"]}
    found = {}
    for packet in data["packets"]:
        nodes = {node["id"]: node for node in packet["nodes"]}
        block = np.frombuffer(zlib.decompress(packet["maps"]) if packet["maps"] else b"", np.uint8)
        start = 0
        for family in packet["families"]:
            for child in family["children"]:
                top, left, rows, columns = child["window"]
                whole = np.zeros(sizes[nodes[child["id"]]["stage"]], np.uint8)
                part = block[start : start + rows * columns].reshape(rows, columns)
                whole[top : top + rows, left : left + columns] = part
                start += rows * columns
                child["whole"] = whole
            found[family["key"]] = family
        assert start == len(block)
    return found


# ---------------------------------------------------------------------------------------- links


def test_panel_opens_on_the_best_channel_of_the_best_class(net):
    image = _picture()
    panel = explore_evidence(net, image)
    scores = net(net.preprocess(image))[0]
    assert panel.class_ids == [int(scores.argmax())]
    first = panel.children()[0]
    assert panel.selected == f"{panel.class_ids[0]}/{first.stage}:{first.channel}"
    assert panel.opened == [str(panel.class_ids[0]), panel.selected]
    name = NAMES[panel.class_ids[0]]
    assert repr(panel) == f"TreePanel(tiny, {name!r}, 2 open, selected {panel.selected!r})"


def test_link_restores_a_path_and_opens_what_lies_on_it(panel, net):
    first = panel.children()[1]
    second = panel.children(f"3:{first.channel}")[-1]
    link = f"3:{first.channel}/2:{second.channel}"
    other = explore_evidence(net, _picture(), "cat")
    other.selected = link
    assert other.selected == f"0/{link}"
    assert {"0", f"0/3:{first.channel}"} <= set(other.opened)


def test_selecting_in_another_class_shows_its_tree(panel):
    best = panel.children("3")[0]
    panel.selected = f"3/3:{best.channel}"
    assert panel.class_ids == [3]
    panel.class_ids = [1, 0]
    assert panel.selected == "1"
    assert {"0", "1"} <= set(panel.opened)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("0/3:99", r"expected a channel in \['3:\d.*got '3:99'"),
        ("dog", "a link looks like 281/5:112/4:57"),
        ("9", r"expected a class in \[0, .*got 9"),
        ("0/1:0", "got '1:0'"),
    ],
)
def test_wrong_links_are_refused_and_change_nothing(panel, link, message):
    before = panel.selected
    with pytest.raises(TraitError, match=f"expected `selected` to be a link in the.*{message}"):
        panel.selected = link
    assert panel.selected == before


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("class_ids", [], r"expected `class_ids` of one or two of \[0, .*got \[\]"),
        ("class_ids", [0, 1, 2], "expected `class_ids` of one or two"),
        ("class_ids", [17], r"got \[17\]; explore_evidence takes"),
        ("top", 0, "expected `top` from 1 to 8, got 0"),
        ("last_stage", 4, r"expected `last_stage` in \[1, 2, 3\], got 4"),
        ("opacity", -0.5, r"expected `opacity` in \[0, 1\], got -0.5"),
        ("palette", "rainbow", r"expected `palette` in \('inferno', .*got 'rainbow'"),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(panel, setting, value, message):
    before = getattr(panel, setting)
    with pytest.raises(TraitError, match=message):
        setattr(panel, setting, value)
    assert getattr(panel, setting) == before


def test_explore_evidence_refuses_what_it_cannot_show(net, tiny):
    with pytest.raises(TypeError, match="got `tops`; the nearest are"):
        explore_evidence(net, _picture(), tops=2)
    with pytest.raises(TypeError, match=r"attnviz.staged or attnviz.load_network, got Tiny"):
        explore_evidence(tiny, _picture())
    with pytest.raises(ValueError, match="expected a class of tiny, got 'owl'"):
        explore_evidence(net, _picture(), "owl")
    with pytest.raises(ValueError, match="at least one class in `class_ids`, got none"):
        explore_evidence(net, _picture(), [])
    with pytest.raises(TypeError, match=r"counts by \(stage, channel\), got int"):
        explore_evidence(net, _picture(), histograms=3)


# --------------------------------------------------------------------------------- what is sent


def test_browser_gets_the_numbers_and_maps_of_the_evidence(panel, net):
    image = net.preprocess(_picture())
    tree = evidence(net, image, 0, 8, depth=1)
    node = panel.children()[0].id
    tree.expand(node)
    families = _families(panel)
    assert set(families) == {"class:0", node}
    for key, parent in (("class:0", "class"), (node, node)):
        edges = [edge for edge in tree.edges if edge.parent == parent]
        edges = {edge.child: edge for edge in edges}
        children = families[key]["children"]
        alphas = [child["contribution"] for child in children]
        assert alphas == sorted(alphas, reverse=True)
        assert len(children) == min(len(edges), 8)
        for child in children:
            edge = edges[child["id"]]
            map = edge.map.clamp_min(0).numpy()
            np.testing.assert_allclose(child["contribution"], edge.contribution)
            np.testing.assert_allclose(child["share"], edge.share)
            np.testing.assert_allclose(child["maximum"], map.max())
            np.testing.assert_allclose(child["whole"] / 255, map / map.max(), atol=0.5 / 255)


def test_maps_are_sent_without_the_zeros_around_them(panel):
    node = panel.children()[0]
    family = _families(panel)[node.id]
    height, width = next(s["size"] for s in panel._data["stages"] if s["stage"] == 2)
    for child in family["children"]:
        _, _, rows, columns = child["window"]
        assert child["whole"].any()
        assert rows * columns < height * width / 4  # a neuron of stage 3 sees 4 x 4 places


def test_node_is_expanded_once_and_known_to_later_views(panel):
    ask = _served(panel)
    node = panel.children()[1].id
    count = len(panel._data["packets"])
    sent = ask(kind="expand", id="a:1", key=node)
    sent = ask(kind="expand", id="b:7", key=node)
    assert [content["id"] for content, _ in sent] == ["a:1", "b:7"]
    first, second = (content["packet"] for content, _ in sent)
    assert first == second
    assert [family["key"] for family in first["families"]] == [node]
    assert len(panel._data["packets"]) == count + 1
    assert sent[0][1] == [panel._data["packets"][-1]["maps"]]
    json.dumps(sent[0][0])


def test_classes_share_the_nodes_of_an_image(net):
    panel = explore_evidence(net, _picture(), "cat", classes=4, top=8)
    panel.grow(3)
    known = set(_families(panel))
    panel.class_ids = [3]
    panel.grow(3)
    families = _families(panel)
    tree = evidence(net, net.preprocess(_picture()), 3, 8)
    assert known & set(tree.nodes), "the classes share no node: this tests nothing"
    for parent in tree.explained:
        key = "class:3" if parent == "class" else parent
        children = [edge.child for edge in tree.children(parent)]
        assert [child["id"] for child in families[key]["children"]] == children
    panel.add_sketches()
    assert panel.picture().ndim == 3


def test_one_class_named_twice_is_not_compared_with_another(net):
    assert explore_evidence(net, _picture(), ["cat", "cat"]).class_ids == [
        *explore_evidence(net, _picture(), "cat").class_ids
    ]


def test_another_class_is_made_when_it_is_asked_for(panel):
    [(content, _)] = _served(panel)(kind="expand", id="a:1", class_id=3, key="class:3")
    assert [family["key"] for family in content["packet"]["families"]] == ["class:3"]


def test_work_is_done_in_one_thread_of_the_panel(panel):
    seen = []
    expand = panel._expand
    panel._expand = lambda *args: (seen.append(threading.current_thread().name), expand(*args))[1]
    ask = _served(panel)
    for number, node in enumerate(panel.children()):
        ask(kind="expand", id=f"a:{number}", key=node.id)
    assert len({*seen[-3:]}) == 1
    assert seen[-1].startswith("attnviz-tree")


def test_failure_is_answered_in_one_line(panel):
    [(content, _)] = _served(panel)(kind="expand", id="a:1", key="3:99@0,0")
    assert content == {"id": "a:1", "error": "expected a node of the tree, got '3:99@0,0'"}


def test_sketch_of_a_node_that_is_no_longer_selected_is_not_made(panel):
    gate, nodes = threading.Event(), panel.children()
    ask = _served(panel)
    panel._worker.submit(gate.wait)
    request = {"kind": "sketch", "class_id": 0}
    panel._asked(panel, request | {"id": "a:1", "key": nodes[0].id}, [])
    panel._asked(panel, request | {"id": "a:2", "key": nodes[1].id}, [])
    gate.set()
    sent = ask(kind="sketch", id="b:1", key=nodes[2].id)
    assert [content.get("packet", {}).get("sketches") for content, _ in sent] == [
        None, [nodes[1].id], [nodes[2].id],
    ]  # fmt: skip


def test_sketch_is_the_guided_gradient_in_the_receptive_field(panel, net):
    node = panel.children()[0]
    [(_, buffers)] = _served(panel)(kind="sketch", id="a:1", key=node.id)
    sketch = np.asarray(Image.open(io.BytesIO(buffers[1])).convert("RGB")).astype(int)
    x0, y0, x1, y1 = node.field
    assert sketch.shape == (y1 - y0, x1 - x0, 3)
    values = net.preprocess(_picture()).requires_grad_()
    x = values  # guided backpropagation, step by step, on the tiny network
    for index, layer in enumerate(net.model.convolutions):
        x = _Guided.apply(layer(nn.functional.max_pool2d(x, 2) if index else x))
    [gradient] = torch.autograd.grad(x[0, node.channel][node.peak], values)
    expected = gradient[0, :, y0:y1, x0:x1].permute(1, 2, 0).numpy()
    expected = expected / np.quantile(np.abs(expected), 0.995)
    expected = (expected.clip(-1, 1) / 2 + 0.5) * 255
    np.testing.assert_allclose(sketch, expected, atol=1)


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values.relu()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.relu() * (ctx.saved_tensors[0] > 0)


def test_setting_a_trait_sends_no_data_again(panel):
    sent = []
    panel.send_state = lambda key=None: sent.append(key)
    panel.opacity = 0.3
    panel.opened = ["0"]
    assert "_data" not in repr(sent)


def test_network_is_left_as_it_was(net, tiny):
    tiny.train()
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    panel = explore_evidence(net, _picture(), "cat")
    panel.grow(3)
    panel.add_sketches()
    assert tiny.training
    assert all(value.grad is None and value.requires_grad for value in tiny.parameters())
    assert all(not m._forward_hooks and not m._backward_hooks for m in tiny.modules())
    for name, value in tiny.state_dict().items():
        assert torch.equal(value, before[name])


# ------------------------------------------------------------------------------- what is drawn


def _average(image, box, size):
    """Bilinear resizing written as loops over pixels."""
    x0, y0, x1, y1 = box
    height, width = image.shape[:2]
    result = np.zeros((*size, image.shape[2]))
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((y0 + (i + 0.5) / size[0] * (y1 - y0)) * height - 0.5, 0), height - 1)
            x = min(max((x0 + (j + 0.5) / size[1] * (x1 - x0)) * width - 0.5, 0), width - 1)
            for row in range(height):
                for column in range(width):
                    weight = max(1 - abs(row - y), 0) * max(1 - abs(column - x), 0)
                    result[i, j] += weight * image[row, column]
    return result


def test_crop_is_a_bilinear_resize_of_the_box():
    image, box = _picture(12, 16), (0.25, 0.1, 0.9, 0.8)
    expected = _average(image.astype(float), box, (9, 11))
    np.testing.assert_array_equal(
        crop_picture(image, box, (9, 11)), np.floor(expected + 0.5).astype(np.uint8)
    )
    map = np.random.default_rng(1).random((12, 16))
    expected = _average(map[:, :, None], box, (9, 11))[:, :, 0]
    np.testing.assert_allclose(crop_map(map, box, (9, 11)), expected)


def test_reduced_crop_averages_what_falls_together():
    fine = np.indices((64, 64)).sum(0) % 2 * 255  # a checkerboard, gray from afar
    image = np.repeat(fine[:, :, None], 3, axis=2).astype(np.uint8)
    assert set(np.unique(crop_picture(image, (0, 0, 1, 1), (8, 8)))) == {128}


def test_thumbnail_of_a_node_is_its_map_over_its_field(panel, net):
    node = panel.children()[0]
    link = f"3:{node.channel}"
    panel.cropped = False
    tree = evidence(net, net.preprocess(_picture()), 0, top=8)
    [edge] = [e for e in tree.edges if e.parent == "class" and e.child == node.id]
    map = edge.map[None]
    whole = cam.resize(cam.normalize(map), (45, 56))[0].numpy()
    picture = np.asarray(panel._pixels)
    expected = colors.overlay(crop_picture(picture, (0, 0, 1, 1), (45, 56)), whole)
    drawn = panel.thumbnail(link)
    difference = np.abs(drawn.astype(int) - expected)
    assert difference.max() <= 16  # the first of 8 bit levels takes a root of 1 / 255
    assert difference.mean() < 0.5
    panel.cropped = True
    x0, y0, x1, y1 = node.field
    ratio = (y1 - y0) / (x1 - x0)
    height, width = panel.thumbnail(link).shape[:2]
    assert max(height, width) == 56
    assert abs(height / width - ratio) < 0.05


def test_notebook_keeps_a_picture_beside_the_widget(panel):
    panel.class_ids = [0, 2]
    bundle, _ = panel._repr_mimebundle_()
    assert bundle["text/plain"] == repr(panel)
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"])))
    assert picture.size == panel.picture().shape[1::-1]
    assert "application/vnd.jupyter.widget-view+json" in bundle


# ------------------------------------------------------------------------------- the saved page


def test_saved_page_holds_the_open_tree_and_asks_for_nothing(panel, tmp_path):
    panel.class_ids = [2]
    panel.grow(3)
    panel.add_sketches()
    path = panel.save_html(tmp_path / "tree.html")
    text = path.read_text("utf-8")
    assert re.findall(r"https?://[\w.]*", text.replace("http://www.w3.org/2000/svg", "")) == []
    assert not re.search(r"<(link|img|iframe)|@import|url\(", text)
    assert "unsafe" not in text
    assert text.count("</script>") == 2
    state = json.loads(re.search(r'id="data">(.*)</script>', text)[1])["panels"][0]["state"]
    assert state["opened"] == panel.opened
    packets = state["_data"]["packets"]
    families = [family["key"] for packet in packets for family in packet["families"]]
    assert len(set(families)) == len(families)
    shown = {family["key"]: family for packet in packets for family in packet["families"]}
    sketches = {node for packet in packets for node, _ in packet["sketches"]}
    for link in (link for link in panel.opened if link.startswith("2")):
        for child in shown[_key(shown, link)]["children"][: panel.top]:
            assert child["id"] in sketches


def _key(families, link):
    first, *steps = link.split("/")
    key = f"class:{first}"
    for step in steps:
        children = [child["id"] for child in families[key]["children"]]
        key = next(child for child in children if child.startswith(f"{step}@"))
    return key


def test_grow_opens_every_shown_channel_down_to_the_depth(net):
    panel = explore_evidence(net, _picture(), "cat", top=2)
    panel.grow(2)
    firsts = [f"0/3:{node.channel}" for node in panel.children()]
    assert set(panel.opened) == {"0", *firsts}
    panel.grow(9)
    seconds = [f"{link}/2:{node.channel}" for link in firsts for node in panel.children(link)]
    assert set(panel.opened) == {"0", *firsts, *seconds}
    panel.last_stage = 3
    assert all(node.stage == 3 for node in panel.children())


def test_histogram_of_a_channel_is_shown_best_first(net):
    counts = {"a": 1, "b": 5, "c": 3}
    panel = explore_evidence(net, _picture(), histograms={(3, 2): counts})
    assert panel.state["_data"]["histograms"] == {"3:2": [["b", 5.0], ["c", 3.0], ["a", 1.0]]}


# ----------------------------------------------------------------------------- the command line


def test_command_writes_the_page_and_the_evidence(tmp_path, capsys):
    image = tmp_path / "scene.png"
    Image.fromarray(_picture(112, 112)).save(image)
    out, result = tmp_path / "tree.html", tmp_path / "tree.json"
    command = ["tree", str(image), "--network", "scenes_conv", "--class", "0", "1", "--depth", "2"]
    assert cli.main([*command, "--out", str(out), "--json", str(result)]) == 0
    assert str(out) in capsys.readouterr().out
    trees = json.loads(result.read_text())["trees"]
    assert [tree["class_id"] for tree in trees] == [0, 1]
    assert out.stat().st_size < 400_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top", "9"], "expected --top from 1 to 8, got 9"),
        (["--depth", "0"], "expected --depth of at least 1, got 0"),
        (["--class", "0", "1", "2"], "expected one or two classes, got 3"),
        (["--class", "unicorn"], "expected a class of scenes_conv, got 'unicorn'"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, options, message):
    image = tmp_path / "scene.png"
    Image.fromarray(_picture(112, 112)).save(image)
    out = tmp_path / "tree.html"
    command = ["tree", str(image), "--network", "scenes_conv", "--out", str(out), *options]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


# ----------------------------------------------------------------------------------- JavaScript

SCRIPT = """
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
const [module, given, results] = process.argv.slice(2);
const source = Buffer.from(readFileSync(module)).toString("base64");
const panel = await import(`data:text/javascript;base64,${source}`);

assert.deepEqual(panel.parseLink(" 281/5:112/4:57 "), { classId: 281, steps: ["5:112", "4:57"] });
assert.deepEqual(panel.parseLink("7"), { classId: 7, steps: [] });
for (const wrong of ["", "cat", "7/5", "7/5:1:2", "7/5:x", "5:112"])
  assert.equal(panel.parseLink(wrong), null);

// class 7 -> a, b; a -> c, d; b -> c: the node c is drawn twice
const node = (id) => [id, { id, stage: Number(id[0]), channel: id.charCodeAt(1) }];
const nodes = new Map(["3a", "3b", "2c", "2d"].map(node));
const child = (id) => ({ id, share: 0.5 });
const families = new Map(Object.entries({
  "class:7": [child("3a"), child("3b")], "3a": [child("2c"), child("2d")], "3b": [child("2c")],
}).map(([key, children]) => [key, { children }]));
const opened = new Set(["7", "7/3:97", "7/3:98", "7/3:97/2:99"]);
const see = (settings) => panel.visibleNodes(families, nodes, 7, opened,
  { top: 3, last_stage: 1, ...settings }, [3, 2, 1]);
const all = see({});
assert.deepEqual(all.map(({ link }) => link),
  ["7", "7/3:97", "7/3:97/2:99", "7/3:97/2:100", "7/3:98", "7/3:98/2:99"]);
assert.deepEqual(all.map(({ column }) => column), [0, 1, 2, 2, 1, 2]);
assert.deepEqual(all.map(({ open }) => open), [true, true, false, false, true, false]);
assert.equal(all[2].key, all[5].key);
assert.equal(see({ top: 1 }).length, 3);
const short = see({ last_stage: 3 });
assert.deepEqual(short.map(({ leaf }) => leaf), [false, true, true]);

panel.placeNodes(all);
const y = (k) => all[k].y;
assert.equal(y(1), (y(2) + y(3)) / 2);
assert.equal(y(4), y(5));
assert.equal(y(0), (y(1) + y(4)) / 2);
for (const [a, b] of [[2, 3], [3, 5], [1, 4]]) assert.ok(y(b) - y(a) >= 60, "cards overlap");
for (const record of all)
  if (record.parent) assert.ok(record.x >= record.parent.x + record.parent.width + 40);

assert.equal(panel.edgeWidth(0.4, 0.4), 2 * panel.edgeWidth(0.2, 0.4));
assert.ok(panel.edgeWidth(0, 0.4) > 0);

const { image, size, map, window, grid, cases } = JSON.parse(readFileSync(given));
const pyramid = panel.pyramid(Uint8ClampedArray.from(image), size);
writeFileSync(results, JSON.stringify(cases.map(([box, shape]) => {
  const values = new Float32Array(shape[0] * shape[1]);
  panel.cropMap(Uint8Array.from(map), window, grid, box, shape, 1, values);
  return [[...panel.cropPicture(pyramid, box, shape)], [...values]];
})));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_javascript_lays_out_the_tree_and_cuts_as_python_does(tmp_path):
    generator = np.random.default_rng(3)
    image = generator.integers(0, 256, (75, 101, 3), dtype=np.uint8)
    levels = np.zeros((14, 19), np.uint8)
    levels[3:9, 5:16] = generator.integers(1, 256, (6, 11))
    cases = [
        ((0, 0, 1, 1), (75, 101)), ((0, 0, 1, 1), (21, 28)), ((0.2, 0.3, 0.4, 0.45), (30, 56)),
        ((0.5, 0, 1, 0.9), (16, 9)), ((0.9, 0.9, 1, 1), (3, 4)),
    ]  # fmt: skip
    opaque = np.concatenate([image, np.full((75, 101, 1), 255, np.uint8)], axis=2)
    files = [tmp_path / name for name in ("tree.mjs", "given.json", "results.json", "test.mjs")]
    files[0].write_text(source("tree"))
    files[1].write_text(json.dumps({
        "image": opaque.ravel().tolist(), "size": [75, 101], "cases": cases,
        "map": levels[3:9, 5:16].ravel().tolist(), "window": [3, 5, 6, 11], "grid": [14, 19],
    }))  # fmt: skip
    files[3].write_text(SCRIPT)
    done = subprocess.run(
        ["node", files[3], *files[:3]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(files[2].read_text())
    for (box, shape), (pixels, values) in zip(cases, results, strict=True):
        drawn = np.reshape(pixels, (*shape, 4))
        np.testing.assert_array_equal(drawn[:, :, :3], crop_picture(image, box, shape))
        assert (drawn[:, :, 3] == 255).all()
        np.testing.assert_allclose(
            np.reshape(values, shape), crop_map(levels.astype(float), box, shape), atol=1e-4
        )


def test_every_control_keeps_its_keys_from_the_notebook():
    module = source("tree")
    created = set(re.findall(r"document\.createElement\w*\((.*?)\)", module))
    assert created == {"name", '"http://www.w3.org/2000/svg", name'}
    assert "innerHTML" not in module


# ------------------------------------------------------------------------------ several pictures


def test_each_picture_has_its_own_evidence_which_is_made_once(net, monkeypatch):
    made = []
    monkeypatch.setattr(
        "attnviz.panels.tree.evidence", lambda *a, **k: made.append(a[2]) or evidence(*a, **k)
    )
    pictures = [_picture(seed=0), _picture(48, 40, seed=1)]
    panel = explore_evidence(net, pictures, [["cat", "dog"], "dog"], names=["one", "two"])
    alone = explore_evidence(net, pictures[1], "dog")
    made.clear()
    first = panel.state
    panel.image_index = 1
    assert panel.class_id == 0  # offered there too, so it stays
    panel.class_id = 1
    panel.selected = alone.selected
    assert [node.id for node in panel.children()] == [node.id for node in alone.children()]
    np.testing.assert_array_equal(panel.thumbnail(panel.selected), alone.thumbnail(alone.selected))
    assert panel.state["_data"]["image"] == alone.state["_data"]["image"]
    assert panel.state["_data"]["image"] != first["_data"]["image"]
    assert sorted(made) == [0, 1]
    panel.image_index = 0
    assert panel.class_ids == [1]
    assert sorted(made) == [0, 1]  # both had been made at the start
    assert panel.state["_data"]["image"] == first["_data"]["image"]
    with pytest.raises(TraitError, match=r"`image_index` in \[0, 2\), got 2; the panel has 2"):
        panel.image_index = 2


@pytest.mark.parametrize("part", ["attnviz.panels.tree.evidence", "attnviz.tree.Evidence.expand"])
def test_picture_whose_evidence_fails_leaves_the_one_before(net, monkeypatch, part):
    panel = explore_evidence(net, [_picture(seed=0), _picture(seed=1)], ["cat", "dog"])
    before, picture = copy.deepcopy(panel.state), panel.picture()
    sent = []
    monkeypatch.setattr(panel, "_send", lambda message, buffers=None: sent.append(message))

    def fail(*_, **__):
        raise RuntimeError("not enough\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(part, fail)
        with pytest.raises(RuntimeError, match="not enough"):
            panel.image_index = 1
        with pytest.raises(RuntimeError, match="not enough"):
            panel.set_state({"image_index": 1})  # as the browser sets it
    updates = [message["state"] for message in sent if message["method"] == "update"]
    assert updates[-1] == {"image_index": 0}
    words = [message["content"] for message in sent if message["method"] == "custom"]
    assert words[-1] == {"picture": 1, "error": "not enough memory"}
    assert panel.state == before
    np.testing.assert_array_equal(panel.picture(), picture)
    panel.selected = f"0/3:{panel.children()[1].channel}"  # what was there can be used
    panel.image_index = 1
    assert panel.state["_data"]["index"] == 1


def test_class_of_another_panel_can_be_linked(panel):
    panel.class_ids = [0, 2]
    assert panel.class_id == 0
    panel.class_id = 3
    assert (panel.class_ids, panel.selected) == ([3, 2], "3")
    panel.class_id = 2
    assert panel.class_ids == [2]
    with pytest.raises(TraitError, match=r"expected `class_id` in \[.*\], got 17; explore_evid"):
        panel.class_id = 17
    assert panel.class_ids == [2]


@pytest.mark.parametrize(
    "asked",
    [
        torch.tensor([1, 3]), np.array([1, 3]), (1, 3), {1: 0, 3: 0}.keys(), {1, 3},
        [torch.tensor(1), np.int64(3)], ["1", 3],
    ],
    ids=repr,
)  # fmt: skip
def test_classes_come_in_any_container(untyped, net, asked):
    assert explore_evidence(net, _picture(), asked).class_ids == [1, 3]
    assert explore_stages(net, _picture(), asked).class_id == 1
    for one in (torch.tensor(3), np.int64(3), "3"):
        assert explore_evidence(net, _picture(), one).class_ids == [3]
    for wrong in (1.0, True, [None], [[1, 3]]):
        with pytest.raises(TypeError, match="expected a class as a number or a name, got"):
            explore_stages(net, _picture(), wrong)
