"""The player in a browser: as a saved page without a network, and following a training."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded import record
from sample import settles

from attnviz.evolution import load_evolution
from attnviz.panels import explore_accumulation
from notebooks import TWO_FRAMES, python

pytestmark = pytest.mark.browser

LAID = """(picture) => {
  const [below, above] = picture.querySelectorAll("canvas");
  const canvas = new OffscreenCanvas(below.width, below.height);
  const context = canvas.getContext("2d");
  context.drawImage(below, 0, 0);
  context.drawImage(above, 0, 0);
  const copy = document.createElement("canvas");
  Object.assign(copy, { width: below.width, height: below.height });
  copy.getContext("2d").drawImage(canvas, 0, 0);
  return copy.toDataURL("image/png");
}"""
HOST = """async ([source, state, data, frames]) => {
  const read = (text) => JSON.parse(text, (key, value) => value?.$bytes === undefined
    ? value
    : new DataView(Uint8Array.from(atob(value.$bytes), (c) => c.charCodeAt(0)).buffer));
  const values = { ...read(state), _data: read(data), _frames: read(frames) };
  const heard = new Map();
  window.host = {
    sent: 0, read,
    get: (name) => values[name],
    set(name, value) {
      if (values[name] === value) return;
      values[name] = value;
      heard.get(`change:${name}`)?.();
    },
    on: (event, listener) => heard.set(event, listener),
    off: (event) => heard.delete(event),
    save_changes() { this.sent++; },
  };
  const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  const { default: panel } = await import(address);
  panel.render({ model: window.host, el: document.getElementById("panel") });
}"""  # a model in the notebook's place


def _plain(value):
    return json.dumps(value, default=lambda data: {"$bytes": base64.b64encode(data).decode()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        record(folder / "plain", 12, history=True),
        record(folder / "dropped", 12, drop=True, seed=7),
    ]


@pytest.fixture
def panel(runs):
    return explore_accumulation(runs, epoch=1)


@pytest.fixture
def page(panel, open_page, tmp_path):
    path = panel.save_html(tmp_path / "panel.html")
    page = open_page(path, awaits="canvas.attnviz-map[aria-label] >> nth=-1")
    page.evaluate(TWO_FRAMES)
    return page


def _assert_same(page, panel):
    page.evaluate(TWO_FRAMES)
    pictures = page.locator(".attnviz-column:not(.attnviz-plain) .attnviz-picture")
    assert pictures.count() == len(panel.render())
    for number, expected in enumerate(panel.render()):
        address = pictures.nth(number).evaluate(LAID)
        shown = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB")
        difference = np.abs(np.asarray(shown).astype(int) - expected)
        assert np.median(difference) <= 1
        assert (difference > 8).mean() <= 0.002


def _epoch(page):
    return int(page.locator(".attnviz-epoch b:not(:empty)").inner_text())


def _choose(page, label, value):
    page.get_by_label(label, exact=True).select_option(value)


def _slide(page, label, value):
    page.get_by_label(label, exact=True).evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }",
        value,
    )


def test_saved_player_draws_what_python_draws_and_asks_for_nothing(page, panel):
    _assert_same(page, panel)
    for epoch in (2, 7, 12):
        _slide(page, "Epoch", epoch)
        panel.epoch = epoch
        _assert_same(page, panel)
    for highlight in ("first", "none", "epoch"):
        _choose(page, "New pixels", highlight)
        panel.highlight = highlight
        _assert_same(page, panel)
    _slide(page, "Found from", 0.3)
    _slide(page, "Opacity", 0.5)
    _choose(page, "Colors", "viridis")
    _choose(page, "Class", "2")
    panel.threshold, panel.opacity, panel.palette, panel.class_id = 0.3, 0.5, "viridis", 2
    _assert_same(page, panel)
    _choose(page, "Picture", "1")
    panel.image_index = 1
    page.locator("canvas.attnviz-map[width='40']").last.wait_for()
    _assert_same(page, panel)
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "blob:"))] == []


def test_numbers_and_curves_are_those_of_python(page, panel):
    curve = panel.curve()
    for epoch in (1, 6, 12):
        _slide(page, "Epoch", epoch)
        page.evaluate(TWO_FRAMES)
        texts = page.locator(
            ".attnviz-column:not(.attnviz-plain) .attnviz-rates"
        ).all_inner_texts()
        for name, text in zip(curve, texts):
            shown = [int(number) for number in re.findall(r"(\d+) %", text)]
            expected = [100 * curve[name][kind][epoch - 1] for kind in ("recall", "noise")]
            np.testing.assert_allclose(shown, expected, atol=0.51)
    y = [float(dot.get_attribute("cy")) for dot in page.locator(".attnviz-dot").all()]
    expected = [8 + (1 - curve[name]["recall"][-1]) * 120 for name in curve]
    np.testing.assert_allclose(y, expected, atol=0.1)
    _choose(page, "Curves of", "training")
    page.evaluate(TWO_FRAMES)
    assert "recorded at 50 %" in page.locator(".attnviz-legend").inner_text()


def test_playing_follows_the_clock_and_ends_at_the_last_epoch(page):
    _choose(page, "Speed", "16")
    play, pause = (page.get_by_role("button", name=name) for name in ("Play", "Pause"))
    play.click()
    pause.wait_for()
    play.wait_for()
    assert _epoch(page) == 12
    begun = page.evaluate("performance.now()")
    play.click()  # at the end: from the start again
    pause.wait_for()
    play.wait_for()
    assert page.evaluate("performance.now()") - begun > 11 / 16 * 1000 - 30
    assert _epoch(page) == 12


def test_keys_play_step_and_stay_in_the_panel(page):
    for control in page.locator(".attnviz-panel :is(input, select, button, [tabindex])").all():
        assert control.get_attribute("data-lm-suppress-shortcuts") == "true"
    page.locator(".attnviz-columns").focus()
    for key, epoch in (
        ("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", 12), ("ArrowRight", 12),
        ("Home", 1), ("ArrowLeft", 1),
    ):  # fmt: skip
        page.keyboard.press(key)
        page.evaluate(TWO_FRAMES)
        assert _epoch(page) == epoch
    page.keyboard.press("+")
    page.keyboard.press("+")
    page.keyboard.press("-")
    page.evaluate(TWO_FRAMES)
    assert page.get_by_label("Speed").input_value() == "8"
    page.keyboard.press("Space")
    page.get_by_role("button", name="Pause").wait_for()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Play").wait_for()
    page.get_by_label("Found from").focus()  # arrows there are the slider's own
    epoch = _epoch(page)
    page.keyboard.press("ArrowRight")
    page.evaluate(TWO_FRAMES)
    assert (_epoch(page), page.get_by_label("Found from").input_value()) == (epoch, "0.51")
    page.keyboard.press("?")
    assert page.locator(".attnviz-keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator(".attnviz-keys").is_visible()


def test_reduced_motion_is_respected(panel, open_page, tmp_path):
    path = panel.save_html(tmp_path / "panel.html")
    page = open_page(
        path, awaits="canvas.attnviz-map[aria-label] >> nth=-1", reduced_motion="reduce"
    )
    _choose(page, "Speed", "1")
    page.get_by_role("button", name="Play").click()
    page.wait_for_timeout(500)
    places = {page.evaluate("document.querySelector('.attnviz-cursor').style.transform")}
    page.wait_for_timeout(200)
    places.add(page.evaluate("document.querySelector('.attnviz-cursor').style.transform"))
    assert len(places) == 1


def test_height_stays_and_nothing_overflows(panel, open_page, tmp_path):
    path, drawn = panel.save_html(tmp_path / "panel.html"), "canvas.attnviz-map[aria-label]"
    page = open_page(path, awaits=f"{drawn} >> nth=-1")
    for width in (1100, 700, 360):
        page.set_viewport_size({"width": width, "height": 900})
        page.reload()
        page.locator(drawn).last.wait_for()
        page.evaluate(TWO_FRAMES)
        height = page.locator(".attnviz-panel").bounding_box()["height"]
        for epoch in (3, 12):
            _slide(page, "Epoch", epoch)
        _slide(page, "Found from", 0.2)
        page.locator(".attnviz-picture").last.hover()
        _choose(page, "Picture", "1")
        page.evaluate(TWO_FRAMES)
        assert page.locator(".attnviz-panel").bounding_box()["height"] == height
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for text in page.locator(".attnviz-rates, .attnviz-readout, .attnviz-epoch").all():
            assert text.evaluate("node => node.scrollWidth - node.clientWidth") <= 1


def test_finished_run_has_no_stop_button(page):
    assert page.get_by_role("button", name="Stop training").count() == 0


def test_new_epochs_arrive_and_the_stop_button_asks(chromium, tmp_path):
    panel = explore_accumulation(record(tmp_path / "run", 2, planned=5), seconds=600)
    page = chromium.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.set_content(f"<style>{panel._css}</style><div id=panel></div>")
    state = {name: panel.get_state()[name] for name in panel.trait_names() if name in panel.keys}
    state = {name: value for name, value in state.items() if not name.startswith("_")}
    page.evaluate(HOST, [panel._esm, _plain(state), _plain(panel._data), _plain(panel._frames)])
    page.get_by_text("following, 2 of 5").wait_for()
    assert _epoch(page) == 2
    _slide(page, "Found from", 0.4)
    _choose(page, "Class", "2")
    page.get_by_label("Epoch", exact=True).focus()
    page.keyboard.press("ArrowLeft")

    page.wait_for_function("host.sent > 0")  # the kernel hears of it
    panel.epoch = page.evaluate("host.get('epoch')")

    record(tmp_path / "run", 4, planned=5)
    panel._take([load_evolution(tmp_path / "run")])
    page.evaluate(
        "([frames, epoch]) => (host.set('_frames', host.read(frames)), host.set('epoch', epoch))",
        [_plain(panel._frames), panel.epoch],
    )
    page.get_by_text("following, 4 of 5").wait_for()
    page.evaluate(TWO_FRAMES)
    assert (_epoch(page), page.get_by_label("Found from").input_value()) == (1, "0.4")
    _choose(page, "Speed", "1")
    page.get_by_role("button", name="Play").click()
    page.evaluate("host.set('epoch', 4)")  # a late word of the kernel does not disturb playing
    page.wait_for_timeout(100)
    assert _epoch(page) < 3
    page.get_by_label("Epoch", exact=True).focus()
    page.keyboard.press("End")
    page.evaluate(TWO_FRAMES)
    assert _epoch(page) == 4
    panel.epoch, panel.class_id, panel.threshold = 4, 2, 0.4
    _assert_same(page, panel)
    page.get_by_role("button", name="Stop training").click()
    assert page.evaluate("[host.sent > 0, host.get('stopping')]") == [True, True]
    page.get_by_text("stopping at the next step").wait_for()
    panel.close()
    page.close()
    assert problems == []


def test_damage_is_reported_in_the_panel(panel, open_page, tmp_path):
    first, second = panel._frames["maps"]
    panel._frames = panel._frames | {"maps": [first[:60], second]}
    page = open_page(panel.save_html(tmp_path / "panel.html"), awaits="[role=alert]")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "can't be drawn: the maps of pond can't be decoded" in alert.inner_text()
    _choose(page, "Picture", "1")
    page.locator("canvas.attnviz-map[width='40']").last.wait_for()
    assert not alert.is_visible()


# -------------------------------------------------------------------------------- JupyterLab

CELL = """
import sys, threading, time
sys.path.insert(0, {tests!r})
from recorded import train, writer
import attnviz
target = writer("run", 400)
training = threading.Thread(target=train, args=(target, 400, lambda: time.sleep(0.4)), daemon=True)
training.start()
panel = attnviz.explore_accumulation("run", training=training, seconds=0.1, threshold=0.3)
panel
"""


def test_training_is_followed_and_stopped_in_jupyterlab(open_notebook):
    page = open_notebook("player", CELL.format(tests=str(Path(__file__).parents[1])), height=1000)
    page.get_by_text(re.compile(r"following, \d+ of 400")).wait_for(timeout=60_000)
    page.locator("canvas.attnviz-map[aria-label]").last.wait_for()
    first = _epoch(page)
    page.wait_for_function(
        f"Number(document.querySelector('.attnviz-epoch b').innerText) > {first}"
    )
    page.locator(".attnviz-columns").focus()
    page.keyboard.press("Home")  # looks back: new epochs arrive and do not disturb
    assert settles(lambda: python(page, "print(panel.epoch)"), "1")
    count = int(python(page, "print(len(panel._epochs))"))
    page.wait_for_function(
        "least => /following, (\\d+) of/.exec(document.body.innerText)?.[1] >= least",
        arg=count + 2,
    )
    assert (_epoch(page), page.get_by_label("Found from").input_value()) == (1, "0.3")
    page.get_by_role("button", name="Stop training").click()
    page.get_by_text(re.compile(r"ended at \d+ of 400 epochs")).wait_for()
    assert python(page, "print(training.is_alive(), panel.live)") == "False False"
    assert page.outside == []
    assert page.problems == []
