"""Panels under 500 random interactions, and how fast they follow the pointer."""

import random
import statistics

import pytest
from recorded import record
from sample import make_panel
from test_layercam import TWO_FRAMES

from attnviz import explore_evidence, load_network
from attnviz.data.scenes import Scenes
from attnviz.panels import explore_accumulation

pytestmark = pytest.mark.browser

DRAWN = "canvas.attnviz-map[aria-label] >> nth=-1"
SLIDE = """(share) => {
  const inputs = [...document.querySelectorAll(".attnviz-panel input[type=range]:enabled")];
  const input = inputs[Math.floor(share * inputs.length)];
  const at = (share * 7919) % 1;
  input.value = Number(input.min) + at * (input.max - input.min);
  for (const name of ["input", "change"])
    input.dispatchEvent(new Event(name, { bubbles: true }));
}"""
CHOOSE = """(share) => {
  const lists = [...document.querySelectorAll(".attnviz-panel select")];
  const list = lists[Math.floor(share * lists.length)];
  const options = [...list.options].filter(({ disabled }) => !disabled);
  list.value = options[Math.floor(((share * 7919) % 1) * options.length)].value;
  list.dispatchEvent(new Event("change", { bubbles: true }));
}"""
CLICK = """(share) => {
  const parts = document.querySelectorAll(".attnviz-panel :is(button:not(.attnviz-menu button), " +
    "input[type=radio], input[type=checkbox], [role=treeitem])");
  parts[Math.floor(share * parts.length)].click();
}"""
CLOSE = """() => document.querySelectorAll(
  '[role=treeitem][aria-level="1"][aria-expanded=true] .attnviz-door').forEach(d => d.click())"""
KEYS = (
    "ArrowUp ArrowDown ArrowLeft ArrowRight Home End Enter Space * + - 0 1 2 5 c m n o p ? "
    "Escape Tab Shift+Tab"
).split()


@pytest.fixture(scope="module")
def panels(tmp_path_factory):
    runs = [record(tmp_path_factory.mktemp("runs") / name, 12) for name in ("plain", "other")]
    tree = explore_evidence(load_network("scenes_conv"), Scenes("val", 1)[0].image)
    start = tree.opened
    tree.grow(2)
    tree.opened = start
    return {
        "layercam": make_panel(),
        "player": explore_accumulation(runs, epoch=1),
        "tree": tree,
    }


@pytest.fixture(params=["layercam", "player", "tree"])
def page(request, panels, open_page, tmp_path):
    path = panels[request.param].save_html(tmp_path / f"{request.param}.html")
    page = open_page(path, DRAWN, viewport={"width": 1100, "height": 800})
    page.wait_for_timeout(400)
    page.kind = request.param
    return page


def _interact(page, chance, count):
    box = page.locator(".attnviz-panel").bounding_box()
    for _ in range(count):
        share = chance.random()
        action = chance.choice(("key", "key", "click", "slide", "choose", "drag", "hover"))
        if action == "key":
            page.keyboard.press(chance.choice(KEYS))
        elif action in ("drag", "hover"):
            page.mouse.move(chance.uniform(0, 1100), chance.uniform(0, min(box["height"], 800)))
            if action == "drag":
                page.mouse.down()
                page.mouse.move(chance.uniform(0, 1100), chance.uniform(60, 700))
                page.mouse.up()
        else:
            page.evaluate({"click": CLICK, "slide": SLIDE, "choose": CHOOSE}[action], share)


def _memory(page):
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.enable")
    session.send("HeapProfiler.collectGarbage")
    used = session.send("Runtime.getHeapUsage")
    session.detach()
    return sum(used.get(name, 0) for name in ("usedSize", "embedderHeapUsedSize",
                                              "backingStorageSize"))  # fmt: skip


def test_500_random_interactions_leave_the_panel_responsive_and_small(page, capsys):
    chance = random.Random(11)
    used = []
    for _ in range(10):
        _interact(page, chance, 50)
        page.keyboard.press("Escape")
        page.evaluate(CLOSE)  # or memory would say how many nodes are open just then
        page.evaluate(TWO_FRAMES)
        used.append(_memory(page) / 1e6)
    before, after = max(used[:5]), max(used[5:])
    with capsys.disabled():
        print(f"\n{page.kind}: {before:.1f} to {after:.1f} MB", end="")  # noqa: T201
    assert after < 1.2 * before
    begun = page.evaluate("performance.now()")
    page.evaluate(SLIDE, 0.3)
    page.evaluate(TWO_FRAMES)
    assert page.evaluate("performance.now()") - begun < 1000
    assert page.locator(".attnviz-error:visible").count() == 0
    assert page.problems == []
    assert page.locator(DRAWN).get_attribute("aria-label") != "nothing drawn"


