"""Attention masks that are made piece by piece, so that no T×T array exists on a long input.

transformers describes a mask by a function of indices, and makes of it what an attention needs. A
`Mask` keeps the description. Attention asks it for the pieces it is about to use; any other use, in
models that write their attention out or work on the mask, makes the whole mask first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from elm_lanczos.freezing import UNTYPED, function_name, is_in_place, rebuild

NONE, SOME, ALL = 0, 1, 2
"""How many of a piece's queries see how many of its keys."""

Piece = Callable[[int, int, int, int], Tensor]
"""Makes of (query, queries, key, keys), first numbers and counts, a boolean piece of a mask, (batch
| 1, heads | 1, queries, keys), True where the query sees the key."""


class Mask(Tensor):
    """Which keys each query sees: an additive mask (batch | 1, heads | 1, T, S) not made yet.

    It has shape, dtype and device of that tensor, and every torch function that is given it gets
    that tensor, made when it is first needed. What is stored is one NaN.

    Attributes:
        piece: makes a piece of it; None once something has been written into it.
        additive: makes the whole of it.
    """

    piece: Piece | None
    additive: Callable[[], Tensor]

    @staticmethod
    def of(
        shape: Sequence[int],
        piece: Piece,
        additive: Callable[[], Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Mask:
        """Describes a mask.

        Args:
            shape: (batch | 1, heads | 1, T, S).
            piece: makes a piece of it.
            additive: makes the whole additive mask.
            dtype: of that.
            device: of that.

        Returns:
            The mask.
        """
        nothing = torch.full((), torch.nan, dtype=dtype, device=device)
        mask = nothing.expand(*shape).as_subclass(Mask)
        mask.piece, mask.additive = piece, additive
        return mask

    @cached_property
    def explicit(self) -> Tensor:
        """The additive mask."""
        return self.additive()

    def whole(self) -> Tensor:
        """The mask as a tensor: boolean, or additive if something has been written into it."""
        T, S = self.shape[-2:]
        return self.explicit if self.piece is None else self.piece(0, T, 0, S)

    def row(self, query: int) -> Tensor:
        """The mask of one query.

        Args:
            query: its number.

        Returns:
            The additive mask, (batch | 1, heads | 1, 1, S).
        """
        if self.piece is None:
            return self.explicit[:, :, query : query + 1]
        seen = self.piece(query, 1, 0, self.shape[-1])
        nothing = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return nothing.masked_fill_(~seen, torch.finfo(self.dtype).min)

    @cached_property
    def _grids(self) -> dict[int, list[list[int]]]:
        return {}

    def visible(self, size: int) -> list[list[int]]:
        """What the pieces of a grid hold.

        Args:
            size: queries and keys of a piece.

        Returns:
            NONE, SOME or ALL for each row of pieces and each piece in it. A row in which a query
            sees nothing at all is all SOME, as its softmax is over every key.
        """
        if size not in self._grids:
            T = self.shape[-2]
            starts = range(0, T, size)
            self._grids[size] = [
                self._pieces(first, min(size, T - first), size) for first in starts
            ]
        return self._grids[size]

    def _pieces(self, first: int, queries: int, size: int) -> list[int]:
        """The row of pieces from a query on."""
        S = self.shape[-1]
        assert self.piece is not None
        row = self.piece(first, queries, 0, S)
        row = row.expand(*row.shape[:2], queries, S)
        if not row.any(-1).all():
            return [SOME] * len(range(0, S, size))
        return [
            ALL if bool(part.all()) else SOME if bool(part.any()) else NONE
            for part in row.split(size, -1)
        ]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers what does not depend on values; calls all else with the additive mask."""
        kwargs = kwargs or {}
        if function_name(func) in UNTYPED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.to and isinstance(args[0], Mask) and _only_device(args[1:], kwargs):
            return args[0]._on(torch.device(args[1] if len(args) > 1 else kwargs["device"]))
        result = func(*_made(args), **_made(kwargs))
        if is_in_place(func) and isinstance(args[0], Mask):
            args[0].piece = None
        return result

    def _on(self, device: torch.device) -> Mask:
        """The mask on another device; pieces go where they are used."""
        if device == self.device or self.piece is None:
            return self
        return Mask.of(self.shape, self.piece, lambda: self.explicit.to(device), self.dtype, device)


def _only_device(args: Sequence[Any], kwargs: Any) -> bool:
    given = [*args, *kwargs.values()]
    return not any(isinstance(value, torch.dtype | Tensor) for value in given)


def _made(values: Any) -> Any:
    """Nested arguments with every mask in them made."""
    return rebuild(lambda value: value.explicit if isinstance(value, Mask) else value, values)


def registered_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that transformers asks an attention's mask function for.

    Args:
        *args: as `transformers.masking_utils.eager_mask` takes them; then nothing is described.
        **kwargs: the same by name: sizes, offsets, the function of indices, padding.

    Returns:
        The additive mask, not made yet; None where none is needed.
    """
    # additive: also right for models that write their attention out and add the mask themselves
    from transformers.masking_utils import eager_mask, sdpa_mask

    if args or not {"batch_size", "q_length", "kv_length"} <= kwargs.keys():
        return eager_mask(*args, **kwargs)
    if kwargs.get("allow_is_bidirectional_skip") and _everything_is_seen(kwargs):
        return None
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    given = {name: value for name, value in kwargs.items() if name != "dtype"} | skips
    offsets = kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0)

    def piece(query: int, queries: int, key: int, keys: int) -> Tensor:
        place = {
            "q_length": queries,
            "kv_length": keys,
            "q_offset": offsets[0] + query,
            "kv_offset": offsets[1] + key,
        }
        found = sdpa_mask(**(given | place))
        assert found is not None  # nothing may be skipped
        return found

    sizes = (int(kwargs[name]) for name in ("batch_size", "q_length", "kv_length"))
    batch, T, S = sizes
    return Mask.of(
        (batch, 1, T, S),
        piece,
        lambda: eager_mask(**kwargs),
        kwargs.get("dtype", torch.float32),
        kwargs.get("device", "cpu"),
    )


def _everything_is_seen(kwargs: dict[str, Any]) -> bool:
    """Whether transformers leaves out a mask in both directions, asked without making it."""
    from transformers.masking_utils import sdpa_mask

    def nothing(*_: Any) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=kwargs.get("device", "cpu"))

    given = {name: value for name, value in kwargs.items() if name not in ("dtype", "use_vmap")}
    return sdpa_mask(**(given | {"mask_function": nothing, "allow_is_causal_skip": False})) is None


