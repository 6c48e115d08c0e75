"""Pages of JupyterLab: how to wait for them, and how to speak to their kernel."""

import nbformat

READY = """async () => {
  const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  for (let k = 0; k < 600; k++, await wait(50)) {
    const context = window.jupyterapp?.shell.currentWidget?.context;
    const kernel = context?.sessionContext?.session?.kernel;
    if (context?.isReady && kernel?.connectionStatus === "connected" && kernel.status === "idle")
      return kernel.id;
  }
  return null;
}"""
TWO_FRAMES = "() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"
RUN = """async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel;
  const future = kernel.requestExecute({ code, store_history: false });
  let text = "";
  future.onIOPub = (message) => {
    if (message.header.msg_type === "stream") text += message.content.text;
    if (message.header.msg_type === "error") text += message.content.evalue;
  };
  await future.done;
  return text.trim();
}"""


def python(page, code):
    """Runs code in the kernel of the notebook that a page shows; returns what it prints."""
    return page.evaluate(RUN, code)


def write_notebook(path, *cells):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in cells]
    )
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, path)


def watched(context):
    """Returns a page that collects its errors and the requests that leave the machine."""
    page = context.new_page()
    page.outside, page.problems = [], []
    page.on("request", lambda r: None if _is_local(r.url) else page.outside.append(r.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    return page


def _is_local(url):
    return url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "blob:", "data:"))