WATCH = """(kind) => {
  const maps = [...document.querySelectorAll("canvas.attnviz-map")];
  const [canvas] = kind === "player" ? maps.slice(-1) : maps;
  const scroller = document.querySelector(".attnviz-scroller");
  const watch = (window.watch = { times: [], frames: 0, moved: null });
  let changed = false;
  const put = CanvasRenderingContext2D.prototype.putImageData;
  CanvasRenderingContext2D.prototype.putImageData = function (...parts) {
    put.apply(this, parts);
    changed ||= this.canvas === canvas;
  };
  scroller?.addEventListener("scroll", () => (changed = true));
  document.addEventListener("pointermove", (event) => (watch.moved ??= event.timeStamp), true);
  const channel = new MessageChannel();  // its message comes after the frame is painted
  channel.port1.onmessage = () => {
    if (!changed) return;
    changed = false;
    watch.frames++;
    if (watch.moved !== null) watch.times.push(performance.now() - watch.moved);
    watch.moved = null;
  };
  const frame = () => {
    channel.port2.postMessage(null);
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
}"""


DRAG = """async (label) => {
  const input = [...document.querySelectorAll("input[type=range]")]
    .find((each) => (each.labels[0]?.textContent ?? each.ariaLabel) === label);
  const steps = Math.min(Math.round((input.max - input.min) / input.step), 22); // all differ
  const begun = performance.now();
  watch.frames = 0;
  for (let k = 0; performance.now() - begun < 1500; k++) {
    const share = Math.abs((k % (2 * steps)) - steps) / steps;
    input.value = Number(input.min) + share * (input.max - input.min);
    input.dispatchEvent(new Event("input", { bubbles: true }));
    await new Promise(requestAnimationFrame);
  }
  return (1000 * watch.frames) / (performance.now() - begun);
}"""


def _track(page):
    """Two points of the page between which a drag changes the picture."""
    if page.kind == "tree":
        for _ in range(5):
            page.get_by_role("button", name="Zoom in").first.click()
        scroller = page.locator(".attnviz-scroller").first
        room = scroller.evaluate(
            "part => (part.scrollLeft = 1e6, Math.min(part.scrollLeft, part.clientWidth - 200))"
        )
        box = scroller.bounding_box()
        y = box["y"] + box["height"] - 90
        return (box["x"] + 40, y), (box["x"] + 40 + room, y)
    slider = page.get_by_label("γ" if page.kind == "layercam" else "Epoch", exact=True)
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    y = box["y"] + box["height"] / 2
    return (box["x"] + 10, y), (box["x"] + box["width"] - 10, y)


def test_drag_is_followed_within_a_frame_or_two(page, capsys):
    (x0, y0), (x1, y1) = _track(page)
    page.evaluate(WATCH, page.kind)
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move(x0 + 12, y0)
    page.wait_for_timeout(200)
    page.evaluate("watch.times = []; watch.moved = null")
    for number in range(100):  # to and fro, so that every move changes something
        share = abs((number + 1) % 20 - 10) / 10
        page.evaluate("watch.moved = null")
        page.mouse.move(x0 + 12 + share * (x1 - x0 - 12), y1)
        page.wait_for_timeout(30)
    times = page.evaluate("watch.times")
    page.mouse.up()
    cuts = statistics.quantiles(times, n=20)
    label = {"layercam": "γ", "player": "Epoch"}.get(page.kind)
    rate = f"; {page.evaluate(DRAG, label):.0f} pictures/s in a drag" if label else ""
    with capsys.disabled():
        print(  # noqa: T201 - the measurement is the point
            f"\n{page.kind}: pointer to pixels median {statistics.median(times):.1f}, 95th "
            f"percentile {cuts[-1]:.1f} ms over {len(times)} moves{rate}",
            end="",
        )
    assert len(times) >= 80
    assert statistics.median(times) < 200  # a round trip to a kernel takes longer
    assert page.problems == []
