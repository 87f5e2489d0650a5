"""Classical Gram–Schmidt in two passes against batches of orthonormal rows, on CUDA by a kernel.

With an orthonormal basis Q (j, d) and rows X (b, d),

    c = X Qᵀ,   Y = X − c Q,   e = Y Qᵀ,   Z = Y − e Q,

Z is orthogonal to Q as by Householder's method unless X lies in the span of Q to rounding, and
X = Z + (c + e) Q ("twice is enough": Giraud, Langou & Rozložník, 2005). b is small, so the time is
that of reading Q. As four matrix products Q is read four times. `kernels/gram_schmidt.cu` reads it
three times: each tile of columns gives its part of Y and then, still held, its part of e. Where one
operator's basis fits into the shared memory of a cluster of thread blocks it is read once.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elm_lanczos.errors import first_line

SOURCE = "gram_schmidt.cu"
LANES = 32
# Thread blocks of a cluster: the most that every device with clusters grants.
CLUSTER = 8
# Rows of X that a kernel is compiled for; beyond, matrix products read the basis often enough.
_MOST_ROWS = 8
# Thread blocks in a launch: several rounds on the largest devices, so that none waits for a last
# one. Not taken from the device: the order of the sums, and so the result, is the same on all.
_BLOCKS = 2048


@dataclass(frozen=True)
class Launch:
    """How the kernels go over one shape.

    Attributes:
        vector_bytes: Bytes a lane loads at once, 0 for one entry.
        vectors: Loads of a lane in one row of a tile.
        threads: Threads of a thread block.
        tiles: Tiles of columns of a thread block.
        blocks: Thread blocks of an operator.
        held: Whether a tile stays in shared memory between its two uses.
        shared: Bytes of shared memory of each kernel, in the order in which they run.
    """

    vector_bytes: int
    vectors: int
    threads: int
    tiles: int
    blocks: int
    held: bool
    shared: dict[str, int]

    @property
    def reads(self) -> int:
        """How often the basis is read from memory."""
        return 1 if "on_chip" in self.shared else 3 if self.held else 4


# Runs kernels in turn, each given by its name, thread blocks, threads and bytes of shared memory,
# all with the same arguments.
Run = Callable[[list[tuple[str, int, int, int]], tuple[Any, ...]], None]


def project_out(basis: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Remove from X its components along an orthonormal basis, in two passes.

    Args:
        basis: (a, j, d) orthonormal rows.
        X: (a, b, d) rows.

    Returns:
        What is left of X, (a, b, d), and the components removed, (a, b, j).
    """
    kernel = None
    if X.is_cuda and _with_cupy() and 0 < X.shape[1] <= _MOST_ROWS and basis.numel() > 0:
        X = X.contiguous()
        kernel = _kernel(basis, X)
    return two_pass(basis, X) if kernel is None else sweep(basis, X, *kernel)


