"""Softmax attention without its probabilities: `P V` and `Pᵀ G` from the queries and keys.

With q and k frozen, `P` is a matrix of T×S coefficients that nothing but `P V` needs, and the
transpose of that is `Pᵀ G`. Both are computed here piece by piece: the scores of a few hundred
queries and keys, their softmax by the normalisers of the rows (the largest score and the sum, found
once), and its product with the part of V or G that it meets. Pieces that a mask hides are left out.
So the memory grows linearly with the length.

Under `vmap` a block of vectors is folded into the columns of V, so that each piece is made once for
all of them and the work is one large matrix product; a fused attention kernel, which has one V,
would make it for each vector. Milakov & Gimelshein, "Online normalizer calculation for softmax"
(2018), and Dao et al., "FlashAttention" (2022), are where the pieces come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from elm_lanczos.masks import ALL, NONE, Mask, some

# Scores of a piece, over all heads: their bytes stay within caches.
_PIECE = 2**21
_SMALLEST, _LARGEST = 64, 1024
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Scores:
    """How scores are made of `q kᵀ`; everything in it is constant.

    Attributes:
        scaling: factor of the products.
        softcap: cap `c` of `c · tanh(scores / c)`.
        seen: which keys each query sees; all of them if there is none.
        biases: added, (batch | 1, heads | 1, T | 1, S | 1) each.
    """

    scaling: float
    softcap: float | None = None
    seen: Mask | None = None
    biases: tuple[Tensor, ...] = ()

    def of(self, q: Tensor, k: Tensor, first: int, key: int, *, whole: bool) -> Tensor:
        """The scores of a piece.

        Args:
            q: (batch, kv_heads, groups, queries, head_dim), some of the queries.
            k: (batch, kv_heads, keys, head_dim), some of the keys.
            first: number of the first query.
            key: number of the first key.
            whole: whether it is known that the queries see all these keys.

        Returns:
            (batch, kv_heads, groups, queries, keys).
        """
        queries, keys = q.shape[-2], k.shape[-2]
        scores = torch.matmul(q.flatten(2, 3), k.mT).mul_(self.scaling)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        scores = scores.unflatten(2, (q.shape[2], queries))
        for bias in self.biases:
            part = some(some(bias, -2, first, queries), -1, key, keys)
            scores = scores.add_(_grouped(part, q))
        if self.seen is not None and not whole:
            assert self.seen.piece is not None
            seen = self.seen.piece(first, queries, key, keys).to(scores.device)
            scores = scores.masked_fill_(~_grouped(seen, q), torch.finfo(scores.dtype).min)
        return scores

    def grid(self, q: Tensor, k: Tensor) -> list[list[int]]:
        """How many of the keys of each piece its queries see (see `Mask.visible`)."""
        size = piece_size(q)
        if self.seen is not None:
            return self.seen.visible(size)
        rows, columns = len(range(0, q.shape[-2], size)), len(range(0, k.shape[-2], size))
        return [[ALL] * columns] * rows


def piece_size(q: Tensor) -> int:
    """Queries and keys of a piece, a power of two.

    Args:
        q: (batch, kv_heads, groups, T, head_dim).

    Returns:
        The size.
    """
    heads = q.shape[0] * q.shape[1] * q.shape[2]
    side = max(1, _PIECE // heads)
    return max(_SMALLEST, min(_LARGEST, 2 ** ((side.bit_length() - 1) // 2)))


def _grouped(mask: Tensor, q: Tensor) -> Tensor:
    """(batch | 1, heads | 1, ...) as it broadcasts with (batch, kv_heads, groups, ...)."""
    kv_heads, groups = q.shape[1:3]
    return mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, groups))


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, sinks: Tensor | None = None
) -> Tensor:
    """Softmax attention with grouped key-value heads; a torch function, so that a mode sees it.

    Args:
        q: (batch, kv_heads, groups, T, head_dim).
        k: (batch, kv_heads, S, head_dim).
        v: (batch, kv_heads, S, value_dim).
        scores: how scores are made.
        sinks: (batch, kv_heads, groups, T | 1), logits of attention sinks.

    Returns:
        (batch, kv_heads, groups, T, value_dim), differentiable in v alone.
    """
    if has_torch_function((q, k, v)):
        result: Tensor = handle_torch_function(
            blockwise_attention, (q, k, v), q, k, v, scores, sinks
        )
        return result
    q, k = q.detach(), k.detach()
    largest, total = _normalisers(q, k, scores, None if sinks is None else sinks.detach())
    out: Tensor = _Linear.apply(q, k, largest, total.reciprocal(), v, scores, False)
    return out


def _grid(q: Tensor, k: Tensor, scores: Scores) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """The pieces that are not hidden, row by row.

    Yields:
        The queries of a row, and for each of its pieces the keys and whether all are seen.
    """
    size = piece_size(q)
    for row, first in zip(scores.grid(q, k), range(0, q.shape[-2], size), strict=True):
        columns = zip(row, range(0, k.shape[-2], size), strict=True)
        pieces = [(slice(key, key + size), seen == ALL) for seen, key in columns if seen != NONE]
        yield slice(first, first + size), pieces


def _normalisers(
    q: Tensor, k: Tensor, scores: Scores, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The largest score of every query, and the sum of exp(score − largest): (..., T, 1) both."""
    found = []
    for queries, pieces in _grid(q, k, scores):
        part = q[..., queries, :]
        largest = torch.full_like(part[..., :1], torch.finfo(q.dtype).min)
        total = torch.zeros_like(largest)
        if sinks is not None:
            sink = some(sinks, -1, queries.start, part.shape[-2])
            largest = sink[..., None].expand_as(largest)
            total = torch.ones_like(largest)
        for keys, whole in pieces:
            s = scores.of(part, k[..., keys, :], queries.start, keys.start, whole=whole)
            before, largest = largest, torch.maximum(largest, s.amax(-1, keepdim=True))
            here = _exponential(s.sub_(largest)).sum(-1, keepdim=True)
            total = total * (before - largest).exp() + here
        found.append((largest, total))
    largest, total = (torch.cat(parts, -2) for parts in zip(*found, strict=True))
    return largest, total


