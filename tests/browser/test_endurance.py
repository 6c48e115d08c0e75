"""Panels under 500 random interactions, and how fast they follow the pointer."""

import random
import statistics

import labelled
import pytest
from pointer import drag_rate, follow_pointer, report
from recorded import record
from sample import make_panel

from attnviz import explore_evidence, load_network
from attnviz.data.scenes import Scenes
from attnviz.panels import explore_accumulation
from notebooks import TWO_FRAMES

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
    "Escape Tab Shift+Tab a b r s t"
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
        "labels": labelled.make_panel(),
    }


@pytest.fixture(params=["layercam", "player", "tree", "labels"])
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
        assert page.locator("[role=treeitem]").count() <= 2
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
    assert page.locator("[role=treeitem][aria-selected=true]").count() == (page.kind == "tree")
    assert page.problems == []
    assert page.locator(DRAWN).get_attribute("aria-label") != "nothing drawn"


def test_drag_is_followed_within_a_frame_or_two(page, capsys):
    times = follow_pointer(page, page.kind)
    rate = (
        "" if page.kind == "tree" else f"; {drag_rate(page, page.kind):.0f} pictures/s in a drag"
    )
    with capsys.disabled():
        print(f"\n{page.kind}: {report(times)}{rate}", end="")  # noqa: T201
    assert statistics.median(times) < 100  # a round trip to a kernel takes longer
    assert page.problems == []
