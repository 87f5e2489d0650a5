r"""What attention and the MLP of a layer add to the residual stream, without code per family.

With the outputs of a layer's MLP cut off from differentiation (same values, no derivative), the
frozen layer `Λ` becomes `mid`: the residual stream and what attention adds to it, through the norms
behind it and multipliers. So as linear maps of the stream before the layer

    attention = mid − 1,      mlp = Λ − mid,      Λ = 1 + attention + mlp,

for serial and parallel layers alike; in a serial one the MLP also reads what attention has just
written. Which modules of a layer make its MLP is told by their names (see `layer_parts`), and then
tested with random vectors: without both parts a layer must be the identity, and the MLP must not
mix tokens. Where that fails a layer is not taken apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from elm_lanczos.chain import Segment, is_out_of_memory
from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.frozen_decoder import FrozenDecoder, LinearMap
from elm_lanczos.layer_parts import LayerModules, outputs_cut

ATTENTION, MLP = "attention", "mlp"


@dataclass(frozen=True)
class Layer:
    """One layer of a frozen chain.

    Attributes:
        number: its number from 0.
        name: its name in the decoder.
        place: its segment's number in the chain.
        input: (T, d), the residual stream before it.
        mid: the layer with the outputs of its MLP cut off; None where it has no MLP, or is not
            taken apart.
        modules: what it is taken apart into: ATTENTION, MLP, both or nothing.
        whole: why it is not taken apart; empty if it is.
    """

    number: int
    name: str
    place: int
    input: Tensor
    mid: Segment | None
    modules: tuple[str, ...]
    whole: str = ""


class Sublayers:
    """The layers of a frozen decoder as linear maps of the residual stream, and their parts.

    Streams here are (b, T, d), but (b, 1, d) behind the last layer of a decoder that runs it for
    the output position alone.

    Args:
        decoder: the frozen decoder, of one prompt.

    Attributes:
        decoder: it.
        position: the output position p.
        layers: its layers.

    Raises:
        UnsupportedModelError: if it is not a chain of layers.
    """

    def __init__(self, decoder: FrozenDecoder) -> None:
        places = self.places(decoder)
        self.decoder, self.position = decoder, decoder.position
        prompts, length, width = decoder.inputs.shape
        assert prompts == 1
        self.has_prelude = places.start == 1
        self._shapes = {}
        self._mids: dict[int, LinearMap] = {}
        self._keep = decoder.keep and decoder.footprint.is_kept(length, decoder.memory // 2)
        for place in (*places, places.stop):
            self._shapes[place] = decoder.segments[place].input.shape[1:]
            if self._shapes[place][-1] != width:
                raise UnsupportedModelError(
                    f"{decoder.model.name}: its residual stream has {self._shapes[place][-1]} "
                    f"features and its embeddings have {width}"
                )
        self.layers = tuple(self._layer(place, number) for number, place in enumerate(places))

    @staticmethod
    def places(decoder: FrozenDecoder) -> range:
        """Returns the numbers of the segments that are layers.

        Args:
            decoder: the frozen decoder.

        Returns:
            A range of them.

        Raises:
            UnsupportedModelError: if it is not a chain of layers.
        """
        if decoder.not_a_chain:
            raise UnsupportedModelError(
                f"{decoder.model.name} is not a chain of layers: {decoder.not_a_chain}"
            )
        return range(int(decoder.segments[0].name == "prelude"), len(decoder.segments) - 1)

    def __len__(self) -> int:
        """Returns the number of layers."""
        return len(self.layers)

    # ------------------------------------------------------------------------ linear maps

    def before(self, u: Tensor, layer: int) -> Tensor:
        """Returns vectors (b, d) at the output position as streams before a layer, zero elsewhere.

        Args:
            u: (b, d).
            layer: the layer's number; that of layers stands for behind the last.

        Returns:
            (b, T, d).
        """
        length, width = self._shapes[layer + int(self.has_prelude)]
        stream = u.new_zeros(len(u), length, width)
        stream[:, self._row(length)] = u
        return stream

    def at_position(self, stream: Tensor) -> Tensor:
        """Returns what a stream (b, T, d) is at the output position, (b, d)."""
        return stream[:, self._row(stream.shape[1])]

    def behind(self, layer: int, stream: Tensor) -> Tensor:
        """Returns of streams (b, T, d) what there is of them behind a layer."""
        narrow = self._shapes[self.layers[layer].place + 1][0] < stream.shape[1]
        return stream[:, self.position : self.position + 1] if narrow else stream

    def widened(self, stream: Tensor) -> Tensor:
        """Returns streams behind a layer as (b, T, d), zero where there was nothing of them."""
        length = self.decoder.inputs.shape[1]
        if stream.shape[1] == length:
            return stream
        wide = stream.new_zeros(len(stream), length, stream.shape[2])
        wide[:, self.position] = stream[:, 0]
        return wide

    def stream(self, layer: int) -> Tensor:
        """Returns the residual stream behind a layer, (T, d); (1, d) of a narrowed last one."""
        return self.decoder.segments[self.layers[layer].place + 1].input[0]

    def vjp(self, layer: int, u: Tensor) -> Tensor:
        """Returns `Λᵀu` of streams behind a layer, (b, T, d)."""
        return self._product(self.decoder.map(self.layers[layer].place).vjp, u)

    def jvp(self, layer: int, v: Tensor) -> Tensor:
        """Returns `Λv` of streams before a layer, (b, T, d)."""
        return self._product(self.decoder.map(self.layers[layer].place).jvp, v)

    def mid_vjp(self, layer: int, u: Tensor) -> Tensor:
        """Returns `midᵀu` of streams behind a layer that has an MLP, (b, T, d)."""
        return self._product(self._mid(layer).vjp, u)

    def mid_jvp(self, layer: int, v: Tensor) -> Tensor:
        """Returns `mid v` of streams before a layer that has an MLP, (b, T, d)."""
        return self._product(self._mid(layer).jvp, v)

    def prelude_vjp(self, u: Tensor) -> Tensor:
        """Returns streams before the first layer pulled back to the embeddings, (b, T, d)."""
        return self._product(self.decoder.map(0).vjp, u) if self.has_prelude else u

    def prelude_jvp(self, v: Tensor) -> Tensor:
        """Returns embeddings pushed forward to before the first layer, (b, T, d)."""
        return self._product(self.decoder.map(0).jvp, v) if self.has_prelude else v

    def norm(self, layer: int) -> LinearMap:
        """Returns the final norm frozen at what a layer makes at the output position.

        Args:
            layer: the layer's number.

        Returns:
            The map of (b, d) to (b, m).
        """
        final = self.decoder.segments[-1]
        (module,) = final.modules
        h = self.at_position(self.stream(layer)[None])[:, None]
        found = self.decoder.linearized(Segment(final.name, module, h, final.modules))

        def vjp(u: Tensor) -> Tensor:
            return self._product(found.vjp, u[:, None])[:, 0]

        def jvp(v: Tensor) -> Tensor:
            return self._product(found.jvp, v[:, None])[:, 0]

        return LinearMap(vjp, jvp)

    def final_vjp(self, u: Tensor) -> Tensor:
        """Returns outputs' cotangents (b, m) pulled back to streams behind the last layer."""
        return self._product(self.decoder.map(len(self.decoder.segments) - 1).vjp, u[:, None])

    def final_jvp(self, v: Tensor) -> Tensor:
        """Returns streams behind the last layer pushed forward to outputs (b, m)."""
        return self._product(self.decoder.map(len(self.decoder.segments) - 1).jvp, v)[:, 0]

    def _row(self, length: int) -> int:
        return self.position if length > 1 else 0

    def _product(self, of: Any, X: Tensor) -> Tensor:
        """A linear map of streams (b, …) in blocks that a segment takes at a time."""
        with torch.no_grad(), self.decoder.model.arithmetic():
            return torch.cat([of(x[:, None])[:, 0] for x in X.split(self.decoder.block)])

    def _mid(self, layer: int) -> LinearMap:
        if layer in self._mids:
            return self._mids[layer]
        segment = self.layers[layer].mid
        assert segment is not None
        found = self.decoder.linearized(segment)
        if self._keep:
            self._mids[layer] = found
        return found

    # ------------------------------------------------------------------ taking a layer apart

    def _layer(self, place: int, number: int) -> Layer:
        """A layer and what it is taken apart into."""
        segment = self.decoder.segments[place]
        (module,) = segment.modules
        modules = LayerModules.of(module)
        mlp, mixing = modules.mlp, modules.attention
        layer = Layer(number, segment.name, place, segment.input[0], None, ())
        if not mlp and not mixing:
            return replace(layer, whole="it has neither attention nor an MLP that can be told")
        try:
            with self.decoder.model.arithmetic(), torch.no_grad():
                doubt = self._doubt(place, mlp, mixing)
        except Exception as error:  # a layer's code met outputs in a form it was not written for
            if is_out_of_memory(error):
                raise
            doubt = "it cannot be run with parts of it cut off"
        if doubt:
            return replace(layer, whole=doubt)
        mid = _cut(segment, mlp) if mlp and mixing else None
        return replace(layer, mid=mid, modules=(ATTENTION,) * bool(mixing) + (MLP,) * bool(mlp))

    def _doubt(self, place: int, mlp: Sequence[nn.Module], mixing: Sequence[nn.Module]) -> str:
        """Why the parts named are not what a layer adds to the stream; empty if they are."""
        segment, shape = self.decoder.segments[place], self._shapes[place + 1]
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(segment.input)
        at_p = u.new_zeros(1, 1, *shape)
        at_p[:, :, self._row(shape[0])] = u
        tolerance = 1e-2 if self.decoder.precision == "tf32" else 64 * torch.finfo(u.dtype).eps
        limit = tolerance * float(u.norm())
        skip = self.decoder.linearized(_cut(segment, [*mlp, *mixing])).vjp(at_p)[0, 0]
        elsewhere = torch.ones(len(skip), dtype=torch.bool, device=skip.device)
        elsewhere[self.position] = False
        if not float((skip[self.position] - u).norm() + skip[elsewhere].norm()) <= limit:
            return "it does more to the residual stream than add attention and an MLP"
        alone = self.decoder.linearized(_cut(segment, mixing)).vjp(at_p)[0, 0]
        if not float(alone[elsewhere].norm()) <= tolerance * float(alone.norm()):
            return "what looks like its MLP mixes tokens"
        return ""


def _cut(segment: Segment, modules: Sequence[nn.Module]) -> Segment:
    """A segment in which what some modules return has no derivative, of the same values."""

    def function(h: Tensor) -> Tensor:
        with outputs_cut(modules):
            return segment.function(h)

    return replace(segment, function=function)
