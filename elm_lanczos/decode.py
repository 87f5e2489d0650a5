"""Singular vectors as words.

An output direction `u` is read through the unembedding (no bias, no further norm: the output is
already normed): its words are those of the largest entries of `W_U u`. An input direction `v` is
read against the input embeddings: its words are those whose embeddings have the largest cosine with
it. The search is exact over the whole vocabulary, in blocks of rows of the two tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elm_lanczos.model import DetachedModel
    from elm_lanczos.svd import SVDResult

_ROWS = 16_384
"""Vocabulary rows raised to the working precision at a time."""


@dataclass(frozen=True)
class Words:
    """The best tokens of a set of directions, best first.

    Attributes:
        ids: (..., top) int64 token ids.
        scores: (..., top), logits for output directions, cosines for input directions.
    """

    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Decoding:
    """What triplets write and read, in words.

    Attributes:
        u: words of the left singular vectors (n, k, top): what the direction writes.
        v: words of the right singular vectors (n, k, top): what the direction reads.
    """

    u: Words
    v: Words


def decode_output(directions: Tensor, model: DetachedModel, top: int = 8) -> Words:
    """Returns the tokens with the largest logits `W_U u`.

    Args:
        directions: (..., m).
        model: the model whose unembedding is used.
        top: tokens per direction.

    Returns:
        Words of shape (..., top).
    """
    return _best_rows(directions, model.storage.weight(model.unembedding), top, cosine=False)


def decode_input(directions: Tensor, model: DetachedModel, top: int = 8) -> Words:
    """Returns the tokens whose input embeddings have the largest cosine with each direction.

    Args:
        directions: (..., d).
        model: the model whose input embeddings are used.
        top: tokens per direction.

    Returns:
        Words of shape (..., top).
    """
    return _best_rows(directions, model.storage.weight(model.embedding), top, cosine=True)


def decode_triplets(result: SVDResult, model: DetachedModel, top: int = 8) -> Decoding:
    """Decodes both sides of triplets (see the module's text).

    Args:
        result: triplets, U (n, k, m) and V (n, k, d).
        model: the model they come from.
        top: tokens per direction.

    Returns:
        The words of every direction.
    """
    return Decoding(decode_output(result.U, model, top), decode_input(result.V, model, top))


def _best_rows(directions: Tensor, table: Tensor, top: int, *, cosine: bool) -> Words:
    lead, X = directions.shape[:-1], directions.reshape(-1, directions.shape[-1])
    top = min(top, table.shape[0])
    X = X.to(table.device)
    scores = X.new_empty(X.shape[0], 0)
    ids = torch.empty(X.shape[0], 0, dtype=torch.int64, device=X.device)
    with torch.no_grad():
        if cosine:
            X = torch.nn.functional.normalize(X, dim=-1)
        for start in range(0, table.shape[0], _ROWS):
            rows = table[start : start + _ROWS].to(X.dtype)
            if cosine:
                rows = torch.nn.functional.normalize(rows, dim=-1)
            block, index = (X @ rows.T).topk(min(top, rows.shape[0]), dim=-1)
            scores = torch.cat([scores, block], dim=-1)
            ids = torch.cat([ids, index + start], dim=-1)
            scores, index = scores.topk(min(top, scores.shape[1]), dim=-1)
            ids = ids.gather(-1, index)
    return Words(ids.reshape(*lead, top), scores.reshape(*lead, top))
