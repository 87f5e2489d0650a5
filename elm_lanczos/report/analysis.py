"""Results of analyses in a terminal and in a notebook: their table and the facts beside it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elm_lanczos.analysis.result import Analysis
from elm_lanczos.report.notebook import card, html_table, shown
from elm_lanczos.report.text import printable, token_text

if TYPE_CHECKING:
    import pandas as pd

_LEAST = 12
"""Columns of a terminal that words get at least."""


def render(result: Analysis, width: int = 100) -> RenderableType:
    """Returns a result as a table with the facts beside it.

    Args:
        result: what was found.
        width: columns of the terminal.

    Returns:
        Something rich can print.
    """
    parts: list[RenderableType] = [Text(_short(result.title), style="bold")]
    for frame in result.tables():
        parts += _table(frame, width)
    parts += [Text(printable(fact)) for fact in result.facts]
    parts += [Text(f"! {printable(doubt)}", style="bold yellow") for doubt in result.doubts]
    return Group(*parts)


def _table(frame: pd.DataFrame, width: int) -> list[RenderableType]:
    """A table for a terminal, and what is left out of it; of words as many as there is room for."""
    rows, left_out = _shown(frame)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    heads = {name: printable(name.replace("_", " ")) for name in frame.columns}
    widths = {
        name: max([cell_len(heads[name]), *(cell_len(_cell(name, row[name])) for row in rows)])
        for name in frame.columns
    }
    words = [name for name in frame.columns if any(isinstance(row[name], list) for row in rows)]
    others = sum(widths[name] for name in frame.columns if name not in words)
    room = (width - others - 2 * len(frame.columns)) // max(1, len(words))
    for name in frame.columns:
        numbers = all(not isinstance(row[name], (str, list)) for row in rows)
        table.add_column(
            Text(heads[name]),
            justify="right" if numbers else "left",
            no_wrap=True,
            overflow="ellipsis",
            min_width=widths[name] if numbers else None,  # words may be cut, numbers not
            max_width=max(_LEAST, room) if name in words else None,
        )
    for row in rows:
        table.add_row(*(Text(_cell(name, value)) for name, value in row.items()))
    said = f"… and {left_out} more rows in between"
    return [table, Text(said, style="dim")] if left_out else [table]


def to_html(result: Analysis) -> str:
    """Returns a result as a piece of HTML: its figure, its tables and its facts, all escaped."""
    facts = [*result.facts, *(f"! {doubt}" for doubt in result.doubts)]
    tables = [_frame(frame) for frame in result.tables()]
    return card(_short(result.title), tables, facts, _picture(result))


def _frame(frame: pd.DataFrame) -> str:
    """A table as HTML, and what is left out of it."""
    rows, left_out = _shown(frame)
    names = list(frame.columns)
    return html_table(
        [name.replace("_", " ") for name in names],
        [[_cell(name, row[name]) for name in names] for row in rows],
        left_out,
    )


def to_html_page(result: Analysis) -> str:
    """Returns a result as an HTML page of its own."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_short(result.title))}</title>"
        "<style>body{font-family:system-ui,sans-serif;margin:2em auto;max-width:70em;"
        "padding:0 1em}table{border-collapse:collapse}td,th{padding:.2em .6em;text-align:left;"
        f"border-bottom:1px solid #8884}}</style></head><body>{to_html(result)}</body></html>\n"
    )


def _picture(result: Analysis) -> str:
    """The figure as base64 of a PNG."""
    from elm_lanczos.report.figures.style import save_figure

    file = io.BytesIO()
    save_figure(result.plot(), file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _shown(frame: pd.DataFrame) -> tuple[Sequence[dict[str, Any]], int]:
    """The rows that are shown, and how many are left out; files and `to_dataframe` have all."""
    rows: list[dict[str, Any]] = frame.to_dict(orient="records")
    return shown(rows)


def _cell(name: str, value: Any) -> str:
    """A value as text that is safe to show."""
    if isinstance(value, list):
        return "  ".join(printable(str(word).strip()) or token_text(str(word)) for word in value)
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return token_text(value) if name == "token" else printable(str(value))


def _short(text: str, length: int = 300) -> str:
    text = printable(text)
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"
