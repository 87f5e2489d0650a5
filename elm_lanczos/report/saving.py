"""Results as files; the suffix of the name decides the form."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from elm_lanczos.analysis.result import Analysis
from elm_lanczos.errors import UsageError
from elm_lanczos.report.analysis import to_html_page


def check_suffix(path: Path) -> None:
    """Checks that a file's name says how to write it, and that its folder exists.

    Args:
        path: the file.

    Raises:
        UsageError: if not.
    """
    if path.suffix not in _WRITERS:
        raise UsageError(f"--out {path}: use a name that ends in {', '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir() and not (path.suffix == ".zarr" and _is_of_an_analysis(path)):
        raise UsageError(f"--out {path}: there is a folder, which would be lost: use another name")


def save(result: Analysis, path: Path) -> None:
    """Writes a result to a file.

    Args:
        result: what was found.
        path: where to; an older file is replaced.

    Raises:
        UsageError: if its suffix is not known.
    """
    check_suffix(path)
    _WRITERS[path.suffix](result, path)


def _is_of_an_analysis(path: Path) -> bool:
    """Whether a folder is what `_save_zarr` has written before."""
    try:
        attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
        return {"kind", "title", "prompt"} <= attributes.keys()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _save_json(result: Analysis, path: Path) -> None:
    text = json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def _save_csv(result: Analysis, path: Path) -> None:
    table = result.to_dataframe()
    for name in table.columns:  # lists of words as JSON, which other programs read
        if table[name].map(lambda value: isinstance(value, list)).any():
            table[name] = table[name].map(partial(json.dumps, ensure_ascii=False))
    table.to_csv(path, index=False)


def _save_figure(result: Analysis, path: Path) -> None:
    from elm_lanczos.report.figures.style import save_figure

    save_figure(result.plot(), path)


def _save_html(result: Analysis, path: Path) -> None:
    path.write_text(to_html_page(result), encoding="utf-8")


def _save_zarr(result: Analysis, path: Path) -> None:
    result.to_xarray().to_zarr(path, mode="w", consolidated=False, zarr_format=3)


_WRITERS: dict[str, Callable[[Analysis, Path], None]] = {
    ".json": _save_json,
    ".csv": _save_csv,
    ".png": _save_figure,
    ".svg": _save_figure,
    ".pdf": _save_figure,
    ".html": _save_html,
    ".zarr": _save_zarr,
}
