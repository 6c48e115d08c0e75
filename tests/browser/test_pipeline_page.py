"""The label panel in a browser: as a saved page without a network."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from labelled import NAMES, make_panel, settings_of
from PIL import Image

from attnviz.panels import explore_labels
from attnviz.panels.export import save_story
from notebooks import TWO_FRAMES

pytestmark = pytest.mark.browser

SVG = "{http://www.w3.org/2000/svg}"
LABELS = {
    "floor": "Values count from", "conflict": "Conflict above", "salient": "Salient from",
    "strong": "Strong map above", "least": "Objects at least", "power": "Power α",
    "constant": "Constant", "background": "Class from", "opacity": "Opacity",
}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return make_panel()


@pytest.fixture
def panel(made):
    names = set(made.state) - {"_data"}
    before = {name: getattr(made, name) for name in names}
    yield made
    for name, value in before.items():
        setattr(made, name, value)


@pytest.fixture
def page(panel, open_page, tmp_path):
    page = open_page(panel.save_html(tmp_path / "panel.html"))
    page.evaluate(TWO_FRAMES)
    return page


def _drawn(page):
    page.evaluate(TWO_FRAMES)
    addresses = page.evaluate(
        "[...document.querySelectorAll('.attnviz-picture canvas')].map((c) => c.toDataURL())"
    )
    parts = [io.BytesIO(base64.b64decode(address.split(",")[1])) for address in addresses]
    return [np.asarray(Image.open(part).convert("RGB")) for part in parts]


def _assert_same(page, panel):
    drawn, expected = _drawn(page), panel.render()
    assert len(drawn) == len(expected)
    for shown, (name, pixels) in zip(drawn, expected.items()):
        np.testing.assert_array_equal(shown, pixels, err_msg=f"{name} of {panel}")


def _slide(page, name, value):
    page.get_by_label(LABELS[name], exact=True).evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }",
        round(value * 255) if name == "salient" else value,
    )


def _choose(page, label, value):
    page.get_by_label(label, exact=True).select_option(value)


def test_saved_page_draws_what_python_draws_to_the_pixel(page, panel):
    _assert_same(page, panel)
    for seed, cue in enumerate(("saliency", "affinity", "constant", "saliency", "affinity")):
        _choose(page, "Background by", cue)
        panel.cue = cue
        used = {"saliency": ("floor", "salient", "strong"), "affinity": ("power",),
                "constant": ("constant",)}[cue]  # fmt: skip
        settings = settings_of(seed)
        for name in ("conflict", "least", *used):
            value = settings[name] if name != "least" else 0.005
            _slide(page, name, value)
            setattr(panel, name, value)
        _assert_same(page, panel)
    assert len(np.unique(panel.labels())) > 2
    page.get_by_label("Average maps over superpixels").check()
    _choose(page, "Superpixels", "felzenszwalb")
    panel.averaged, panel.regions = True, "felzenszwalb"
    _assert_same(page, panel)
    _choose(page, "Labels by", "superpixels")
    panel.method = "superpixels"
    _assert_same(page, panel)
    _slide(page, "background", 0.55)
    page.get_by_role("radio", name=NAMES[2]).check()
    panel.background, panel.class_id = 0.55, 2
    _assert_same(page, panel)
    _choose(page, "Superpixels", "slic")
    _slide(page, "opacity", 0.4)
    _choose(page, "Colors", "viridis")
    _choose(page, "Mask of the network", "with CRF")
    panel.regions, panel.opacity, panel.palette = "slic", 0.4, "viridis"
    panel.prediction = "with CRF"
    _assert_same(page, panel)
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "blob:"))] == []


def test_settings_of_python_are_those_of_the_page(panel, open_page, tmp_path):
    panel.method, panel.background, panel.outlined = "superpixels", 0.42, False
    page = open_page(panel.save_html(tmp_path / "panel.html"))
    _assert_same(page, panel)
    assert page.get_by_label("Class from").input_value() == "0.42"
    assert page.locator(".attnviz-outline").count() == 0
    assert not page.get_by_label("Outline the truth").is_checked()
    assert page.get_by_label("Conflict above").is_hidden()


def test_table_shows_the_scores_of_python(page, panel):
    for floor in (0.3, 0.6):
        _slide(page, "floor", floor)
        panel.floor = floor
        page.evaluate(TWO_FRAMES)
        scores = panel.scores()
        for name in ("background", *panel._names.values(), "mean"):
            row = page.get_by_role("row", name="mean IoU" if name == "mean" else name)
            shown = [text for text in row.get_by_role("cell").all_inner_texts() if text]
            shown = shown[-2:] if name == "mean" else shown[1::2]
            for text, what in zip(shown, ("labels", "network"), strict=True):
                value = scores[what][name]
                read = np.nan if text == "–" else float(text.split()[0]) / 100
                np.testing.assert_allclose(read, value, atol=0.0051)
        left_out = (panel.labels() == 255).mean()
        text = page.locator(".attnviz-picture + .attnviz-rates").nth(3).inner_text()
        assert f"mIoU {100 * scores['labels']['mean']:.0f} %" in text
        assert float(re.search(r"left out ([\d.]+) %", text)[1]) == pytest.approx(
            100 * left_out, abs=0.51
        )


def test_pointer_reads_the_label_and_why(page, panel):
    labels = panel.labels()
    saliency = panel._saliency / 255
    salient = np.argwhere((labels == 255) & (saliency >= panel.salient))[0]
    found = np.argwhere(labels == 1)[5]
    area = page.locator(".attnviz-picture").nth(3).bounding_box()
    for (y, x), words in (
        (salient, "left out: salient, but no map wins"), (found, "→ boat")
    ):  # fmt: skip
        page.mouse.move(
            area["x"] + (x + 0.5) / 64 * area["width"], area["y"] + (y + 0.5) / 48 * area["height"]
        )
        text = page.locator(".attnviz-readout").inner_text()
        assert f"x {x}, y {y}" in text
        assert words in text
        assert f"background {1 - saliency[y, x]:.2f}" in text
    page.mouse.move(0, 0)
    assert "Point at a picture" in page.locator(".attnviz-readout").inner_text()


def test_keys_work_and_stay_in_the_panel(page, panel):
    for control in page.locator(".attnviz-panel :is(input, select, button, [tabindex])").all():
        assert control.get_attribute("data-lm-suppress-shortcuts") == "true"
    page.locator(".attnviz-columns").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("ArrowUp")
    assert "x 48, y 23" in page.locator(".attnviz-readout").inner_text()
    steps = (
        ("m", {"method": "superpixels"}), ("s", {"regions": "felzenszwalb"}),
        ("c", {"class_id": 2}), ("m", {"method": "rules"}), ("b", {"cue": "affinity"}),
        ("a", {"averaged": True}), ("n", {"prediction": "with CRF"}), ("t", {"outlined": False}),
    )  # fmt: skip
    for key, changed in steps:
        page.keyboard.press(key)
        for name, value in changed.items():
            setattr(panel, name, value)
        _assert_same(page, panel)
    assert page.locator(".attnviz-outline").count() == 0
    slider = page.get_by_label("Conflict above")
    slider.focus()
    page.keyboard.press("ArrowLeft")  # arrows there are the slider's own
    assert slider.input_value() == "0.89"
    page.keyboard.press("r")
    page.evaluate(TWO_FRAMES)
    assert slider.input_value() == "0.9"
    assert page.get_by_role("button", name="Published values").is_disabled()
    page.keyboard.press("?")
    assert page.locator(".attnviz-keys").is_visible()
    page.keyboard.press("Escape")
    assert page.locator(".attnviz-keys").is_hidden()


CUT = """() => {
  const all = (selector) =>
    [...document.querySelectorAll(selector)].filter((part) => part.checkVisibility());
  const right = document.querySelector(".attnviz-panel").getBoundingClientRect().right - 10;
  const beyond = all(".attnviz-panel :is(select, input, button, td)")
    .filter((part) => part.getBoundingClientRect().right > right);
  const cut = all(".attnviz-rates, .attnviz-readout, .attnviz-slider, thead th").filter((text) =>
    Math.max(text.scrollWidth - text.clientWidth, text.scrollHeight - text.clientHeight) > 1);
  const wide = document.documentElement.scrollWidth > innerWidth ? [document.body] : [];
  return [...beyond, ...cut, ...wide].map((node) => node.outerHTML);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_height_stays_and_nothing_overflows(panel, open_page, tmp_path, scheme):
    page = open_page(panel.save_html(tmp_path / "panel.html"), color_scheme=scheme)
    root = page.locator(".attnviz-panel")
    for width in (1600, 1100, 700, 320):
        page.set_viewport_size({"width": width, "height": 900})
        page.reload()
        page.locator("canvas.attnviz-map[aria-label]").wait_for()
        page.evaluate(TWO_FRAMES)
        height = root.bounding_box()["height"]
        for cue in ("affinity", "constant", "saliency"):
            _choose(page, "Background by", cue)
            page.evaluate(TWO_FRAMES)
            assert root.bounding_box()["height"] == height
        page.locator(".attnviz-picture").nth(3).hover()
        assert page.evaluate(CUT) == []
        _choose(page, "Labels by", "superpixels")
        page.evaluate(TWO_FRAMES)
        assert root.bounding_box()["height"] == height
        assert page.evaluate(CUT) == []
    assert page.problems == []


def test_panel_without_truth_saliency_or_network_has_no_empty_places(open_page, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    panel = explore_labels(image, {1: np.eye(20, 30)}, NAMES)
    page = open_page(panel.save_html(tmp_path / "panel.html"))
    _assert_same(page, panel)
    assert page.locator(".attnviz-picture").count() == 4
    options = page.get_by_label("Background by").locator("option").all_inner_texts()
    assert options == ["maps: (1 − max)^α", "a constant"]
    assert page.get_by_label("Outline the truth").count() == 0
    assert "IoU" not in page.locator(".attnviz-panel").inner_text()
    page.locator(".attnviz-columns").focus()
    page.keyboard.press("n")
    page.keyboard.press("b")
    panel.cue = "constant"
    _assert_same(page, panel)
    assert page.problems == []


def test_figure_holds_every_step_the_outline_and_the_settings(page, panel):
    _slide(page, "floor", 0.55)
    panel.floor = 0.55
    page.evaluate(TWO_FRAMES)
    page.get_by_role("button", name="Copy or save as a figure").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save SVG").click()
    figure = download.value.path().read_text("utf-8")
    assert figure.count("<image") == 5
    texts = [text.text for text in ElementTree.fromstring(figure).iter(f"{SVG}text")]
    assert "Pseudo labels" in texts
    assert "mIoU" in figure
    assert set(panel._names.values()) <= set(texts)
    assert panel._caption() == " ".join(text for text in texts[texts.index(NAMES[3]) + 1 :])
    assert "floor 0.55" in panel._caption()
    assert figure.count("<path") == 10  # a halo and a line each
    assert page.problems == []


def test_damage_is_reported_in_the_panel(panel, open_page, tmp_path):
    whole = panel._data
    panel._data = whole | {"planes": whole["planes"][:200]}
    page = open_page(panel.save_html(tmp_path / "panel.html"), awaits="[role=alert]:visible")
    panel._data = whole
    text = page.get_by_role("alert").inner_text()
    assert text == "The panel can't be drawn: the maps can't be decoded"


def test_story_sets_a_threshold_and_links_classes(panel, open_page, tmp_path):
    other = explore_labels(np.zeros((20, 30, 3), np.uint8), {2: np.eye(20, 30)}, NAMES)
    text = "Count [only what is certain](#panel-1?floor=0.6)."
    path = save_story(tmp_path / "story.html", [text, panel, other], title="Labels", linked=True)
    page = open_page(path, awaits="canvas.attnviz-map[aria-label] >> nth=1")
    page.get_by_role("link", name="only what is certain").click()
    panel.floor = 0.6
    first = panel.render()
    assert (_drawn(page)[3] == first["labels"]).all()
    page.get_by_role("radio", name=NAMES[2]).first.check()
    panel.class_id = 2
    assert (_drawn(page)[1] == panel.render()["maps"]).all()
    page.get_by_role("radio", name=NAMES[0]).check()  # which the other panel does not have
    assert (_drawn(page)[6] == other.render()["maps"]).all()
    assert page.problems == []
