"""Gram–Schmidt: the algorithm on the CPU, the CUDA source emulated on it, and the kernels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import math
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from elm_lanczos.svd import gram_schmidt
from elm_lanczos.svd.gram_schmidt import (
    CLUSTER,
    Launch,
    Run,
    aligned,
    compiled,
    fused_reference,
    kernel_source,
    on_chip,
    plan_launch,
    project_out,
    sweep,
    three_sweeps,
    two_pass,
)
from elm_lanczos.svd.orthogonal import normal_rows
from tests.spectra import DTYPES

FOLDER = Path(__file__).parent
KERNELS = FOLDER.parents[1] / "kernels"
HOPPER, AMPERE = 227 * 1024, 163 * 1024  # bytes of shared memory of a thread block

# (a, b, j, d), and where the rows begin: entries left out before each
SHAPES = {
    "one column": ((2, 1, 1, 1), 0),
    "one vector": ((3, 1, 1, 40), 0),
    "square": ((2, 1, 5, 5), 0),
    "odd": ((2, 1, 13, 301), 0),
    "aligned": ((2, 1, 21, 512), 0),
    "many columns": ((1, 1, 7, 2308), 0),
    "block": ((2, 3, 9, 260), 0),
    "shifted": ((2, 2, 9, 260), 3),
    "long basis": ((1, 1, 70, 72), 0),
}


def problem(
    shape: tuple[int, int, int, int], before: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis, a slice of a larger buffer as in Lanczos, and rows X."""
    a, b, j, d = shape
    like = torch.empty(0, dtype=torch.float64)
    columns = normal_rows(0, range(a), 0, (d, j), like)
    buffer = torch.full((a, j + 2, before + d), torch.nan, dtype=dtype)
    buffer[:, :j, before:] = torch.linalg.qr(columns)[0].mT.to(dtype)
    return buffer[:, :j, before:], normal_rows(1, range(a), 0, (b, d), like).to(dtype)


def compare(answer: tuple[Tensor, Tensor], basis: Tensor, X: Tensor) -> None:
    """The rest is orthogonal to the basis, and the two parts make up X, in float64."""
    rest, components = (part.double().cpu() for part in answer)
    Q, exact = basis.double().cpu(), X.double().cpu()
    # A sum of d terms in any order, and a sum of j terms of which each enters an entry
    bound = 8 * torch.finfo(X.dtype).eps * (1 + basis.shape[1]) ** 0.5
    size = exact.norm(dim=2, keepdim=True)
    assert ((rest + components @ Q - exact).abs() <= bound * size).all()
    assert ((components - exact @ Q.mT).abs() <= bound * size).all()
    # The basis itself is orthonormal to rounding only, which the second pass sees again.
    left = rest.norm(dim=2, keepdim=True)
    assert ((rest @ Q.mT).abs() <= bound * (left + bound * size)).all()


# -- the algorithm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_tile_by_tile_is_two_passes(name: str, dtype: torch.dtype) -> None:
    basis, X = problem(*SHAPES[name], dtype)
    for tile in (1, 32, 1000):
        answer = fused_reference(basis, X, tile)
        compare(answer, basis, X)
        for mine, theirs in zip(answer, two_pass(basis, X), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=64 * torch.finfo(dtype).eps)


def test_an_empty_basis_leaves_everything() -> None:
    _, X = problem((2, 3, 4, 30))
    basis = X.new_zeros(2, 5, 30)[:, :0]
    for rest, components in (project_out(basis, X), fused_reference(basis, X, 7)):
        assert torch.equal(rest, X)
        assert components.shape == (2, 3, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e15])
def test_zero_and_ill_scaled_rows(scale: float, dtype: torch.dtype) -> None:
    basis, X = problem((2, 2, 11, 90), dtype=dtype)
    X[:, 0] *= scale
    for answer in (two_pass(basis, X), fused_reference(basis, X, 32)):
        compare(answer, basis, X)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_the_span_leave_rounding_only(dtype: torch.dtype) -> None:
    basis, _ = problem((3, 1, 10, 64), dtype=dtype)
    rest, components = fused_reference(basis, basis.sum(1, keepdim=True), 32)
    assert float(rest.abs().max()) < 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(components, torch.ones_like(components))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twice_is_enough_and_once_is_not(dtype: torch.dtype) -> None:
    basis, new = nearly_in_the_span(dtype)
    once = new - (new @ basis.mT) @ basis
    assert loss(basis, once) > 30  # rounding of the large part, relative to the small one left
    assert loss(basis, fused_reference(basis, new, 32)[0]) < 4
    assert loss(basis, two_pass(basis, new)[0]) < 4


