"""Panels where they live: linked in JupyterLab, in Jupyter Notebook 7, in nbconvert's page."""

import base64
import io
import json
import statistics
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from pointer import PANELS, follow_pointer, report
from sample import make_panel, settles
from test_layercam import _assert_same

from notebooks import READY, TWO_FRAMES, python, watched

pytestmark = pytest.mark.browser

LINKED = """import sys
sys.path.insert(0, {tests!r})
import numpy as np
from ipywidgets import jslink
from recorded import PAIRS, record
import attnviz
from attnviz.data.scenes import Scenes
from attnviz.panels import LayerCAMPanel
player = attnviz.explore_accumulation(record("run", 12))
maps = [np.random.default_rng(k).random((6, 8)) for k in range(3)]
shown = [each.pixels for each in player._pictures]
panel = LayerCAMPanel(
    shown, [[(0, "deer", 2.0), (2, "ship", 1.0)], [(1, "taxi", 3.0)]],
    [[{{"layercam": [maps[0]]}}, {{"layercam": [maps[1]]}}], [{{"layercam": [maps[2]]}}]],
)
net = attnviz.load_network("scenes_conv")
images = [scene.image for scene in (Scenes("val", 2)[0], Scenes("val", 2)[1])]
tree = attnviz.explore_evidence(net, images, [[0, 1, 2], [1]], names=["one", "two"])
jslink((panel, "image_index"), (tree, "image_index"))
jslink((panel, "image_index"), (player, "image_index"))
jslink((panel, "class_id"), (player, "class_id"))
jslink((panel, "class_id"), (tree, "class_id"))"""


@pytest.fixture(scope="module")
def linked(open_notebook):
    code = LINKED.format(tests=str(Path(__file__).parents[1]))
    page = open_notebook("linked", code, "panel", "player", "tree", height=3600)
    page.locator(".attnviz-evidence [role=treeitem]").first.wait_for(timeout=90_000)
    return page


def _parts(page):
    return [page.locator(PANELS[kind]) for kind in ("layercam", "player", "tree")]


STATE = "print([(each.image_index, each.class_id) for each in (panel, player, tree)])"


def test_class_and_picture_of_one_panel_drive_the_others_in_jupyterlab(linked):
    layercam, player, tree = _parts(linked)
    python(linked, "panel.image_index, panel.class_id = 0, 0")
    tree.locator("[role=treeitem][data-link='0']").wait_for()
    layercam.get_by_role("radio", name="ship").check()
    tree.locator("[role=treeitem][data-link='2']").wait_for()
    assert settles(lambda: player.get_by_label("Class", exact=True).input_value(), "2")
    layercam.get_by_label("Picture", exact=True).select_option("1")
    tree.locator("[role=treeitem][data-link='1']").first.wait_for()
    assert settles(lambda: tree.get_by_label("Picture", exact=True).input_value(), "1")
    player.locator("canvas.attnviz-map[width='40']").last.wait_for()
    data = "print(tree._data['index'], tree.class_ids)"
    assert settles(lambda: python(linked, data), "1 [1]", 20)
    player.get_by_label("Picture", exact=True).select_option("0")  # and back the other way
    layercam.locator("canvas.attnviz-map[width='64']").wait_for()
    assert settles(lambda: python(linked, STATE), str([(0, 0)] * 3), 20)
    tree.locator("[role=treeitem][data-link='0']").first.wait_for()
    linked.wait_for_timeout(500)
    assert python(linked, STATE) == str([(0, 0)] * 3)  # nothing goes to and fro
    assert linked.locator(".attnviz-error:visible").count() == 0
    assert linked.outside == []
    assert linked.problems == []


FAIL = """def fail(*_):
    raise RuntimeError("not enough memory")
plant, tree._plant = tree._plant, fail
scene = tree._scenes.pop(1, None)"""


