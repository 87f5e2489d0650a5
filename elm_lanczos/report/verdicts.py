"""What a check of models came to, in a terminal."""

from __future__ import annotations

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from elm_lanczos.check import BOUNDS, FamilyReport, Verdict
from elm_lanczos.report.text import printable

MEANING = {
    "reconstruction": "output against Σ J_i x_i + c",
    "leak": "F(0) with every known constant removed",
    "adjoint": "⟨u, Jv⟩ against ⟨Jᵀu, v⟩",
    "affinity": "F(z) against Jz + c at a random z",
    "mixture": "F at a mixture of two inputs against the mixture of F",
    "bypass": "change of F when queries, keys, gates and routers move",
    "raised": "frozen forward pass against the model's, its casts to float32 left out",
    "fidelity": "frozen forward pass against the model's own",
}
"""What each figure of a report compares."""

_STYLE = {
    Verdict.EXACT: "bold green",
    Verdict.REFUSED: "yellow",
    Verdict.NOT_BUILT: "dim",
    Verdict.WRONG: "bold red",
    Verdict.CRASH: "bold red",
}


def render_report(report: FamilyReport) -> RenderableType:
    """Returns the report of one model: its verdict, and each figure beside its bound.

    Args:
        report: of one model.

    Returns:
        Something rich can print.
    """
    parts: list[RenderableType] = [_line(report)]
    if report.reconstruction is not None:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("figure")
        table.add_column("value", justify="right")
        table.add_column("bound", justify="right")
        table.add_column("what is compared", style="dim")
        for name, bound in BOUNDS[getattr(torch, report.dtype)].items():
            value = getattr(report, name)
            style = "" if value is None or value <= bound else "bold red"
            shown = "not measured" if value is None else f"{value:.1e}"
            table.add_row(name, Text(shown, style=style), f"{bound:.0e}", MEANING[name])
        kept = "bit for bit as it was" if report.untouched else "CHANGED"
        chain = f"a chain of {report.segments} segments"
        if report.not_a_chain:
            chain = f"linearised as a whole: {report.not_a_chain}"
        parts += [
            table,
            Text(f"constant  ‖c‖ / ‖y‖ = {report.bias:.2g}"),
            Text(f"structure {printable(chain)}"),
            Text(f"model     {kept} · computed in {report.dtype} · {report.seconds:.1f} s"),
        ]
    return Group(*parts)


def _line(report: FamilyReport) -> Text:
    line = Text(f"{printable(report.architecture)}  ", overflow="fold")
    line.append(str(report.verdict), style=_STYLE[report.verdict])
    if report.reason:
        line.append(f"  {printable(report.reason)}")
    return line


class Sweep:
    """Progress of a check of many architectures; those that are not exact are printed at once.

    Args:
        total: how many there are.
        quiet: show nothing.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=quiet or not Console(stderr=True).is_terminal,
        )
        self._task = self._progress.add_task("checking", total=total)
        self._quiet = quiet

    def __enter__(self) -> Sweep:
        """Starts to show progress."""
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Takes the progress off the screen."""
        self._progress.stop()

    def finished(self, report: FamilyReport) -> None:
        """Counts one report.

        Args:
            report: of one architecture.
        """
        self._progress.update(self._task, advance=1, description=report.architecture)
        if report.verdict != Verdict.EXACT and not self._quiet:
            self._progress.console.print(_line(report), soft_wrap=True)
