"""Explicit Jacobians: two solvers that must agree, the way back from one, and the scratch file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elm_lanczos.errors import UsageError
from elm_lanczos.operators import StackedOperators, TokenOperators
from elm_lanczos.status import Status
from elm_lanczos.svd import SVDResult, svd
from elm_lanczos.svd import dense as module
from elm_lanczos.svd.cost import _ReflectedDiagonal
from elm_lanczos.svd.plan import Plan, make_plan
from elm_lanczos.svd.solve import solve
from tests.spectra import (
    CASES,
    DTYPES,
    Case,
    ExplicitChain,
    Forbid,
    check_triplets,
    powers,
    with_spectrum,
)


class Solvers:
    """Which solvers ran, and on how many matrices each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.krylov: list[tuple[int, bool]] = []
        self.svd: list[int] = []
        by_krylov, by_svd = module._by_krylov, module._by_svd

        def counted_krylov(batch: Any, plan: Plan, J: Tensor) -> SVDResult | None:
            result = by_krylov(batch, plan, J)
            self.krylov.append((len(J), result is not None))
            return result

        def counted_svd(batch: Any, plan: Plan, index: Tensor, J: Tensor) -> SVDResult:
            self.svd.append(len(J))
            return by_svd(batch, plan, index, J)

        monkeypatch.setattr(module, "_by_krylov", counted_krylov)
        monkeypatch.setattr(module, "_by_svd", counted_svd)


@pytest.fixture
def solvers(monkeypatch: pytest.MonkeyPatch) -> Solvers:
    return Solvers(monkeypatch)


def dense_plan(batch: Any, k: int, **changes: Any) -> Plan:
    plan = make_plan(*batch.shape, batch.dtype, k, "dense", memory=2**33)
    return replace(plan, **changes)


def decaying(count: int, m: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values 0.5^i and, for the others, ever slower ones."""
    return torch.stack(
        [
            with_spectrum((0.5 + i / 20) ** torch.arange(min(m, d)), m, d, dtype, i)
            for i in range(count)
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_solvers_on_every_hard_case(case: Case, dtype: torch.dtype, solvers: Solvers) -> None:
    matrix = case.build().to(dtype)
    batch = StackedOperators(matrix[None])
    for solver in ("krylov", "svd"):
        result = svd(batch, case.k, plan=dense_plan(batch, case.k, solver=solver))
        check_triplets(result, matrix[None], case.sigma, case.residual)
        assert result.converged.all(), solver
        assert result.passes == len(matrix)
        exact = float(matrix.double().square().sum())
        assert float(result.frobenius_squared) == pytest.approx(exact, rel=1e-5)
        assert result.stable_rank_error.item() == 0
    assert len(solvers.krylov) == 1 and solvers.svd[-1:] == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_krylov_serves_decaying_spectra_without_the_svd(
    solvers: Solvers, dtype: torch.dtype
) -> None:
    # Blocks of 40 with values to i^-1 take 3 in float32 and 4 in float64, of the 4 allowed.
    J = with_spectrum(powers(-1.0, 380), 420, 380, dtype).expand(3, -1, -1)
    batch = StackedOperators(J)
    plan = dense_plan(batch, 4)
    assert plan.solver == "krylov"  # by itself: blocks of 40 in 380
    result = svd(batch, 4, plan=plan)
    assert solvers.krylov == [(3, True)] and solvers.svd == []
    # The basis grew, nothing was thrown away: a restart would cost more products than an SVD.
    assert int(result.n_iter.max()) >= 3 and int(result.n_restarts.max()) == 0
    check_triplets(result, J)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_krylov_gives_way_to_the_svd_where_the_basis_grows_too_large(
    solvers: Solvers, dtype: torch.dtype
) -> None:
    flat = with_spectrum(torch.linspace(1, 0.99, 340), 350, 340, dtype)
    J = torch.stack([flat, *decaying(1, 350, 340, dtype)])
    batch = StackedOperators(J, labels=[7, 3])
    result = svd(batch, 4, plan=dense_plan(batch, 4, solver="krylov"))
    assert solvers.krylov == [(2, False)] and solvers.svd == [2]
    assert result.tokens == (7, 3)
    check_triplets(result, J)


@pytest.mark.parametrize("solver", ["krylov", "svd"])
def test_matrices_are_solved_a_few_at_a_time(solvers: Solvers, solver: str) -> None:
    inputs = torch.randn(7, 60, generator=torch.Generator().manual_seed(0)).double()
    J = decaying(7, 70, 60)
    batch = StackedOperators(J, labels=[9, 1, 8, 2, 7, 3, 6], inputs=inputs)
    one = svd(batch, 2, plan=dense_plan(batch, 2, solver=solver, together=3, width=6))
    assert [*solvers.svd, *(count for count, _ in solvers.krylov)] == [3, 3, 1]
    all_at_once = svd(batch, 2, plan=dense_plan(batch, 2, solver=solver, together=7, width=6))
    assert one.tokens == all_at_once.tokens == (9, 1, 8, 2, 7, 3, 6)
    assert one.passes == all_at_once.passes == 70
    check_triplets(one, J)
    torch.testing.assert_close(one.S, all_at_once.S, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.V, all_at_once.V, rtol=0, atol=1e-6)  # signs too
    torch.testing.assert_close(one.contribution, torch.einsum("nmd,nd->nm", J, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_krylov_with_matrices_that_are_not_finite(solvers: Solvers, dtype: torch.dtype) -> None:
    J = decaying(4, 80, 60, dtype)
    J[1, 3, 4], J[2] = torch.nan, 0.0
    batch = StackedOperators(J)
    result = svd(batch, 2, plan=dense_plan(batch, 2, solver="krylov", width=6))
    assert solvers.krylov == [(4, True)]
    assert result.converged.tolist() == [True, False, True, True]
    assert result.S[1].isnan().all() and result.S[2].eq(0).all()
    assert result.status[1] == Status.NOT_CONVERGED
    expected = torch.linalg.svdvals(J[[0, 3]].double())[:, :2]
    torch.testing.assert_close(result.S[[0, 3]].double(), expected, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------- scratch file


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that kept rows, in bytes."""
    sizes: list[int] = []
    from_file = torch.from_file

    def counted(name: str, **options: Any) -> Tensor:
        mapped = from_file(name, **options)
        sizes.append(os.path.getsize(name))
        return mapped

    monkeypatch.setattr(torch, "from_file", counted)
    return sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", ["krylov", "svd"])
def test_a_scratch_file_changes_no_bit_and_goes_with_the_result(
    tmp_path: Path, opened: list[int], solver: str, dtype: torch.dtype
) -> None:
    J = decaying(5, 90, 70, dtype)
    batch = TokenOperators(ExplicitChain(J, torch.ones(5, 70, dtype=dtype)), range(5))
    changes: dict[str, Any] = {"solver": solver, "width": 8, "together": 2}
    kept = svd(batch, 3, plan=dense_plan(batch, 3, **changes))
    assert opened == []
    filed = svd(batch, 3, plan=dense_plan(batch, 3, scratch=str(tmp_path), **changes))
    assert opened == [J.nbytes]
    assert list(tmp_path.iterdir()) == []
    for name, value in vars(kept).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(filed, name)), name
    through_the_front_door = svd(batch, 3, method="dense", scratch=str(tmp_path))
    check_triplets(through_the_front_door, J)
    assert opened == [J.nbytes] * 2 and list(tmp_path.iterdir()) == []


