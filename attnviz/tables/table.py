"""A table of the thesis: the numbers it printed beside ours."""

import html
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache as cached
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..metrics import bootstrap_interval

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Row", "Table", "mean_cell", "numbers", "table_names"]

Row = dict[str, object]


@dataclass(frozen=True, eq=False)
class Table:
    """One table of the thesis, its numbers beside ours."""

    id: str
    """Number of the table, such as ``3.1``."""
    title: str
    """What it shows."""
    data: str
    """Name of the data set."""
    network: str
    """Name of the network."""
    preset: str
    """Whose choices were made where sources differ."""
    seed: int
    """Seed of generated data."""
    versions: dict[str, str]
    """Versions of the packages."""
    n: int
    """Number of pictures measured."""
    rows: list[Row]
    """The rows of the thesis. A number is ``{"paper", "ours", "low", "high"}``, in percent (in
    table 5.1 a correlation): the printed one, ours and its 95 % bootstrap interval over pictures;
    None where there is none."""
    extra: list[Row]
    """Rows of the same columns that the thesis does not have: the other rule for thresholds, the
    boxes alone (``gt_known``), the thresholds themselves, the same without graph cut."""
    notes: list[str]
    """What must be known to read the numbers."""
    weights: dict[str, str]
    """Where the network's weights come from."""

    def to_json(self) -> dict[str, object]:
        """Returns the table as plain values, for :func:`json.dump`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_frame(self, extra: bool = False) -> "DataFrame":
        """Returns the rows, the thesis' numbers beside ours.

        Args:
            extra: Also the rows that the thesis does not have.

        Returns:
            One row each; columns ``(column, "paper" | "ours" | "low" | "high")``.
        """
        from pandas import DataFrame, MultiIndex

        rows = self.rows + (self.extra if extra else [])
        names = [name for name in self.rows[0] if isinstance(self.rows[0][name], dict)]
        words = [name for name in self.rows[0] if name not in names]
        kinds = ("paper", "ours", "low", "high")
        values = [[row[name][kind] for name in names for kind in kinds] for row in rows]
        index = MultiIndex.from_tuples([tuple(row[word] for word in words) for row in rows])
        columns = MultiIndex.from_product([names, kinds])
        return DataFrame(values, index.set_names(words), columns, dtype=np.float64)

    def __str__(self) -> str:
        head = f"table {self.id}: {self.title}; {self.network} on {self.data}, {self.n} images"
        cells = [self._texts(row) for row in self.rows + self.extra]
        widths = [max(map(len, column)) for column in zip(list(self.rows[0]), *cells, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in [list(self.rows[0]), *cells]
        ]
        lines.insert(1 + len(self.rows), "-" * max(map(len, lines)))
        return "\n".join([head, "paper | ours [95 %]", *lines, *(f"* {n}" for n in self.notes)])

    def _repr_html_(self) -> str:
        def line(texts: Iterable[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(t)}</{tag}>' for t in texts)}</tr>"

        head = html.escape(
            f"Table {self.id}: {self.title}; {self.network} on {self.data}, {self.n} images. "
            "Thesis | ours [95 %]"
        )
        body = "".join(line(self._texts(row), "td") for row in self.rows)
        more = "".join(line(self._texts(row), "td") for row in self.extra)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f"<table><caption>{head}</caption>{line(self.rows[0], 'th')}{body}</table>"
            f"<details><summary>{len(self.extra)} more rows</summary><table>"
            f"{line(self.rows[0], 'th')}{more}</table></details><ul>{notes}</ul>"
        )

    def _texts(self, row: Row) -> list[str]:
        # A correlation with three decimals, a percentage with two and its interval with one.
        digits, coarse = (3, 3) if numbers().get(self.id, {}).get("metric") == "PCC" else (2, 1)

        def text(cell: object) -> str:
            if not isinstance(cell, dict):
                return str(cell)
            paper, ours = (
                "-" if cell[kind] is None else f"{cell[kind]:.{digits}f}"
                for kind in ("paper", "ours")
            )
            if cell["low"] is None:
                return f"{paper} | {ours}"
            return f"{paper} | {ours} [{cell['low']:.{coarse}f}, {cell['high']:.{coarse}f}]"

        return [text(cell) for cell in row.values()]


@cached
def numbers() -> dict[str, dict]:
    """Returns what the thesis printed: title, metric, note and rows of each table."""
    return json.loads(Path(__file__).with_name("paper_numbers.json").read_text())


def table_names() -> list[tuple[str, str]]:
    """Returns the number and the title of every table that can be made."""
    return [(name, table["title"]) for name, table in numbers().items()]


def mean_cell(
    paper: object, values: np.ndarray | None = None, factor: float = 100.0, digits: int = 2
) -> dict[str, float | None]:
    """Puts the mean of values, with its 95 % bootstrap interval, beside a number of the thesis."""
    cell = {"paper": paper, "ours": None, "low": None, "high": None}
    if values is None or not len(values):
        return cell
    found = values.astype(np.float64)
    resamples = min(2000, max(200, 20_000_000 // len(found)))
    low, high = bootstrap_interval(found, resamples=resamples)
    shown = {"ours": found.mean(), "low": low, "high": high}
    return cell | {name: round(factor * float(value), digits) for name, value in shown.items()}
