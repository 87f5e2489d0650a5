r"""Frozen attention: the probabilities `P` are a coefficient, and only `P V` is linear.

transformers looks attention up by name in a registry. `register_attention` adds this module's under
a name of its own; `DetachedModel.frozen` lets a model use it for the time of a trace. It
is written in plain torch, so that under `freezing.Freezing` its softmax is fixed like any other
coefficient, and without it computes ordinary attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elm_lanczos.blockwise import Scores, blockwise_attention
from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.freezing import marks_of
from elm_lanczos.masks import Mask, both, registered_mask

EXPLICIT = 2**21
"""Attention probabilities of a layer, over all heads, up to which they are kept as a matrix."""


class _FrozenProduct(torch.autograd.Function):
    """`P V` for a fixed `P`, whose groups of rows share one V: linear in V.

    Under `vmap` the block of vectors is folded into V's columns, so that P is read once for all of
    them and the product is one large one; its derivative is the product with `Pᵀ`, and that one's
    is this again, so it can be transposed any number of times.
    """

    @staticmethod
    def forward(P: Tensor, V: Tensor) -> Tensor:
        n, groups, rows, inner = P.shape
        return torch.bmm(P.reshape(n, groups * rows, inner), V).reshape(n, groups, rows, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _FrozenTransposed.apply(ctx.saved_tensors[0], grad)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, P: Tensor, V: Tensor) -> tuple[Tensor, int]:
        return _folded(_FrozenProduct, info, in_dims, P, V)


class _FrozenTransposed(torch.autograd.Function):
    """`Pᵀ G` for a fixed `P`, summed over the groups of rows that share one V."""

    @staticmethod
    def forward(P: Tensor, G: Tensor) -> Tensor:
        n, groups, rows, inner = P.shape
        flat = P.reshape(n, groups * rows, inner).transpose(1, 2)
        return torch.bmm(flat, G.reshape(n, groups * rows, -1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _FrozenProduct.apply(ctx.saved_tensors[0], grad)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, P: Tensor, G: Tensor) -> tuple[Tensor, int]:
        return _folded(_FrozenTransposed, info, in_dims, P, G)


_Dims = tuple[int | None, int | None]


def _folded(
    product: type[torch.autograd.Function], info: Any, in_dims: _Dims, P: Tensor, X: Tensor
) -> tuple[Tensor, int]:
    """A product of P with a block of X, the block folded into the columns of one X."""
    block: int = info.batch_size
    X = X.expand(block, *X.shape) if in_dims[1] is None else X.movedim(in_dims[1], 0)
    if in_dims[0] is not None:  # a P for every member of the block: more matrices, not columns
        P = P.movedim(in_dims[0], 0).flatten(0, 1)
        several: Tensor = product.apply(P, X.flatten(0, 1))
        return several.unflatten(0, (block, -1)), 0
    folded: Tensor = product.apply(P, X.movedim(0, -2).flatten(-2))
    return folded.unflatten(-1, (block, -1)).movedim(-2, 0), 0


def frozen_product(P: Tensor, V: Tensor) -> Tensor:
    """Returns `P @ V` for frozen batches of matrices.

    Args:
        P: (..., groups, rows, inner), a coefficient.
        V: (..., groups, inner, columns), or (..., 1, inner, columns) shared by the groups.

    Returns:
        (..., groups, rows, columns).
    """
    lead = P.shape[:-2]
    groups = 1 if V.shape[:-2] == lead else lead[-1]
    grouped = P.reshape(-1, groups, *P.shape[-2:])
    out: Tensor = _FrozenProduct.apply(grouped, V.reshape(-1, *V.shape[-2:]))
    return out.reshape(*lead, *out.shape[-2:])


def is_shared(P: Tensor, V: Tensor) -> bool:
    """Whether `P @ V` is one product a matrix, or a group of matrices, as `frozen_product` wants.

    Args:
        P: (..., rows, inner).
        V: (..., inner, columns).

    Returns:
        Whether their leading dimensions agree, but for a last one of V that may be 1.
    """
    lead, other = P.shape[:-2], V.shape[:-2]
    same_rank = len(lead) == len(other) >= 1
    return same_rank and (lead == other or (other[-1] == 1 and lead[:-1] == other[:-1]))


def is_explicit(heads: int, queries: int, keys: int) -> bool:
    """Whether the probabilities of a layer are few enough to be kept as a matrix.

    Args:
        heads: attention heads, times sequences.
        queries: queries T.
        keys: keys S.

    Returns:
        False where they are made piece by piece whenever they are needed (see `blockwise`).
    """
    return heads * queries * keys <= EXPLICIT


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Sequence[Tensor],
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped key-value heads, in plain torch.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, S, head_dim).
        v: (batch, kv_heads, S, value_dim).
        masks: (batch | 1, heads | 1, T | 1, S | 1) each, or with fewer dimensions; boolean (True
            attends), additive, or only described.
        scaling: factor of the scores.
        softcap: cap `c` of `c · tanh(scores / c)`.
        sinks: (heads,) or (batch, heads, T, 1), logits of the attention sinks.

    Returns:
        (batch, heads, T, value_dim).
    """
    batch, heads, T, _ = q.shape
    groups = heads // k.shape[1]
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1) if sinks.ndim == 1 else sinks
        sinks = sinks.expand(batch, heads, T, 1)
    if not is_explicit(batch * heads, T, k.shape[2]) and not marks_of(masks):
        grouped = None if sinks is None else sinks[..., 0].unflatten(1, (-1, groups))
        how = _scores(scaling, softcap, masks, T, k.shape[2])
        out = blockwise_attention(q.unflatten(1, (-1, groups)), k, v, how, grouped)
        return out.flatten(1, 2)
    scores = torch.matmul(q.unflatten(1, (-1, groups)).flatten(2, 3), k.mT) * scaling
    scores = scores.reshape(batch, heads, T, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for mask in masks:
        mask = _made(mask, T, k.shape[2]).to(scores.device)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
        P = torch.softmax(scores, dim=-1)[..., :-1]
    else:
        P = torch.softmax(scores, dim=-1)
    P = P.reshape(batch, k.shape[1], groups, T, -1)
    return torch.matmul(P, v[:, :, None]).reshape(batch, heads, T, -1)


def _is_described(mask: Tensor, T: int, S: int) -> bool:
    """Whether a mask is described, and as the queries and keys are that it is used for."""
    return isinstance(mask, Mask) and mask.piece is not None and mask.shape[-2:] == (T, S)


def _made(mask: Tensor, T: int, S: int) -> Tensor:
    """A mask as a boolean or additive tensor."""
    if not isinstance(mask, Mask):
        return mask
    return mask.whole() if _is_described(mask, T, S) else mask.explicit


def _scores(
    scaling: float, softcap: float | None, masks: Sequence[Tensor], T: int, S: int
) -> Scores:
    """How scores are made: what is hidden in one description, what is added beside it."""
    seen: list[Tensor] = []
    biases: list[Tensor] = []
    for mask in masks:
        if not _is_described(mask, T, S):
            mask = _made(mask, T, S)
            mask = mask[(None,) * (4 - mask.ndim)]
        hides = isinstance(mask, Mask) or mask.dtype == torch.bool
        (seen if hides else biases).append(mask)
    return Scores(scaling, softcap, both(seen, T, S) if seen else None, tuple(biases))


IMPLEMENTATION = "elm_lanczos_frozen"
"""The name under which transformers' attention registries know this module's attention."""


_IGNORED = {
    "position_ids",
    "position_embeddings",
    "cache_position",
    "sliding_window",  # in the mask already
}
"""Tensors that models pass to any attention function and that none of transformers' own uses."""


def _registered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, with all that changes the scores.

    Args:
        module: the attention module.
        query: (batch, heads, T, head_dim).
        key: (batch, kv_heads, S, head_dim).
        value: (batch, kv_heads, S, value_dim).
        attention_mask: (batch, 1 | heads, T, S), additive, or only described.
        scaling: factor of the scores.
        softcap: cap of the scores.
        s_aux: (heads,), logits of attention sinks.
        sinks: (batch, heads, T, 1), the same where each query has its own.
        position_bias: added to the scores.
        indices: (batch, T, selected), the only keys a sparse attention looks at.
        **others: what does not change the result.

    Returns:
        (batch, T, heads, value_dim), and no attention weights.

    Raises:
        UnsupportedModelError: if a tensor is given whose meaning is not known.
        _Attended: to `at_position`, in whose first run this is the end.
    """
    one = _ONE_POSITION.get()
    if one is not None and one.output is not None:
        return one.take(), None
    for name, other in others.items():
        if isinstance(other, Tensor) and name not in _IGNORED:
            raise UnsupportedModelError(
                f"{type(module).__name__}: its attention takes {name!r}, for which there is no rule"
            )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    masks = [] if attention_mask is None else [attention_mask]
    if indices is not None:
        seen = torch.zeros(
            (*indices.shape[:2], key.shape[2]), dtype=torch.bool, device=key.device
        ).scatter(-1, indices.long(), True)
        masks.append(seen[:, None])
    if position_bias is not None:
        masks.append(position_bias.detach())
    sinks = sinks if s_aux is None else s_aux
    if one is not None:
        masks, sinks = [one.row(mask) for mask in masks], one.row(sinks)
        query = query[:, :, one.position : one.position + 1]
    out = attention(query, key, value, masks, scaling, softcap, sinks)
    out = out.transpose(1, 2).contiguous()
    if one is not None:
        one.output = out
        raise _Attended
    return out, None


class _Attended(Exception):
    """Stops a layer where its attention has been computed."""


class NotOneAttentionError(Exception):
    """A layer does not call the registered attention exactly once."""


@dataclass
class _OnePosition:
    """What the two runs of `at_position` have in common.

    Attributes:
        position: the query that is wanted.
        length: number of queries T.
        output: what attention gives there, (batch, 1, heads, value_dim), once it is known.
        taken: whether the layer has been given it.
    """

    position: int
    length: int
    output: Tensor | None = None
    taken: bool = False

    def row(self, x: Any) -> Any:
        """The one query of (batch, heads, T, ...); anything with another layout as it is."""
        if isinstance(x, Mask):
            return x.row(self.position)
        if x is None or x.ndim != 4 or x.shape[2] != self.length:
            return x
        return x[:, :, self.position : self.position + 1]

    def take(self) -> Tensor:
        if self.taken or self.output is None:
            raise NotOneAttentionError
        self.taken = True
        return self.output


_ONE_POSITION: ContextVar[_OnePosition | None] = ContextVar("one_position", default=None)


def at_position(
    everywhere: Callable[[], object], there: Callable[[], Tensor], position: int, length: int
) -> Tensor:
    """Runs a layer for one position, whose attention still looks at all of them.

    The layer is run for all positions as far as its attention, which is computed for one query;
    and then for this position alone, with that as the output of its attention. So nothing behind
    the attention, forward or back, is computed for the other positions.

    Args:
        everywhere: runs the layer on the whole residual stream.
        there: runs it on the residual stream at the position.
        position: the position p.
        length: number of positions T.

    Returns:
        What `there` returns.

    Raises:
        NotOneAttentionError: if the layer does not attend exactly once by `register_attention`.
    """
    one = _OnePosition(position, length)
    token = _ONE_POSITION.set(one)
    try:
        # Not inside `except`, where the first run and all it holds would still be alive.
        with contextlib.suppress(_Attended):
            everywhere()
        if one.output is not None:
            out = there()
            if one.taken:
                return out
    finally:
        _ONE_POSITION.reset(token)
    raise NotOneAttentionError


def register_attention() -> None:
    """Adds the frozen attention to transformers' registries, beside the existing ones."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _registered_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, registered_mask)
