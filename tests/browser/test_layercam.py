"""The LayerCAM panel in a browser: as a saved page without a network, and in JupyterLab."""

import base64
import io
import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image
from sample import make_panel, settles

from notebooks import TWO_FRAMES, python

pytestmark = pytest.mark.browser


def _pixels(page, selector="canvas.attnviz-map"):
    address = page.eval_on_selector(selector, "canvas => canvas.toDataURL('image/png')")
    image = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
    return np.asarray(image.convert("RGB"))


def _slide(page, label, value):
    page.get_by_label(label, exact=True).evaluate(
        """(input, value) => {
          input.value = value;
          input.dispatchEvent(new Event("input", { bubbles: true }));
        }""",
        value,
    )


def _assert_same(page, panel):
    page.evaluate(TWO_FRAMES)
    difference = np.abs(_pixels(page).astype(int) - panel.render())
    assert np.median(difference) <= 1
    assert (difference > 8).mean() <= 0.002


def _shown_box(page):
    text = page.locator(".attnviz-verdict").inner_text()
    numbers = re.search(r"box (\d+), (\d+) – (\d+), (\d+)", text)
    return tuple(int(number) for number in numbers.groups()) if numbers else None


def _cv2_box(fused, threshold):
    mask = (fused > np.float32(threshold) * fused.max()).astype(np.uint8)
    count, _, found, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count == 1:
        return None
    x, y, width, height, _ = found[1 + found[1:, cv2.CC_STAT_AREA].argmax()]
    return (x, y, x + width, y + height)


@pytest.fixture
def panel():
    return make_panel()


@pytest.fixture
def page(panel, open_page, tmp_path):
    page = open_page(panel.save_html(tmp_path / "panel.html"))
    page.evaluate(TWO_FRAMES)
    return page


# -------------------------------------------------------------------------------- saved page


def test_saved_page_draws_what_python_draws_and_asks_for_nothing(page, panel):
    _assert_same(page, panel)
    for gamma in (0.5, 3.3, 8.0):
        _slide(page, "γ", gamma)
        panel.gamma = gamma
        _assert_same(page, panel)
    for stage in (1, 5, 4):
        page.get_by_role("button", name=f"Stage {stage}").click()
        panel.stages = sorted({stage} ^ set(panel.stages))
        _assert_same(page, panel)
    choices = (("sqrt", "all"), ("tan", "all"), ("none", "none"), ("tanh", "shallow"))
    for scaling, scaled in choices:
        page.get_by_label("Function").select_option(scaling)
        page.get_by_label("Stages", exact=True).select_option(scaled)
        panel.scaling, panel.scaled = scaling, scaled
        _assert_same(page, panel)
    page.get_by_label("Method").select_option("gradcam")
    page.get_by_label("boat").check()
    page.get_by_label("Colors").select_option("turbo")
    _slide(page, "Opacity", 0.4)
    panel.method, panel.class_id, panel.palette, panel.opacity = "gradcam", 2, "turbo", 0.4
    _assert_same(page, panel)
    page.get_by_label("Picture", exact=True).select_option("1")
    panel.image_index = 1
    page.locator("canvas.attnviz-map[width='299']").wait_for()
    _assert_same(page, panel)
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "blob:"))] == []


def test_box_is_the_one_of_opencv(page, panel):
    for threshold in (0.0, 0.15, 0.31, 0.5, 0.62, 0.85, 0.97):
        _slide(page, "Threshold", threshold)
        panel.threshold = threshold
        page.evaluate(TWO_FRAMES)
        assert _shown_box(page) == _cv2_box(panel.fused(), threshold) == panel.box
    for stage in (3, 4, 5):
        page.get_by_role("button", name=f"Stage {stage}").click()
    page.evaluate(TWO_FRAMES)
    assert _shown_box(page) is None
    assert "no stage" in page.locator("canvas.attnviz-map").get_attribute("aria-label")
    original = _pixels(page)
    panel.stages = []
    np.testing.assert_allclose(original, panel.render(), atol=2)


def test_overlap_with_the_ground_truth_is_shown(page, panel):
    _slide(page, "Threshold", 0.5)
    page.evaluate(TWO_FRAMES)
    x0, y0, x1, y1 = _shown_box(page)
    shared = max(0, min(x1, 260) - max(x0, 40)) * max(0, min(y1, 210) - max(y0, 30))
    expected = shared / ((x1 - x0) * (y1 - y0) + 220 * 180 - shared)
    assert f"IoU {expected:.2f}" in page.locator(".attnviz-verdict").inner_text()


def test_values_under_the_pointer_are_those_of_the_map(page, panel):
    area = page.locator(".attnviz-picture").last.bounding_box()
    page.mouse.move(area["x"] + area["width"] * 0.4, area["y"] + area["height"] * 0.6)
    text = page.locator(".attnviz-readout").last.inner_text()
    x, y, value = re.search(r"x (\d+), y (\d+)\s+fused ([\d.]+)", text).groups()
    assert abs(panel.fused()[int(y), int(x)] - float(value)) <= 0.011
    page.mouse.move(0, 0)
    assert "Point at the picture" in page.locator(".attnviz-readout").last.inner_text()


