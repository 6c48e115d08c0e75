"""Saved pages: a panel's JavaScript runs in them as it does in a notebook.

A small host in the page stands in for the widget's model; a page needs no kernel and no network.
:func:`save_story` puts several panels and the text between them into one page.
"""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import traitlets

from ..files import write_whole

if TYPE_CHECKING:
    from .panel import Panel

__all__ = ["save_page", "save_story"]

_HOST = """\
const read = (key, value) => value?.$bytes === undefined
  ? value
  : new DataView(Uint8Array.from(atob(value.$bytes), (c) => c.charCodeAt(0)).buffer);
const text = document.getElementById("data").textContent;
const { core, kinds, panels, linked } = JSON.parse(text, read);

function makeModel(state) {
  const listeners = new Map();
  return {
    alone: panels.length === 1,
    has: (name) => name in state && !name.startsWith("_"),
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
}

const modules = await Promise.all(kinds.map((own) =>
  import(URL.createObjectURL(new Blob([core, own], { type: "text/javascript" })))));
const places = document.querySelectorAll("[data-panel]");
const models = panels.map(({ state }) => makeModel(state));
panels.forEach(({ kind }, k) => modules[kind].default.render({ model: models[k], el: places[k] }));

for (const [k, model] of models.entries())
  for (const name of linked)
    model.on(`change:${name}`, () => {
      for (const other of models) if (other.has(name)) other.set(name, model.get(name));
    });

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[data-set]");
  if (!link) return;
  event.preventDefault();
  const { panel, values } = JSON.parse(link.dataset.set);
  for (const [name, value] of Object.entries(values)) models[panel].set(name, value);
  places[panel].scrollIntoView({ block: "nearest" });
});
"""

