import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

sys.path.insert(0, str(Path(__file__).parent))

from notebooks import READY, python, watched, write_notebook  # noqa: E402 - beside this file


@pytest.fixture(scope="session")
def chromium():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens a saved page without a network; `problems` and `requests` collect what goes wrong."""
    contexts = []

    def opener(path, awaits="canvas.attnviz-map[aria-label]", **options):
        context = chromium.new_context(offline=True, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.problems, page.requests = [], []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(path.as_uri())
        page.locator(awaits).wait_for()
        return page

    yield opener
    for context in contexts:
        context.close()


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A JupyterLab server on an empty folder: its address and the folder."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    folder = tmp_path_factory.mktemp("lab")
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    notification = settings / "notification.jupyterlab-settings"
    notification.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    (folder / "work").mkdir()
    port = _free_port()
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)]),
    }
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        *(f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1"),
        *("--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.port_retries=0"),
        *("--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder / 'work'}"),
        "--JupyterNotebookApp.expose_app_in_browser=True",  # the server has both front ends
    ]
    address = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for(address, server, folder / "log")
            yield address, folder / "work"
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # kernels are in the server's session
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


SWITCH = """async ([path, id]) => {
  window.jupyterapp.shell.currentWidget.dispose();
  await window.jupyterapp.commands.execute("docmanager:open", { path, kernel: { id } });
}"""


@pytest.fixture(scope="session")
def open_notebook(lab, chromium):
    """Runs cells as a notebook of JupyterLab; one page and one kernel serve all of them."""
    address, folder = lab
    context = chromium.new_context()
    context.set_default_timeout(30_000)
    page, kernel = watched(context), None

    def opener(name, *cells, width=1280, height=900):
        nonlocal kernel
        write_notebook(folder / f"{name}.ipynb", *cells)
        page.set_viewport_size({"width": width, "height": height})
        if kernel is None:
            page.goto(f"{address}/doc/tree/{name}.ipynb")
            page.wait_for_function("window.jupyterapp !== undefined")
        else:
            python(page, "import ipywidgets; ipywidgets.Widget.close_all()")
            page.evaluate(SWITCH, [f"{name}.ipynb", kernel])
        kernel = page.evaluate(READY)
        assert kernel is not None
        page.outside.clear()
        page.problems.clear()
        page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        return page

    yield opener
    context.close()


def _wait_for(address, server, log):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/api", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
