"""What a linearised chain holds in memory, by kind of array, from the shapes of its layers alone.

A linearised layer keeps what it is linear with: its weights where they had to be made, the gates
and scales that multiply each token's vectors, and of attention its probabilities where they are
few, else the queries and keys they are made from (see `attention`). All layers are kept if they
take no more than half of the memory, else one at a time. Arrays of T² numbers occur only where they
are few, so everything else grows linearly with the length.

Which matrices make gates is not asked: the widest of each layer counts as one, and the scales of
two norms are as wide as the residual stream. While a block of vectors goes through a layer, a few
copies of the widest form exist at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elm_lanczos.attention import is_explicit
from elm_lanczos.storage import slots

# Copies of a block, as wide as it gets, that exist at a time while it goes through a layer; norms
# of a layer, whose scales are as wide as the residual stream.
_COPIES, _NORMS = 4, 2


@dataclass(frozen=True)
class Footprint:
    """The shapes that the bytes of a chain follow from; sums are over all layers.

    Attributes:
        depth: layers.
        hidden: width d of the residual stream.
        widest: the widest that a vector gets on its way.
        gates: sum over the layers of the width of the widest matrix.
        attended: sum of the widths of queries and keys.
        heads: attention heads of a layer; 0 if it has none.
        head_dim: width of a head.
        made: bytes of the weights that have to be made plain.
        itemsize: bytes of a number.
    """

    depth: int
    hidden: int
    widest: int
    gates: int
    attended: int
    heads: int
    head_dim: int
    made: int
    itemsize: int

    @staticmethod
    def of(
        decoder: nn.Module,
        layers: Sequence[nn.Module],
        table: Tensor,
        dtype: torch.dtype,
        *,
        made: int,
    ) -> Footprint:
        """Reads the shapes of a decoder, which may be on the meta device.

        Args:
            decoder: the decoder.
            layers: its layers.
            table: its token embeddings, (vocabulary, d).
            dtype: what is computed in.
            made: bytes of the weights that have to be made plain.

        Returns:
            The shapes.
        """
        config: Any = decoder.config
        text = config.get_text_config(decoder=True)
        hidden = table.shape[1]
        heads = getattr(text, "num_attention_heads", None) or 0
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or (hidden // heads if heads else 0)
        gates = [
            max((s.shape[0] for s in slots(layer, buffers=False) if len(s.shape) == 2), default=0)
            for layer in layers
        ]
        return Footprint(
            depth=max(1, len(layers)),
            hidden=hidden,
            widest=max([hidden, *gates]),
            gates=sum(gates),
            attended=len(layers) * (heads + kv_heads) * head_dim,
            heads=heads,
            head_dim=head_dim,
            made=made,
            itemsize=dtype.itemsize,
        )

    def block(self, length: int, memory: int, prompts: int = 1) -> int:
        """The vectors that are pushed through a layer at once, if no number is asked for.

        Enough rows for full-speed products, within caches and memory; on long inputs no less than
        16, so that the pieces of attention that each block makes anew (see `blockwise`) are a small
        part of the work.

        Args:
            length: number of tokens T.
            memory: bytes to work within.
            prompts: how many go through together.

        Returns:
            Their number.
        """
        tokens = prompts * length
        one = _COPIES * tokens * self.widest * self.itemsize
        return int(max(1, min(256, max(16, 8192 // tokens + 1), memory // 4 // one)))

    def is_kept(self, length: int, memory: int, prompts: int = 1) -> bool:
        """Whether all layers stay linearised, or each is linearised anew for every block.

        Args:
            length: number of tokens T.
            memory: bytes to work within.
            prompts: how many go through together.

        Returns:
            Whether they take no more than half of the memory.
        """
        return sum(self._maps(length, prompts).values()) <= memory // 2

    def _maps(self, length: int, prompts: int) -> dict[str, int]:
        row = prompts * length * self.itemsize
        maps = {"weights raised": self.made}
        maps["gates and scales"] = (self.gates + _NORMS * self.depth * self.hidden) * row
        if is_explicit(prompts * self.heads, length, length):
            maps["attention probabilities"] = self.depth * self.heads * length * row
        else:
            maps["queries and keys"] = self.attended * row
        return maps

    def arrays(self, length: int, block: int, prompts: int = 1, *, keep: bool) -> dict[str, int]:
        """The bytes of each kind of array at a length.

        Args:
            length: number of tokens T.
            block: vectors that are pushed through a layer at once.
            prompts: how many go through together.
            keep: whether all layers stay linearised.

        Returns:
            Bytes by name; what there is none of is left out.
        """
        row = prompts * length * self.itemsize
        held = 1 if keep else self.depth
        arrays = {name: size // held for name, size in self._maps(length, prompts).items()}
        arrays["residual streams"] = (self.depth + 1) * self.hidden * row
        arrays["block of vectors"] = block * _COPIES * self.widest * row
        return {name: size for name, size in arrays.items() if size}

    def attention_flops(self, length: int, block: int) -> float:
        """Floating-point operations of one vector's products with a layer's probabilities.

        Args:
            length: number of tokens T.
            block: vectors that are pushed through a layer at once.

        Returns:
            Their number. Where probabilities are made piece by piece, their making counts in equal
            parts for each vector of a block, and the half that a causal mask hides is left out.
        """
        whole = 2 * length**2 * self.heads * self.head_dim
        if is_explicit(self.heads, length, length):
            return whole
        return whole * (1 + 1 / block) / 2


def spare(memory: int, arrays: Mapping[str, int]) -> int:
    """What is left of the memory for what is done with the products.

    Args:
        memory: bytes to work within.
        arrays: bytes that the chain takes, by kind of array.

    Returns:
        Bytes; a quarter of the memory at least, as a chain may take more than it can be told.
    """
    return max(memory - sum(arrays.values()), memory // 4)
