"""Block Krylov iteration: operators that leave, what finishes them, and hostile neighbours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from elm_lanczos.operators import StackedOperators, TokenOperators
from elm_lanczos.status import Status
from elm_lanczos.svd import SVDResult, svd
from elm_lanczos.svd.block_krylov import BlockKrylov
from elm_lanczos.svd.plan import Plan, make_plan
from elm_lanczos.svd.solve import solve
from tests.spectra import DTYPES, ExplicitChain, check_triplets, powers, with_spectrum


class Rounds:
    """What the iteration did: operators, width and basis of each round of products."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products: list[tuple[int, int, int]] = []
        self.narrow_before_stream = 0
        self.active: list[int] = []
        residuals, block = BlockKrylov.next_residuals, BlockKrylov.next_block
        advance = BlockKrylov.advance

        def next_residuals(state: BlockKrylov) -> None:
            residuals(state)
            self.products.append((len(state.active), state._block.shape[1], state._V.shape[1]))

        def next_block(state: BlockKrylov) -> None:
            self.narrow_before_stream += state._image.shape[1] < state.plan.width
            block(state)

        def counted_advance(state: BlockKrylov) -> None:
            self.active.append(len(state.active))
            advance(state)

        monkeypatch.setattr(BlockKrylov, "next_residuals", next_residuals)
        monkeypatch.setattr(BlockKrylov, "next_block", next_block)
        monkeypatch.setattr(BlockKrylov, "advance", counted_advance)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(monkeypatch)


def stream_plan(batch: StackedOperators | TokenOperators, k: int, **changes: object) -> Plan:
    plan = make_plan(*batch.shape, batch.dtype, k, "stream", memory=2**33)
    return replace(plan, **changes)  # type: ignore[arg-type]


def solved(J: Tensor, k: int, **changes: object) -> tuple[SVDResult, int]:
    """The result by streams, and the passes that were counted on the way."""
    batch, made = StackedOperators(J), [0]
    plan = stream_plan(batch, k, **changes)
    return svd(batch, k, plan=plan, progress=made.append), made[-1]


