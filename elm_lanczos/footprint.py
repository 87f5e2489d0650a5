"""What a linearised chain holds in memory, by kind of array, from the shapes of its layers alone.

A linearised layer keeps what it is linear with: its weights where they had to be made, the gates
and scales that multiply each token's vectors, and of attention its probabilities where they are
few, else the queries and keys they are made from (see `attention`). All layers are kept if they
take no more than half of the memory, else one at a time. Which matrices make gates is not asked, so
that gates and scales count for every matrix: too much, for a Llama by a factor of 1.8. Arrays of T²
numbers occur only where they are few, so everything else grows linearly with the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elm_lanczos.attention import is_explicit
from elm_lanczos.linearization import _COPIES, Linearization
from elm_lanczos.storage import slots


@dataclass(frozen=True)
class Footprint:
    """The shapes that the bytes of a chain follow from; sums are over all layers.

    Attributes:
        depth: layers.
        hidden: width d of the residual stream.
        widest: the widest that a vector gets on its way.
        outputs: sum of the output widths of all matrices.
        attended: sum of the widths of queries and keys.
        heads: attention heads of a layer; 0 if it has none.
        head_dim: width of a head.
        made: bytes of the weights that have to be made plain.
        itemsize: bytes of a number.
    """

    depth: int
    hidden: int
    widest: int
    outputs: int
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
        outputs = sum(
            slot.shape[0]
            for layer in layers
            for slot in slots(layer, buffers=False)
            if len(slot.shape) == 2
        )
        widths = (
            slot.shape[0]
            for slot in slots(decoder, buffers=False)
            if len(slot.shape) == 2 and slot.tensor is not table
        )
        return Footprint(
            depth=max(1, len(layers)),
            hidden=hidden,
            widest=max(widths, default=hidden),
            outputs=outputs,
            attended=len(layers) * (heads + kv_heads) * head_dim,
            heads=heads,
            head_dim=head_dim,
            made=made,
            itemsize=dtype.itemsize,
        )

    def block(self, length: int, memory: int) -> int:
        """The vectors that are pushed through a layer at once.

        Args:
            length: number of tokens T.
            memory: bytes to work within.

        Returns:
            Their number, if none is asked for.
        """
        return Linearization.default_block(length, self.widest, self.itemsize, memory)

    def arrays(self, length: int, block: int, memory: int) -> dict[str, int]:
        """The bytes of each kind of array at a length.

        Args:
            length: number of tokens T.
            block: vectors that are pushed through a layer at once.
            memory: bytes to work within.

        Returns:
            Bytes by name; what there is none of is left out.
        """
        row = length * self.itemsize
        maps = {"weights raised": self.made}
        maps["gates and scales"] = max(0, self.outputs - self.attended) * row
        if is_explicit(self.heads, length, length):
            maps["attention probabilities"] = self.depth * self.heads * length * row
        else:
            maps["queries and keys"] = self.attended * row
        held = 1 if sum(maps.values()) <= memory // 2 else self.depth
        arrays = {name: size // held for name, size in maps.items()}
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