def nearly_in_the_span(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    basis, X = problem((4, 1, 20, 400), dtype=dtype)
    part = 1e3 * torch.finfo(dtype).eps
    return basis, basis.sum(1, keepdim=True) + part * X


def loss(basis: Tensor, rest: Tensor) -> float:
    """The largest |⟨q, z⟩| / ‖z‖ in roundings."""
    cosines = (rest.double() @ basis.double().mT) / rest.double().norm(dim=2, keepdim=True)
    return float(cosines.abs().max()) / torch.finfo(rest.dtype).eps


# -- the choice of layout and the source


@pytest.mark.parametrize(
    ("shape", "itemsize", "vectorised", "shared", "clusters", "reads"),
    [
        ((256, 1, 64, 4096), 4, True, HOPPER, True, 1),
        ((256, 1, 64, 4096), 8, True, HOPPER, True, 3),  # 2 MiB: more than a cluster holds
        ((256, 1, 64, 4096), 4, True, AMPERE, False, 3),
        ((256, 1, 64, 4095), 4, False, AMPERE, False, 3),
        ((1, 1, 1500, 4096), 4, True, HOPPER, True, 3),
        ((1, 1, 6000, 8192), 4, True, HOPPER, True, 4),
    ],
)
def test_reads_of_the_basis(
    shape: tuple[int, int, int, int],
    itemsize: int,
    vectorised: bool,
    shared: int,
    clusters: bool,
    reads: int,
) -> None:
    launch = plan_launch(shape, itemsize, vectorised, shared, clusters)
    assert launch is not None
    assert launch.reads == reads
    assert max(launch.shared.values()) <= shared
    assert launch.threads <= 512
    width = launch.vectors * 32 * (launch.vector_bytes // itemsize or 1)
    assert launch.blocks * launch.tiles * width >= shape[3]


def test_what_does_not_fit_is_left_to_torch() -> None:
    assert plan_launch((1, 8, 20000, 20000), 8, True, HOPPER, True) is None


def test_alignment_is_that_of_every_row() -> None:
    basis, X = problem((2, 1, 4, 40))
    assert aligned(basis, X)
    assert not aligned(*problem((2, 1, 4, 41)))
    assert not aligned(*problem((2, 1, 4, 40), before=1))
    assert not aligned(basis, X.flatten()[1:][None, None, :40])


def test_source_is_found_in_a_checkout_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel_source() == (KERNELS / "gram_schmidt.cu").read_text()
    (tmp_path / "_kernels").mkdir()
    (tmp_path / "_kernels/gram_schmidt.cu").write_text("// packaged")
    monkeypatch.setattr(gram_schmidt.resources, "files", lambda package: tmp_path)
    assert kernel_source() == "// packaged"


def test_a_kernel_that_does_not_compile_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    cuda = SimpleNamespace(Device=contextlib.nullcontext)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, RawModule=fail))
    monkeypatch.setattr(gram_schmidt, "limits", lambda device: (AMPERE, False))
    launch = plan_launch((2, 7, 3, 50), 8, True, AMPERE, False)
    assert launch is not None
    with pytest.warns(RuntimeWarning, match=r"\(no compiler here\)$"):
        assert compiled(launch, 7, 0) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(launch, 7, 0) is None
    gram_schmidt._module.cache_clear()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    "options",
    [
        "-arch=sm_80",
        "-arch=sm_80 -DWIDTH=8 -DVECTOR_BYTES=0 -DVECTORS=1",
        f"-arch=sm_90 -DCLUSTER={CLUSTER}",
    ],
)
def test_compiles(options: str, tmp_path: Path) -> None:
    source, binary = KERNELS / "gram_schmidt.cu", tmp_path / "kernel.cubin"
    strict = ["-Werror", "all-warnings"]
    command = ["nvcc", "-std=c++17", *options.split(), *strict, "-cubin", "-o", binary, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -- the CUDA source, emulated


def emulated(launch: Launch, width: int, folder: Path, descending: bool) -> Run:
    """Runs kernels on the CPU, thread by thread (`cuda_emulation.h`)."""
    defines = {
        "WIDTH": width,
        "VECTOR_BYTES": launch.vector_bytes,
        "VECTORS": launch.vectors,
        "CLUSTER": CLUSTER,
    }
    library = _library(folder, tuple(f"-D{name}={value}" for name, value in defines.items()))

    def run(steps: list[tuple[str, int, int, int]], arguments: tuple[Any, ...]) -> None:
        passed = [
            ctypes.c_void_p(x.data_ptr())
            if isinstance(x, Tensor)
            else (ctypes.c_longlong if x.itemsize == 8 else ctypes.c_int)(int(x))
            for x in arguments
        ]
        for name, grid, threads, shared in steps:
            start = library[f"launch_{name.rsplit('_', 1)[1]}"]
            start.restype = ctypes.c_bool
            kernel, size = ctypes.cast(library[name], ctypes.c_void_p), ctypes.c_longlong(shared)
            clustered = ctypes.c_bool(name.startswith("on_chip"))
            order = ctypes.c_bool(descending)
            assert start(kernel, grid, threads, size, clustered, order, *passed), name

    return run


@functools.cache
def _library(folder: Path, defines: tuple[str, ...]) -> ctypes.CDLL:
    library = folder / ("".join(defines).replace("=", "") + ".so")
    includes, source = [f"-I{KERNELS}", f"-I{FOLDER}"], FOLDER / "gram_schmidt_emulated.cpp"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    subprocess.run(["g++", *flags, *defines, *includes, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return tmp_path_factory.mktemp("emulated")


# Kernels, bytes a lane loads at once, loads of a lane; the shape, entries before each row.
LAYOUTS = {
    "cluster": ("on_chip", (16, 2), (2, 1, 7, 2308), 0),
    "cluster, odd": ("on_chip", (0, 1), (2, 1, 13, 301), 0),
    "cluster, block": ("on_chip", (16, 2), (1, 3, 9, 2100), 0),
    "held": ("held", (16, 2), (3, 1, 21, 1028), 0),
    "held, narrower": ("held", (16, 1), (2, 1, 40, 512), 0),
    "held, odd": ("held", (0, 4), (2, 1, 13, 301), 0),
    "held, shifted block": ("held", (0, 4), (2, 3, 9, 520), 3),
    "held, block": ("held", (16, 2), (2, 3, 9, 520), 0),
    "long basis": ("held", (0, 1), (1, 1, 70, 72), 0),
    "one column": ("held", (0, 4), (2, 1, 1, 1), 0),
    "square": ("held", (0, 4), (2, 1, 5, 5), 0),
    "not held": ("not held", (16, 2), (2, 1, 33, 512), 0),
    "not held, odd": ("not held", (0, 4), (2, 1, 60, 301), 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_cuda_source_computes_the_same(name: str, dtype: torch.dtype, built: Path) -> None:
    kernels, layout, shape, before = LAYOUTS[name]
    basis, X = problem(shape, before, dtype)
    assert aligned(basis, X) or layout[0] == 0
    if kernels == "on_chip":
        launches = [on_chip(shape, dtype.itemsize, *layout)]
        assert launches[0].blocks == CLUSTER
    else:
        held = kernels == "held"
        launches = [three_sweeps(shape, dtype.itemsize, *layout, 64, held)]
        # Several tiles for a thread block, the last one not full
        blocks = math.ceil(launches[0].blocks / 2)
        launches.append(replace(launches[0], tiles=2, blocks=blocks))
    for launch in launches:
        first, second = (
            sweep(basis, X, launch, emulated(launch, shape[1], built, order))
            for order in (False, True)
        )
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        compare(first, basis, X)
        for mine, theirs in zip(first, two_pass(basis, X), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("room", [HOPPER, AMPERE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_source_passes_twice(dtype: torch.dtype, room: int, built: Path) -> None:
    basis, X = nearly_in_the_span(dtype)
    shape = (*X.shape[:2], basis.shape[1], X.shape[2])
    launch = plan_launch(shape, dtype.itemsize, False, room, room == HOPPER)
    assert launch is not None
    run = emulated(launch, 1, built, False)
    assert loss(basis, sweep(basis, X, launch, run)[0]) < 4


# -- the kernels themselves


on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None,
    reason="no CUDA device, or no CuPy",
)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [*(shape for shape, _ in SHAPES.values()), (64, 1, 64, 4096), (2, 8, 300, 5000)]
)
def test_kernels_on_a_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    basis, X = (x.cuda() for x in problem(shape, dtype=dtype))
    answer = project_out(basis, X)
    compare(answer, basis, X)
    again = project_out(basis, X)
    assert all(torch.equal(x, y) for x, y in zip(answer, again, strict=True))


@on_gpu
def test_kernels_run_on_the_current_stream() -> None:
    basis, X = (x.cuda() for x in problem((64, 1, 64, 4096), dtype=torch.float32))
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            late = X * 2
            answer = project_out(basis, late)
    torch.cuda.synchronize()
    compare(answer, basis, 2 * X)
