r"""A decoder layer told apart into its attention and its MLP.

A layer `Λ` of the frozen decoder adds to the residual stream what its attention (or another mixer
of tokens: a state-space model, a short convolution, linear attention) and what its MLP make of it:

    Λ(h) = h + a(h) + m(h)

Nothing is known of how a family writes its layers. What is known is which of a layer's modules are
its MLP, by their names; `h + a(h)` is then the layer with the output of those set to zero, its
coefficients as recorded. So norms behind the sublayers, residual multipliers and parallel sublayers
are where they belong, and `m(h)` of a layer of sublayers in sequence contains what the MLP makes of
the attention's output. Derivatives come from the layer with the same outputs cut from it.

A layer is refused unless `h` itself passes through it unchanged, and unless no token reaches
another one without its attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from elm_lanczos.chain import Segment
from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.freezing import Tape, linear, mark_of, set_mark
from elm_lanczos.frozen_decoder import FrozenDecoder, LinearMap

_NORM = re.compile(r"(Layer|RMS)_?Norm\w*$|Norm$")
_MLP_NAME = re.compile(r"^(mlp|ffn|feed_forward)")
_MLP_CLASS = re.compile(r"(MLP|Mlp|FFN|FeedForward|M[oO][eE](Block|Layer)?)$")
_MIXER = re.compile(
    r"attn|attention|mixer|mamba|conv|ssm|ssd|delta_?net|temporal_block|recurrent|lstm|retention|"
    r"hyena|time_mix",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LayerModules:
    """The modules of a layer, told apart by their names.

    Attributes:
        attention: those that mix tokens.
        mlp: all others that have parameters, except norms.
    """

    attention: tuple[nn.Module, ...]
    mlp: tuple[nn.Module, ...]

    @classmethod
    def of(cls, layer: nn.Module) -> LayerModules:
        """Returns the sublayers of a layer; either may be none.

        Args:
            layer: a decoder layer.

        Returns:
            Its sublayers, in the order in which they are registered.
        """
        attention: list[nn.Module] = []
        mlp: list[nn.Module] = []
        for name, child in layer.named_children():
            kind = type(child).__name__
            if not any(True for _ in child.parameters()) or _NORM.search(kind):
                continue
            is_mlp = _MLP_NAME.search(name) or _MLP_CLASS.search(kind)
            mixes = not is_mlp and (_MIXER.search(name) or _MIXER.search(kind))
            modules = child if isinstance(child, nn.ModuleList) else [child]
            (attention if mixes else mlp).extend(modules)
        return cls(tuple(attention), tuple(mlp))


@contextmanager
def outputs_zeroed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lets modules return zeros: in a frozen decoder, and in a model as it is.

    Args:
        modules: whose output, or the first tensor of it, is set to zero.

    Yields:
        Nothing.
    """
    with _outputs(modules, lambda value: value * 0):
        yield


