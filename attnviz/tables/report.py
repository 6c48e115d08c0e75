"""Every table of the thesis in one page, made with one network and data set or with the defaults.

A table that cannot be made with them says why in its place; the others follow. Each is kept as
it is finished, so a stopped report goes on where it was.
"""

import html
from collections.abc import Callable, Mapping
from pathlib import Path

from .. import __version__
from ..files import write_whole
from ..networks import bundled_folder
from . import make_table, table_options
from .processes import processes
from .table import Table, table_names

__all__ = ["QUICK", "write_report"]

_MASKS = ("3.11", "3.12", "3.13", "4.1", "4.2", "4.3", "4.4", "4.7", "4.12")
_START = {"weights": str(bundled_folder() / "networks" / "scenes_conv.safetensors"), "epochs": 6}
QUICK: dict[str, dict[str, object]] = {
    "3": {"limit": 100},
    "3.9": {"limit": 150, "epochs": 3},
    "3.10": {"limit": 150, "epochs": 3},
    "4": {"limit": 150, **_START},
    "5": {"limit": 10},
    **{id: {"limit": 80, "segment_epochs": 6, **_START} for id in _MASKS},
}
"""Sizes that make a report in minutes, by table or chapter; its numbers show that all runs, and
are no measure of a method. Trainings start from the bundled network's stages, as the thesis' from
ImageNet's."""

_EVERY = ("network", "weights", "data_root", "limit", "device", "cache", "progress")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
nav { columns: 3; margin: 1rem 0 2rem; font-size: 14px }
nav a { display: block; color: #0b559f; text-decoration: none }
section { margin: 2.5rem 0; overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #ddd; text-align: left;
  white-space: nowrap; font-variant-numeric: tabular-nums }
.why { color: #9a3412 }
ul, details { font-size: 13px; color: #444 }
@media (prefers-color-scheme: dark) {
  body { color: #eee; background: #161616 } nav a { color: #8ab8ea }
  th, td { border-color: #3a3a3a } ul, details { color: #bbb } .why { color: #fdba74 }
}
"""


def write_report(
    out: str | Path,
    *,
    data: str = "scenes",
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    **options: object,
) -> dict[str, object]:
    """Makes every table and writes them as one page that needs nothing else.

    The page is written anew after each table. Of generated pictures it takes the sizes of
    :data:`QUICK` where neither ``limit`` nor ``epochs`` is given.

    Args:
        out: The page.
        data: See :func:`attnviz.tables.make_table`.
        seed: See there.
        say: Is told of each table.
        **options: See there; each table is given those that it takes.

    Returns:
        The tables as plain values, by number, and why others are missing.
    """
    quick = data == "scenes" and not {"limit", "epochs"} & options.keys()
    made: dict[str, Table] = {}
    missing: dict[str, str] = {}
    for id, _ in table_names():
        sizes = QUICK.get(id, QUICK[id[0]]) if quick else {}
        known = {*_EVERY, *table_options(id)}
        given = {name: value for name, value in {**sizes, **options}.items() if name in known}
        try:
            made[id] = make_table(id, data=data, seed=seed, **given)
        except ConnectionError:  # another process has ended
            raise
        except (ValueError, TypeError, LookupError, OSError, ImportError) as error:
            missing[id] = str(error)
        say(f"{id:5} " + (f"{made[id].n} images" if id in made else f"not made: {missing[id]}"))
        if processes().rank == 0:
            small = quick or bool({"limit", "epochs"} & options.keys())
            write_whole(Path(out), _page(made, missing, data, seed, small).encode())
    return {"tables": {id: table.to_json() for id, table in made.items()}, "missing": missing}


def _page(
    made: Mapping[str, Table], missing: Mapping[str, str], data: str, seed: int, small: bool
) -> str:
    titles = dict(table_names())
    done = [id for id in titles if id in made or id in missing]
    links = "".join(f'<a href="#t{id}">{id} {html.escape(titles[id])}</a>' for id in done)
    parts = []
    for id in done:
        if id in made:
            body = made[id]._repr_html_()
        else:
            body = (f"<h3>Table {id}: {html.escape(titles[id])}</h3>"
                    f'<p class="why">not made: {html.escape(missing[id])}</p>')  # fmt: skip
        parts.append(f'<section id="t{id}">{body}</section>')
    versions = next(iter(made.values())).versions if made else {"attnviz": __version__}
    facts = ", ".join(f"{name} {version}" for name, version in versions.items())
    sizes = (
        "<p>Small samples and short trainings: they show that every table runs, and are no "
        "measure of a method.</p>"
        if small
        else ""
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>attnviz: the thesis' tables on {html.escape(data)}</title>"
        f"<style>{_STYLE}</style><h1>The thesis' tables on {html.escape(data)}</h1>"
        f"<p>{len(made)} of {len(titles)} tables; seed {seed}; {html.escape(facts)}. Each cell: "
        f"thesis | ours [interval].</p>{sizes}<nav>{links}</nav>{''.join(parts)}</html>"
    )
