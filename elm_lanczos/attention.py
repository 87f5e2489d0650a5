r"""Frozen attention: the probabilities `P` are a coefficient, and only `P V` is linear.

transformers looks attention up by name in a registry. `register_attention` adds this module's under
a name of its own; `DetachedModel.frozen` lets a model use it for the time of a trace. It
is written in plain torch, so that under `freezing.Freezing` its softmax is fixed like any other
coefficient, and without it computes ordinary attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elm_lanczos.errors import UnsupportedModelError


class _FrozenProduct(torch.autograd.Function):
    """`P @ V` for a fixed `P`: linear in V, and one matrix product for a whole block of vectors.

    Under `vmap` the block of vectors is folded into V's columns, so that P is read once for all of
    them; its derivative is the same function with P transposed, so it can be transposed again.
    """

    @staticmethod
    def forward(P: Tensor, V: Tensor) -> Tensor:
        return torch.bmm(P, V)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (P,) = ctx.saved_tensors
        return None, _FrozenProduct.apply(P.mT, grad)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], P: Tensor, V: Tensor
    ) -> tuple[Tensor, int]:
        dim = in_dims[1]
        V = V.expand(info.batch_size, *V.shape) if dim is None else V.movedim(dim, 0)
        if in_dims[0] is not None:
            return torch.matmul(P.movedim(in_dims[0], 0), V), 0
        block, n, rows, columns = V.shape
        folded = V.permute(1, 2, 0, 3).reshape(n, rows, block * columns)
        out = _FrozenProduct.apply(P, folded)
        return out.view(n, P.shape[1], block, columns).permute(2, 0, 1, 3), 0


def frozen_product(P: Tensor, V: Tensor) -> Tensor:
    """Returns `P @ V` for frozen batches of matrices.

    Args:
        P: (..., rows, inner), a coefficient.
        V: (..., inner, columns) with the same leading dimensions.

    Returns:
        (..., rows, columns).
    """
    lead = V.shape[:-2]
    P, V = P.reshape(-1, *P.shape[-2:]), V.reshape(-1, *V.shape[-2:])
    out: Tensor = _FrozenProduct.apply(P, V)
    return out.view(*lead, *out.shape[-2:])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped key-value heads, in plain torch.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, S, head_dim).
        v: (batch, kv_heads, S, value_dim).
        mask: (batch | 1, heads | 1, T, S), boolean (True attends) or additive, or None.
        scaling: factor of the scores.
        softcap: cap `c` of `c · tanh(scores / c)`.
        sinks: (heads,) or (batch, heads, T, 1), logits of the attention sinks.

    Returns:
        (batch, heads, T, value_dim).
    """
    batch, heads, T, _ = q.shape
    groups = heads // k.shape[1]
    scores = torch.matmul(q.unflatten(1, (-1, groups)).flatten(2, 3), k.mT) * scaling
    scores = scores.reshape(batch, heads, T, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1) if sinks.ndim == 1 else sinks
        sinks = sinks.expand(batch, heads, T, 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
        P = torch.softmax(scores, dim=-1)[..., :-1]
    else:
        P = torch.softmax(scores, dim=-1)
    P = P.reshape(batch, k.shape[1], groups * T, -1)
    return torch.matmul(P, v).reshape(batch, heads, T, -1)


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
        attention_mask: (batch, 1 | heads, T, S), additive.
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
    """
    for name, other in others.items():
        if isinstance(other, Tensor) and name not in _IGNORED:
            raise UnsupportedModelError(
                f"{type(module).__name__}: its attention takes {name!r}, for which there is no rule"
            )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if indices is not None:
        unseen = torch.ones(
            (*indices.shape[:2], key.shape[2]), dtype=torch.bool, device=key.device
        ).scatter(-1, indices.long(), False)
        lowest = torch.finfo(query.dtype).min
        scores = torch.zeros((), dtype=query.dtype, device=key.device)
        start = scores if attention_mask is None else attention_mask
        attention_mask = start.masked_fill(unseen[:, None], lowest)
    if position_bias is not None:
        bias = position_bias.detach()
        attention_mask = bias if attention_mask is None else attention_mask + bias
    out = attention(
        query, key, value, attention_mask, scaling, softcap, sinks if s_aux is None else s_aux
    )
    return out.transpose(1, 2).contiguous(), None


def _registered_mask(*args: Any, **kwargs: Any) -> Any:
    # additive: also right for models that write their attention out and add the mask themselves
    from transformers.masking_utils import eager_mask

    return eager_mask(*args, **kwargs)


def register_attention() -> None:
    """Adds the frozen attention to transformers' registries, beside the existing ones."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _registered_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _registered_mask)