def test_picture_whose_evidence_fails_is_named_and_the_one_before_stays_usable(linked):
    layercam, _, tree = _parts(linked)
    python(linked, "panel.image_index = 0")
    tree.locator("[role=treeitem][data-link='0']").first.wait_for()
    python(linked, FAIL)
    tree.get_by_label("Picture", exact=True).select_option("1")
    alert = tree.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text() == "The evidence of two can't be made: not enough memory"
    assert settles(lambda: tree.get_by_label("Picture", exact=True).input_value(), "0")
    assert settles(lambda: layercam.get_by_label("Picture", exact=True).input_value(), "0")
    assert settles(lambda: python(linked, STATE)[:6], "[(0, 0")
    assert "attnviz-loading" not in tree.get_attribute("class")
    node = tree.locator("[role=treeitem][aria-level='2']:visible").last
    node.click()  # the next action: the old view works, and the word is gone
    tree.locator(f"[data-link='{node.get_attribute('data-link')}'][aria-selected=true]").wait_for()
    alert.wait_for(state="hidden")
    python(linked, "tree._plant = plant")
    tree.get_by_label("Picture", exact=True).select_option("1")
    tree.locator("[role=treeitem][data-link='1']").first.wait_for()
    assert alert.is_hidden()
    assert linked.problems == []


BUSY = """() => new Promise((begun) => {
  const { kernel } = window.jupyterapp.shell.currentWidget.context.sessionContext.session;
  const code = "print('begun', flush=True)\\nwhile True: pass";
  window.work = kernel.requestExecute({ code });
  work.onIOPub = ({ header }) => header.msg_type === "stream" && begun();
  work.done.then(() => (work.ended = true));
})"""
INTERRUPT = """async () => {
  const working = !work.ended;
  await window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.interrupt();
  await work.done;
  return working;
}"""


@pytest.mark.parametrize("kind", ["layercam", "player", "tree"])
def test_drag_never_waits_for_the_kernel(linked, kind, capsys):
    linked.set_viewport_size({"width": 1280, "height": 900})
    idle = follow_pointer(linked, kind, 40)
    linked.evaluate(BUSY)
    busy = follow_pointer(linked, kind, 40)
    assert linked.evaluate(INTERRUPT)
    with capsys.disabled():
        for state, times in (("idle", idle), ("busy", busy)):
            print(f"\n{kind}, kernel {state}: {report(times)}", end="")  # noqa: T201
    assert max(statistics.median(idle), statistics.median(busy)) < 100
    assert linked.problems == []


def test_panel_in_jupyter_notebook_7(lab, open_notebook, chromium):
    pytest.importorskip("notebook", minversion="7", reason="Jupyter Notebook 7 is not installed")
    address, _ = lab
    open_notebook("seven", "from sample import make_panel\nmake_panel()")  # whose kernel it uses
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(30_000)
    page = watched(context)
    page.goto(f"{address}/notebooks/seven.ipynb")
    page.wait_for_function("window.jupyterapp !== undefined")
    assert "notebook" in page.evaluate("window.jupyterapp.name").lower()
    assert page.evaluate(READY)
    page.problems.clear()  # of Notebook itself while it starts
    page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.locator("canvas.attnviz-map[aria-label]").wait_for(timeout=60_000)
    page.evaluate(TWO_FRAMES)
    panel = make_panel()
    _assert_same(page, panel)
    page.get_by_role("button", name="Stage 1").click()
    panel.stages = [1, *panel.stages]
    _assert_same(page, panel)
    for key in ("d", "d", "m"):
        page.keyboard.press(key)
    assert page.locator("canvas.attnviz-map").is_visible()
    assert page.outside == []
    assert page.problems == []
    context.close()


def test_page_of_nbconvert_shows_the_picture_without_a_network(open_page, tmp_path):
    nbconvert = pytest.importorskip("nbconvert")
    panel = make_panel()
    data, metadata = panel._repr_mimebundle_()
    cell = nbformat.v4.new_code_cell("panel", execution_count=1)
    cell.outputs = [
        nbformat.v4.new_output(
            "execute_result", data=json.loads(json.dumps(data)), metadata=metadata,
            execution_count=1,
        )
    ]  # fmt: skip
    exporter = nbconvert.HTMLExporter(require_js_url="", mathjax_url="")
    html, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    (tmp_path / "notebook.html").write_text(html, "utf-8")
    page = open_page(tmp_path / "notebook.html", "img")
    picture = page.locator("img")
    address = picture.get_attribute("src")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))
    assert np.abs(shown.astype(int) - panel.picture()).mean() < 4  # a JPEG
    assert picture.evaluate("image => image.naturalWidth") == panel.picture().shape[1]
    assert [url for url in page.requests if not url.startswith(("file:", "blob:", "data:"))] == []
