"""Runs that are killed at random moments, again and again: nothing they leave may be wrong.

Runs of one process and of four are begun and continued, and after a random time one of their
processes, or the launcher of the four, gets SIGKILL, SIGTERM or SIGINT. After every kill each row
marked done must have the bits of an undisturbed run; when a run has ended, so must everything, and
the next one begins. A run that is still going at the last kill is ended by another number of
processes. To spare the imports processes are forked; the four by torchrun's own agent.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 200
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
import zarr
from machine import write_results
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from elm_lanczos import cli, distributed
from elm_lanczos.errors import StoreError
from elm_lanczos.store.layout import ROW_ARRAYS

ROOT = Path(distributed.__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PROMPTS = [
    "the Soviet Union and the",
    "peace and security of the",
    "my fellow citizens, we have",
    " ".join(["we seek peace and freedom for all the world"] * 15),  # several owners
]


def arrays(path: Path) -> dict[str, Any]:
    """Returns every array of a store that can be opened, by its path."""
    root = zarr.open_group(path, mode="r")
    members = root.members(max_depth=None)
    return {name: node for name, node in members if isinstance(node, zarr.Array)}


def rows_done(path: Path, right: dict[str, Any]) -> int:
    """Returns how many rows are marked done; every one of them must be right.

    Args:
        path: a store, of a run that was killed.
        right: the arrays of an undisturbed run.

    Returns:
        The number of rows.

    Raises:
        StoreError: if one is not.
    """
    rows = 0
    for marker in path.glob("prompts/**/done/zarr.json"):
        group = marker.parents[1].relative_to(path).as_posix()
        done = np.asarray(zarr.open_array(marker.parent, mode="r")[:])
        for spec in ROW_ARRAYS if done.any() else ():
            found = np.asarray(zarr.open_array(path / group / spec.name, mode="r")[:])[done]
            if (
                found.tobytes()
                != np.ascontiguousarray(right[f"{group}/{spec.name}"][done]).tobytes()
            ):
                raise StoreError(f"{path}: rows of {group}/{spec.name} are marked done and wrong")
        rows += int(done.sum())
    return rows


def same_bits(path: Path, right: dict[str, Any]) -> None:
    """Checks that a store is that of an undisturbed run.

    Args:
        path: the store.
        right: the arrays of an undisturbed run.

    Raises:
        StoreError: if it is not.
    """
    found = arrays(path)
    if found.keys() != right.keys():
        raise StoreError(f"{path}: {sorted(found.keys() ^ right.keys())} differ")
    for name, values in right.items():
        same = np.asarray(found[name][...])
        text = values.dtype.kind not in "fiub"
        if (same != values).any() if text else same.tobytes() != values.tobytes():
            raise StoreError(f"{path}: {name} differs")


def command_line(arguments: list[str]) -> None:
    """Is `elm-lanczos` with some arguments; returns where that ends with exit code 0."""
    sys.argv = ["elm-lanczos", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


def launch(processes: int, arguments: list[str], complaints: Path) -> None:
    """Is `elm-lanczos`, or torchrun with some processes of it; what they say goes to a file."""
    os.dup2(os.open(complaints, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    os.setpgid(0, 0)
    if processes == 1:
        return command_line(arguments)
    options: dict[str, Any] = {"max_restarts": 0, "start_method": "fork"}
    options |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, processes, run_id=str(os.getpid()), **options)
    elastic_launch(config, command_line)(arguments)


def started(processes: int, arguments: list[str], complaints: Path) -> BaseProcess:
    """A run in processes of its own."""
    process = get_context("fork").Process(target=launch, args=(processes, arguments, complaints))
    process.start()
    return process


def finished(processes: int, arguments: list[str], complaints: Path) -> None:
    """Waits for a run to end well.

    Args:
        processes: how many processes.
        arguments: of the command line.
        complaints: where what they say goes.

    Raises:
        StoreError: if it does not.
    """
    process = started(processes, arguments, complaints)
    process.join()
    if process.exitcode:
        raise StoreError(complaints.read_text())


def killed(
    processes: int,
    arguments: list[str],
    complaints: Path,
    moment: float,
    kind: signal.Signals,
    rng: random.Random,
) -> bool:
    """Starts a run, kills one of its processes, and waits until all have ended.

    Args:
        processes: how many processes.
        arguments: of the command line.
        complaints: where what they say goes.
        moment: seconds after the store is locked.
        kind: the signal.
        rng: chooses the process.

    Returns:
        Whether the run was still going.

    Raises:
        StoreError: if it failed of itself, or did not end.
    """
    out = Path(arguments[arguments.index("--out") + 1])
    process = started(processes, arguments, complaints)
    assert process.pid is not None
    lock = out.with_name(f"{out.name}.lock")
    while not lock.exists() and process.is_alive():
        time.sleep(0.005)
    process.join(moment)
    everyone: list[psutil.Process] = []
    alive = process.is_alive()
    with suppress(psutil.NoSuchProcess):  # it has just ended
        launcher = psutil.Process(process.pid)
        everyone = [launcher, *launcher.children(recursive=True)]
        rng.choice(everyone).send_signal(kind)
    process.join(100)
    if psutil.wait_procs(everyone, timeout=60)[1]:
        raise StoreError("processes of a killed run go on")
    if f"{ROOT}/elm_lanczos/" in complaints.read_text():  # a traceback
        raise StoreError(complaints.read_text())
    if process.exitcode and not alive:
        raise StoreError(f"failed of itself: {complaints.read_text()}")
    return bool(process.exitcode)


def main(
    kills: Annotated[int, typer.Option(help="How many, all numbers of processes together.")] = 200,
    processes: Annotated[str, typer.Option(help="Numbers of processes.")] = "1,4",
    seed: Annotated[int, typer.Option(help="Of the moments and signals.")] = 0,
    model: Annotated[str | None, typer.Option(help="Folder of a small model.")] = None,
) -> None:
    """Kill runs, check what they leave, and write benchmarks/results/kills.json."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng = random.Random(seed)
    figures, numbers = [], [int(number) for number in processes.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        said = folder / "said"
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        given = ["run", "--seq-file", str(prompts), "--k", "2", "--top", "3"]
        given += ["--positions", "last:2", "--batch", "16", "--method", "stream", "--quiet"]
        given += ["--memory", "2GiB", "--resume", *(["--model", model] if model else []), "--out"]
        undisturbed = folder / "undisturbed.zarr"
        begun = time.monotonic()
        finished(1, [*given, str(undisturbed)], said)
        duration = time.monotonic() - begun
        right = {name: np.asarray(array[...]) for name, array in arrays(undisturbed).items()}
        for number in numbers:
            made = dict.fromkeys(SIGNALS, 0)
            rows = ended = 0
            while sum(made.values()) < kills // len(numbers):
                out = folder / f"{number}-{ended}.zarr"
                kind, moment = rng.choice(SIGNALS), rng.uniform(0, 0.7) * duration
                arguments = [*given, str(out)]
                made[kind] += killed(number, arguments, said, moment, kind, rng)
                rows += rows_done(out, right) if out.exists() else 0
                if (out / "summary" / "zarr.json").exists():
                    finished(1, arguments, said)
                    same_bits(out, right)
                    ended += 1
                print(f"{number} processes: {sum(made.values())} kills, {ended} runs ended")
            finished(1 if number > 1 else 2, [*given, str(out)], said)
            same_bits(out, right)
            counts = {kind.name: times for kind, times in made.items()}
            row = {"processes": number, **counts, "stores": ended + 1, "rows_checked": rows}
            figures.append(row)
    print(figures, f"written to {write_results('kills', {'runs': figures}).name}")


if __name__ == "__main__":
    typer.run(main)
