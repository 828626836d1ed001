"""The notebooks: text files that open as notebooks, that run from top to bottom, and whose pictures can be read."""

import ast
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import gptjax

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.py"))
RUN = """
import json, runpy, sys
from matplotlib.figure import Figure
found = {name: value for name, value in runpy.run_path(sys.argv[1]).items() if isinstance(value, Figure)}
for figure in found.values():
    figure.draw_without_rendering()
said = lambda figure: [figure.get_suptitle(), *(axes.get_title() or axes.get_xlabel() for axes in figure.axes)]
print(json.dumps({name: said(figure) for name, figure in found.items()}))
"""
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path) -> list[tuple[bool, list[str]]]:
    """Of each cell whether it is Markdown, and its lines, as jupytext's percent format has them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("# %%")]
    assert starts[0] == 0, "text before the first cell would become a cell without a kind"
    for start in starts:
        assert re.fullmatch(r"# %%( \[markdown\])?", lines[start]), lines[start]
    return [("markdown" in lines[a], lines[a + 1 : b]) for a, b in pairwise([*starts, len(lines)])]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@each
def test_is_percent_format(path):
    """Markdown cells are comments, which begin with a title; code cells are whole statements."""
    found = cells(path)
    markdown, lines = found[0]
    assert markdown
    assert lines[0].startswith("# # ")
    for markdown, lines in found:
        if markdown:
            assert all(line == "" or line == "#" or line.startswith("# ") for line in lines), lines
        else:
            assert ast.parse("\n".join(lines)).body, lines


@each
def test_keeps_to_the_face(path):
    """Nothing runs beside the notebook, and what the library's face has is taken from there."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    taken = [
        (node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert "subprocess" not in path.read_text(encoding="utf-8")
    assert not [(m, name) for m, name in taken if m.startswith("gptjax.") and name in gptjax.__all__]
    assert not [name for m, name in taken if name.startswith("_")]


def test_hold_no_output():
    """Pictures and numbers are made by running: only the text is kept."""
    kept = [path for path in (ROOT / "notebooks").rglob("*") if "__pycache__" not in path.parts]
    assert {path.suffix for path in kept} == {".py"}


@pytest.mark.skipif("GPTJAX_RUN_NOTEBOOKS" not in os.environ, reason="take minutes: .ci/run sets GPTJAX_RUN_NOTEBOOKS")
@each
def test_runs_and_shows(path, tmp_path):
    """From top to bottom without a warning, in a process of its own; each figure says what it is, and ends a cell."""
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "error", "-c", RUN, str(path)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads(result.stdout.splitlines()[-1])
    assert len(figures) >= 3
    assert all(any(texts) for texts in figures.values()), figures
    ends = {"\n".join(lines).rstrip().rpartition("\n")[2] for markdown, lines in cells(path) if not markdown}
    assert set(figures) <= ends
    assert not [*tmp_path.glob("*")], "something was left behind"
