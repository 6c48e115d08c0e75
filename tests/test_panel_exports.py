"""Figures for a paper and stories: what leaves a panel."""

import io
import json
import re

import labelled
import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image
from recorded import record

from attnviz import explore_evidence, staged
from attnviz.panels import LayerCAMPanel, explore_accumulation, save_story

CLASSES = [(7, "heron", 12.0), (2, "</script><img src=x onerror=alert(1)>", 9.0)]


def _picture(height=24, width=32):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _layercam(classes=CLASSES, **settings):
    generator = np.random.default_rng(1)
    maps = [
        {"layercam": [generator.random(size) ** 3 for size in ((12, 16), (6, 8))]} for _ in classes
    ]
    return LayerCAMPanel(_picture(), classes, maps, boxes=[(3, 4, 20, 18)], **settings)


def _tree(tiny):
    net = staged(tiny, class_names=["cat", "dog", "owl", "eel"], image_size=(32, 40))
    return explore_evidence(net, _picture(32, 40), ["cat", "dog"])


def _data(text):
    return json.loads(re.search(r'id="data">(.*)</script>', text)[1])


# --------------------------------------------------------------------------------------- figures


def test_layercam_figure_has_the_pixels_the_boxes_and_the_settings_of_the_panel():
    panel = _layercam(threshold=0.6)
    figure = panel.to_figure()
    [axis] = figure.axes
    [image] = axis.images
    np.testing.assert_array_equal(image.get_array(), panel.render())
    left, right, lower, upper = image.get_extent()
    boxes = set()
    for patch in axis.patches:
        assert isinstance(patch, Rectangle)
        (x0, y0), (x1, y1) = patch.get_bbox().get_points()
        across, down = 32 / (right - left), 24 / (upper - lower)
        box = (
            (x0 - left) * across,
            (upper - y1) * down,
            (x1 - left) * across,
            (upper - y0) * down,
        )
        boxes.add(tuple(round(value) for value in box))
    assert boxes == {panel.box, (3, 4, 20, 18)}
    assert [text.get_text() for text in axis.texts] == ["LayerCAM of heron, stages 1, 2, tanh(2x)"]
    panel.stages = []
    assert "stage none" in panel.to_figure().axes[0].texts[0].get_text()


@pytest.mark.parametrize("name", ["a $ and $\\frac{ b", CLASSES[1][1], "鹭"])
def test_class_name_is_text_in_a_figure(name):
    figure = _layercam([(7, name, 1.0)]).to_figure()
    file = io.BytesIO()
    if name == "鹭":  # which matplotlib's own font lacks
        with pytest.warns(UserWarning, match="Glyph"):
            figure.savefig(file, format="png")
        return
    figure.savefig(file, format="svg")
    text = re.sub(r"\s+", " ", file.getvalue().decode())
    assert "<img" not in text
    assert name.split()[0].replace("<", "&lt;").replace(">", "&gt;") in text


def test_player_figure_has_the_maps_and_the_curves(tmp_path):
    run = record(tmp_path / "run", 6)
    panel = explore_accumulation(run, epoch=4, threshold=0.4)
    axis, *charts = panel.to_figure().axes
    chart = (charts or axis.child_axes)[0]
    expected = [panel._pictures[0].pixels, *panel.render()]
    for image, pixels in zip(axis.images, expected):
        np.testing.assert_array_equal(image.get_array(), pixels)
    drawn = [line.get_ydata() for line in chart.lines if len(line.get_xdata()) == 6]
    curves = [shares[kind] for shares in panel.curve().values() for kind in ("recall", "noise")]
    for values in curves:
        assert any(np.array_equal(values, line, equal_nan=True) for line in drawn)
    assert len(drawn) == len(curves)
    assert any(set(line.get_xdata()) == {4} for line in chart.lines)
    outlines = [lines for lines in axis.collections if len(lines.get_segments())]
    assert len(outlines) == 2 * (1 + 2 * len(panel.render()))  # a dark line under each


def test_player_without_an_epoch_has_a_figure_too(tmp_path):
    from recorded import writer

    writer(tmp_path / "run", 4)
    from attnviz.evolution import load_evolution
    from attnviz.panels.player import EvolutionPlayer

    panel = EvolutionPlayer([load_evolution(tmp_path / "run")], following=True)
    file = io.BytesIO()
    panel.to_figure().savefig(file, format="png")
    assert Image.open(file).size[0] > 0


