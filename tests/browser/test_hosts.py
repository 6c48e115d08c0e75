"""Panels where they live: linked in JupyterLab, in Jupyter Notebook 7, in nbconvert's page."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import _free_port, _wait_for
from PIL import Image
from sample import make_panel, settles
from test_layercam import READY, RUN, TWO_FRAMES, _assert_same, _is_local

pytestmark = pytest.mark.browser

LINKED = """import sys
sys.path.insert(0, {tests!r})
import numpy as np
from ipywidgets import jslink
from recorded import PAIRS, record
import attnviz
from attnviz.data.scenes import Scenes
from attnviz.panels import LayerCAMPanel
player = attnviz.explore_accumulation(record("run", 6))
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


def _write_notebook(path, *cells):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in cells]
    )
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, path)


def _watched(context):
    page = context.new_page()
    context.set_default_timeout(30_000)
    page.outside, page.problems = [], []
    page.on("request", lambda r: None if _is_local(r.url) else page.outside.append(r.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    return page


def test_class_and_picture_of_one_panel_drive_the_others_in_jupyterlab(lab, chromium):
    address, folder = lab
    code = LINKED.format(tests=str(Path(__file__).parents[1]))
    _write_notebook(folder / "linked.ipynb", code, "panel", "player", "tree")
    context = chromium.new_context(viewport={"width": 1280, "height": 3600})
    page = _watched(context)
    page.goto(f"{address}/doc/tree/linked.ipynb")
    page.wait_for_function("window.jupyterapp !== undefined")
    assert page.evaluate(READY)
    page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.locator(".attnviz-evidence [role=treeitem]").first.wait_for(timeout=90_000)
    player, tree = page.locator(".attnviz-player"), page.locator(".attnviz-evidence")
    layercam = page.locator(".attnviz-panel:not(.attnviz-player):not(.attnviz-evidence)")
    layercam.get_by_role("radio", name="ship").check()
    tree.locator("[role=treeitem][data-link='2']").wait_for()
    assert settles(lambda: player.get_by_label("Class", exact=True).input_value(), "2")
    layercam.get_by_label("Picture", exact=True).select_option("1")
    tree.locator("[role=treeitem][data-link='1']").first.wait_for()
    assert settles(lambda: tree.get_by_label("Picture", exact=True).input_value(), "1")
    player.locator("canvas.attnviz-map[width='40']").last.wait_for()
    data = "print(tree._data['index'], tree.class_ids)"
    assert settles(lambda: page.evaluate(RUN, data).strip(), "1 [1]", 20)
    player.get_by_label("Picture", exact=True).select_option("0")  # and back the other way
    layercam.locator("canvas.attnviz-map[width='64']").wait_for()
    three = "(panel, player, tree)"
    state = f"print([(each.image_index, each.class_id) for each in {three}])"
    assert settles(lambda: page.evaluate(RUN, state).strip(), str([(0, 0)] * 3), 20)
    tree.locator("[role=treeitem][data-link='0']").first.wait_for()
    page.wait_for_timeout(500)
    assert page.evaluate(RUN, state).strip() == str([(0, 0)] * 3)  # nothing goes to and fro
    assert page.locator(".attnviz-error:visible").count() == 0
    assert page.outside == []
    assert page.problems == []
    page.evaluate("() => window.jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")
    context.close()


def test_panel_in_jupyter_notebook_7(chromium, tmp_path):
    pytest.importorskip("notebook", minversion="7", reason="Jupyter Notebook 7 is not installed")
    _write_notebook(tmp_path / "panel.ipynb", "from sample import make_panel\nmake_panel()")
    port = _free_port()
    folders = {
        name: str(tmp_path / name)
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    path = [str(Path(__file__).parents[2]), str(Path(__file__).parent), *sys.path]
    environment = os.environ | folders | {"PYTHONPATH": os.pathsep.join(path)}
    command = [
        *(sys.executable, "-m", "notebook", "--no-browser", "--allow-root"),
        *(f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0"),
        *("--IdentityProvider.token=", "--ServerApp.password="),
        *("--JupyterNotebookApp.expose_app_in_browser=True", f"--ServerApp.root_dir={tmp_path}"),
    ]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}", server, tmp_path / "log")
            context = chromium.new_context(viewport={"width": 1280, "height": 900})
            page = _watched(context)
            page.goto(f"http://127.0.0.1:{port}/notebooks/panel.ipynb")
            page.wait_for_function("window.jupyterapp !== undefined")
            assert page.evaluate(READY)
            page.problems.clear()  # of Notebook itself while it starts
            page.evaluate(
                "() => void window.jupyterapp.commands.execute('notebook:run-all-cells')"
            )
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
        finally:
            os.killpg(server.pid, 15)
            server.wait(20)


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
