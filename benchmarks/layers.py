"""Passes and seconds of all layers and modules against those of a run of the same prompt.

Cumulative and layerwise triplets of every layer's stream, attention and MLP, for every token. One
pass is one vector pushed through each segment of the chain; what is counted is vectors really
pushed through segments, divided by the number of segments.

    python benchmarks/layers.py --tokens 16
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from machine import write_results
from rich.console import Console
from rich.table import Table

from elm_lanczos import DetachedModel, svd
from elm_lanczos.analysis import layers
from elm_lanczos.analysis.layer_spectra import DEFAULT_K, DEFAULT_TOL

TEXT = "My fellow citizens, the state of the Union is strong and the people are free to"
KINDS = ("cumulative", "layerwise")


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 16,
    k: Annotated[int, typer.Option(help="Triplets of each Jacobian of a layer.")] = DEFAULT_K,
    tol: Annotated[float, typer.Option(help="Residual relative to σ₁.")] = DEFAULT_TOL,
    model: Annotated[str | None, typer.Option(help="Model; default: the bundled one.")] = None,
) -> None:
    """Print the table and write benchmarks/results/layers.json."""
    detached = DetachedModel.from_pretrained(model)
    ids = detached.encode(TEXT)[:tokens]
    figures = {}
    for name in ("run", "layers"):
        lin = detached.linearize(ids)
        before, begun, used = lin.decoder.pushed, time.perf_counter(), time.process_time()
        if name == "run":
            converged = bool(svd(lin, 16, method="stream").converged.all())
        else:
            found = layers(lin, kinds=KINDS, k=k, tol=tol)
            converged = not found.doubts
        figures[name] = {
            "passes": (lin.decoder.pushed - before) / len(lin.segments),
            "seconds": time.perf_counter() - begun,
            "processor_seconds": time.process_time() - used,
            "converged": converged,
        }
    ratio = figures["layers"]["passes"] / figures["run"]["passes"]
    table = Table(title=f"{detached.name}, T = {len(ids)}, k = {k}, tol = {tol:.0e}")
    for column in ("", "passes", "seconds", "processor seconds", "converged"):
        table.add_column(column, justify="right" if column else "left")
    for name, figure in figures.items():
        table.add_row(name, *(f"{value:.4g}" for value in figure.values()))
    Console().print(table)
    Console().print(f"layers take {ratio:.2f} times the passes of a run")
    path = write_results(
        "layers",
        {"tokens": len(ids), "k": k, "tol": tol, "ratio_of_passes": ratio, "figures": figures},
    )
    Console().print(f"written to {path}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    typer.run(main)
