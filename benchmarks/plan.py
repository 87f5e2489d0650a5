"""Predicted against measured: what `elm-lanczos plan` says, and what the same work then takes.

For each length and method, `svd.cost.predict` on the linear system of a prompt, and then `svd`, in
one process and in turn.

    python benchmarks/plan.py --lengths 8,32,128
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from machine import write_results
from rich.console import Console
from rich.table import Table

from elm_lanczos import DetachedModel
from elm_lanczos.operators import TokenOperators
from elm_lanczos.svd.cost import predict
from elm_lanczos.svd.solve import svd


def main(
    lengths: Annotated[str, typer.Option(help="Sequence lengths T.")] = "8,32,64,128,192",
    k: Annotated[int, typer.Option(help="Triplets for each token.")] = 16,
    limit: Annotated[float, typer.Option(help="Seconds; what takes longer is left out.")] = 120.0,
) -> None:
    """Print the table and write benchmarks/results/plan.json."""
    model = DetachedModel.from_pretrained()
    generator = torch.Generator().manual_seed(0)
    table = Table(title=f"{model.name}, k = {k}: predicted / measured")
    for column in ("T", "method", "passes", "", "seconds", "", "ratio"):
        table.add_column(column, justify="right")
    rows = []
    for length in map(int, lengths.split(",")):
        ids = torch.randint(model.embedding.weight.shape[0], (length,), generator=generator)
        lin = model.linearize(ids)
        batch = TokenOperators(lin, range(length))
        for method, cost in predict(batch, k).items():
            predicted = cost.seconds or 0.0
            if predicted > limit:
                continue
            begun = time.perf_counter()
            made = svd(batch, k, method=method).passes
            seconds = time.perf_counter() - begun
            ratio = predicted / seconds
            cells = (cost.passes, made, f"{predicted:.2f}", f"{seconds:.2f}", f"{ratio:.2f}")
            table.add_row(str(length), method, *map(str, cells))
            rows.append(
                {
                    "tokens": length,
                    "method": method,
                    "predicted_passes": cost.passes,
                    "passes": made,
                    "predicted_seconds": predicted,
                    "seconds": seconds,
                    "ratio": ratio,
                }
            )
    Console().print(table)
    worst = max(max(row["ratio"], 1 / row["ratio"]) for row in rows)
    Console().print(f"worst ratio {worst:.2f}")
    path = write_results("plan", {"k": k, "rows": rows, "worst_ratio": worst})
    Console().print(f"written to {path.name}")


if __name__ == "__main__":
    typer.run(main)
