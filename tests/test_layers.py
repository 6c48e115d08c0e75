"""The shape of the package: imports point downwards, two lists of dependencies agree."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"data", "figures", "panels", "tables", "probes", "segment", "training"}
LEVELS = [  # a module imports only from levels above it in this list
    {"checks", "files"},
    {"cam", "localize", "metrics", "colors", "images", "graphs", "oaa", "gap", "labels"},
    {"stages", "excitation", "perturb", "evolution", "memory", "data"},
    {"networks", "crops"},
    {"explain", "deeplab"},
    {"tree", "segment", "instances"},
    {"probes", "training"},
    {"figures", "bench"},
    {"panels"},
    {"tables", "bench_training", "bench_tree"},
    {"bench_all"},
    {"cli"},
]


def _imports(path):
    """Siblings that a module of the package imports, by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            outside = node.level == len(path.relative_to(ROOT / "attnviz").parts)
            if outside and node.module:
                yield node.module.split(".")[0]
            elif outside:
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attnviz."):
            yield node.module.split(".")[1]


def _level(name):
    return next(index for index, level in enumerate(LEVELS) if name in level)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "attnviz").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_downwards(path):
    name = path.relative_to(ROOT / "attnviz").parts[0].removesuffix(".py")
    if name in ("__init__", "__main__"):
        return
    for other in _imports(path):
        if other not in ("__version__", name):
            assert _level(other) < _level(name), f"{name} imports {other}"


def test_every_module_has_a_level():
    names = {p.name.removesuffix(".py") for p in (ROOT / "attnviz").iterdir()}
    code = {n for n in names if (ROOT / "attnviz" / f"{n}.py").exists()} | PACKAGES
    assert code - {"__init__", "__main__"} == set().union(*LEVELS)


def test_environment_and_project_agree_on_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    text = (ROOT / "environment.yml").read_text()
    listed = re.findall(r"^ +- \"?([^\"#\n]+?)\"?$", text, re.M)
    channels = {"conda-forge", "nodefaults", "pip", "pip:", "-e ."}
    python = "python" + project["requires-python"]
    assert sorted(set(listed) - channels) == sorted({*wanted, python})


def test_import_stays_light():
    code = (
        "import sys, attnviz; heavy = {'matplotlib', 'pandas', 'IPython', 'ipywidgets', "
        "'torch._inductor', 'torchvision', 'lightning', 'lightning_fabric', 'plotly'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
