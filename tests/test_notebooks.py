"""The notebooks run from the first cell to the last, and show what they find."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
RICH = {
    "first_steps": [
        "lin",
        "lin.certificate()",
        "result",
        "attribute(lin)",
        "results",
        "results[0]",
    ],
    "paper_figures": ["lin.certificate()", "by_layer.tables()[0]", "comparison.directions()"],
}
"""What cells end with whose result must be shown as a table."""

FIGURES = {"first_steps": 1, "paper_figures": 6}
"""How many figures there are."""


def test_both_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(RICH)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_its_results(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {}
    pictures = 0
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        assert not [one for one in cell.outputs if one.output_type == "error"]
        (data,) = (one.data for one in cell.outputs if one.output_type == "execute_result")
        pictures += "image/png" in data or "data:image/png" in data.get("text/html", "")
        shown[cell.source.splitlines()[-1]] = data
    for line in RICH[path.stem]:
        assert "<table" in shown[line]["text/html"], line
    assert pictures == FIGURES[path.stem]
