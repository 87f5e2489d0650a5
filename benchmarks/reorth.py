"""Two-pass Gram–Schmidt: the CUDA kernels against torch's batched matrix products.

X (a, b, d) is made orthogonal to a basis (a, j, d) for each of a tokens. Bandwidth is what a method
must read and write, over the time it takes, beside that of a copy within the device in the same
run: four reads of the basis with matrix products, three with the kernels' sweeps, one where a
token's basis fits into a cluster of thread blocks. X is read and written besides. The kernels'
partial sums are not counted, nor what the matrix products write in between. A basis smaller than
the L2 cache stays in it from call to call: the share of a copy may then exceed 1.

Without a GPU, or without CuPy, there are no kernels to time: torch and the kernels' algorithm in
its reference form are then timed on the CPU, at reduced sizes, and the table says so.

    python benchmarks/reorth.py
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from machine import write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor

from elm_lanczos.svd.gram_schmidt import (
    aligned,
    compiled,
    fused_reference,
    limits,
    plan_launch,
    sweep,
    two_pass,
)

# (a, b, j, d): the first is the one to judge by
SHAPES = (
    (256, 1, 64, 4096),
    (256, 1, 16, 4096),
    (256, 1, 128, 4096),
    (64, 1, 64, 8192),
    (16, 1, 64, 4096),
    (1, 1, 64, 4096),
    (256, 4, 64, 4096),
    (256, 1, 64, 4095),
)
# Calls between two events: the device then has work while the host prepares the next.
QUEUED = 10
SMALLER = ((16, 1, 64, 1024), (16, 1, 16, 1024), (4, 4, 64, 1024))


def problem(shape: tuple[int, int, int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a random orthonormal basis, a slice of a larger buffer, and random rows."""
    a, b, j, d = shape
    buffer = like.new_zeros(a, j + 1, d)
    for token in range(a):
        buffer[token, :j] = torch.linalg.qr(torch.randn(d, j).to(like))[0].mT
    return buffer[:, :j], torch.randn(a, b, d).to(like)


def milliseconds(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Times works in turn after a warm-up, so that a drifting machine is fair to all.

    Args:
        works: what to time.
        repeats: how often.

    Returns:
        The median of each.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(-3, repeats):
        for name, work in works.items():
            if torch.cuda.is_available():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(QUEUED):
                    work()
                end.record()
                end.synchronize()
                elapsed = begin.elapsed_time(end) / QUEUED
            else:
                begun = time.perf_counter()
                work()
                elapsed = 1e3 * (time.perf_counter() - begun)
            if repeat >= 0:
                taken[name].append(elapsed)
    return {name: statistics.median(values) for name, values in taken.items()}


def must_move(shape: tuple[int, int, int, int], itemsize: int, reads: int) -> int:
    """Returns the bytes a method must read and write, the basis read so many times."""
    a, b, j, d = shape
    # X or what is left of it: read with every read of the basis; written by every subtraction
    rows = 2 if reads == 1 else {3: 5, 4: 6}[reads]
    return a * itemsize * (reads * j * d + rows * b * d)


def methods(basis: Tensor, X: Tensor) -> dict[str, tuple[int, Callable[[], object]]]:
    """Each method by name; the kernels only on a GPU, the sweeps also where clusters are chosen.

    Args:
        basis: (a, j, d) orthonormal rows.
        X: (a, b, d) rows.

    Returns:
        Reads of the basis, and what to time.
    """
    found: dict[str, tuple[int, Callable[[], object]]] = {
        "torch, two passes": (4, lambda: two_pass(basis, X))
    }
    if not X.is_cuda:
        return found | {"reference form": (3, lambda: fused_reference(basis, X, 256))}
    a, b, d = X.shape
    shape, even = (a, b, basis.shape[1], d), aligned(basis, X)
    shared, clusters = limits(X.device.index)
    for with_clusters in sorted({clusters, False}):
        launch = plan_launch(shape, X.element_size(), even, shared, with_clusters)
        run = launch and compiled(launch, b, X.device.index)
        if launch and run:
            name = "one kernel, a cluster a token" if launch.reads == 1 else "three sweeps"
            found[name] = launch.reads, partial(sweep, basis, X, launch, run)
    return found


def measure(shape: tuple[int, int, int, int], like: Tensor, repeats: int) -> dict[str, Any]:
    """Times all methods on one shape.

    Args:
        shape: (a, b, j, d).
        like: gives dtype and device.
        repeats: how often each is timed.

    Returns:
        The figures as plain data.
    """
    basis, X = problem(shape, like)
    found = methods(basis, X)
    works = {name: work for name, (_, work) in found.items()}
    source = torch.empty(256 * 2**20 if like.is_cuda else 32 * 2**20, dtype=torch.uint8)
    source = source.to(like.device)
    target = torch.empty_like(source)
    works["copy"] = lambda: target.copy_(source)
    taken = milliseconds(works, repeats)
    copy = 2 * source.numel() / taken.pop("copy") / 1e6
    figures: dict[str, Any] = {"shape": shape, "dtype": str(like.dtype), "copy_gb_per_s": copy}
    for name, elapsed in taken.items():
        moved = must_move(shape, like.element_size(), found[name][0])
        figures[name] = {
            "milliseconds": elapsed,
            "reads": found[name][0],
            "gb_per_s": moved / elapsed / 1e6,
            "share_of_copy": moved / elapsed / 1e6 / copy,
            "times_faster": taken["torch, two passes"] / elapsed,
        }
    return figures


def main(
    repeats: Annotated[int, typer.Option(help="Timed repeats; the methods take turns.")] = 30,
) -> None:
    """Print the table and write benchmarks/results/reorth.json."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
    missing = "no CuPy" if torch.cuda.is_available() else "no GPU"
    note = None if gpu else f"{missing}: no kernel was timed; CPU, reduced sizes"
    rows = [
        measure(shape, torch.empty(0, dtype=dtype, device="cuda:0" if gpu else "cpu"), repeats)
        for dtype in (torch.float32, torch.float64)
        for shape in (SHAPES if gpu else SMALLER)
    ]
    table = Table(title=note or f"{torch.cuda.get_device_name()}, medians of {repeats}")
    for column in ("a × b, j × d", "", "ms", "× torch", "reads", "GB/s", "of a copy"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        a, b, j, d = row["shape"]
        label = f"{a} × {b}, {j} × {d} {row['dtype'].removeprefix('torch.')}"
        for name, figure in row.items():
            if isinstance(figure, dict):
                table.add_row(
                    label,
                    name,
                    f"{figure['milliseconds']:.3g}",
                    f"{figure['times_faster']:.2f}",
                    str(figure["reads"]),
                    f"{figure['gb_per_s']:.0f}",
                    f"{figure['share_of_copy']:.0%}",
                )
                label = ""
    Console().print(table)
    path = write_results("reorth", {"note": note, "rows": rows})
    Console().print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
