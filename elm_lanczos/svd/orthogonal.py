"""Shared numerics of the solvers: seeded vectors, exact scaling, orthonormalisation.

Bases are batches of orthonormal *rows*, (a, j, d). Vectors are orthogonalised against them by
classical Gram–Schmidt in two passes (`gram_schmidt`), as accurate as Householder's method unless a
vector lies in the span of the basis to rounding; that case, the breakdown of a Krylov sequence, is
met by replacing the vector with a random one.
"""

from collections.abc import Sequence
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
    exponent = torch.frexp(largest).exponent.clamp(-120, 120)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest == 0, 1.0, scale)


def next_vector(
    basis: Tensor, w: Tensor, spare: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The unit vector by which w extends a basis, or a random one where w lies in its span.

    Everything is decided by masks: nothing waits for the device. The unit vector is made
    orthogonal again after normalisation, because what is left of w may be mostly rounding error.

    Args:
        basis: (a, j, d) orthonormal rows, j < d.
        w: (a, d).
        spare: (a, d) random vectors.
        threshold: (a,) norms up to which (inclusive) w counts as lying in the span.

    Returns:
        Unit vector (a, d); norm of what was left of w, 0 where it was replaced, (a,); components
        of w along the basis, (a, j); whether w was replaced, (a,) bool.
    """
    rest, components = project_out(basis, w[:, None])
    norm = rest.norm(dim=-1, keepdim=True)
    replaced = norm <= threshold[:, None, None]
    unit = torch.where(replaced, normalise(spare[:, None]), rest / norm)
    unit = normalise(project_out(basis, normalise(project_out(basis, unit)[0]))[0])
    norm = torch.where(replaced, 0.0, norm)
    return unit[:, 0], norm[:, 0, 0], components[:, 0], replaced[:, 0, 0]


def orthonormal_block(
    basis: Tensor, W: Tensor, spare: Tensor, threshold: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that extend a basis by the leading directions of W, largest first.

    Directions that W lacks are replaced by random ones, so the block always has full width.

    Args:
        basis: (a, j, d) orthonormal rows, j + width ≤ d.
        W: (a, b, d) rows, b ≥ width.
        spare: (a, width, d) random rows.
        threshold: (a,) size up to which (inclusive) a direction of W counts as missing.
        width: Rows wanted.

    Returns:
        (a, width, d) orthonormal rows, orthogonal to the basis; (a,) number of random rows in it.
    """
    Q, R = torch.linalg.qr(project_out(basis, W)[0].mT)
    rotation, size, _ = small_svd(R)
    rows = rotation[..., :width].to(Q).mT @ Q.mT
    missing = size[:, :width].to(Q) <= threshold[:, None]
    rows = torch.where(missing[..., None], normalise(spare), rows)
    for _ in range(2):
        rows = torch.linalg.qr(project_out(basis, rows)[0].mT)[0].mT
    return rows, missing.sum(1)


def normalise(X: Tensor) -> Tensor:
    """Rows of unit length: (…, d) -> (…, d)."""
    unit: Tensor = X / X.norm(dim=-1, keepdim=True)
    return unit


def polish(rows: Tensor) -> Tensor:
    """The nearest orthonormal rows to almost orthonormal ones: a Newton–Schulz step, (a, k, d)."""
    return 1.5 * rows - 0.5 * (rows @ rows.mT) @ rows


def small_svd(B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of small matrices in float64, (a, p, q) -> U (a, p, r), S (a, r), Vᵀ (a, r, q)."""
    U, S, Vt = batched_svd(B.double().cpu())
    return U.to(B.device), S.to(B.device), Vt.to(B.device)


def batched_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVDs of a batch of matrices.

    On a CPU, torch takes one matrix after another, and LAPACK is slow to use several cores for a
    small one; here as many matrices are worked on at a time as torch has threads.

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
