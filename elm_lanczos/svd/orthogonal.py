"""Shared numerics of the solvers: seeded vectors, exact scaling, orthonormalisation.

Bases are batches of orthonormal *rows*, (a, j, d). Vectors are orthogonalised against them by
classical Gram–Schmidt in two passes (`gram_schmidt`), as accurate as Householder's method unless a
vector lies in the span of the basis to rounding; that case, the breakdown of a Krylov sequence, is
met by replacing the vector with a random one.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from elm_lanczos.svd.gram_schmidt import project_out

# A vector is in the span of a basis where what is left of it is at most this many rounding errors.
BREAKDOWN = 64.0


def normal_rows(
    seed: int, labels: Sequence[int], purpose: int, shape: tuple[int, ...], like: Tensor
) -> Tensor:
    """Standard normal numbers that depend on (seed, label, purpose) alone.

    Args:
        seed: Seed of the run.
        labels: One integer for each of a operators.
        purpose: Distinguishes independent draws for one operator.
        shape: Shape of one operator's draw.
        like: Gives dtype and device; drawn on the CPU in float64, so equal on every device.

    Returns:
        (a, *shape).
    """
    generator = torch.Generator()
    draws = []
    for label in labels:
        state = np.random.SeedSequence([seed, label, purpose]).generate_state(1, np.uint64)
        generator.manual_seed(int(state[0]) >> 1)
        draws.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return torch.stack(draws).to(like.device, like.dtype)


def power_of_two_scale(samples: Tensor) -> Tensor:
    """The power of two next to the largest entry, so that dividing by it is exact.

    Args:
        samples: (a, …); products of a operators with vectors of size one.

    Returns:
        (a,); 1 where every entry is 0.
    """
    largest = samples.abs().flatten(1).amax(1)
    most = 120 if samples.dtype == torch.float32 else 1000
    exponent = torch.frexp(largest).exponent.clamp(-most, most)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest == 0, 1.0, scale)


def next_block(
    basis: Tensor, W: Tensor, spare: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Orthonormal rows by which W extends a basis, random ones where W lies in its span.

    W = components · basis + lower · rows, up to what was replaced. Everything is decided by masks:
    nothing waits for the device. The rows are made orthogonal again after normalisation, because
    what is left of W may be mostly rounding error.

    Args:
        basis: (a, j, d) orthonormal rows, j + b ≤ d.
        W: (a, b, d) rows.
        spare: (a, b, d) random rows.
        threshold: (a,) norms up to which (inclusive) a row of W counts as lying in the span of the
            basis and the rows before it.

    Returns:
        Orthonormal rows (a, b, d); W in terms of them, lower triangular with 0 on the diagonal
        where a row was replaced, (a, b, b); components of W along the basis, (a, b, j); which rows
        were replaced, (a, b) bool.
    """
    rest, components = project_out(basis, W)
    rows = torch.zeros_like(W)
    lower = W.new_zeros(W.shape[0], W.shape[1], W.shape[1])
    for i in range(W.shape[1]):
        w, lower[:, i : i + 1, :i] = project_out(rows[:, :i], rest[:, i : i + 1])
        norm = w.norm(dim=-1, keepdim=True)
        lost = norm <= threshold[:, None, None]
        rows[:, i : i + 1] = torch.where(lost, 0.0, w / norm)
        lower[:, i, i] = torch.where(lost, 0.0, norm)[:, 0, 0]
    replaced = lower.diagonal(dim1=1, dim2=2) == 0
    # Orthogonal to the rows of W, so that those stay what they are.
    spare = normalise(project_out(rows, spare)[0])
    block = torch.where(replaced[..., None], spare, rows)
    for _ in range(2):
        block = _gram_schmidt(normalise(project_out(basis, block)[0]))
    return block, lower, components, replaced


def _gram_schmidt(rows: Tensor) -> Tensor:
    """Orthonormal rows that span what independent rows do, one after the other, (a, b, d)."""
    done = normalise(rows[:, :1])
    for i in range(1, rows.shape[1]):
        done = torch.cat([done, normalise(project_out(done, rows[:, i : i + 1])[0])], 1)
    return done


def orthonormal_block(
    basis: Tensor, W: Tensor, spare: Callable[[], Tensor], threshold: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that extend a basis by the leading directions of W, largest first.

    Directions that W lacks are replaced by random ones, so the block always has full width.

    Args:
        basis: (a, j, d) orthonormal rows, j + width ≤ d.
        W: (a, b, d) rows, b ≥ width.
        spare: Gives (a, width, d) random rows, if they are needed.
        threshold: (a,) size up to which (inclusive) a direction of W counts as missing.
        width: Rows wanted.

    Returns:
        (a, width, d) orthonormal rows, orthogonal to the basis; (a,) number of random rows in it.
    """
    Q, R = torch.linalg.qr(project_out(basis, W)[0].mT)
    rotation, size, _ = small_svd(R)
    rows = rotation[..., :width].to(Q).mT @ Q.mT
    missing = size[:, :width].to(Q) <= threshold[:, None]
    if missing.any():
        rows = torch.where(missing[..., None], normalise(spare()), rows)
    for _ in range(2):
        rows = torch.linalg.qr(project_out(basis, rows)[0].mT)[0].mT
    return rows, missing.sum(1)


def normalise(X: Tensor) -> Tensor:
    """Rows of unit length: (…, d) -> (…, d)."""
    unit: Tensor = X / X.norm(dim=-1, keepdim=True)
    return unit


def polishing(rows: Tensor) -> Tensor:
    """The Newton–Schulz step (a, k, k) that makes almost orthonormal rows (a, k, d) orthonormal."""
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return 1.5 * eye - 0.5 * (rows @ rows.mT)


def small_svd(B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of small matrices in float64, (a, p, q) -> U (a, p, r), S (a, r), Vᵀ (a, r, q)."""
    U, S, Vt = batched_svd(B.double().cpu())
    return U.to(B.device), S.to(B.device), Vt.to(B.device)


def batched_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVDs of a batch of matrices, on a CPU as many at a time as torch has threads.

    Torch takes one matrix after another, and LAPACK is slow to use several cores for a small one.
    (The same for QR factorisations does not pay: they gain less than the threads lose.)

    Args:
        A: (a, p, q).

    Returns:
        U (a, p, r), S (a, r), Vᵀ (a, r, q) with r = min(p, q).
    """
    parts = min(torch.get_num_threads(), len(A))
    if A.device.type != "cpu" or parts < 2:
        U, S, Vt = torch.linalg.svd(A, full_matrices=False)
        return U, S, Vt
    with ThreadPoolExecutor(parts) as pool:
        found = pool.map(lambda part: torch.linalg.svd(part, False), A.tensor_split(parts))
        U, S, Vt = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    return U, S, Vt
