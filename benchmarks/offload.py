"""Offloaded weights against resident ones: the time of large blocks of VJPs.

A random Llama is kept in memory, and on disk with one layer fetched at a time (accelerate's
`disk_offload`). Its layers are linearised anew for every block (`keep=False`), as those of a model
that does not fit are, so that one fetch serves one block. The operating system may hold the files
in its cache; `--throttle` makes every fetch take at least as long as a disk of that speed would.

    python benchmarks/offload.py --throttle 1.0
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from accelerate import disk_offload
from accelerate.utils import OffloadedWeightsLoader
from machine import write_results
from rich.console import Console
from rich.table import Table

from elm_lanczos import DetachedModel
from elm_lanczos.linearization import Linearization


def random_llama(width: int, layers: int) -> Any:
    """Returns a Llama with random weights.

    Args:
        width: of its residual stream.
        layers: how many layers.

    Returns:
        The model.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def throttled(gib_per_second: float) -> Any:
    """Returns accelerate's reader of offloaded weights, slowed down.

    Args:
        gib_per_second: the speed of the disk.

    Returns:
        What replaces `OffloadedWeightsLoader.__getitem__`.
    """
    read = OffloadedWeightsLoader.__getitem__

    def slow(self: Any, key: str) -> Any:
        begun = time.perf_counter()
        weight = read(self, key)
        size = weight.nbytes if hasattr(weight, "nbytes") else 0
        wait = size / (gib_per_second * 2**30) - (time.perf_counter() - begun)
        time.sleep(max(0.0, wait))
        return weight

    return slow


def seconds(lin: Linearization, block: int, repeats: int) -> float:
    """Returns the median time of one block of VJPs.

    Args:
        lin: the linear system.
        block: vectors in it.
        repeats: how often it is timed.

    Returns:
        Seconds.
    """
    U = torch.randn(block, lin.shape[1], generator=torch.Generator().manual_seed(0))
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        lin.vjp(U)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def main(
    width: Annotated[int, typer.Option(help="Of the residual stream.")] = 1024,
    layers: Annotated[int, typer.Option(help="Layers.")] = 6,
    length: Annotated[int, typer.Option(help="Tokens T.")] = 64,
    blocks: Annotated[str, typer.Option(help="Vectors in a block.")] = "1,8,32,128",
    throttle: Annotated[float, typer.Option(help="GiB a second of the disk; 0: as it is.")] = 1.0,
    repeats: Annotated[int, typer.Option(help="Times a block is timed.")] = 3,
) -> None:
    """Print the table and write benchmarks/results/offload.json."""
    hf, ids = random_llama(width, layers), torch.arange(length)
    table = Table(title=f"Llama, {layers} layers, d = {width}, T = {length}, {throttle:g} GiB/s")
    for column in ("block", "resident s", "offloaded s", "ratio"):
        table.add_column(column, justify="right")
    options: dict[str, Any] = {"keep": False}
    sizes = [int(size) for size in blocks.split(",")]

    def timed(model: Any) -> list[float]:
        detached = DetachedModel(model)
        return [
            seconds(detached.linearize(ids, block=size, **options), size, repeats) for size in sizes
        ]

    resident = timed(hf)
    with tempfile.TemporaryDirectory() as folder:
        away = disk_offload(hf, Path(folder), execution_device=torch.device("cpu"))
        if throttle:
            OffloadedWeightsLoader.__getitem__ = throttled(throttle)  # type: ignore[method-assign]
        offloaded = timed(away)
    rows = []
    for size, here, there in zip(sizes, resident, offloaded, strict=True):
        rows.append({"block": size, "resident": here, "offloaded": there, "ratio": there / here})
        table.add_row(f"{size}", f"{here:.3f}", f"{there:.3f}", f"{there / here:.2f}")
    Console().print(table)
    shape = {"width": width, "layers": layers, "tokens": length, "gib_per_second": throttle}
    print(f"written to {write_results('offload', {**shape, 'rows': rows}).name}")


if __name__ == "__main__":
    typer.run(main)