def test_the_scratch_file_goes_after_an_exception_and_when_results_are_left_unread(
    tmp_path: Path, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    J = decaying(4, 30, 20)
    batch = StackedOperators(J)
    plan = dense_plan(batch, 2, scratch=str(tmp_path))

    results: Iterator[Any] = solve(batch, plan, [[0, 1], [2, 3]])
    next(results)
    assert len(opened) == 2 and list(tmp_path.iterdir()) != []
    results.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []

    def fail(Y: Tensor) -> Tensor:
        assert list(tmp_path.iterdir()) != []
        raise RuntimeError("in the middle of a stream")

    monkeypatch.setattr(batch, "rows", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        svd(batch, 2, plan=plan)
    assert len(opened) == 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["auto", "lanczos", "stream"])
def test_scratch_is_for_dense_alone(tmp_path: Path, method: str) -> None:
    with pytest.raises(UsageError, match="'dense'") as refused:
        svd(decaying(1, 20, 20)[0], 2, method=method, scratch=str(tmp_path))
    assert "\n" not in str(refused.value)


def test_scratch_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(UsageError, match=name) as refused:
            svd(decaying(1, 20, 20)[0], 2, method="dense", scratch=str(tmp_path / name))
        assert "\n" not in str(refused.value)


def test_scratch_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file that outgrows its disk would end the process with a bus error."""
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: (2**40, 2**40, 900))
    with pytest.raises(UsageError, match=r"900 bytes free, and 3\.1 KiB are needed") as refused:
        svd(decaying(1, 20, 20)[0], 2, method="dense", scratch=str(tmp_path))
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)
    assert opened == [] and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room")
def test_scratch_that_fills_up_meanwhile_is_refused_in_one_line(
    tmp_path: Path, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(UsageError, match=r"no room for 3\.1 KiB: No space left") as refused:
        svd(decaying(1, 20, 20)[0], 2, method="dense", scratch=str(tmp_path))
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)
    assert opened == [] and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("solver", ["krylov", "svd"])
def test_rows_are_kept_in_panels_within_the_memory(solver: str) -> None:
    batch = _ReflectedDiagonal(24, 64, 48, torch.float64, torch.device("cpu"))  # holds no matrix
    matrix = 64 * 48
    memory = 12 * matrix * 8
    plan = make_plan(*batch.shape, batch.dtype, 2, "dense", memory=memory, vectors=4)
    plan = replace(plan, solver=solver, width=8)
    assert 1 < plan.panel < 24 and plan.bytes["dense"] <= memory
    streams = -(-24 // plan.panel)
    assert plan.passes["dense"] == streams * 64
    with Forbid(memory // 8) as mode:
        result = svd(batch, 2, plan=plan)
    assert mode.largest >= plan.panel * matrix  # the panel was there
    assert result.passes == streams * 64
    explicit = batch.rows(torch.eye(64).double()).transpose(0, 1)
    check_triplets(result, explicit)


def test_a_scratch_file_needs_one_stream_and_memory_for_a_few_matrices(tmp_path: Path) -> None:
    J = decaying(24, 96, 64)
    batch = TokenOperators(ExplicitChain(J, torch.ones(24, 64).double()), range(24))
    memory, folder = 12 * J[0].nbytes, str(tmp_path)
    plan = make_plan(
        *batch.shape, batch.dtype, 2, "dense", memory=memory, scratch=folder, vectors=4
    )
    assert plan.panel == 24 and plan.bytes["dense"] <= memory and plan.passes["dense"] == 96
    assert svd(batch, 2, plan=plan).passes == 96
