"""What leaves a panel in a browser: the view as a figure, and a story of several panels."""

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from recorded import record
from sample import make_panel
from test_layercam import _assert_same, _slide

from attnviz import explore_evidence, explore_stages, load_network
from attnviz.data.scenes import Scenes
from attnviz.panels import explore_accumulation, save_story
from notebooks import TWO_FRAMES

pytestmark = pytest.mark.browser

HOSTILE = "</script><img src=x onerror=alert(1)>"
DRAWN = "canvas.attnviz-map[aria-label] >> nth=-1"
SVG = "{http://www.w3.org/2000/svg}"
READ = """async () => {
  const [item] = await navigator.clipboard.read();
  const bytes = new Uint8Array(await (await item.getType("image/png")).arrayBuffer());
  return btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
}"""


@pytest.fixture(scope="module")
def tree():
    net = load_network("scenes_conv")
    image = Scenes("val", 1)[0].image
    best, other = net(net.preprocess(image))[0].topk(2).indices.tolist()
    names = list(net.class_names)
    names[other] = HOSTILE
    net.class_names = tuple(names)
    panel = explore_evidence(net, image, [best, other], classes=1)
    start = panel.opened
    panel.grow(2)
    panel.opened = start
    return panel


def _figure(page, kind):
    page.get_by_role("button", name="Copy or save as a figure").click()
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Save {kind}").click()
    page.get_by_text(f"Saved as {kind}.").wait_for()
    page.keyboard.press("Escape")
    name, data = download.value.suggested_filename, download.value.path().read_bytes()
    assert name.endswith(f".{kind.lower()}")
    return data


def _pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def _embedded(svg, number):
    image = svg.findall(f".//{SVG}image")[number]
    return _pixels(base64.b64decode(image.attrib["href"].split(",")[1])), image.attrib


def test_layercam_figure_is_the_view_and_is_copied_as_well(open_page, tmp_path):
    panel = make_panel(threshold=0.5)
    page = open_page(panel.save_html(tmp_path / "panel.html"), device_scale_factor=2)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for name, value in (("gamma", 3.5), ("threshold", 0.6)):
        _slide(page, {"gamma": "γ", "threshold": "Threshold"}[name], value)
        setattr(panel, name, value)
    page.evaluate(TWO_FRAMES)
    svg = ElementTree.fromstring(_figure(page, "SVG"))
    pixels, _ = _embedded(svg, 0)
    assert np.abs(pixels - panel.render()).max() <= 16
    assert np.median(np.abs(pixels - panel.render())) <= 1
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert texts[0] == "LayerCAM of heron, stages 3, 4, 5, tanh(3.5 x)"
    x0, y0, x1, y1 = panel.box
    assert any(f"box {x0}, {y0} – {x1}, {y1}" in text for text in texts)
    rect = svg.findall(f"{SVG}rect")[-1].attrib  # the picture is 448 wide, as in the figure
    found = [float(rect[name]) for name in ("x", "y", "width", "height")]
    np.testing.assert_allclose(found, [12 + x0, 12 + y0, x1 - x0, y1 - y0], atol=0.6)
    png = _pixels(_figure(page, "PNG"))
    assert png.shape[:2] == tuple(
        2 * round(float(svg.attrib[name])) for name in ("height", "width")
    )
    inner = png[24 : 24 + 600, 24 : 24 + 896].reshape(300, 2, 448, 2, 3).mean((1, 3))
    assert np.median(np.abs(inner - panel.render())) <= 3
    page.get_by_role("button", name="Copy or save as a figure").click()
    page.get_by_role("button", name="Copy PNG").click()
    page.get_by_text("Copied.").wait_for()
    np.testing.assert_array_equal(_pixels(base64.b64decode(page.evaluate(READ))), png)
    assert page.problems == []


def test_copying_that_is_refused_is_said(open_page, tmp_path):
    page = open_page(make_panel().save_html(tmp_path / "panel.html"))
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("button", name="Copy or save as a figure").click()
    page.get_by_role("button", name="Copy PNG").click()
    page.get_by_text("Not done: this page may not copy; save it instead").wait_for()
    assert page.problems == []