def test_every_control_is_reached_and_worked_by_keys(page):
    focusable = page.locator(".attnviz-panel :is(input, select, button, [tabindex])")
    for control in focusable.all():
        assert control.get_attribute("data-lm-suppress-shortcuts") == "true"
    gamma = page.get_by_label("γ", exact=True)
    gamma.focus()
    page.keyboard.press("ArrowRight")
    assert gamma.input_value() == "2.1"
    page.get_by_role("button", name="Stage 1").focus()
    page.keyboard.press("Space")
    page.evaluate(TWO_FRAMES)
    assert page.get_by_role("button", name="Stage 1").get_attribute("aria-pressed") == "true"
    page.get_by_role("group", name="Picture").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    assert "x 224, y 166" in page.locator(".attnviz-readout").last.inner_text()
    reached = set()
    page.locator("body").focus()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + document.activeElement.type"))
    assert {"INPUTrange", "INPUTradio", "INPUTcheckbox", "BUTTONbutton"} <= reached


def test_height_stays_and_nothing_overflows(panel, open_page, tmp_path):
    page = open_page(panel.save_html(tmp_path / "panel.html"))
    for width in (1100, 700, 360):
        page.set_viewport_size({"width": width, "height": 900})
        page.reload()
        page.locator("canvas.attnviz-map[aria-label]").wait_for()
        page.evaluate(TWO_FRAMES)
        box = page.locator(".attnviz-panel").bounding_box()
        for stage in (3, 4, 5):
            page.get_by_role("button", name=re.compile(f"{stage}$|{stage} ")).first.click()
        page.mouse.move(box["x"] + 100, box["y"] + 150)
        page.get_by_label("Picture", exact=True).select_option("1")
        page.evaluate(TWO_FRAMES)
        assert page.locator(".attnviz-panel").bounding_box()["height"] == box["height"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_damage_is_reported_in_the_panel(panel, open_page, tmp_path):
    first, second = panel._data["pictures"]
    damaged = first | {"maps": first["maps"][:200]}
    panel._data = panel._data | {"pictures": [damaged, second]}
    page = open_page(panel.save_html(tmp_path / "panel.html"), awaits="[role=alert]")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "can't be drawn: the maps of pond can't be decoded" in alert.inner_text()
    page.get_by_label("Picture", exact=True).select_option("1")
    page.locator("canvas.attnviz-map[width='299']").wait_for()
    assert not alert.is_visible()
    page.get_by_label("Picture", exact=True).select_option("0")
    alert.wait_for()


# -------------------------------------------------------------------------------- JupyterLab

CELLS = ["from sample import make_panel\npanel = make_panel()\npanel", "x = 1"]


@pytest.fixture(scope="module")
def lab_page(open_notebook):
    page = open_notebook("panel", *CELLS)
    page.locator("canvas.attnviz-map[aria-label]").wait_for(timeout=60_000)
    page.evaluate(TWO_FRAMES)
    return page


def _kernel(page, expression):
    return json.loads(python(page, f"import json; print(json.dumps({expression}))"))


def test_panel_in_jupyterlab_equals_python_and_tells_the_kernel(lab_page):
    panel = make_panel()
    _assert_same(lab_page, panel)
    _slide(lab_page, "γ", 5.5)
    lab_page.get_by_role("button", name="Stage 2").click()
    lab_page.get_by_label("boat").check()
    _slide(lab_page, "Threshold", 0.45)
    panel.gamma, panel.stages, panel.class_id, panel.threshold = 5.5, [2, 3, 4, 5], 2, 0.45
    _assert_same(lab_page, panel)
    names = ["gamma", "stages", "class_id", "threshold", "box"]
    expected = [5.5, [2, 3, 4, 5], 2, 0.45, list(panel.box)]
    state = f"[getattr(panel, name) for name in {names}]"
    assert settles(lambda: _kernel(lab_page, state), expected)
    assert _shown_box(lab_page) == panel.box


def test_kernel_sets_the_panel_in_jupyterlab(lab_page):
    panel = make_panel(gamma=1.0, stages=[4], palette="viridis", class_id=30, image_index=1)
    python(
        lab_page,
        "panel.image_index, panel.class_id, panel.gamma, panel.stages, panel.palette, "
        "panel.threshold = 1, 30, 1.0, [4], 'viridis', 0.15",
    )
    lab_page.locator("canvas.attnviz-map[width='299']").wait_for()
    _assert_same(lab_page, panel)
    python(lab_page, "panel.image_index, panel.stages = 0, [3, 4, 5]")
    lab_page.locator("canvas.attnviz-map[width='448']").wait_for()


def test_keys_in_the_panel_leave_the_notebook_alone(lab_page):
    gamma = lab_page.get_by_label("γ", exact=True)
    gamma.focus()
    before = float(gamma.input_value())
    for key in ("ArrowRight", "ArrowUp", "b", "m", "d", "d", "x"):
        lab_page.keyboard.press(key)
    assert float(gamma.input_value()) == pytest.approx(before + 0.2)
    lab_page.get_by_role("button", name="Stage 1").focus()
    for key in ("a", "d", "d"):
        lab_page.keyboard.press(key)
    count = "window.jupyterapp.shell.currentWidget.content.widgets.length"
    assert lab_page.evaluate(count) == len(CELLS)
    assert lab_page.locator("canvas.attnviz-map").is_visible()
    assert lab_page.outside == []
    assert lab_page.problems == []
