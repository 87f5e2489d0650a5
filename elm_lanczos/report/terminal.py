"""Results in a terminal: a table of tokens, the certificate, progress while it is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from elm_lanczos.report.record import Words
from elm_lanczos.report.text import printable, token_text
from elm_lanczos.status import Status
from elm_lanczos.store import PromptResult
from elm_lanczos.store.place import Address
from elm_lanczos.svd.plan import Plan

_ROWS = 40
"""Tokens shown of a long prompt: the last ones."""

_DIRECTIONS = 2
"""Leading directions decoded in the table."""

_TOKEN_WIDTH, _NUMBERS_WIDTH = 16, 36
"""Columns of the widest token shown, and of the numbers with all padding."""


def render(result: PromptResult, words: Words, title: str = "", width: int = 100) -> RenderableType:
    """Returns one prediction as a table with its certificate.

    Args:
        result: one prediction of a store.
        words: texts of token ids.
        title: what to put before the prompt, such as its number.
        width: columns of the terminal.

    Returns:
        Something rich can print.
    """
    parts: list[RenderableType] = [_heading(result, title)]
    if result.attrs.get("predicted"):
        parts.append(_prediction(result))
    parts.append(_table(result, words, width))
    hidden = len(result.tokens) - _ROWS
    if hidden > 0:
        parts.append(Text(f"… and {hidden} earlier tokens, in the store", style="dim"))
    parts.append(_certificate(result))
    parts.append(_where(result))
    return Group(*parts, Text())


def _heading(result: PromptResult, title: str) -> Text:
    heading = Text(overflow="fold")
    if title:
        heading.append(f"{title}  ", style="dim")
    text = result.text
    shown = printable(text if len(text) <= 600 else f"{text[:300]} … {text[-300:]}")
    return heading.append(shown, style="bold")


def _prediction(result: PromptResult) -> Text:
    predicted: Any = result.attrs["predicted"]
    line = Text("→ ")
    for i, candidate in enumerate(predicted):
        line.append(f"{token_text(candidate['token'])}", style="bold green" if i == 0 else "")
        line.append(f" {100 * candidate['probability']:.1f} %   ", style="dim")
    return line


def _table(result: PromptResult, words: Words, width: int) -> Table:
    shown = range(max(0, len(result.tokens) - _ROWS), len(result.tokens))
    tokens = [token_text(result.tokens[i]) for i in shown]
    widest = max(4, min(_TOKEN_WIDTH, max(cell_len(token) for token in tokens)))
    room = max(12, (width - widest - _NUMBERS_WIDTH) // 2)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("token", no_wrap=True, max_width=_TOKEN_WIDTH, overflow="ellipsis")
    for name in ("share of\nlogit", "σ₁\nσ₂", "stable\nrank"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reads\n(v₁ v₂ as input)", no_wrap=True, width=room)
    table.add_column("writes\n(u₁ u₂ as output)", no_wrap=True, width=room)
    count = min(_DIRECTIONS, result.S.shape[1])
    size = float(np.nanmax(np.abs(result.attribution), initial=0.0)) or 1.0
    for i, token in zip(shown, tokens, strict=True):
        share = float(result.attribution[i])
        logit = Text(f"{share:+.2f}", style=_share_style(share / size))
        status = Status(int(result.status[i]))
        if status in (Status.NOT_REQUESTED, Status.PENDING):
            state = status.name.lower().replace("_", " ")
            table.add_row(Text(token), logit, "", "", Text(state, style="dim"))
            continue
        values = [f"{s:.4g}" for s in result.S[i, :count]]
        values[0] += "" if status != Status.NOT_CONVERGED else " !"
        reads, writes = (
            _lines(_fit(words(ids), room) for ids in side[i, :count].tolist())
            for side in (result.v_token, result.u_token)
        )
        rank = f"{result.stable_rank[i]:.2f}"
        table.add_row(Text(token), logit, _lines(values), Text(rank), reads, writes)
    return table


def _share_style(relative: float) -> str:
    if abs(relative) < 0.1:
        return "dim"
    return "green" if relative > 0 else "red"


def _lines(values: Iterable[str]) -> Text:
    """One line per direction, the first at full strength."""
    text = Text()
    for i, value in enumerate(values):
        text.append("\n" if i else "").append(value, style="" if i == 0 else "dim")
    return text


def _fit(tokens: list[str], room: int) -> str:
    """As many of the words as fit, at least one."""
    line = ""
    for token in tokens:
        word = printable(token.strip()) or token_text(token)
        if line and cell_len(line) + 2 + cell_len(word) > room:
            break
        line += ("  " if line else "") + word
    return line


def _figures(figures: dict[str, Any], *names: str) -> str:
    shown = [(name, figures[name]) for name in names if figures.get(name) is not None]
    return ", ".join(f"{name} {_figure(value)}" for name, value in shown)


def _figure(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _certificate(result: PromptResult) -> Text:
    figures = result.certificate
    line = Text(overflow="fold")
    if not figures:
        return line.append("not finished", style="yellow")
    if figures["exact"]:
        line.append("exact", style="bold green")
    else:
        line.append("NOT EXACT: " + ", ".join(figures["failures"]), style="bold red")
    line.append(f" ({figures['dtype']}): ", style="dim")
    names = ("reconstruction", "leak", "adjoint", "affinity", "raised", "fidelity")
    line.append(_figures(figures, *names))
    if figures.get("residual") is not None:
        line.append("\ntriplets: ", style="dim")
        line.append(_figures(figures, "residual", "orthogonality"))
    wrong = int((result.status == Status.NOT_CONVERGED).sum())
    if wrong:
        line.append(f"\n! {wrong} tokens not converged to the tolerance", style="bold yellow")
    return line


def _where(result: PromptResult) -> Text:
    plan = result.plan["svd"]
    share: Any = result.attrs.get("attribution")
    line = Text(style="dim", overflow="fold")
    if share:
        total = float(result.attribution.sum()) + share["constant"] + share["bias"]
        line.append(f"logit {share['logit']:.4f} = {float(result.attribution.sum()):.4f} (tokens)")
        line.append(f" + {share['constant'] + share['bias']:.4f} (constant)")
        line.append(f" (off by {_figure(abs(total - share['logit']))})\n")
    line.append(f"{plan['reason']}; {result.attrs.get('seconds', 0):.1f} s\n")
    return line.append(f"{result.path}")


class Terminal:
    """Shows a run in a terminal: tables on standard output, progress and notes on standard error.

    Args:
        quiet: show nothing but notes.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.out = Console(highlight=False, quiet=quiet)
        self.err = Console(stderr=True, highlight=False)
        self.words: Words = lambda ids: [f"<{i}>" for i in ids]
        self._title = ""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} passes"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
            disable=quiet or not self.err.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Terminal:
        """Starts the progress display."""
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Ends the progress display."""
        self._progress.stop()

    def note(self, message: str) -> None:
        """Prints a line on standard error."""
        if not self.out.quiet:
            self.err.print(Text(f"note: {printable(message)}", style="yellow"), soft_wrap=True)

    def opened(self, path: Address, words: Words) -> None:
        """Remembers how to spell tokens."""
        self.words = words

    def started(self, number: int, total: int, text: str) -> None:
        """Begins the progress bar of one prediction, in place of one that is shown later."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._title = f"{number + 1}/{total}"
        short = printable(text if len(text) <= 30 else f"…{text[-29:]}")
        self._task = self._progress.add_task(f"{self._title} {short}", total=None)

    def planned(self, plan: Plan, passes: int) -> None:
        """Gives the bar its length."""
        if self._task is not None:
            self._progress.update(self._task, total=passes)

    def passes(self, made: int) -> None:
        """Moves the bar."""
        if self._task is not None:
            total = self._progress.tasks[self._progress.task_ids.index(self._task)].total or 0
            self._progress.update(self._task, completed=made, total=max(total, made))

    def finished(self, result: PromptResult) -> None:
        """Prints the table of one prediction."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self.out.print(render(result, self.words, self._title, self.out.width))
