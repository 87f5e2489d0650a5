"""Peak memory and time of whole runs against the length of the prompt.

Each run (`elm_lanczos.run.run` with a store on the disk) has a process of its own. Its peak is the
resident set above that of the process with the model loaded, and is compared with what `plan`
predicts: the linearised layers with a block of vectors, and what the method holds. An exponent is
fitted to the peaks of each method. Runs of which not all passes are wanted are stopped there, once
everything has its full size but the Krylov bases.

The text is made of the sentences of `prompts.txt` in random order.

    python benchmarks/memory.py
    python benchmarks/memory.py --lengths 8192 --whole 8192
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from machine import write_results
from rich.console import Console
from rich.table import Table

from elm_lanczos.config import RunConfig
from elm_lanczos.run import load_model, run

PROMPTS = Path(__file__).parent.parent / "prompts.txt"


class _EnoughError(Exception):
    """As many passes have been made as are wanted."""


class _Stopping:
    """Observes a run; stops it after some passes, and takes the time."""

    def __init__(self, passes: float) -> None:
        self.wanted, self.made, self.predicted = passes, 0, 0
        self.begun = self.seconds = 0.0
        self.method, self.bytes = "", 0

    def note(self, message: str) -> None: ...

    def opened(self, path: Path, words: object) -> None: ...

    def started(self, number: int, total: int, text: str) -> None: ...

    def planned(self, plan: Any, passes: int) -> None:
        self.method, self.bytes, self.predicted = plan.method, plan.bytes[plan.method], passes
        self.begun = time.perf_counter()

    def passes(self, made: int) -> None:
        self.made, self.seconds = made, time.perf_counter() - self.begun
        if made >= self.wanted:
            raise _EnoughError

    def finished(self, result: object) -> None:
        self.seconds = time.perf_counter() - self.begun


class _Peak:
    """The highest resident set of this process, sampled a hundred times a second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(0.01):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def end(self) -> int:
        self._ended.set()
        self._sampler.join()
        return self.bytes


def text_of(tokens: int, model: Any) -> str:
    """Returns text of at least so many tokens, and cuts it to that number.

    Args:
        tokens: how many.
        model: whose tokens.

    Returns:
        The text.
    """
    sentences = [line for line in PROMPTS.read_text().splitlines() if line.strip()]
    order = random.Random(0)
    text = ""
    while len(model.encode(text or "a")) < tokens:
        text += " ".join(order.sample(sentences, len(sentences))) + " "
    return str(model.tokenizer.decode(model.encode(text)[:tokens], skip_special_tokens=True))


def measure(length: int, method: str, k: int, memory: str, passes: float) -> dict[str, Any]:
    """Does one run in this process.

    Args:
        length: tokens T.
        method: of `run`.
        k: triplets for each token.
        memory: the ceiling.
        passes: after which it is stopped.

    Returns:
        The figures.
    """
    config = {"k": k, "method": method, "memory": memory}
    model = load_model(RunConfig(text="a"))
    text = text_of(length, model)
    ids = model.encode(text)
    model.linearize(ids[:32]).vjp(torch.ones(256))  # what is loaded once
    before = psutil.Process().memory_info().rss
    observer, peak = _Stopping(passes), _Peak()
    with tempfile.TemporaryDirectory() as folder:
        whole = True
        try:
            run(RunConfig(text=text, out=f"{folder}/r.zarr", **config), observer)  # type: ignore[arg-type]
        except _EnoughError:
            whole = False
    found = peak.end() - before
    lin = model.linearize(ids, memory=RunConfig(text="a", memory=memory).memory)
    predicted = lin.held_bytes + observer.bytes
    return {
        "tokens": len(ids),
        "method": method,
        "followed": observer.method,
        "whole": whole,
        "passes": observer.made,
        "predicted_passes": observer.predicted,
        "seconds": observer.seconds,
        "block": lin.block,
        "peak_mib": found / 2**20,
        "predicted_mib": predicted / 2**20,
        "chain_mib": lin.held_bytes / 2**20,
    }


def exponent(rows: list[dict[str, Any]]) -> float:
    """The power of T that the peaks of some rows grow with, fitted to their logarithms."""
    if len(rows) < 2:
        return math.nan
    x, y = (np.log([row[name] for row in rows]) for name in ("tokens", "peak_mib"))
    return float(np.polyfit(x, y, 1)[0])


def main(
    lengths: Annotated[str, typer.Option(help="Sequence lengths T.")] = (
        "512,1024,2048,4096,8192,16384"
    ),
    methods: Annotated[str, typer.Option(help="Methods.")] = "dense,auto",
    k: Annotated[int, typer.Option(help="Triplets for each token.")] = 4,
    memory: Annotated[str, typer.Option(help="Ceiling of each run.")] = "4GiB",
    whole: Annotated[int, typer.Option(help="Longest prompt whose run is not stopped.")] = 1024,
    passes: Annotated[int, typer.Option(help="Passes after which the others are.")] = 64,
    name: Annotated[str, typer.Option(help="Of the JSON file.")] = "memory",
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print the table and write benchmarks/results/memory.json."""
    if job:
        print(json.dumps(measure(**json.loads(job))))
        return
    console, rows = Console(), []
    table = Table(title=f"bundled model, all tokens, k = {k}, memory {memory}")
    for column in ("T", "method", "passes", "seconds", "ms / pass", "MiB", "predicted", "ratio"):
        table.add_column(column, justify="right")
    for method in methods.split(","):
        for length in map(int, lengths.split(",")):
            wanted = math.inf if length <= whole else passes
            task = {"length": length, "method": method, "k": k, "memory": memory, "passes": wanted}
            command = [sys.executable, __file__, "--job", json.dumps(task)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(said.splitlines()[-1])
            rows.append(row)
            cells = (
                str(row["tokens"]),
                f"{method}" + ("" if row["followed"] == method else f" ({row['followed']})"),
                f"{row['passes']}" + ("" if row["whole"] else f" of {row['predicted_passes']}"),
                f"{row['seconds']:.1f}",
                f"{1000 * row['seconds'] / row['passes']:.0f}",
                f"{row['peak_mib']:.0f}",
                f"{row['predicted_mib']:.0f}",
                f"{row['predicted_mib'] / row['peak_mib']:.2f}",
            )
            table.add_row(*cells)
            console.print(*cells)
    console.print(table)
    fitted = {m: exponent([r for r in rows if r["method"] == m]) for m in methods.split(",")}
    for method, power in fitted.items():
        console.print(f"{method}: peak memory grows with T to the power {power:.2f}")
    figures = {"k": k, "memory": memory, "rows": rows, "exponents": fitted}
    console.print(f"written to {write_results(name, figures).name}")


if __name__ == "__main__":
    typer.run(main)