def test_player_and_tree_give_lines_and_text_as_such(open_page, tmp_path, tree):
    player = explore_accumulation(record(tmp_path / "run", 6), epoch=4)
    page = open_page(player.save_html(tmp_path / "player.html"), DRAWN)
    page.wait_for_timeout(300)
    svg = ElementTree.fromstring(_figure(page, "SVG"))
    for number, expected in enumerate([player._pictures[0].pixels, *player.render()]):
        assert np.median(np.abs(_embedded(svg, number)[0] - expected)) <= 1
    lines = [path for path in svg.iter(f"{SVG}path") if path.get("stroke-dasharray") == "4 3"]
    assert len(lines) == len(player.render())
    assert "style" not in ElementTree.tostring(svg, "unicode")  # no page's colors are missing
    assert page.problems == []

    page = open_page(tree.save_html(tmp_path / "tree.html"), DRAWN)
    page.wait_for_timeout(600)
    svg = ElementTree.fromstring(_figure(page, "SVG"))
    links = page.locator("[role=treeitem]").evaluate_all("items => items.map(i => i.dataset.link)")
    images = [image.attrib for image in svg.iter(f"{SVG}image")]
    assert len(images) == len(links)
    for number, link in enumerate(links):
        pixels, _ = _embedded(svg, number)
        assert np.median(np.abs(pixels - tree.thumbnail(link, 112))) <= 1
    words = "".join(text.text for text in svg.iter(f"{SVG}text"))
    assert "</script><img src=x …" in words.replace("<img", "<img ").replace("  ", " ")
    assert len(list(svg.iter(f"{SVG}path"))) == len(links) - 2
    assert _pixels(_figure(page, "PNG")).std() > 20
    assert page.problems == []


# --------------------------------------------------------------------------------------- stories


def test_story_draws_all_panels_and_its_links_set_them(open_page, tmp_path, tree):
    panel, other = make_panel(), make_panel(palette="viridis")
    text = f"[all](#panel-1?stages=[1,2,3,4,5]&gamma=4)\n\n{HOSTILE}"
    parts = [text, panel, "## Then", other, tree]
    path = save_story(tmp_path / "story.html", parts, title=HOSTILE)
    page = open_page(path, DRAWN)
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.locator("#panel-2 canvas.attnviz-map[aria-label]").wait_for()
    _assert_same(page, panel)
    page.get_by_role("link", name="all").click()
    panel.stages, panel.gamma = [1, 2, 3, 4, 5], 4.0
    page.evaluate(TWO_FRAMES)
    _assert_same(page, panel)
    assert page.locator("#panel-2").get_by_label("γ", exact=True).input_value() == "2"
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("img").count() == 0
    assert dialogs == []
    assert "#" not in page.url
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "blob:"))] == []


def test_linked_story_shows_one_picture_and_class_everywhere(open_page, tmp_path):
    path = save_story(tmp_path / "s.html", [make_panel(), make_panel()], title="t", linked=True)
    page = open_page(path, DRAWN)
    page.locator("#panel-1").get_by_label("Picture", exact=True).select_option("1")
    page.locator("#panel-2 canvas.attnviz-map[width='299']").wait_for()
    page.locator("#panel-2").get_by_role("radio", name="reed <&>").check()
    assert page.locator("#panel-1").get_by_role("radio", name="reed <&>").is_checked()
    assert page.problems == []


def test_linked_class_reaches_the_tree(open_page, tmp_path, tree):
    one, other = tree.class_ids
    panel = explore_stages(load_network("scenes_conv"), Scenes("val", 1)[0].image, [one, other])
    path = save_story(tmp_path / "s.html", [panel, tree], title="t", linked=True)
    page = open_page(path, DRAWN)
    page.locator(f"[role=treeitem][data-link='{one}']").wait_for()
    page.locator(f"#panel-1 input[type=radio][value='{other}']").check()
    page.wait_for_function(f"document.querySelector('[role=treeitem]').dataset.link === '{other}'")
    unknown = next(number for _, number in _classes(panel) if number not in tree._names)
    page.locator(f"#panel-1 input[type=radio][value='{unknown}']").check()
    page.get_by_text(f"Class {unknown} is not offered here.").wait_for()
    assert page.problems == []


def _classes(panel):
    return [(entry["name"], entry["id"]) for entry in panel._data["pictures"][0]["classes"]]