def hard(m: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return with_spectrum(powers(-0.5, min(m, d)), m, d, dtype)


def easy(m: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return with_spectrum(0.5 ** torch.arange(30.0), m, d, dtype, seed)


# ------------------------------------------------------------------------ finished by products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "d"), [(300, 200), (200, 300), (240, 240)])
def test_the_last_are_finished_by_products(
    rounds: Rounds, m: int, d: int, dtype: torch.dtype
) -> None:
    J = torch.stack([hard(m, d, dtype), *(easy(m, d, dtype, seed) for seed in range(5))])
    result, made = solved(J, 4)
    assert rounds.products
    assert rounds.products[-1][0] < 6  # fewer operators than the group has
    assert all(width <= 4 for _, width, _ in rounds.products)
    own = sum(2 * active * width for active, width, _ in rounds.products)
    streams = int(result.n_iter.max())
    assert result.passes == made == result.plan.width + streams * m + own
    assert 0 < own <= m  # never more than the stream it replaces
    assert (result.status == Status.CONVERGED).all()
    assert (result.residual <= result.plan.tol * result.S[:, :1]).all()
    check_triplets(result, J)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_restart_thickly_too(rounds: Rounds, dtype: torch.dtype) -> None:
    # One triplet of 300 values that hardly decay: tens of rounds of one vector fill a small basis.
    J = with_spectrum(torch.linspace(1, 0.95, 300), 320, 300, dtype)[None]
    result, made = solved(J, 1, width=20, basis=45)
    assert result.n_iter.item() == 1 and len(rounds.products) > 20
    assert result.n_restarts.item() >= 1
    assert max(basis for _, _, basis in rounds.products) < 45
    assert result.passes == made == 20 + 320 + 2 * len(rounds.products)
    assert result.status.item() == Status.CONVERGED
    check_triplets(result, J)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("basis", [26, 60, 240])
def test_a_stream_goes_on_where_products_gave_up(
    rounds: Rounds, basis: int, dtype: torch.dtype
) -> None:
    """Products that do not pay are broken off; the next block is as wide as any."""
    flat = with_spectrum(torch.linspace(1, 0.8, 240), 240, 240, dtype)
    J = torch.stack([flat, *(easy(240, 240, dtype, seed) for seed in range(3))])
    result, made = solved(J, 6, width=20, basis=basis, max_streams=16)
    assert rounds.products and rounds.narrow_before_stream
    assert result.passes == made
    assert (result.status[1:] == Status.CONVERGED).all()
    assert result.converged[0] or basis < 240  # where it may span everything
    for index, matrix in enumerate(J):
        left = matrix.mT @ result.U[index].mT - result.V[index].mT * result.S[index]
        right = matrix @ result.V[index].mT - result.U[index].mT * result.S[index]
        worst = torch.maximum(left.norm(dim=0), right.norm(dim=0))
        # What was reported is what is, converged or not.
        torch.testing.assert_close(worst, result.residual[index], rtol=0.05, atol=3e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_other_groups_where_products_finish(
    rounds: Rounds, dtype: torch.dtype
) -> None:
    m = d = 160
    kinds = [hard(m, d, dtype), *(easy(m, d, dtype, seed) for seed in range(7))]
    batch = TokenOperators(
        ExplicitChain(torch.stack(kinds), torch.ones(8, d, dtype=dtype)), [*range(8)]
    )
    plan = stream_plan(batch, 4, width=20)
    groups = [[0, 1, 2], [3, 4], [5, 6, 7]]
    together = dict(solve(batch, plan, groups))
    assert rounds.products
    for position, group in enumerate(groups):
        ((_, alone),) = solve(batch, plan, [group])
        for name, value in vars(alone).items():
            if isinstance(value, Tensor):
                assert torch.equal(value, getattr(together[position], name)), name
            else:
                assert value == getattr(together[position], name), name


def test_a_group_spends_no_more_products_than_its_part_of_a_stream(rounds: Rounds) -> None:
    flat = with_spectrum(torch.linspace(1, 0.8, 120), 120, 120)
    batch = StackedOperators(torch.stack([flat] + [easy(120, 120)] * 3))
    plan = stream_plan(batch, 6, width=20, max_streams=3)
    made: list[int] = []
    results = dict(solve(batch, plan, [[0], [1, 2, 3]], made.append))
    own = sum(2 * active * width for active, width, _ in rounds.products)
    assert results[0].passes - 20 - 120 * int(results[0].n_iter) <= 120 / 4
    assert made[-1] == 20 + 120 * int(results[0].n_iter) + own


def test_passes_of_several_groups_and_panels_add_up() -> None:
    """Streams are shared within a panel alone, products are never."""
    J = torch.stack([hard(80, 80), easy(80, 80)] * 40)
    for panel in (80, 30):
        result, made = solved(J, 2, width=16, panel=panel)
        assert result.passes == made, panel


# ------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hostile_neighbours_change_nothing_but_rounding(rounds: Rounds, dtype: torch.dtype) -> None:
    m, d, k = 130, 110, 5
    infinite = hard(m, d, dtype)
    infinite[3, 4] = torch.inf
    matrices = {
        "hard": hard(m, d, dtype),
        "zero": torch.zeros(m, d, dtype=dtype),
        "NaN": torch.full((m, d), torch.nan, dtype=dtype),
        "easy": easy(m, d, dtype),
        "infinite": infinite,
        "rank 2": with_spectrum([2, 1], m, d, dtype),
        "tiny": 1e-25 * easy(m, d, dtype, 2),
        "huge": 1e25 * hard(m, d, dtype),
        "plateau": with_spectrum([1.0] * 20 + [0.1] * 90, m, d, dtype),
    }
    together, _ = solved(torch.stack([*matrices.values()]), k, width=14)
    # They left one after the other.
    assert len(set(rounds.active)) >= 3 and rounds.active == sorted(rounds.active, reverse=True)
    lost = [name in ("NaN", "infinite") for name in matrices]
    assert (~together.converged).tolist() == lost
    for index, (name, matrix) in enumerate(matrices.items()):
        if lost[index]:
            assert together.S[index].isnan().all() and together.V[index].isnan().all(), name
            assert together.frobenius_squared[index].isnan(), name
            continue
        plan = stream_plan(StackedOperators(matrix[None]), k, width=14)
        alone = svd(StackedOperators(matrix[None], labels=[index]), k, plan=plan)
        exact = torch.linalg.svdvals(matrix.double())[:k]
        # Values are second order in residuals of at most 1e-5 and 1e-10.
        tol = (2e-6 if dtype == torch.float32 else 1e-13) * float(exact[0])
        for found in (together.S[index].double(), alone.S[0].double()):
            torch.testing.assert_close(found, exact, rtol=0, atol=tol, msg=name)
        gram = together.V[index] @ together.V[index].mT
        assert (gram - torch.eye(k)).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("neighbours", [[], [0], [1, 3], [0, 1, 3, 4]])
def test_compaction_does_not_mix_operators_up(rounds: Rounds, neighbours: list[int]) -> None:
    """Whoever leaves first, and from whatever place, the others keep their own state."""
    values = [0.3, 0.9, 0.95, 0.6, 0.8]
    J = torch.stack(
        [with_spectrum(v ** torch.arange(100.0), 110, 100, seed=i) for i, v in enumerate(values)]
    )
    chosen = sorted([*neighbours, 2])
    batch = TokenOperators(ExplicitChain(J, torch.randn(5, 100, dtype=J.dtype)), chosen)
    result = svd(batch, 6, plan=stream_plan(batch, 6, width=12))
    check_triplets(result, J[chosen])
    assert batch.inputs is not None and result.contribution is not None
    expected = torch.einsum("nmd,nd->nm", J[chosen], batch.inputs)
    torch.testing.assert_close(result.contribution, expected)
    torch.testing.assert_close(result.frobenius_squared, J[chosen].square().sum((1, 2)))
    assert len(neighbours) == 0 or min(rounds.active) < len(chosen)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_cotangent_blocks_change_nothing_but_rounding(block: int) -> None:
    J = hard(90, 70)[None]
    result, made = solved(J, 5, cotangent_block=block)
    assert result.passes == made
    check_triplets(result, J)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_operators_of_few_rows_or_columns(k: int) -> None:
    for m, d in ((3, 40), (40, 3), (3, 3)):
        J = with_spectrum([3, 2, 1], m, d)[None]
        result, made = solved(J, k)
        check_triplets(result, J)
        assert result.passes == made
