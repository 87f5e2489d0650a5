"""One prompt by one process and by several: the time of the passes when their blocks are dealt.

Each run is one of the command line, with one thread a process; its seconds are those that the store
notes for the prediction: the linear system, all passes, the solver and the writing, without the
start of the processes and the loading of the model, which the table shows apart.

    python benchmarks/processes.py --length 300 --processes 1,2
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import write_results
from rich.console import Console
from rich.table import Table

from elm_lanczos.store import open_results

SENTENCE = "we seek peace and freedom for all the people of the world and of this nation, "


def measured(processes: int, method: str, length: int, folder: Path) -> dict[str, Any]:
    """Returns the times of one run.

    Args:
        processes: how many processes.
        method: how the triplets are computed.
        length: about how many tokens.
        folder: where the store goes.

    Returns:
        Plain data.
    """
    out = folder / f"{method}-{processes}.zarr"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    start = [sys.executable, "-m", *(launcher if processes > 1 else []), "elm_lanczos", "run"]
    text = (SENTENCE * length)[: 5 * length]
    given = ["--text", text, "--method", method, "--out", str(out), "--quiet", "--overwrite"]
    begun = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*start, *given, "--memory", "4GiB"], env=environment, check=True)
    seconds = time.perf_counter() - begun
    result = open_results(out)[0]
    return {
        "processes": processes,
        "method": method,
        "tokens": len(result.tokens),
        "seconds": result.attrs["seconds"],
        "seconds_with_start": seconds,
    }


def main(
    length: Annotated[int, typer.Option(help="About how many tokens the prompt has.")] = 300,
    methods: Annotated[str, typer.Option(help="Methods.")] = "dense,stream",
    processes: Annotated[str, typer.Option(help="Numbers of processes.")] = "1,2",
) -> None:
    """Print the table and write benchmarks/results/processes.json."""
    table = Table(title="one prompt, one thread a process")
    for column in ("method", "tokens", "processes", "seconds", "speed-up", "with start"):
        table.add_column(column, justify="right")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in methods.split(","):
            first = None
            for count in map(int, processes.split(",")):
                row = measured(count, method, length, Path(folder))
                first = first or row["seconds"]
                row["speed_up"] = first / row["seconds"]
                cells = (method, row["tokens"], count, f"{row['seconds']:.1f}")
                more = (f"{row['speed_up']:.2f}", f"{row['seconds_with_start']:.1f}")
                table.add_row(*map(str, (*cells, *more)))
                rows.append(row)
    Console().print(table)
    Console().print(f"written to {write_results('processes', {'rows': rows}).name}")


if __name__ == "__main__":
    typer.run(main)