_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; padding: 24px 16px; background: light-dark(#f4f5f7, #101114); }
.attnviz-slot { max-width: 1040px; margin: 0 auto; }
"""

_STORY_STYLE = """
.story { color: light-dark(#1f2328, #e4e6ea); font: 17px/1.6 system-ui, sans-serif; }
.story > * { max-width: 720px; margin-inline: auto; }
.story > .attnviz-slot { max-width: 1040px; margin-block: 28px; }
.story h1, .story h2, .story h3 { line-height: 1.25; }
.story img { max-width: 100%; }
.story a { color: light-dark(#1264c4, #6cb1ff); }
.story a[data-set] { text-decoration-style: dotted; }
.story :is(code, pre) { border-radius: 4px; background: light-dark(#e7eaee, #24272d); }
.story code { padding: 1px 4px; font-size: 0.9em; }
.story pre { padding: 12px 14px; overflow-x: auto; }
.story pre code { padding: 0; }
.story blockquote { padding-left: 14px; border-left: 3px solid light-dark(#c3c9d1, #4a5059); }
.story table { display: block; overflow-x: auto; border-collapse: collapse; }
.story :is(th, td) { padding: 4px 12px; border-bottom: 1px solid; text-align: left; }
.story footer { margin-top: 40px; color: light-dark(#59606a, #a4abb6); font-size: 13px; }
"""


_CORE = (files("attnviz.panels") / "js" / "core.js").read_text("utf-8")
_SIZE = "<!-- size -->"  # its place; no Markdown makes it, since HTML is escaped


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
    body = '<main id="panel" class="attnviz-slot" data-panel="0"></main>'
    return _save(path, title, _PAGE_STYLE + css, body, [(module, state)])


def save_story(
    path: str | os.PathLike[str],
    parts: "Sequence[str | Panel]",
    *,
    title: str,
    linked: bool = False,
) -> Path:
    """Saves panels and the text between them as one page that needs no kernel and no network.

    A link in the text can set a panel: ``[stage 1 too](#panel-1?stages=[1,4,5]&gamma=4)`` sets
    two traits of the first panel; values are written as JSON, and text without quotes. Code that
    panels share is in the page once, and the page states its size. A picture in the text,
    ``![](cat.jpg)``, is taken into the page.

    Args:
        path: The file; replaced as a whole, or not at all.
        parts: Markdown and panels, in their order. HTML in the Markdown is shown as text.
        title: The page's title, also its heading.
        linked: Whether the class and the picture chosen in one panel are chosen in all of them.

    Returns:
        The path of the file.

    Raises:
        ValueError: There is no panel, a link sets what its panel does not have, or a picture of
            the text is no file.

    Example:
        ``save_story("talk.html", ["Look at **stage 1**:", panel, "And why:", tree], title="Cat")``
    """
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise TypeError(
            f"expected a list of Markdown and panels in `parts`, got {type(parts).__name__}; "
            "write [panel] for one"
        )
    if not isinstance(title, str):
        raise TypeError(f"expected text as `title`, got {title!r}")
    panels = [part for part in parts if not isinstance(part, str)]
    for panel in panels:
        if not isinstance(panel, traitlets.HasTraits) or not hasattr(panel, "save_html"):
            raise TypeError(f"expected Markdown or panels in `parts`, got {type(panel).__name__}")
    if not panels:
        raise ValueError("expected at least one panel in `parts`, got none")
    number, body = 0, [f"<h1>{html.escape(title)}</h1>"]
    markdown = _markdown(panels)
    for part in parts:
        if isinstance(part, str):
            body.append(markdown(part))
            continue
        name = html.escape(repr(part))
        body.append(
            f'<section class="attnviz-slot" id="panel-{number + 1}" data-panel="{number}" '
            f'aria-label="{name}"></section>'
        )
        number += 1
    css = _PAGE_STYLE + _STORY_STYLE + panels[0]._css
    shown = [(panel._esm, panel.state) for panel in panels]
    text = "".join(body)
    links = ("image_index", "class_id") if linked else ()
    return _save(path, title, css, f'<main class="story">{text}{_SIZE}</main>', shown, links)


def _save(
    path: str | os.PathLike[str],
    title: str,
    css: str,
    body: str,
    panels: Sequence[tuple[str, dict[str, object]]],
    linked: Sequence[str] = (),
) -> Path:
    modules = [module.removeprefix(_CORE) for module, _ in panels]
    kinds = list(dict.fromkeys(modules))
    content = {
        "core": _CORE,
        "kinds": kinds,
        "linked": linked,
        "panels": [
            {"kind": kinds.index(module), "state": state}
            for module, (_, state) in zip(modules, panels, strict=True)
        ],
    }
    data = json.dumps(content, default=_bytes).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; script-src {_hash(_HOST)} blob:; style-src {_hash(css)}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    size = (len(data) + len(css) + len(_HOST) + len(body.encode())) / 1000
    stated = f"{size / 1000:.1f} MB" if size > 1000 else f"{size:.0f} kB"
    footer = f"<footer>One file of {stated}; it needs neither Python nor a network.</footer>"
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n"
        f"{body.replace(_SIZE, footer)}\n"
        f'<script type="application/json" id="data">{data}</script>\n'
        f'<script type="module">{_HOST}</script>\n</body>\n</html>\n'
    )
    path = Path(path)
    _write(path, page)
    return path


def _markdown(panels: "Sequence[Panel]") -> Callable[[str], str]:
    import mistune  # with Pillow below, what a single panel does without
    from PIL import Image

    class Renderer(mistune.HTMLRenderer):
        def link(self, text: str, url: str, title: str | None = None) -> str:
            if url.startswith("#panel-"):
                values = html.escape(json.dumps(_setting(url, panels)))
                target = html.escape(url.partition("?")[0])
                return f'<a href="{target}" data-set="{values}">{text}</a>'
            safe = re.match(r"(https?:|mailto:|#)", url)
            return super().link(text, url, title) if safe else text

        def image(self, text: str, url: str, title: str | None = None) -> str:
            try:
                with Image.open(url) as picture:
                    mime = Image.MIME[picture.format]
            except OSError as error:
                raise ValueError(
                    f"expected a picture file in the text, got {url!r}; a page holds its "
                    "pictures, so download one that is elsewhere"
                ) from error
            coded = base64.b64encode(Path(url).read_bytes()).decode()
            return super().image(text, f"data:{mime};base64,{coded}", title)

    markdown = mistune.create_markdown(
        renderer=Renderer(escape=True), plugins=["table", "strikethrough"]
    )
    # the plugin aligns cells by a style attribute, which the page's policy forbids
    markdown.renderer.register(
        "table_cell",
        lambda _, text, align=None, head=False: f"<t{'dh'[head]}>{text}</t{'dh'[head]}>",
    )
    return markdown


def _setting(url: str, panels: "Sequence[Panel]") -> dict[str, object]:
    # "#panel-2?gamma=4&palette=gray": the place of a panel and the traits to set.
    found = re.fullmatch(r"#panel-(\d+)(?:\?(.*))?", url)
    if not found or not 1 <= int(found[1]) <= len(panels):
        raise ValueError(
            f"expected a link to a panel from #panel-1 to #panel-{len(panels)}, got {url!r}"
        )
    panel, values = panels[int(found[1]) - 1], {}
    for name, text in parse_qsl(found[2] or "", keep_blank_values=True):
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        known = [each for each in panel.state if not each.startswith("_")]
        if name not in known:
            raise ValueError(f"expected a setting of the panel in {url!r}, from {known}")
        try:
            values[name] = panel.traits()[name]._validate(panel, value)
        except traitlets.TraitError as error:
            raise ValueError(f"{error}, in the link {url!r}") from error
    return {"panel": int(found[1]) - 1, "values": values}


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
