r"""A decoder at prompts of one length as a product of linearised segments.

Each segment of the chain (see `chain`) is remembered with the input it had, and is turned into a
linear map where it is needed: `torch.func.vjp` of the frozen segment (see `freezing`), pushed
through a whole block of vectors at once by `vmap`. A JVP is the VJP transposed: it is the VJP of
the (linear) function `cotangent ↦ vjp(cotangent)`. So the memory of a pass is that of one layer
whatever the depth, and weights are touched one layer at a time.

Several prompts of one length go through together, like the sequences of a batch; no prompt enters
into another one's output. A frozen layer takes a hundred small operations, which for a few tokens
take longer to be told apart than to be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from elm_lanczos.certificate import Certificate
from elm_lanczos.chain import Segment, behind_layer, is_out_of_memory, not_frozen, trace
from elm_lanczos.errors import ModelError, UnsupportedModelError
from elm_lanczos.footprint import Footprint, spare
from elm_lanczos.freezing import Freezing, Tape, linear
from elm_lanczos.memory import ceiling
from elm_lanczos.model import DetachedModel, Prediction
from elm_lanczos.rules import RULES, unfrozen


@dataclass(frozen=True)
class LinearMap:
    """A segment linearised at its input.

    Attributes:
        vjp: maps a block of cotangents (b, *out) to (b, *in).
        jvp: maps a block of tangents (b, *in) to (b, *out).
    """

    vjp: Callable[[Tensor], Tensor]
    jvp: Callable[[Tensor], Tensor]


class FrozenDecoder:
    """The frozen decoder at B prompts of T tokens, affine in their embeddings.

    Args:
        model: the model.
        inputs: (B, T, d), the input embeddings.
        position: the position whose final hidden states are the outputs.
        ids: (B, T), the token ids the embeddings came from, if any.
        layer: the layer, counted from 1, behind which the outputs are taken, without the final
            norm; they are the final hidden states if not given.
        block: how many vectors are pushed through a segment at once; chosen from the sequence
            length if not given.
        memory: bytes that linearised segments, blocks and what is done with them may use; 70 % of
            what is free by default.
        keep: hold every linearised segment, or linearise it anew for each block of vectors; decided
            from the memory if not given.
        narrow: run the last layer for the output position alone behind its attention; wherever that
            is the same map if not given.
        rules: another rule table, only to test what a wrong rule does.

    Attributes:
        segments: the chain.
        not_a_chain: why the decoder is one segment; empty if it is a chain.
        outputs: (B, m), the hidden states at the position.
        footprint: the shapes that its memory follows from.
        narrowed: whether the last layer is run for the output position alone behind its attention.
        pushed: vectors pushed through a segment so far; a pass pushes one through each.

    Raises:
        UnsupportedModelError: if the decoder is not affine once frozen, or is not a chain of layers
            of which one could be the last; the message names the module.
        UsageError: if there is no such layer.
        ModelError: if the forward pass gives values that are not finite.
    """

    def __init__(
        self,
        model: DetachedModel,
        inputs: Tensor,
        position: int = -1,
        *,
        ids: Tensor | None = None,
        layer: int | None = None,
        block: int | None = None,
        memory: int | None = None,
        keep: bool | None = None,
        narrow: bool | None = None,
        rules: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.ids, self.layer = ids, layer
        self.pushed = 0
        prompts, length, _ = inputs.shape
        self.position = position % length
        self._rules = RULES if rules is None else rules
        self.memory = ceiling(inputs.device) if memory is None else memory
        mode = self.freezing(type(model.decoder).__name__)
        found = trace(model, inputs, self.position, mode, ids)
        if layer is not None:
            found = behind_layer(model, found, layer, self.position)
        self.segments = found.segments
        self.not_a_chain = found.not_a_chain
        self.outputs = found.output[:, self.position].detach().to(inputs.device)
        if not self.outputs.isfinite().all():
            raise ModelError(f"{model.name}: the forward pass gives values that are not finite")
        self.footprint = Footprint.of(
            model.decoder,
            model.layers,
            model.embedding.weight,
            model.compute_dtype,
            made=model.storage.bytes_made(model.compute_dtype),
        )
        self.block = block or self.footprint.block(length, self.memory, prompts)
        self.narrowed = narrow is not False and self._same_map(
            found.at_position, found.segments[-2:]
        )
        if narrow and not self.narrowed:
            raise UnsupportedModelError(f"{model.name}: its last layer cannot be run at a position")
        if self.narrowed:
            self.segments = (*found.segments[:-2], *found.at_position)
        self._maps: dict[int, LinearMap] = {}
        self.keep = self.footprint.is_kept(length, self.memory, prompts) if keep is None else keep

    @property
    def precision(self) -> str:
        """The precision of float32 matrix products, 'ieee' or 'tf32'."""
        return self.model.precision

    def freezing(self, module: str, **options: Any) -> Freezing:
        """The mode that these systems are frozen by.

        Args:
            module: name of the module being run, for messages.
            **options: see `Freezing`.

        Returns:
            The mode.
        """
        options |= {"gate": self.model.gate, "module": module}
        return Freezing(self.model.compute_dtype, self._rules, **options)

    # ---------------------------------------------------------------------- linear maps

    @property
    def held_bytes(self) -> int:
        """Estimates the bytes that linearised layers and a block of vectors take."""
        return sum(self._arrays().values())

    @property
    def spare_bytes(self) -> int:
        """What `memory` leaves for what is done with the products (see `footprint.spare`)."""
        return spare(self.memory, self._arrays())

    def _arrays(self) -> dict[str, int]:
        prompts, length, _ = self.inputs.shape
        return self.footprint.arrays(length, self.block, prompts, keep=self.keep)

    def map(self, index: int) -> LinearMap:
        """Returns a segment of the chain as a linear map, by its number."""
        if index in self._maps:
            return self._maps[index]
        result = self.linearized(self.segments[index])
        if self.keep:
            self._maps[index] = result
        return result

    def _same_map(self, some: tuple[Segment, ...], others: tuple[Segment, ...]) -> bool:
        """Whether two ends of the chain give one value and one VJP, up to rounding.

        A random cotangent excludes another Jacobian with probability one.

        Args:
            some: segments that may not run, or compute something else.
            others: the segments they would replace.

        Returns:
            False also if the first ones cannot be run.
        """
        if not some:
            return False
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(self.outputs.shape[-1], generator=generator, dtype=torch.float64)
        u = u.to(self.outputs).expand(1, *self.outputs.shape)[:, :, None]
        tolerance = 1e-2 if self.precision == "tf32" else 64 * torch.finfo(u.dtype).eps
        try:
            with self.model.frozen():
                ends = [self._end(segments, u) for segments in (some, others)]
        except Exception as error:  # a layer's code run in a way it was not written for
            if is_out_of_memory(error):
                raise
            return False
        return all(
            bool((one - other).norm() <= tolerance * other.norm())
            for one, other in zip(*ends, strict=True)
        )

    def _end(self, segments: tuple[Segment, ...], u: Tensor) -> tuple[Tensor, Tensor]:
        """The values (B, 1, m) at the end of some segments, and Jᵀu at their beginning."""
        h = segments[0].input
        with torch.no_grad(), self.model.frozen():
            for segment in segments:
                with self.freezing(segment.name):
                    h = segment.function(linear(h)).detach()
        for segment in reversed(segments):  # linearised one at a time
            u = self.linearized(segment).vjp(u)
        return h, u

    def linearized(self, segment: Segment) -> LinearMap:
        """Linearises a segment, of the chain or any other, at its input.

        Args:
            segment: the segment.

        Returns:
            Its linear map; what goes through it is counted in `pushed`.

        Raises:
            UnsupportedModelError: if it cannot be transformed; the message names it.
            RuntimeError: if memory is used up.
        """

        def frozen(h: Tensor) -> Tensor:
            with self.freezing(segment.name):
                return segment.function(linear(h))

        with torch.no_grad(), self.model.frozen():
            try:
                out, pull_back = torch.func.vjp(frozen, segment.input)[:2]
            except RuntimeError as error:  # an operation torch.func cannot transform
                if is_out_of_memory(error):
                    raise
                raise UnsupportedModelError(f"{segment.name}: {not_frozen(error)}") from error
        push_forward: list[Callable[[Tensor], Any]] = []

        def vjp(cotangents: Tensor) -> Tensor:
            self.pushed += len(cotangents)
            return torch.func.vmap(lambda u: pull_back(u)[0])(cotangents.to(out.device))

        def jvp(tangents: Tensor) -> Tensor:
            if not push_forward:
                zero = torch.zeros_like(out)
                push_forward.append(torch.func.vjp(lambda u: pull_back(u)[0], zero)[1])
            tangents = tangents.to(segment.input.device)
            self.pushed += len(tangents)
            return torch.func.vmap(lambda v: push_forward[0](v)[0])(tangents)

        return LinearMap(vjp, jvp)

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Returns `J_iᵀ u` for every token at once: one backward pass per cotangent.

        Args:
            cotangents: (b, B, m), of each prompt's output.

        Returns:
            (b, B, T, d).
        """
        out = cotangents.new_empty(len(cotangents), *self.inputs.shape)
        with torch.no_grad(), self.model.arithmetic():
            for start in range(0, len(cotangents), self.block):
                g = cotangents[start : start + self.block, :, None]
                for index in reversed(range(len(self.segments))):
                    g = self.map(index).vjp(g)
                out[start : start + self.block] = g
        return out

    def pulled_back(self, cotangents: Tensor) -> Iterator[Tensor]:
        """Pulls cotangents back through the chain, one segment after another.

        Args:
            cotangents: (b, B, m), of each prompt's output; at most `block` of them.

        Yields:
            The cotangents at the input of each segment, (b, B, T, d), from the last one to the
            first.
        """
        g = cotangents[:, :, None]
        for index in reversed(range(len(self.segments))):
            with torch.no_grad(), self.model.arithmetic():
                g = self.map(index).vjp(g)
            yield g

    def jvp(self, tangents: Tensor) -> Tensor:
        """Returns `Σ_i J_i v_i` of each prompt: one forward pass per tangent.

        Args:
            tangents: (b, B, T, d).

        Returns:
            (b, B, m).
        """
        out = tangents.new_empty(len(tangents), *self.outputs.shape)
        with torch.no_grad(), self.model.arithmetic():
            for start in range(0, len(tangents), self.block):
                v = tangents[start : start + self.block]
                for index in range(len(self.segments)):
                    v = self.map(index).jvp(v)
                out[start : start + self.block] = v[:, :, 0]
        return out

    # ------------------------------------------------------------- the affine map by replay

    def replayed(self, *inputs: tuple[Tensor, bool]) -> list[Tensor]:
        """Evaluates the frozen map `F` at other embeddings, with these prompts' coefficients.

        Args:
            *inputs: (B, T, d) each, and whether to leave out every additive constant (biases,
                learned positions).

        Returns:
            `F` of each, (B, m).

        Raises:
            UnsupportedModelError: if the model takes another course for these embeddings.
        """
        values = [z.to(self.inputs) for z, _ in inputs]
        with torch.no_grad(), self.model.frozen():
            for segment in self.segments:
                tape = Tape()
                with self.freezing(segment.name, record=tape):
                    segment.function(linear(segment.input))
                for i, (_, without) in enumerate(inputs):
                    with self.freezing(segment.name, replay=tape, without_constants=without):
                        values[i] = segment.function(linear(values[i]))
                    if not tape.finished:
                        raise UnsupportedModelError(
                            f"{segment.name}: takes another course for another input, so it cannot "
                            "be linearised exactly"
                        )
        return [z[:, 0].detach().to(self.inputs.device) for z in values]

    @cached_property
    def constants(self) -> Tensor:
        """(B, m), the constants `c = F(0)` that biases leave behind."""
        return self.replayed((torch.zeros_like(self.inputs), False))[0]

    @cached_property
    def predictions(self) -> list[Prediction]:
        """What the untouched model computes for each prompt at the same position."""
        given = self.inputs if self.ids is None else self.ids
        return [self.model.predict(prompt, self.position, self.layer) for prompt in given]

    def _raised_outputs(self) -> Tensor:
        """Runs the model's own code, unfrozen, with its casts to a lower precision left out."""
        model = self.model
        with (
            model.unfrozen(self.inputs.shape[1]),
            Freezing(model.compute_dtype, {}, default=unfrozen),
        ):
            hidden = model.hidden_states(linear(self.inputs), self.ids, self.layer)
        return hidden[:, self.position]

    def certificates(self, seed: int = 0) -> list[Certificate]:
        """Measures how exactly the linear systems reproduce the model (see `Certificate`).

        Args:
            seed: of the random vectors of the adjoint test, the same for each prompt.

        Returns:
            The certificate of each prompt, without the figures of triplets.
        """
        generator = torch.Generator().manual_seed(seed)
        m, (T, d) = self.outputs.shape[-1], self.inputs.shape[1:]
        u = torch.randn(m, generator=generator, dtype=torch.float64).to(self.outputs)
        v = torch.randn(T, d, generator=generator, dtype=torch.float64).to(self.inputs)
        x, v, zero = self.inputs, v.expand_as(self.inputs), torch.zeros_like(self.inputs)
        references = [prediction.hidden for prediction in self.predictions]
        raised = self._raised_outputs().to(x.device)
        with self.model.frozen():
            self.constants, leaks, Fv = self.replayed((zero, False), (zero, True), (v, False))
            Jx, Jv = self.jvp(torch.stack([x, v]))
            (JTu,) = self.vjp(u.expand(1, len(x), m))
        columns = self.outputs, references, raised, self.constants, leaks, Fv, Jx, Jv, JTu, v
        return [
            self._certificate(u.double(), *(one.double().to(x.device) for one in prompt))
            for prompt in zip(*columns, strict=True)
        ]

    def _certificate(
        self,
        u: Tensor,
        y: Tensor,
        reference: Tensor,
        raised: Tensor,
        constant: Tensor,
        leak: Tensor,
        Fv: Tensor,
        Jx: Tensor,
        Jv: Tensor,
        JTu: Tensor,
        v: Tensor,
    ) -> Certificate:
        """The certificate of one prompt, from what was computed of it in float64 or below."""
        forward, backward = u @ Jv, (JTu * v).sum()
        return Certificate(
            fidelity=float((y - reference).norm() / reference.norm()),
            raised=float((y - raised).norm() / raised.norm()),
            reconstruction=float((y - (Jx + constant)).norm() / y.norm()),
            leak=float(leak.norm() / y.norm()),
            adjoint=float((forward - backward).abs() / (u.norm() * Jv.norm())),
            affinity=float((Fv - constant - Jv).norm() / Fv.norm()),
            dtype="tf32" if self.precision == "tf32" else str(self.outputs.dtype)[6:],
            not_a_chain=self.not_a_chain,
        )
