"""One prompt by one process and by several: where the time goes when its work is dealt.

Each run is one of the command line, with one thread a process. On a machine with other work, or
fewer cores than processes, seconds say little, so each process counts its own processor time, by
step; waiting takes none. The critical path is what a machine with a core for each process would
take: the first one's tracing; then the slowest of the others' tracing and its certificate and
outputs; then the process that takes longest for its part of the passes, of the solver and of the
rows to be written; then what the first one does to finish. Both are of the prediction, without
the start of the processes and the loading of the model.

    python benchmarks/processes.py --lengths 130,400,920 --processes 1,2
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import write_results
from rich.console import Console
from rich.table import Table

from elm_lanczos import distributed, solving
from elm_lanczos.config import RunConfig
from elm_lanczos.frozen_decoder import FrozenDecoder
from elm_lanczos.model import DetachedModel
from elm_lanczos.operators import TokenOperators
from elm_lanczos.run import run
from elm_lanczos.store import open_results

SENTENCE = "we seek peace and freedom for all the people of the world and of this nation, "
STEPS = ("tracing", "certificate", "outputs", "passes", "solver", "exchange", "rows", "end")


class _Silent:
    """Observes a run and says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def time_steps(taken: dict[str, float]) -> None:
    """Lets the steps of a run note the processor time they take in this process.

    Args:
        taken: seconds by step, added to.
    """

    def timed(step: str, owner: Any, name: str, clock: Callable[[], float]) -> None:
        original = getattr(owner, name)

        def with_clock(*given: Any, **options: Any) -> Any:
            begun = clock()
            try:
                return original(*given, **options)
            finally:
                taken[step] += clock() - begun

        setattr(owner, name, with_clock)

    for name in ("rows", "matvec", "rmatvec"):
        timed("passes", TokenOperators, name, time.process_time)
    for name in ("_agreed", "_given", "_sent"):
        timed("exchange", distributed.Exchange, name, time.process_time)
    for step, owner, name in (
        ("tracing", DetachedModel, "linearize_together"),
        ("certificate", FrozenDecoder, "certificates"),
        ("outputs", solving, "write_outputs"),
        ("rows", solving, "commit"),
        ("rows", distributed, "commit"),
        ("end", solving, "finish"),
        ("part", solving.Alone, "solve"),
        ("part", distributed.Shared, "_part"),
        ("all", solving, "_solve"),
    ):
        timed(step, owner, name, time.process_time)
    timed("waiting", distributed.Exchange, "_finish", time.monotonic)


def one(folder: Path) -> None:
    """Is one process of a run; writes what its steps took.

    Args:
        folder: holds the options as `run.json`.
    """
    config = RunConfig(**json.loads((folder / "run.json").read_text()))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    taken: dict[str, float] = defaultdict(float)
    run_here = distributed.run if several else run
    prepare = distributed.prepare

    def prepared(*given: Any) -> Any:
        job = prepare(*given)
        taken.clear()
        return job

    time_steps(taken)
    if several:
        distributed.prepare = prepared
    else:
        begin = _Silent.__getattr__

        def begun(self: _Silent, name: str) -> Any:
            if name == "started":
                taken.clear()
            return begin(self, name)

        _Silent.__getattr__ = begun  # type: ignore[method-assign]
    run_here(config, _Silent(), overwrite=True)
    taken["solver"] = taken["part"] - taken["passes"] - taken["rows"] - taken["exchange"]
    (folder / f"taken.{os.environ.get('RANK', '0')}").write_text(json.dumps(taken))


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
    out, text = folder / "r.zarr", (SENTENCE * length)[: 5 * length]
    given = {"text": text, "method": method, "out": str(out), "memory": 2**32}
    (folder / "run.json").write_text(json.dumps(given))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(launcher if processes > 1 else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*start, __file__, "one", str(folder)], env=environment, check=True)
    result = open_results(out)[0]
    steps = [json.loads((folder / f"taken.{rank}").read_text()) for rank in range(processes)]
    first, others = steps[0], steps[1:]
    alone = first["all"] - first["tracing"] - first["part"] - first["end"]
    meanwhile = max([alone, *(other["tracing"] for other in others)])
    path = first["tracing"] + meanwhile + max(one["part"] for one in steps) + first["end"]
    return {
        "processes": processes,
        "method": method,
        "tokens": len(result.tokens),
        "seconds": result.attrs["seconds"],
        "critical_path": path,
        "processor_seconds": steps,
    }


def main(
    lengths: Annotated[str, typer.Option(help="About how many tokens a prompt has.")] = "130,400",
    methods: Annotated[str, typer.Option(help="Methods.")] = "dense,stream",
    processes: Annotated[str, typer.Option(help="Numbers of processes.")] = "1,2",
) -> None:
    """Print the table and write benchmarks/results/processes.json."""
    table = Table(title="one prompt, one thread a process: processor seconds")
    names = ("method", "tokens", "process", *STEPS, "critical path", "speed-up", "seconds")
    for column in names:
        table.add_column(column, justify="right")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for length in map(int, lengths.split(",")):
            for method in methods.split(","):
                first = None
                for count in map(int, processes.split(",")):
                    row = measured(count, method, length, Path(folder))
                    rows.append(row)
                    first = first or row["critical_path"]
                    row["speed_up"] = first / row["critical_path"]
                    for rank, steps in enumerate(row["processor_seconds"]):
                        cells = [method, row["tokens"], f"{rank + 1} of {count}"]
                        cells += [f"{steps.get(step, 0.0):.1f}" for step in STEPS]
                        if rank == 0:
                            cells += [f"{row['critical_path']:.1f}", f"{row['speed_up']:.2f}"]
                            cells.append(f"{row['seconds']:.1f}")
                        table.add_row(*map(str, cells))
                    write_results("processes", {"rows": rows})
    Console(width=140).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(Path(sys.argv[2]))
    else:
        typer.run(main)