def two_pass(basis: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """`project_out` as four matrix products, each of which reads the basis."""
    components = X @ basis.mT
    X = X - components @ basis
    correction = X @ basis.mT
    return X - correction @ basis, components + correction


def fused_reference(basis: Tensor, X: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """`project_out` in the order of the kernels: three sweeps over tiles of columns.

    Args:
        basis: (a, j, d) orthonormal rows.
        X: (a, b, d) rows.
        tile: Columns of a tile.

    Returns:
        What is left of X, (a, b, d), and the components removed, (a, b, j).
    """
    tiles = [slice(start, start + tile) for start in range(0, X.shape[2], tile)]
    rest = X.clone()
    components, correction = X.new_zeros(2, *X.shape[:2], basis.shape[1])
    for at in tiles:
        components += X[..., at] @ basis[..., at].mT
    for at in tiles:
        rest[..., at] -= components @ basis[..., at]
        correction += rest[..., at] @ basis[..., at].mT
    for at in tiles:
        rest[..., at] -= correction @ basis[..., at]
    return rest, components + correction


def kernel_source() -> str:
    """The CUDA source: from the installed package, or beside it in a checkout."""
    packaged = resources.files("elm_lanczos") / "_kernels" / SOURCE
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parents[2] / "kernels" / SOURCE).read_text(encoding="utf-8")


def aligned(basis: Tensor, X: Tensor) -> bool:
    """Whether every row of both, the last axes contiguous, begins at a multiple of 16 bytes."""
    size = X.element_size()
    steps = [basis.stride(0) * size, basis.stride(1) * size, X.shape[2] * size]
    return all(step % 16 == 0 for step in [basis.data_ptr(), X.data_ptr(), *steps])


@functools.cache
def plan_launch(
    shape: tuple[int, int, int, int], itemsize: int, vectorised: bool, shared: int, clusters: bool
) -> Launch | None:
    """Choose the layout for a shape.

    Args:
        shape: (a, b, j, d).
        itemsize: Bytes of an entry.
        vectorised: Whether rows are aligned.
        shared: Bytes of shared memory that a thread block can have.
        clusters: Whether the device has clusters of thread blocks.

    Returns:
        On one chip where the basis fits, else in three sweeps; None where not even the
        coefficients fit.
    """
    layouts = [(16, 2), (16, 1)] if vectorised else [(0, 4), (0, 1)]
    plans = [on_chip(shape, itemsize, *layout) for layout in layouts] if clusters else []
    fitting = [plan for plan in plans if plan.shared["on_chip"] <= shared and plan.blocks]
    if fitting:
        return min(fitting, key=lambda plan: plan.tiles * plan.vectors)
    # Two thread blocks at a time on a multiprocessor: one loads while the other waits at a barrier.
    for room, threads in ((shared // 2, 256), (shared, 512)):
        for layout in [*layouts, (0, 1)]:
            plan = three_sweeps(shape, itemsize, *layout, threads, held=True)
            if max(plan.shared.values()) <= room:
                return plan
    plan = three_sweeps(shape, itemsize, *layouts[0], 256, held=False)
    return plan if max(plan.shared.values()) <= shared else None


def _columns(itemsize: int, vector_bytes: int, vectors: int) -> int:
    """Columns of a tile."""
    return LANES * vectors * (vector_bytes // itemsize or 1)


def on_chip(
    shape: tuple[int, int, int, int], itemsize: int, vector_bytes: int, vectors: int
) -> Launch:
    """One cluster for an operator, its basis in shared memory.

    Args:
        shape: (a, b, j, d).
        itemsize: Bytes of an entry.
        vector_bytes: Bytes a lane loads at once, 0 for one entry.
        vectors: Loads of a lane in one row of a tile.

    Returns:
        The launch; with no thread blocks where d is too short for a cluster.
    """
    _, b, j, d = shape
    tile = _columns(itemsize, vector_bytes, vectors)
    count, threads = math.ceil(d / tile), 512 if j > LANES else 256
    tiles = math.ceil(count / CLUSTER)
    entries = tiles * j * tile + threads // LANES * tile + tiles * b * tile + 3 * b * j
    return Launch(
        vector_bytes=vector_bytes,
        vectors=vectors,
        threads=threads,
        tiles=tiles,
        blocks=CLUSTER if count >= CLUSTER else 0,
        held=True,
        shared={"on_chip": entries * itemsize},
    )


def three_sweeps(
    shape: tuple[int, int, int, int],
    itemsize: int,
    vector_bytes: int,
    vectors: int,
    threads: int,
    held: bool,
) -> Launch:
    """Three sweeps; an operator's columns are split as far as it takes to fill the device.

    Args:
        shape: (a, b, j, d).
        itemsize: Bytes of an entry.
        vector_bytes: Bytes a lane loads at once, 0 for one entry.
        vectors: Loads of a lane in one row of a tile.
        threads: Threads of a thread block.
        held: Whether a tile stays in shared memory between its two uses.

    Returns:
        The launch.
    """
    a, b, j, d = shape
    tile = _columns(itemsize, vector_bytes, vectors)
    count, tiles = math.ceil(d / tile), 1
    while 2 * tiles <= count and a * count >= 2 * tiles * _BLOCKS:
        tiles *= 2
    across = threads // LANES * tile + b * tile
    entries = {
        "dot": b * j,
        "fused": (j * tile if held else 0) + across + 2 * b * j,
        "subtract": across + b * j,
    }
    return Launch(
        vector_bytes=vector_bytes,
        vectors=vectors,
        threads=threads,
        tiles=tiles,
        blocks=math.ceil(count / tiles),
        held=held,
        shared={name: size * itemsize for name, size in entries.items()},
    )


def sweep(basis: Tensor, X: Tensor, launch: Launch, run: Run) -> tuple[Tensor, Tensor]:
    """Run the kernels of a launch one after another.

    Args:
        basis: (a, j, d) orthonormal rows, the last axis contiguous.
        X: (a, b, d) rows, contiguous.
        launch: The layout.
        run: Runs the kernels.

    Returns:
        What is left of X, (a, b, d), and the components removed, (a, b, j).
    """
    (a, b, d), j = X.shape, basis.shape[1]
    rest, components = torch.empty_like(X), X.new_empty(a, b, j)
    partial = X.new_empty(2, a, launch.blocks if len(launch.shared) > 1 else 0, b, j)
    strides = np.int64(basis.stride(0)), np.int64(basis.stride(1))
    sizes = (np.int32(x) for x in (j, d, launch.tiles, launch.blocks, launch.held))
    arguments = (basis, *strides, X, rest, components, partial[0], partial[1], *sizes)
    name = str(X.dtype).removeprefix("torch.")
    steps = [
        (f"{kernel}_{name}", a * launch.blocks, launch.threads, shared)
        for kernel, shared in launch.shared.items()
    ]
    run(steps, arguments)
    return rest, components


def _kernel(basis: Tensor, X: Tensor) -> tuple[Launch, Run] | None:
    """The launch for CUDA tensors and the function that runs it, where there are such."""
    recorded = torch.is_grad_enabled() and (basis.requires_grad or X.requires_grad)
    alike = basis.dtype == X.dtype and basis.device == X.device and basis.stride(2) == 1
    if recorded or not alike or X.dtype not in (torch.float32, torch.float64):
        return None
    device = X.device.index
    shared, clusters = limits(device)
    a, b, d = X.shape
    shape = a, b, basis.shape[1], d
    launch = plan_launch(shape, X.element_size(), aligned(basis, X), shared, clusters)
    if launch is None:
        return None
    run = compiled(launch, b, device)
    return None if run is None else (launch, run)


@functools.cache
def _with_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None


def compiled(launch: Launch, b: int, device: int) -> Run | None:
    """The kernels of a launch for b rows on a CUDA device; None where they do not compile."""
    kernels = _module(b, launch.vector_bytes, launch.vectors, device)
    return None if kernels is None else functools.partial(_run, kernels, device)


@functools.cache
def limits(device: int) -> tuple[int, bool]:
    """Bytes of shared memory that a thread block can have; whether there are clusters."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.major >= 9


@functools.cache
def _module(width: int, vector_bytes: int, vectors: int, device: int) -> dict[str, Any] | None:
    """The compiled kernels by name; None, with a warning, where they do not compile."""
    shared, clusters = limits(device)
    options = [f"-DWIDTH={width}", f"-DVECTOR_BYTES={vector_bytes}", f"-DVECTORS={vectors}"]
    names = ["dot", "fused", "subtract"]
    if clusters:
        options.append(f"-DCLUSTER={CLUSTER}")
        names.append("on_chip")
    try:
        import cupy

        with cupy.cuda.Device(device):
            module = cupy.RawModule(
                code=kernel_source(), backend="nvrtc", options=("--std=c++17", *options)
            )
            kernels = {}
            for name in (f"{name}_{dtype}" for name in names for dtype in ("float32", "float64")):
                kernels[name] = module.get_function(name)
                kernels[name].max_dynamic_shared_size_bytes = shared
                kernels[name].preferred_shared_memory_carveout = 100
    except Exception as error:  # of CuPy, NVRTC, the driver: torch does the same work
        reason = first_line(error) or type(error).__name__
        warnings.warn(
            f"Gram–Schmidt runs in torch: its CUDA kernel does not compile ({reason})",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return kernels


def _run(
    kernels: dict[str, Any],
    device: int,
    steps: list[tuple[str, int, int, int]],
    arguments: tuple[Any, ...],
) -> None:
    """Launch on torch's current stream, the tensors passed by DLPack."""
    import cupy

    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream, device):
        passed = tuple(
            cupy.from_dlpack(x.detach()) if isinstance(x, Tensor) else x for x in arguments
        )
        for name, grid, threads, shared in steps:
            kernels[name]((grid,), (threads,), passed, shared_mem=shared)
