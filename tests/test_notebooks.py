"""What nbval does not see: widget state, stripped outputs, style; pictures by ``pictures.py``."""

import ast
import base64
import io
import os
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from pictures import PICTURES
from PIL import Image

CHAPTERS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
ALLOWED = {
    "text/plain", "text/html", "image/png", "image/jpeg",
    "application/vnd.jupyter.widget-view+json",
}  # fmt: skip


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


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_clean(path):
    assert list(_faults(path, nbformat.read(path, 4))) == []


def test_a_stripped_chapter_is_noticed():
    path = CHAPTERS[0]
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    faults = list(_faults(path, notebook))
    assert "no picture" in faults
    assert "nothing that nbval compares" in faults
    assert "not run from top to bottom" in faults


@pytest.mark.parametrize(("stored", "code"), [("black", 0), ("gray", 1), (None, 1)])
def test_a_changed_picture_is_noticed(tmp_path, stored, code):
    data = {"text/plain": "<PIL.Image.Image image mode=RGB size=8x8>"}
    if stored:
        file = io.BytesIO()
        Image.new("RGB", (8, 8), stored).save(file, "png")
        data["image/png"] = base64.b64encode(file.getvalue()).decode()
    cell = nbformat.v4.new_code_cell(
        "from PIL import Image\nImage.new('RGB', (8, 8))",
        outputs=[nbformat.v4.new_output("execute_result", data, execution_count=1)],
        execution_count=1,
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "chapter.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "pictures", "--nbval", "--nbval-current-env"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([*command, tmp_path], env=environment, capture_output=True, text=True)
    assert run.returncode == code, run.stdout


def test_cells_are_short():
    lengths = [
        len(cell.source.splitlines())
        for path in CHAPTERS
        for cell in nbformat.read(path, 4).cells
        if cell.cell_type == "code"
    ]
    assert statistics.median(lengths) <= 4