@contextmanager
def outputs_cut(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lets modules return what they return, but with no derivative through it.

    Args:
        modules: whose output, or the first tensor of it, is detached.

    Yields:
        Nothing.
    """

    def cut(value: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # to the freezing it stays what it was
            same = value.detach()
        set_mark(same, mark_of(value))
        return same

    with _outputs(modules, cut):
        yield


@contextmanager
def _outputs(modules: Iterable[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def changed(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        return (change(output[0]), *output[1:])

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(changed).remove)
        yield


@dataclass(frozen=True)
class Values:
    """The residual stream through one layer: (B, T, d) each, or (B, 1, d) of a narrowed layer.

    Attributes:
        before: h.
        attention: what the attention adds, a(h).
        mlp: what the MLP adds, m(h).
        without_attention: what the layer adds if the output of its attention is zero: the MLP of
            the rest, whose coefficients are as recorded.
    """

    before: Tensor
    attention: Tensor
    mlp: Tensor
    without_attention: Tensor


@dataclass(frozen=True)
class LayerParts:
    """One layer of a frozen decoder, `Λ(h) = h + a(h) + m(h)`.

    Attributes:
        decoder: the frozen decoder.
        segment: the layer. The last one of a narrowed decoder gives the output position alone.
        modules: its modules, told apart.
        narrowed: whether it is that one.
    """

    decoder: FrozenDecoder
    segment: Segment
    modules: LayerModules
    narrowed: bool

    def passing(self, h: Tensor) -> Tensor:
        """Returns what of a residual stream (..., T, d) the layer gives the successor of."""
        p = self.decoder.position
        return h[..., p : p + 1, :] if self.narrowed else h

    def values(self) -> Values:
        """Evaluates the parts at the layer's own input."""
        h, (attention, mlp) = self.segment.input, (self.modules.attention, self.modules.mlp)
        whole, until_mlp, no_attention = self._replayed((h, ()), (h, mlp), (h, attention))
        before = self.passing(h).to(whole)
        return Values(before, until_mlp - before, whole - until_mlp, no_attention - before)

    def maps(self) -> tuple[LinearMap, LinearMap]:
        """Linearises the parts: the derivatives of `a` and of `m` at the layer's own input.

        Returns:
            The attention's and the MLP's. Their vectors are those of the layer: cotangents
            (b, B, T, d), or (b, B, 1, d) of a narrowed layer, and tangents (b, B, T, d). Like the
            chain's, they are to be applied under `torch.no_grad()` and `model.arithmetic()`.
        """
        modules, function = self.modules.mlp, self.segment.function

        def run(h: Tensor) -> Tensor:
            with outputs_cut(modules):
                return function(h)

        whole = self.decoder.linearized(self.segment)
        until_mlp = self.decoder.linearized(replace(self.segment, function=run))

        def unchanged(u: Tensor) -> Tensor:
            if not self.narrowed:
                return u
            every = u.new_zeros(*u.shape[:2], *self.segment.input.shape[1:])
            self.passing(every).copy_(u)
            return every

        attention = LinearMap(
            lambda u: until_mlp.vjp(u) - unchanged(u), lambda v: until_mlp.jvp(v) - self.passing(v)
        )
        mlp = LinearMap(
            lambda u: whole.vjp(u) - until_mlp.vjp(u), lambda v: whole.jvp(v) - until_mlp.jvp(v)
        )
        return attention, mlp

    def require_residual(self) -> None:
        """Checks that h passes through unchanged, and that only the attention mixes tokens.

        Both are tested with random vectors, which excludes the contrary with probability one.

        Raises:
            UnsupportedModelError: if not; the message names the layer.
        """
        h, (attention, mlp) = self.segment.input, (self.modules.attention, self.modules.mlp)
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h)
        here, zero = z.clone(), torch.zeros_like(z)
        here[:, self.decoder.position] = 0
        F0, Fz, M0, Mz = self._replayed(
            (zero, (*attention, *mlp)),
            (z, (*attention, *mlp)),
            (zero, attention),
            (here, attention),
        )
        p = 0 if self.narrowed else self.decoder.position
        layer = type(self.segment.modules[0]).__name__
        if not _close(Fz - F0, self.passing(z).to(F0), F0):
            raise UnsupportedModelError(
                f"{self.segment.name} ({layer}): what its attention and its MLP add to the "
                "residual stream cannot be told apart"
            )
        if not _close(Mz[:, p], M0[:, p], M0):
            raise UnsupportedModelError(
                f"{self.segment.name} ({layer}): which of its modules are its attention is not "
                "known: without those that are named so, tokens still reach one another"
            )

    def _replayed(self, *runs: tuple[Tensor, tuple[nn.Module, ...]]) -> list[Tensor]:
        return replayed(self.decoder, self.segment, *runs)


def replayed(
    decoder: FrozenDecoder, segment: Segment, *runs: tuple[Tensor, tuple[nn.Module, ...]]
) -> list[Tensor]:
    """Evaluates a frozen segment at other inputs, its coefficients as recorded at its own.

    Args:
        decoder: the frozen decoder.
        segment: one of its segments.
        *runs: for each the input (B, T, d), and modules whose output is set to zero.

    Returns:
        The segment's output for each.
    """
    tape, found = Tape(), []
    with torch.no_grad(), decoder.model.frozen():
        with decoder.freezing(segment.name, record=tape):
            segment.function(linear(segment.input))
        for h, zeroed in runs:
            with decoder.freezing(segment.name, replay=tape), outputs_zeroed(zeroed):
                found.append(segment.function(linear(h)).detach())
    return found


def layer_parts(decoder: FrozenDecoder) -> list[LayerParts]:
    """Tells the layers of a frozen decoder apart into their attention and their MLP.

    Args:
        decoder: the frozen decoder.

    Returns:
        The parts of each layer, in order.

    Raises:
        UnsupportedModelError: if the decoder is not a chain of layers, or one of them is no sum of
            what passes through, an attention and an MLP; the message names it.
    """
    if decoder.not_a_chain:
        raise UnsupportedModelError(
            f"{decoder.model.name} is not a chain of layers: {decoder.not_a_chain}"
        )
    layers = set(decoder.model.layers)
    last = decoder.segments[-2] if decoder.narrowed else None
    found = []
    for segment in decoder.segments:
        if segment.modules[0] in layers:
            modules = LayerModules.of(segment.modules[0])
            parts = LayerParts(decoder, segment, modules, narrowed=segment is last)
            parts.require_residual()
            found.append(parts)
    return found


def _close(left: Tensor, right: Tensor, size: Tensor) -> bool:
    """Whether tensors are equal to the rounding of themselves and of what was taken from them."""
    scale = float(right.norm() + size.norm())
    return bool((left - right).norm() <= 64 * torch.finfo(left.dtype).eps * scale)