def test_tree_figure_has_a_picture_of_every_node_and_an_edge_to_every_child(tiny):
    panel = _tree(tiny)
    panel.grow(2)
    axis = panel.to_figure().axes[0]
    links = [link for number in panel.class_ids for link in panel._lay_out(number).places]
    assert len(links) > 8
    for image, link in zip(axis.images, links):
        np.testing.assert_array_equal(image.get_array()[::-1], panel.thumbnail(link, 112))
    assert len(axis.images) == len(links)
    curves = [patch for patch in axis.patches if not patch.get_fill()]
    assert len(curves) == len(links) - len(panel.class_ids)
    shares = [edge[2] for n in panel.class_ids for edge in panel._lay_out(n).edges]
    assert np.corrcoef(shares, [patch.get_linewidth() for patch in curves])[0, 1] > 0.5
    words = [text.get_text() for text in axis.texts]
    assert {"cat", "dog"} <= set(words)


def test_label_figure_has_the_steps_the_true_outline_the_colors_and_the_settings():
    panel = labelled.make_panel(cue="affinity", power=6.5)
    axis = panel.to_figure(3.5).axes[0]
    steps = panel.render()
    assert len(axis.images) == len(steps) == 5
    for image, pixels in zip(axis.images, steps.values()):
        np.testing.assert_array_equal(image.get_array(), pixels)
    dark, light = axis.collections[:2]
    left, right, lower, upper = axis.images[0].get_extent()
    edges = sum(int((np.diff(panel._truth, axis=side) != 0).sum()) for side in (0, 1))
    for lines in (dark, light):  # each pixel's side between two labels is drawn, once
        ends = np.array(lines.get_segments()) - (left, lower)
        sides = np.abs(np.diff(ends * (64 / (right - left), 48 / (upper - lower)), axis=1))
        assert round(sides.sum()) == edges
    assert len(axis.collections) == 2 * 5
    words = [text.get_text() for text in axis.texts]
    assert {"boat", "cloud"} <= set(words)
    tones = [patch.get_facecolor()[:3] for patch in axis.patches]
    np.testing.assert_allclose(tones, np.array([*panel._tones.values()]) / 255)
    caption = " ".join(words[-1].split())
    assert caption == "Rules, background by affinity: conflict 0.9, least 0.01, power 6.5"
    panel.outlined, panel.method, panel.prediction = False, "superpixels", "with CRF"
    axis = panel.to_figure().axes[0]
    assert sum(len(lines.get_segments()) for lines in axis.collections) == 0
    assert axis.texts[-1].get_text() == "Vote of slic superpixels: background 0.3"
    assert any(text.get_text().startswith("with CRF, mIoU") for text in axis.texts)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", ["layercam", "player", "tree", "labels"])
def test_figure_of_no_width_is_refused(kind, tiny, tmp_path):
    panel = {
        "layercam": _layercam, "player": lambda: explore_accumulation(record(tmp_path / "run", 2)),
        "tree": lambda: _tree(tiny), "labels": labelled.make_panel,
    }[kind]()  # fmt: skip
    for width in (-1, 0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"`width` from 1 to 100 inches, got {width:g}$"):
            panel.to_figure(width)
    with pytest.raises(TypeError, match="`width` in inches, got 'cat.pdf'; to_figure.*savefig"):
        panel.to_figure("cat.pdf")


# ----------------------------------------------------------------------------------------- sizes


def test_page_is_no_larger_than_one_and_a_half_of_its_maps_and_picture(tmp_path):
    generator = np.random.default_rng(2)
    sizes = [(224, 224), (112, 112), (56, 56), (28, 28), (14, 14)]
    y, x = np.mgrid[:224, :224] / 40

    def rough(size):
        grain = 0.05 * generator.random(size)
        return np.sin(y * generator.random() + x)[: size[0], : size[1]] + 1 + grain

    maps = [{"layercam": [rough(size) for size in sizes]} for _ in range(5)]
    pixels = np.stack([255 * (np.sin(x * k + y) / 2 + 0.5) for k in (1, 2, 3)], -1)
    panel = LayerCAMPanel(
        pixels.astype(np.uint8), [(number, f"class {number}", 1.0) for number in range(5)], maps
    )
    picture = panel._data["pictures"][0]["image"]
    raw = 5 * sum(height * width for height, width in sizes) + len(picture)
    code = len(panel._esm) + len(panel._css)
    size = panel.save_html(tmp_path / "page.html").stat().st_size
    assert size - code < 1.5 * raw


# --------------------------------------------------------------------------------------- stories