def _exponential(x: Tensor) -> Tensor:
    """exp(x) in place, zero where it would be no normal number.

    On a CPU the exponential function of MKL takes a hundred times as long where it underflows, and
    so do products with subnormal numbers. Powers of two come from another library.

    Returns:
        x itself.
    """
    smallest = torch.finfo(x.dtype).smallest_normal
    return nn.functional.threshold(x.mul_(_LOG2E).exp2_(), smallest, 0.0, inplace=True)


@dataclass(frozen=True)
class _Weights:
    """exp(score − largest) by pieces: P but for the sum of each query, whose reciprocals are kept.

    Attributes:
        q: (batch, kv_heads, groups, T, head_dim).
        k: (batch, kv_heads, S, head_dim).
        largest: (batch, kv_heads, groups, T, 1).
        inverse: the same shape.
        scores: how scores are made.
    """

    q: Tensor
    k: Tensor
    largest: Tensor
    inverse: Tensor
    scores: Scores

    def piece(self, queries: slice, keys: slice, *, whole: bool) -> Tensor:
        """One piece, (batch · kv_heads, groups · queries, keys)."""
        q, k = self.q[..., queries, :], self.k[..., keys, :]
        s = self.scores.of(q, k, queries.start, keys.start, whole=whole)
        return _exponential(s.sub_(self.largest[..., queries, :])).flatten(2, 3).flatten(0, 1)

    def product(self, V: Tensor) -> Tensor:
        """`P V`: (batch, kv_heads, S, columns) -> (batch, kv_heads, groups, T, columns)."""
        out = V.new_empty(*self.q.shape[:-1], V.shape[-1])
        V = V.flatten(0, 1)
        for queries, pieces in _grid(self.q, self.k, self.scores):
            part = out[..., queries, :]
            sums = torch.zeros_like(part).flatten(2, 3).flatten(0, 1)
            for keys, whole in pieces:
                torch.baddbmm(sums, self.piece(queries, keys, whole=whole), V[:, keys], out=sums)
            torch.mul(sums.view(part.shape), self.inverse[..., queries, :], out=part)
        return out

    def transposed_product(self, G: Tensor) -> Tensor:
        """`Pᵀ G`, summed over the groups of queries that share keys: `product` transposed."""
        out = G.new_zeros(*self.k.shape[:-1], G.shape[-1])
        sums = out.flatten(0, 1)
        for queries, pieces in _grid(self.q, self.k, self.scores):
            scaled = G[..., queries, :] * self.inverse[..., queries, :]
            scaled = scaled.flatten(2, 3).flatten(0, 1)
            for keys, whole in pieces:
                part, weights = sums[:, keys], self.piece(queries, keys, whole=whole)
                torch.baddbmm(part, weights.mT, scaled, out=part)
        return out


class _Linear(torch.autograd.Function):
    """`P X`, or `Pᵀ X` if `transposed`: linear in X; the derivative of each is the other."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        largest: Tensor,
        inverse: Tensor,
        X: Tensor,
        scores: Scores,
        transposed: bool,
    ) -> Tensor:
        weights = _Weights(q, k, largest, inverse, scores)
        return weights.transposed_product(X) if transposed else weights.product(X)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.scores, ctx.transposed = inputs[5:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = _Linear.apply(*ctx.saved_tensors, grad, ctx.scores, not ctx.transposed)
        return None, None, None, None, back, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
        """The block is folded into the columns of one X."""
        block: int = info.batch_size
        fixed, X, options = given[:4], given[4], given[5:]
        X = X.expand(block, *X.shape) if in_dims[4] is None else X.movedim(in_dims[4], 0)
        if any(dim is not None for dim in in_dims[:4]):  # a P for every member of the block
            each = [
                [
                    x if dim is None else x.select(dim, i)
                    for x, dim in zip(fixed, in_dims[:4], strict=True)
                ]
                for i in range(block)
            ]
            parts = [_Linear.apply(*of, x, *options) for of, x in zip(each, X, strict=True)]
            return torch.stack(parts), 0
        folded: Tensor = _Linear.apply(*fixed, X.movedim(0, -2).flatten(-2), *options)
        return folded.unflatten(-1, (block, -1)).movedim(-2, 0), 0
