"""What nbval does not see: pictures, widget state, stripped outputs, style."""

import ast
import base64
import io
import statistics
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

CHAPTERS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
ALLOWED = {
    "text/plain", "text/html", "image/png", "image/jpeg",
    "application/vnd.jupyter.widget-view+json",
}  # fmt: skip
PICTURES = ("image/png", "image/jpeg")


def _faults(path, notebook):
    """Everything that keeps a notebook from being a readable, comparable chapter."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    data = [output.data for output in outputs if "data" in output]
    if path.stat().st_size > 300_000:
        yield f"{path.stat().st_size} bytes"
    if "widgets" in notebook.metadata:
        yield "stored widget state"
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        yield "not run from top to bottom"
    if any(output.output_type == "error" for output in outputs):
        yield "an error"
    if not any(output.output_type == "stream" for output in outputs):
        yield "nothing that nbval compares"
    for bundle in data:
        if unknown := set(bundle) - ALLOWED:
            yield f"outputs of type {sorted(unknown)}"
        if "widget-view" in "".join(bundle) and not set(PICTURES) & set(bundle):
            yield "a widget without a picture"
    if not any(set(PICTURES) & set(bundle) for bundle in data):
        yield "no picture"
    for cell in cells:
        tree = ast.parse(cell.source)
        if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree)):
            yield "a definition, which belongs in the package"
        if len(cell.source.splitlines()) > 10:
            yield f"a cell of {len(cell.source.splitlines())} lines"


def _pictures(notebook):
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in PICTURES:
                if kind in output.get("data", {}):
                    with Image.open(io.BytesIO(base64.b64decode(output.data[kind]))) as image:
                        found.append(np.asarray(image.convert("RGB"), dtype=float))
    return found


def _differences(stored, fresh):
    """Mean difference in grey levels of each picture to the one stored in its place."""
    assert len(stored) == len(fresh), "the notebook shows another number of pictures"
    for old, new in zip(stored, fresh):
        yield float(np.abs(old - new).mean()) if old.shape == new.shape else 255.0


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_clean(path):
    assert list(_faults(path, nbformat.read(path, 4))) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_stored_pictures_are_what_the_chapter_draws(path):
    stored = nbformat.read(path, 4)
    fresh = nbformat.read(path, 4)
    nbclient.NotebookClient(fresh, store_widget_state=False).execute(cwd=str(path.parent))
    assert all(difference < 4 for difference in _differences(_pictures(stored), _pictures(fresh)))


def test_a_stripped_or_changed_chapter_is_noticed():
    path = CHAPTERS[0]
    notebook = nbformat.read(path, 4)
    pictures = _pictures(notebook)
    rubbish = [255 - picture for picture in pictures]
    assert max(_differences(pictures, rubbish)) > 4
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    faults = list(_faults(path, notebook))
    assert "no picture" in faults
    assert "nothing that nbval compares" in faults
    assert "not run from top to bottom" in faults


def test_cells_are_short():
    lengths = [
        len(cell.source.splitlines())
        for path in CHAPTERS
        for cell in nbformat.read(path, 4).cells
        if cell.cell_type == "code"
    ]
    assert statistics.median(lengths) <= 4
