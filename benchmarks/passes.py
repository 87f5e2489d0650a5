"""Passes per second against the time of the linear path's matrix products alone.

One pass is one vector through the linear path once, forward (JVP) or back (VJP). The floor is what
must be multiplied whatever the code around it: v, o, up and down of every layer for `block · T`
rows, and `Pᵀ G` of every head, at the same shapes and in the same run. (Of the last layer less must
be, as only one position of its output is wanted; that is ours to use.)

A stream is m VJPs and what every token's Krylov basis makes of the rows that flow by; `dense`, m
VJPs whose rows are stored. Beside them stands the floor of m VJPs. The algebra between streams, and
the SVDs, are not in these figures.

    python benchmarks/passes.py --tokens 128 --block 32
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from machine import write_results
from rich.console import Console
from rich.table import Table
from shapes import matrix_products

from elm_lanczos import DetachedModel
from elm_lanczos.operators import TokenOperators
from elm_lanczos.svd.block_krylov import BlockKrylov
from elm_lanczos.svd.plan import make_plan
from elm_lanczos.svd.stream import row_blocks


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Times `work` after one warm-up.

    Args:
        work: what to time.
        repeats: how often.

    Returns:
        Seconds of each repeat.
    """
    work()
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return taken


def main(
    tokens: Annotated[int, typer.Option(help="Sequence length T.")] = 128,
    block: Annotated[int, typer.Option(help="Vectors in a block.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed repeats; the three take turns.")] = 7,
    model: Annotated[str | None, typer.Option(help="Model; default: the bundled one.")] = None,
) -> None:
    """Print the table and write benchmarks/results/passes.json."""
    detached = DetachedModel.from_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    vocabulary = detached.embedding.weight.shape[0]
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    lin = detached.linearize(ids, block=block)
    cotangents = torch.randn(block, lin.output.shape[0], generator=generator)
    tangents = torch.randn(block, *lin.inputs.shape, generator=generator)
    m = lin.output.shape[0]
    batch = TokenOperators(lin, range(tokens))
    plan = make_plan(*batch.shape, batch.dtype, 16, "stream", vectors=block)
    group = torch.arange(tokens)
    sample = torch.randn(tokens, plan.width, lin.inputs.shape[1], generator=generator)

    state = BlockKrylov(batch, plan, group, sample)

    def stream() -> None:
        state.streams = 0  # the first one also takes norms and contributions
        for start, rows in row_blocks(batch, plan, lambda _: None):
            state.absorb(start, rows)

    def stored() -> None:
        J = torch.empty(tokens, m, lin.inputs.shape[1])
        for start, rows in row_blocks(batch, plan, lambda _: None):
            J[:, start : start + len(rows)] = rows.transpose(0, 1)

    works = {
        "matrix products alone": matrix_products(detached, tokens, block, narrowed=False),
        "VJP": lambda: lin.vjp(cotangents),
        "JVP": lambda: lin.jvp(tangents),
        "stream": stream,
        "dense without its SVDs": stored,
    }
    vectors = dict.fromkeys(works, block) | dict.fromkeys(list(works)[3:], m)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):  # in turn, so that a drifting machine is fair to all
        for name, work in works.items():
            taken[name] += seconds(work, 1)
    floor = taken["matrix products alone"]
    figures = {
        name: {
            "seconds": statistics.median(values),
            "passes_per_second": vectors[name] / statistics.median(values),
            "ratio": statistics.median(v / f for v, f in zip(values, floor, strict=True))
            * (block / vectors[name]),
        }
        for name, values in taken.items()
    }
    table = Table(title=f"{detached.name}, T = {tokens}, block of {block}, medians of {repeats}")
    for column in ("", "seconds", "passes/s", "× matrix products"):
        table.add_column(column, justify="right" if column else "left")
    for name, figure in figures.items():
        row = [f"{figure[key]:.3g}" for key in ("seconds", "passes_per_second", "ratio")]
        table.add_row(name, *row)
    Console().print(table)
    path = write_results("passes", {"tokens": tokens, "block": block, "figures": figures})
    Console().print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
