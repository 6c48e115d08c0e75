"""Every benchmark in one report: a table, a plot and a page."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Literal

from .bench import PEERS, Benchmark, Row, bench_cam
from .bench_training import bench_oaa, bench_segment
from .bench_tree import bench_tree
from .files import write_whole

__all__ = ["bench_all", "write_benchmark"]

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>attnviz: benchmarks</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; text-align: left }
img { max-width: 100% } ul { font-size: 13px }
</style>"""

_NEAR = 6  # times its baseline


def bench_all(
    quick: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
    *,
    progress: bool = True,
) -> Benchmark:
    """Runs every benchmark, with the peers that are installed.

    Args:
        quick: Few rounds of one small network, under three minutes, for a look.
        device: ``auto`` takes CUDA where there is one.
        seed: The seed of weights, images and order.
        progress: Whether to show progress bars.

    Returns:
        The rows of all; the notes name every row in which a peer is faster.
    """
    where = {"device": device, "seed": seed, "progress": progress}
    rounds = 3 if quick else 9
    if quick:
        parts = [
            bench_cam(["resnet18"], [1], rounds, **where),
            bench_oaa(["scenes"], 8, rounds, memory=False, **where),
            bench_segment(["scenes"], 8, rounds, memory=False, **where),
            bench_tree(["resnet18"], rounds, ablation=False, **where),
        ]
    else:
        parts = [
            bench_cam(["vgg16", "resnet50", "squeezenet1_1"], [1, 8], rounds, **where),
            bench_oaa(rounds=rounds, **where),
            bench_segment(["scenes", "squeezenet1_1"], rounds=rounds, **where),
            bench_tree(rounds=rounds, **where),
        ]
    rows = [row for part in parts for row in part.rows]
    notes = [note for part in parts for note in part.notes]
    return replace(parts[0], rows=rows, notes=(*notes, *_ahead(rows)))


def _ahead(rows: Sequence[Row]) -> list[str]:
    # Peers that are compared with ours directly and were faster, in words.
    found = []
    for row in rows:
        is_peer = any(f": {peer}: " in row["case"] for peer in PEERS)
        if not is_peer or any(word in row["baseline"] for word in ("forward", "calls")):
            continue
        if row["ratio"] < 1:
            sure = "" if row["high"] < 1 else ", which is within the spread of the rounds"
            found.append(f"{row['case']} took {row['ratio']:.2f} of ours{sure}")
    return found or ["no peer that is installed was faster than ours in any row"]


def write_benchmark(result: Benchmark, folder: str | Path) -> list[Path]:
    """Writes a benchmark as JSON, as a plot and as a page that holds both.

    Args:
        result: What was measured.
        folder: Where to; made if it is missing.

    Returns:
        The files: ``bench.json``, ``bench.png`` and ``bench.html``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot = _plot(result)
    image = base64.b64encode(plot).decode()
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in result.notes)
    table = result.to_frame().to_html(index=False, float_format="{:.2f}".format, na_rep="-")
    page = (
        f"{_PAGE}<h1>Benchmarks</h1><p>{html.escape(result.device)}, {result.rounds} rounds, "
        f"{html.escape(versions)}. Ratio in time of a case to its baseline, median and quartiles "
        f'over rounds.</p><img alt="The ratios of the table as points" '
        f'src="data:image/png;base64,{image}">{table}<ul>{notes}</ul></html>'
    )
    files = {
        "bench.json": json.dumps(result.to_json(), indent=1).encode(), "bench.png": plot,
        "bench.html": page.encode(),
    }  # fmt: skip
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def _plot(result: Benchmark) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # what is many times its baseline has an axis of its own, or the rest could not be told apart
    near = [row for row in result.rows if row["ratio"] < _NEAR]
    parts = [rows[::-1] for rows in (near, [r for r in result.rows if r not in near]) if rows]
    figure = Figure((10, 1 + 0.24 * len(result.rows)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [2 + len(rows) for rows in parts]
    column = figure.subplots(len(parts), squeeze=False, height_ratios=heights)[:, 0]
    for axes, rows in zip(column, parts, strict=True):
        for place, row in enumerate(rows):
            peer = any(f": {name}: " in row["case"] for name in PEERS)
            color = "#d55e00" if peer else "#0072b2"
            axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2)
            axes.plot(row["ratio"], place, "o", color=color, markersize=4)
        labels = [f"{row['case']} / {row['baseline'].partition(': ')[2]}" for row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=7)
        axes.set_ylim(-1, len(rows))
        axes.grid(axis="x", color="0.9")
        if rows[0]["ratio"] < _NEAR:
            axes.axvline(1, color="0.5", linewidth=1)
        else:
            axes.set_xscale("log")
    axes.set_xlabel("time to the baseline's: median, quartiles\n(orange: other packages)")
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
