"""Runs that are killed at random moments, again and again: nothing they leave may be wrong.

Runs of one process and of four are begun and continued, and after a random time one of their
processes gets SIGKILL, SIGTERM or SIGINT. After every kill each row marked done must have the bits
of an undisturbed run; when a run has ended, so must everything, and the next one begins. A run that
is still going at the last kill is ended by another number of processes. Half of the kills are of
prompts with two output positions each, half of prompts of one length, solved together. To spare the
imports processes are forked, and as torchrun does the others are terminated when one has ended.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 200
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
import zarr
from machine import write_results

from elm_lanczos import cli, distributed
from elm_lanczos.errors import StoreError
from elm_lanczos.model import BUNDLED_MODEL
from elm_lanczos.store.layout import ROW_ARRAYS

ROOT = Path(distributed.__file__).parents[1]
LONGEST = 120.0
"""Seconds in which a run must end."""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PROMPTS = [
    "the Soviet Union and the",
    "my fellow citizens, we have",
    " ".join(["we seek peace and freedom for all the world"] * 15),  # several owners
]
KINDS = {
    "positions": (PROMPTS, ["--positions", "last:2"]),
    "together": ([f"the {word} of the people" for word in "peace war law time men".split()], []),
}
"""Prompts of the runs, and options with which they are killed."""


def small_model(folder: Path) -> None:
    """Makes a random Llama with the bundled tokenizer, whose runs take seconds.

    Args:
        folder: where it is saved.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=4096, **sizes, **heads)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, folder / name)


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


def one_of(rank: int, processes: int, port: int, arguments: list[str], complaints: Path) -> None:
    """Is one process of a run, launched as by torchrun; what it says goes to a file."""
    os.dup2(os.open(complaints, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    if processes > 1:
        given = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        given |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
        os.environ |= {name: str(value) for name, value in given.items()}
    command_line(arguments)


def started(processes: int, arguments: list[str], complaints: Path) -> list[BaseProcess]:
    """The processes of a run."""
    complaints.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = (processes, port, arguments, complaints)
    context = get_context("fork")
    run = [context.Process(target=one_of, args=(rank, *given)) for rank in range(processes)]
    for process in run:
        process.start()
    return run


def ended(run: list[BaseProcess]) -> int | None:
    """Waits until all processes of a run have ended, and terminates the others when one fails.

    Args:
        run: the processes.

    Returns:
        The exit code of the first one that failed; 0 if none has.

    Raises:
        StoreError: if they go on when they should have ended.
    """
    code, patience = 0, time.monotonic() + LONGEST
    while any(process.is_alive() for process in run):
        connection.wait([process.sentinel for process in run if process.is_alive()], timeout=1)
        failed = next((process.exitcode for process in run if process.exitcode), 0)
        if failed and not code:
            code, patience = failed, time.monotonic() + LONGEST
            for process in run:
                process.terminate()
        if time.monotonic() > patience:
            for process in run:
                process.kill()
            raise StoreError("processes of a killed run go on")
    return code or next((process.exitcode for process in run if process.exitcode), 0)


def finished(processes: int, arguments: list[str], complaints: Path) -> None:
    """Waits for a run to end well.

    Args:
        processes: how many processes.
        arguments: of the command line.
        complaints: where what they say goes.

    Raises:
        StoreError: if it does not.
    """
    if ended(started(processes, arguments, complaints)):
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
    run = started(processes, arguments, complaints)
    lock = out.with_name(f"{out.name}.lock")
    while not lock.exists() and all(process.is_alive() for process in run):
        time.sleep(0.005)
    connection.wait([process.sentinel for process in run], timeout=moment)
    alive = all(process.is_alive() for process in run)
    victim = rng.choice(run)
    if victim.is_alive():
        assert victim.pid is not None
        os.kill(victim.pid, kind)
    code = ended(run)
    said = complaints.read_text()
    if f"{ROOT}/elm_lanczos/" in said or (code and not alive):  # a traceback, or a failure
        raise StoreError(said)
    return bool(code)


def main(
    kills: Annotated[int, typer.Option(help="How many, all numbers of processes together.")] = 200,
    processes: Annotated[str, typer.Option(help="Numbers of processes.")] = "1,4",
    seed: Annotated[int, typer.Option(help="Of the moments and signals.")] = 0,
) -> None:
    """Kill runs, check what they leave, and write benchmarks/results/kills.json."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng = random.Random(seed)
    figures, numbers = [], [int(number) for number in processes.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        said = folder / "said"
        given = ["run", "--k", "2", "--top", "3", "--batch", "16", "--method", "stream", "--quiet"]
        model = folder / "model"
        maker = get_context("fork").Process(target=small_model, args=(model,))
        maker.start()  # no thread of torch's may be running here when processes are forked
        maker.join()
        given += ["--memory", "2GiB", "--resume", "--model", str(model)]
        for prompts, (texts, options) in KINDS.items():
            file = folder / f"{prompts}.txt"
            file.write_text("\n".join(texts))
            own = [*given, *options, "--seq-file", str(file), "--out"]
            undisturbed = folder / f"{prompts}.zarr"
            begun = time.monotonic()
            finished(1, [*own, str(undisturbed)], said)
            duration = time.monotonic() - begun
            right = {name: np.asarray(array[...]) for name, array in arrays(undisturbed).items()}
            for number in numbers:
                made = dict.fromkeys(SIGNALS, 0)
                rows = stores = 0
                while sum(made.values()) < kills // (len(numbers) * len(KINDS)):
                    out = folder / f"{prompts}-{number}-{stores}.zarr"
                    kind, moment = rng.choice(SIGNALS), rng.uniform(0, 0.7) * duration
                    arguments = [*own, str(out)]
                    made[kind] += killed(number, arguments, said, moment, kind, rng)
                    rows += rows_done(out, right) if out.exists() else 0
                    if (out / "summary" / "zarr.json").exists():
                        finished(1, arguments, said)
                        same_bits(out, right)
                        stores += 1
                    print(f"{prompts}, {number} processes: {sum(made.values())} kills", flush=True)
                finished(1 if number > 1 else 2, [*own, str(out)], said)
                same_bits(out, right)
                counts = {kind.name: times for kind, times in made.items()}
                row = {"prompts": prompts, "processes": number, **counts}
                figures.append({**row, "stores": stores + 1, "rows_checked": rows})
                write_results("kills", {"runs": figures})
    print(figures)


if __name__ == "__main__":
    typer.run(main)