def test_story_holds_code_once_and_states_its_size(tmp_path, tiny):
    one, two = _layercam(), _layercam(gamma=4)
    path = save_story(
        tmp_path / "story.html", ["# One", one, "Two", two, _tree(tiny)], title="A & <b>"
    )
    text = path.read_text("utf-8")
    assert text.count("export function bilinear") == 1
    assert text.count("export function unpack(") == 1
    assert text.count("export function visibleNodes") == 1
    assert "<title>A &amp; &lt;b&gt;</title>" in text
    assert "<h1>A &amp; &lt;b&gt;</h1>" in text
    stated = int(re.search(r"One file of (\d+) kB", text)[1])
    assert abs(stated - path.stat().st_size / 1000) < 4
    assert [panel["state"].get("gamma") for panel in _data(text)["panels"]] == [2.0, 4.0, None]
    assert [panel["kind"] for panel in _data(text)["panels"]] == [0, 0, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["story.html"]


def test_story_of_hostile_names_and_markdown_holds_only_text(tmp_path):
    hostile = (
        "<script>alert(1)</script>\n\n<img src=x onerror=alert(1)>\n\n"
        "[a](javascript:alert(1)) [b](JaVaScript&colon;alert(1)) [c](data:text/html,x) "
        '[d](vbscript:x) <https://example.org> [e](https://example.org "t\\" onclick=x")\n\n'
        "| a | b |\n|:--|--:|\n| 1 | 2 |\n\n<!-- size -->"
    )
    text = save_story(tmp_path / "s.html", [hostile, _layercam()], title=hostile).read_text()
    body = text.partition("<body>")[2].partition('<script type="application/json"')[0]
    tags = set(re.findall(r"<(\w+)", body))
    assert tags <= {"main", "h1", "p", "a", "table", "thead", "tbody", "tr", "th", "td",
                    "section", "footer", "em", "strong"}  # fmt: skip
    assert re.findall(r'href="([^"]*)"', body) == ["https://example.org", "https://example.org"]
    attributes = set(re.findall(r"<\w+((?:\s[\w-]+=\"[^\"]*\")+)", body))
    names = {name for each in attributes for name in re.findall(r'\s([\w-]+)="', each)}
    assert names <= {"class", "id", "data-panel", "aria-label", "href", "title"}
    assert text.count("</script>") == 2
    assert text.count("One file of") == 1


def test_link_in_the_text_sets_a_panel(tmp_path):
    panel = _layercam()
    link = "[more](#panel-1?stages=[1]&gamma=4&palette=gray)"
    text = save_story(tmp_path / "s.html", [link, panel], title="t").read_text()
    value = re.search(r'data-set="([^"]*)"', text)[1].replace("&quot;", '"')
    values = {"stages": [1], "gamma": 4.0, "palette": "gray"}
    assert json.loads(value) == {"panel": 0, "values": values}
    assert (panel.stages, panel.gamma) == ([1, 2], 2.0)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("#panel-2?gamma=4", r"from #panel-1 to #panel-1, got '#panel-2"),
        ("#panel-x", "expected a link to a panel"),
        ("#panel-1?gama=4", r"expected a setting of the panel in '#panel-1\?gama=4'"),
        ("#panel-1?_data=4", "expected a setting of the panel"),
        ("#panel-1?gamma=40", r"expected `gamma` in \(0, 8\], got 40.*in the link '#panel-1"),
        ("#panel-1?stages=all", "in the link '#panel-1"),
    ],
)
def test_link_that_cannot_work_is_refused(tmp_path, link, message):
    with pytest.raises(ValueError, match=message):
        save_story(tmp_path / "s.html", [f"[x]({link})", _layercam()], title="t")
    assert list(tmp_path.iterdir()) == []


def test_story_of_no_panel_or_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least one panel in `parts`, got none"):
        save_story(tmp_path / "s.html", ["text"], title="t")
    with pytest.raises(TypeError, match="expected Markdown or panels in `parts`, got int"):
        save_story(tmp_path / "s.html", [3, _layercam()], title="t")
    with pytest.raises(TypeError, match="Markdown or panels in `parts`, got MetaHasTraits"):
        save_story(tmp_path / "s.html", [LayerCAMPanel], title="t")
    for bare, name in ((_layercam(), "LayerCAMPanel"), ("text", "str"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"in `parts`, got {name}; write \[panel\] for one"):
            save_story(tmp_path / "s.html", bare, title="t")
    assert list(tmp_path.iterdir()) == []


def test_picture_in_the_text_is_taken_into_the_page(tmp_path):
    Image.fromarray(_picture()).save(tmp_path / "cat.png")
    (tmp_path / "secret.png").write_text("no picture")
    text = save_story(
        tmp_path / "s.html", [f"![a cat]({tmp_path}/cat.png)", _layercam()], title="t"
    ).read_text()
    assert re.search(r'<img src="data:image/png;base64,[^"]*" alt="a cat"', text)
    for url in (f"{tmp_path}/secret.png", "https://x.org/y.png", f"{tmp_path}"):
        with pytest.raises(ValueError, match=f"expected a picture file in the text, got '{url}'"):
            save_story(tmp_path / "t.html", [f"![]({url})", _layercam()], title="t")
    with pytest.raises(TypeError, match="expected text as `title`, got None"):
        save_story(tmp_path / "t.html", [_layercam()], title=None)
