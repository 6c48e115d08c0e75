"""What all panels share: their JavaScript, the picture in the notebook, the saved page.

A panel is one anywidget. Its data is sent once and its state is a few small traits; everything
is drawn in the browser. So the same JavaScript also runs in a page without a kernel: a small host
in the page stands in for the widget's model.
"""

import base64
import hashlib
import html
import io
import json
import os
from importlib.resources import files
from pathlib import Path

import anywidget
from PIL import Image

from ..files import write_whole

__all__ = ["Panel", "save_page", "source", "style"]

_WIDGET_TRAITS = {"_esm", "_css", "_anywidget_id", *anywidget.AnyWidget.class_trait_names()}

_HOST = """\
const { source, state } = JSON.parse(document.getElementById("data").textContent, (key, value) =>
  value?.$bytes === undefined
    ? value
    : new DataView(Uint8Array.from(atob(value.$bytes), (c) => c.charCodeAt(0)).buffer));
const listeners = new Map();
const model = {
  get: (name) => state[name],
  set(name, value) {
    if (Object.is(state[name], value)) return;
    state[name] = value;
    for (const event of [`change:${name}`, "change"])
      for (const listener of listeners.get(event) ?? []) listener();
  },
  on: (event, listener) =>
    listeners.set(event, (listeners.get(event) ?? new Set()).add(listener)),
  off(event, listener) {
    if (listener) listeners.get(event)?.delete(listener);
    else listeners.delete(event);
  },
  save_changes() {},
};
const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
const { default: panel } = await import(address);
panel.render({ model, el: document.getElementById("panel") });
"""

_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; padding: 24px 16px; background: light-dark(#f4f5f7, #101114); }
#panel { max-width: 1040px; margin: 0 auto; }
"""


def source(name: str) -> str:
    """Returns the JavaScript module of a panel: the shared part, then its own.

    The two are joined here because a module loaded from a blob has no neighbours to import.
    """
    folder = files("attnviz.panels") / "js"
    return "\n".join((folder / f"{part}.js").read_text("utf-8") for part in ("core", name))


def style() -> str:
    """Returns the style sheet of the panels."""
    return (files("attnviz.panels") / "js" / "panel.css").read_text("utf-8")


class Panel(anywidget.AnyWidget):
    """A panel: draws itself in the browser, leaves a picture in the notebook, saves as a page.

    A subclass sets ``_esm`` and ``_css``, declares its traits and has a method ``picture`` that
    returns the pixels which stand for it where no widget can be drawn.
    """

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Saves the panel in its current state as one page that needs no kernel and no network.

        Args:
            path: The file; replaced as a whole, or not at all.

        Returns:
            The path of the file.
        """
        return save_page(path, title=repr(self), module=self._esm, css=self._css, state=self.state)

    @property
    def state(self) -> dict[str, object]:
        """The data and the settings of the panel: what the browser needs to draw it."""
        return self.get_state([name for name in self.keys if name not in _WIDGET_TRAITS])

    def _repr_mimebundle_(self, **kwargs: object) -> tuple[dict[str, object], dict[str, object]]:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        buffer = io.BytesIO()
        Image.fromarray(self.picture()).save(buffer, "JPEG", quality=85)
        return data | {"image/jpeg": base64.b64encode(buffer.getvalue()).decode()}, metadata


def save_page(
    path: str | os.PathLike[str], *, title: str, module: str, css: str, state: dict[str, object]
) -> Path:
    """Writes one self-contained page that runs a panel's module on a state.

    The page allows no request at all: its content security policy names its own script and style
    by their hashes.

    Args:
        path: The file; replaced as a whole, or not at all.
        title: The page's title.
        module: The panel's JavaScript module.
        css: The panel's style sheet.
        state: The traits, bytes included.

    Returns:
        The path of the file.
    """
    path = Path(path)
    css = _PAGE_STYLE + css
    data = json.dumps({"source": module, "state": state}, default=_bytes).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; script-src {_hash(_HOST)} blob:; style-src {_hash(css)}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n"
        f'<main id="panel"></main>\n<script type="application/json" id="data">{data}</script>\n'
        f'<script type="module">{_HOST}</script>\n</body>\n</html>\n'
    )
    _write(path, page)
    return path


def _bytes(value: bytes) -> dict[str, str]:
    return {"$bytes": base64.b64encode(value).decode()}


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _write(path: Path, text: str) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"expected a file in `path`, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"expected `path` in an existing folder, got {str(path)!r}; "
            f"create {str(path.parent)!r} first"
        )
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise type(error)(
            f"expected `path` in a writable folder, got {str(path)!r} ({error.strerror}); "
            "save to another folder"
        ) from error