def causal(T: int, S: int, device: torch.device) -> Mask:
    """Query i sees the keys up to i.

    Args:
        T: queries.
        S: keys.
        device: where pieces are made.

    Returns:
        The mask.
    """

    def piece(query: int, queries: int, key: int, keys: int) -> Tensor:
        rows = torch.arange(query, query + queries, device=device)[:, None]
        return (rows >= torch.arange(key, key + keys, device=device))[None, None]

    return _boolean((1, 1, T, S), piece, device)


def both(masks: Sequence[Tensor], T: int, S: int) -> Mask:
    """Queries see the keys that all of some masks let them see.

    Args:
        masks: boolean tensors (batch | 1, heads | 1, T | 1, S | 1), or described masks.
        T: queries.
        S: keys.

    Returns:
        The mask.
    """
    if len(masks) == 1 and isinstance(masks[0], Mask):
        return masks[0]  # with what it knows of its pieces
    shape = torch.broadcast_shapes(*(mask.shape for mask in masks), (1, 1, T, S))
    pieces = [mask.piece if isinstance(mask, Mask) else None for mask in masks]

    def piece(query: int, queries: int, key: int, keys: int) -> Tensor:
        seen = torch.ones((), dtype=torch.bool, device=masks[0].device)
        for mask, made in zip(masks, pieces, strict=True):
            part = (
                made(query, queries, key, keys)
                if made is not None
                else some(some(mask, -2, query, queries), -1, key, keys)
            )
            seen = seen & part.to(seen.device)
        return seen.expand(*shape[:2], queries, keys)

    return _boolean(shape, piece, masks[0].device)


def some(x: Tensor, axis: int, start: int, count: int) -> Tensor:
    """A part of an axis, or all of one that is broadcast."""
    return x if x.shape[axis] == 1 else x.narrow(axis, start, count)


def _boolean(shape: Sequence[int], piece: Piece, device: torch.device) -> Mask:
    def additive() -> Tensor:
        unseen = ~piece(0, shape[-2], 0, shape[-1])
        return torch.zeros(unseen.shape, device=device).masked_fill_(unseen, float("-inf"))

    return Mask.of(shape, piece, additive, device=device)
