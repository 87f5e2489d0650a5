"""Attention masks that are made piece by piece, so that no T×T array exists on a long input.

transformers describes a mask by a function of indices, and makes of it what an attention needs. A
`Mask` keeps the description. Attention asks it for the pieces it is about to use; any other use, in
models that write their attention out, makes the whole mask first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from elm_lanczos.freezing import rebuild

NONE, SOME, ALL = 0, 1, 2
"""How many of a piece's queries see how many of its keys."""


class Mask:
    """Which keys each query sees.

    To torch functions and everything else that takes tensors it is the additive mask (batch | 1,
    heads | 1, T, S) it stands for, made when it is first used so.

    Args:
        shape: (T, S).
        piece: Makes of `(query, queries, key, keys)`, first numbers and counts, the boolean piece
            (batch | 1, heads | 1, queries, keys), True where the query sees the key.
        additive: Makes the whole additive mask.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        piece: Callable[[int, int, int, int], Tensor],
        additive: Callable[[], Tensor],
    ) -> None:
        self.lengths = shape
        self.piece = piece
        self._additive = additive
        self._visible: dict[int, list[list[int]]] = {}

    @cached_property
    def explicit(self) -> Tensor:
        """The additive mask."""
        return self._additive()

    def whole(self) -> Tensor:
        """The boolean mask (batch | 1, heads | 1, T, S)."""
        T, S = self.lengths
        return self.piece(0, T, 0, S)

    def row(self, query: int) -> Mask:
        """The mask of one query.

        Args:
            query: Its number.

        Returns:
            The mask, of lengths (1, S).
        """
        S = self.lengths[1]

        def piece(first: int, queries: int, key: int, keys: int) -> Tensor:
            return self.piece(query + first, queries, key, keys)

        return Mask((1, S), piece, lambda: self.explicit[:, :, query : query + 1])

    def visible(self, size: int) -> list[list[int]]:
        """What the pieces of a grid hold.

        Args:
            size: Queries and keys of a piece.

        Returns:
            NONE, SOME or ALL for each row of pieces and each piece in it. A row in which a query
            sees nothing at all is all SOME, as its softmax is over every key.
        """
        if size not in self._visible:
            T, S = self.lengths
            self._visible[size] = [
                self._row_of_pieces(first, min(size, T - first), size, S)
                for first in range(0, T, size)
            ]
        return self._visible[size]

    def _row_of_pieces(self, first: int, queries: int, size: int, S: int) -> list[int]:
        row = self.piece(first, queries, 0, S)
        row = row.expand(*row.shape[:2], queries, S)
        if not row.any(-1).all():
            return [SOME] * len(range(0, S, size))
        found = []
        for part in row.split(size, -1):
            found.append(ALL if bool(part.all()) else SOME if bool(part.any()) else NONE)
        return found

    # ------------------------------------------------------- as the tensor it stands for

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Calls a torch function with the additive mask."""
        return func(*explicit(args), **explicit(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """Anything a tensor has, of the additive mask."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.explicit, name)

    def __getitem__(self, index: Any) -> Any:
        """A part of the additive mask."""
        return self.explicit[index]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The mask itself for a device, as pieces go where they are used; else `Tensor.to`."""
        given = [*args, *kwargs.values()]
        if any(isinstance(value, torch.dtype | Tensor) for value in given):
            return self.explicit.to(*args, **kwargs)
        return self


for _name in "add radd sub rsub mul rmul truediv neg lt le gt ge eq ne invert and or".split():

    def _operator(self: Mask, *others: Any, _name: str = f"__{_name}__") -> Any:
        return getattr(self.explicit, _name)(*others)

    setattr(Mask, f"__{_name}__", _operator)
Mask.__hash__ = object.__hash__  # type: ignore[method-assign]


def explicit(values: Any) -> Any:
    """Nested arguments of a torch function with every mask in them made.

    Args:
        values: Tuples, lists and dicts of arguments.

    Returns:
        The same with tensors for masks.
    """
    return rebuild(lambda value: value.explicit if isinstance(value, Mask) else value, values)


def registered_mask(*args: Any, **kwargs: Any) -> Mask | Tensor | None:
    """The mask as transformers asks an attention's mask function for it.

    Args:
        *args: None are known.
        **kwargs: Sizes, offsets, the function of indices, padding, as `sdpa_mask` takes them.

    Returns:
        The mask; None where none is needed.
    """
    # additive: also right for models that write their attention out and add the mask themselves
    from transformers.masking_utils import eager_mask, sdpa_mask

    if args or not {"q_length", "kv_length"} <= kwargs.keys():
        return eager_mask(*args, **kwargs)
    if kwargs.get("allow_is_bidirectional_skip") and eager_mask(**kwargs) is None:
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

    shape = (int(kwargs["q_length"]), int(kwargs["kv_length"]))
    return Mask(shape, piece, lambda: eager_mask(**kwargs))


def causal(T: int, S: int, device: torch.device) -> Mask:
    """Query i sees the keys up to i.

    Args:
        T: Queries.
        S: Keys.
        device: Where pieces are made.

    Returns:
        The mask.
    """

    def piece(query: int, queries: int, key: int, keys: int) -> Tensor:
        rows = torch.arange(query, query + queries, device=device)[:, None]
        return (rows >= torch.arange(key, key + keys, device=device))[None, None]

    def additive() -> Tensor:
        unseen = ~piece(0, T, 0, S)
        return torch.zeros(unseen.shape, device=device).masked_fill_(unseen, float("-inf"))

    return Mask((T, S), piece, additive)
