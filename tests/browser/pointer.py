"""How fast a panel follows the pointer: from its event to the frame that shows the change."""

import statistics

from notebooks import TWO_FRAMES

PANELS = {
    "layercam": ".attnviz-panel:not(.attnviz-player, .attnviz-evidence, .attnviz-labels)",
    "player": ".attnviz-player",
    "tree": ".attnviz-evidence",
    "labels": ".attnviz-labels",
}
"""Selectors of the panels' elements."""

_SLIDERS = {"layercam": "γ", "player": "Epoch", "labels": "Conflict above"}
_WATCH = """(panel) => {
  const root = document.querySelector(panel);
  const canvas = [...root.querySelectorAll("canvas.attnviz-map")].at(-1);
  const scroller = root.querySelector(".attnviz-scroller");
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
_DRAG = """async ([panel, label]) => {
  const input = [...document.querySelector(panel).querySelectorAll("input[type=range]")]
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


def _track(page, kind):
    # Two places of the page between which a drag changes the picture.
    panel = page.locator(PANELS[kind])
    if kind == "tree":
        for _ in range(5):
            panel.get_by_role("button", name="Zoom in").first.click()
        scroller = panel.locator(".attnviz-scroller").first
        scroller.scroll_into_view_if_needed()
        room = scroller.evaluate(
            "part => (part.scrollLeft = 1e6, Math.min(part.scrollLeft, part.clientWidth - 200))"
        )
        box = scroller.bounding_box()
        y = box["y"] + box["height"] - 90
        return (box["x"] + 40, y), (box["x"] + 40 + room, y)
    slider = panel.get_by_label(_SLIDERS[kind], exact=True)
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    y = box["y"] + box["height"] / 2
    return (box["x"] + 10, y), (box["x"] + box["width"] - 10, y)


def follow_pointer(page, kind, moves=100):
    """Drags a slider, or the tree, to and fro; returns the time of each move in ms."""
    (x0, y), (x1, _) = _track(page, kind)
    page.evaluate(_WATCH, PANELS[kind])
    page.mouse.move(x0, y)
    page.mouse.down()
    page.mouse.move(x0 + 12, y)
    page.evaluate(TWO_FRAMES)
    page.wait_for_timeout(100)
    page.evaluate("watch.times = []; watch.moved = null")
    for number in range(moves):  # every move changes something
        share = abs((number + 1) % 20 - 10) / 10
        page.evaluate("watch.moved = null")
        page.mouse.move(x0 + 12 + share * (x1 - x0 - 12), y)
        page.wait_for_timeout(30)
    times = page.evaluate("watch.times")
    page.mouse.up()
    assert len(times) >= 0.8 * moves
    return times


def drag_rate(page, kind):
    """Returns how many pictures a second are drawn in a long drag of a slider."""
    return page.evaluate(_DRAG, [PANELS[kind], _SLIDERS[kind]])


def report(times):
    """Says the median and the 95th percentile of times."""
    high = statistics.quantiles(times, n=20)[-1]
    return (
        f"pointer to pixels median {statistics.median(times):.1f}, 95th percentile {high:.1f} ms "
        f"over {len(times)} moves"
    )
