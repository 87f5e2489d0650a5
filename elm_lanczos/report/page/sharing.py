"""Which tokens share a direction: the largest cosines between the singular vectors of a prompt.

All pairs of directions are compared exactly, in blocks of rows, so that memory stays bounded
whatever the number of tokens. Work grows with the square of the number of directions: beyond
`PRODUCTS` only the leading ones of every token are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from elm_lanczos.store.layout import Array

NEAR = 8
"""Directions of other tokens that are kept for each direction."""

PRODUCTS = 4_000_000_000_000
"""Multiplications within which all pairs of a prompt are compared; minutes on two cores."""

_BLOCK = 1 << 26
"""Cosines that are held at a time."""


@dataclass(frozen=True)
class Sharing:
    """For each direction of a prompt those of other tokens that are nearest to it.

    Attributes:
        index: int32 (T, c, near), `token * c + component` of the directions with the largest
            |cosine|, largest first; -1 where there are no more.
        cosine: float32 (T, c, near), their cosines, with sign.
    """

    index: Array
    cosine: Array


def compared_components(tokens: int, components: int, features: int) -> int:
    """Returns how many leading components of each token can be compared within `PRODUCTS`.

    Args:
        tokens: T.
        components: k of each.
        features: m + d.

    Returns:
        k, or fewer of a long prompt; possibly 0.
    """
    within = int((PRODUCTS / features) ** 0.5 / tokens)
    return min(components, within)


def nearest(vectors: Array, near: int = NEAR) -> Sharing:
    """Finds the nearest directions of other tokens, exactly.

    Args:
        vectors: (T, c, features) unit vectors; those with NaN are left out.
        near: how many to find for each.

    Returns:
        The nearest of each.
    """
    tokens, components, features = vectors.shape
    flat = torch.from_numpy(np.ascontiguousarray(vectors)).reshape(-1, features).float()
    dead = ~flat.isfinite().all(-1)
    flat = torch.nn.functional.normalize(flat.nan_to_num(0.0, 0.0, 0.0), dim=-1)
    total = len(flat)
    index = torch.full((total, near), -1, dtype=torch.int32)
    cosine = torch.zeros((total, near))
    own = torch.arange(components)
    for start in range(0, total, rows := max(1, _BLOCK // total)):
        block = flat[start : start + rows]
        sizes = (block @ flat.T).abs_()
        first = torch.arange(start, start + len(block)) // components * components
        sizes.scatter_(1, first[:, None] + own, -1.0)
        sizes[:, dead] = -1.0
        best = sizes.topk(min(near, total))
        signed = torch.einsum("rf,rnf->rn", block, flat[best.indices])
        found = (best.values >= 0) & ~dead[start : start + rows, None]
        kept = slice(0, best.indices.shape[1])
        index[start : start + rows, kept] = torch.where(found, best.indices, -1).int()
        cosine[start : start + rows, kept] = torch.where(found, signed, 0.0)
    shape = (tokens, components, near)
    return Sharing(index.reshape(shape).numpy(), cosine.reshape(shape).numpy())
