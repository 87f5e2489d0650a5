"""What a run will cost, as a table in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elm_lanczos.memory import duration, size
from elm_lanczos.planning import Forecast, SystemCost
from elm_lanczos.report.text import printable
from elm_lanczos.svd.cost import Cost

_ONE_BY_ONE = 12


def render_forecast(forecast: Forecast) -> RenderableType:
    """Returns the forecast of a run: each method for each prompt if there are few, and in all.

    Args:
        forecast: of a run.

    Returns:
        Something rich can print.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("prompt")
    for name in ("tokens", "method", "passes", "time", "memory"):
        table.add_column(name, justify="left" if name == "method" else "right")
    several = len(forecast.systems) > 1
    for system in forecast.systems[: _ONE_BY_ONE if several else 1]:
        first = True
        for method in system.costs:
            chosen = method == system.method
            lead = (_shortened(system.prompt), f"{system.tokens}") if first else ("", "")
            _add(table, lead, system.cost(method), chosen=chosen)
            first = False
    if several:
        left_out = len(forecast.systems) - _ONE_BY_ONE
        if left_out > 0:
            table.add_row(Text(f"… {left_out} more", style="dim"))
        table.add_section()
        every = sum(system.tokens for system in forecast.systems)
        _add(table, ("all", f"{every}"), forecast.total(), chosen=True)
        for method in forecast.systems[0].costs:
            _add(table, ("", ""), forecast.total(method), chosen=False)
    lines = [
        f"{printable(forecast.model)}  k = {forecast.k} · {forecast.dtype} on {forecast.device} · "
        f"weights {size(forecast.weight_bytes)}"
    ]
    notes = [f"time from {forecast.basis}", "memory without the weights; ▸ is what a run follows"]
    if not several:
        notes.insert(0, forecast.systems[0].reason)
    parts: list[RenderableType] = [Text(line) for line in lines]
    largest = max(forecast.systems, key=lambda system: system.cost().bytes)
    parts += [table, _arrays(largest), *(Text(printable(note), style="dim") for note in notes)]
    if (held := sum(largest.chain.values())) > largest.memory:
        alone = f"the linearised layers and a block of vectors alone take {size(held)}"
        parts.append(Text(f"{alone}, more than the {size(largest.memory)} to use", style="yellow"))
    if forecast.refusal:
        parts.append(Text(f"a run is refused: {forecast.refusal}", style="red"))
    if forecast.hint:
        parts.append(Text(forecast.hint, style="yellow"))
    return Group(*parts)


def _arrays(system: SystemCost) -> Table:
    """What the memory of the method chosen is made of, from the weights on."""
    title = f"{system.method}, {_shortened(system.prompt)}"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(title)
    table.add_column("memory", justify="right")
    for arrays in (system.chain, system.arrays[system.method]):
        for name, held in arrays.items():
            table.add_row(name, size(held))
        table.add_section()
    table.add_row("all", size(system.cost().bytes), style="bold")
    return table


def _add(table: Table, lead: tuple[str, str], cost: Cost, *, chosen: bool) -> None:
    seconds = "–" if cost.seconds is None else duration(cost.seconds)
    mark = "▸ " if chosen else "  "
    cells = (*lead, mark + cost.method, f"{cost.passes:,}", seconds, size(cost.bytes))
    table.add_row(*cells, style="bold" if chosen else "")


def _shortened(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 24 else name[:23] + "…"
