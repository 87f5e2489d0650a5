r"""A decoder at one input as a product of linearised segments.

Each segment of the chain (see `chain`) is remembered with the input it had, and is turned into a
linear map where it is needed: `torch.func.vjp` of the frozen segment (see `freezing`), pushed
through a whole block of vectors at once by `vmap`. A JVP is the VJP transposed: it is the VJP of
the (linear) function `cotangent ↦ vjp(cotangent)`. So the memory of a pass is that of one layer
whatever the depth, and weights are touched one layer at a time.

With `F` the frozen map, `y = F(x) = Σ_i J_i x_i + c`. The constant `c = F(0)` and the leak come
from replaying the recorded coefficients at zero, independently of `J`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elm_lanczos.chain import Segment, is_linear, is_out_of_memory, not_frozen, trace
from elm_lanczos.errors import ModelError, UnsupportedModelError
from elm_lanczos.footprint import Footprint, spare
from elm_lanczos.freezing import Freezing, Tape, linear
from elm_lanczos.memory import ceiling
from elm_lanczos.model import DetachedModel, Prediction
from elm_lanczos.rules import RULES, unfrozen

if TYPE_CHECKING:
    from elm_lanczos.operators import JointOperator, TokenOperator


_BOUNDS = {
    # many models compute norms or softmax in float32 whatever their dtype: that is in the fidelity
    # to the model as it is, and not in that to its own code with those casts raised
    "fidelity": {"float64": 1e-5, "float32": 1e-5, "tf32": 2e-3},
    "raised": {"float64": 1e-12, "float32": 1e-5, "tf32": 2e-3},
    "reconstruction": {"float64": 1e-13, "float32": 2e-6, "tf32": 1e-3},
    "leak": {"float64": 1e-13, "float32": 1e-6, "tf32": 1e-3},
    "adjoint": {"float64": 1e-12, "float32": 1e-5, "tf32": 1e-3},
    "affinity": {"float64": 1e-12, "float32": 1e-5, "tf32": 1e-3},
    "orthogonality": {"float64": 1e-12, "float32": 1e-5, "tf32": 1e-5},
}


@dataclass(frozen=True)
class Certificate:
    """How exactly the linear system reproduces the model, in relative figures.

    Attributes:
        fidelity: frozen forward pass against the untouched model, ‖F(x) − y_model‖ / ‖y_model‖.
        raised: the same against the model's own code with its casts to a lower precision left out.
        reconstruction: ‖y − (Σ J_i x_i + c)‖ / ‖y‖, with the Jacobian used and c from replay.
        leak: ‖F(0)‖ / ‖y‖ with every additive constant removed.
        adjoint: |⟨u, Jv⟩ − ⟨Jᵀu, v⟩| / (‖u‖ ‖Jv‖) for random u, v.
        affinity: ‖F(z) − F(0) − Jz‖ / ‖F(z)‖ for random z, F by replay.
        residual: largest triplet residual relative to σ₁, once triplets exist.
        orthogonality: largest entry of UᵀU − I and VᵀV − I, once triplets exist.
        dtype: what everything was computed in: float64, float32, or tf32 for float32 with products
            of that precision.
        not_a_chain: why the decoder was linearised as a whole, not layer by layer; empty if it is a
            chain of layers.
    """

    fidelity: float
    raised: float
    reconstruction: float
    leak: float
    adjoint: float
    affinity: float
    residual: float | None = None
    orthogonality: float | None = None
    dtype: str = "float32"
    not_a_chain: str = ""

    @property
    def bounds(self) -> dict[str, float]:
        """The bound each figure must meet for the result to count as exact."""
        measured = (name for name in _BOUNDS if getattr(self, name) is not None)
        return {name: _BOUNDS[name][self.dtype] for name in measured}

    @property
    def failures(self) -> list[str]:
        """The names of the figures that miss their bound (NaN misses)."""
        return [name for name, bound in self.bounds.items() if not getattr(self, name) <= bound]

    @property
    def refuted(self) -> list[str]:
        """The failures that no rounding explains: beyond a thousand times the bound."""
        return [
            name for name in self.failures if not getattr(self, name) <= 1e3 * self.bounds[name]
        ]

    @property
    def exact(self) -> bool:
        """Whether every figure meets its bound."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures and the verdict as plain data."""
        return {**asdict(self), "exact": self.exact, "failures": self.failures}


@dataclass(frozen=True)
class LinearMap:
    """A segment linearised at its input.

    Attributes:
        vjp: maps a block of cotangents (b, *out) to (b, *in).
        jvp: maps a block of tangents (b, *in) to (b, *out).
    """

    vjp: Callable[[Tensor], Tensor]
    jvp: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Readout:
    """A token's logit as an affine functional of the output, `⟨cotangent, y⟩ + constant`.

    Attributes:
        cotangent: (m,).
        constant: what does not come from y, such as the unembedding's bias.
    """

    cotangent: Tensor
    constant: float


class Linearization:
    """The linear system `y = Σ J_i x_i + c` of one prompt at one output position.

    Args:
        model: the model.
        inputs: (T, d), the input embeddings.
        position: the position whose final hidden state is the output.
        ids: (T,), the token ids the embeddings came from, if any.
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
        footprint: the shapes that its memory follows from.
        narrowed: whether the last layer is run for the output position alone behind its attention.

    Raises:
        UnsupportedModelError: if the decoder is not affine once frozen; the message names the
            module.
        ModelError: if the forward pass gives values that are not finite.
    """

    def __init__(
        self,
        model: DetachedModel,
        inputs: Tensor,
        position: int = -1,
        *,
        ids: Tensor | None = None,
        block: int | None = None,
        memory: int | None = None,
        keep: bool | None = None,
        narrow: bool | None = None,
        rules: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.ids = ids
        self.position = position % inputs.shape[0]
        self._rules = RULES if rules is None else rules
        self.memory = ceiling(inputs.device) if memory is None else memory
        mode = self._freezing(type(model.decoder).__name__)
        found = trace(model, inputs, self.position, mode, ids)
        self.segments = found.segments
        self.not_a_chain = found.not_a_chain
        self.output = found.output[0, self.position].detach().to(inputs.device)
        if not self.output.isfinite().all():
            raise ModelError(f"{model.name}: the forward pass gives values that are not finite")
        self.footprint = Footprint.of(
            model.decoder,
            model.layers,
            model.embedding.weight,
            model.compute_dtype,
            made=model.storage.bytes_made(model.compute_dtype),
        )
        self.block = block or self.footprint.block(len(inputs), self.memory)
        self.narrowed = narrow is not False and self._same_map(
            found.at_position, found.segments[-2:]
        )
        if narrow and not self.narrowed:
            raise UnsupportedModelError(f"{model.name}: its last layer cannot be run at a position")
        if self.narrowed:
            self.segments = (*found.segments[:-2], *found.at_position)
        self._maps: dict[int, LinearMap] = {}
        self.keep = self.footprint.is_kept(len(inputs), self.memory) if keep is None else keep

    def __repr__(self) -> str:
        """Returns one line with the shapes of the system."""
        T, d = self.inputs.shape
        return f"Linearization({self.model.name}, T={T}, d={d}, position={self.position})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, m, d): number of tokens, width of the output, width of an input embedding."""
        return (self.inputs.shape[0], self.output.shape[0], self.inputs.shape[1])

    @property
    def precision(self) -> str:
        """The precision of float32 matrix products, 'ieee' or 'tf32'."""
        return self.model.precision

    def _freezing(self, module: str, **options: Any) -> Freezing:
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
        return self.footprint.arrays(len(self.inputs), self.block, keep=self.keep)

    def _map(self, index: int) -> LinearMap:
        if index in self._maps:
            return self._maps[index]
        result = self._linearized(self.segments[index])
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
        u = torch.randn(self.output.shape, generator=generator, dtype=torch.float64)
        u = u.to(self.output)[None, None, None]
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
        """The value (1, 1, m) at the end of some segments, and Jᵀu at their beginning."""
        h = segments[0].input
        with torch.no_grad(), self.model.frozen():
            for segment in segments:
                with self._freezing(segment.name):
                    h = segment.function(linear(h)).detach()
        for segment in reversed(segments):  # linearised one at a time
            u = self._linearized(segment).vjp(u)
        return h, u

    def _linearized(self, segment: Segment) -> LinearMap:
        def frozen(h: Tensor) -> Tensor:
            with self._freezing(segment.name):
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
            return torch.func.vmap(lambda u: pull_back(u)[0])(cotangents.to(out.device))

        def jvp(tangents: Tensor) -> Tensor:
            if not push_forward:
                zero = torch.zeros_like(out)
                push_forward.append(torch.func.vjp(lambda u: pull_back(u)[0], zero)[1])
            tangents = tangents.to(segment.input.device)
            return torch.func.vmap(lambda v: push_forward[0](v)[0])(tangents)

        return LinearMap(vjp, jvp)

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Returns `J_iᵀ u` for every token at once: one backward pass per cotangent.

        Args:
            cotangents: (..., m).

        Returns:
            (..., T, d).
        """
        lead = cotangents.shape[:-1]
        flat = cotangents.reshape(-1, cotangents.shape[-1])
        out = flat.new_empty(flat.shape[0], *self.inputs.shape)
        with torch.no_grad(), self.model.arithmetic():
            for start in range(0, flat.shape[0], self.block):
                g = flat[start : start + self.block, None, None]
                for index in reversed(range(len(self.segments))):
                    g = self._map(index).vjp(g)
                out[start : start + self.block] = g[:, 0]
        return out.view(*lead, *self.inputs.shape)

    def jvp(self, tangents: Tensor) -> Tensor:
        """Returns `Σ_i J_i v_i`: one forward pass per tangent.

        Args:
            tangents: (..., T, d).

        Returns:
            (..., m).
        """
        lead = tangents.shape[:-2]
        flat = tangents.reshape(-1, *self.inputs.shape)
        out = flat.new_empty(flat.shape[0], self.output.shape[0])
        with torch.no_grad(), self.model.arithmetic():
            for start in range(0, flat.shape[0], self.block):
                v = flat[start : start + self.block, None]
                for index in range(len(self.segments)):
                    v = self._map(index).jvp(v)
                out[start : start + self.block] = v[:, 0, 0]
        return out.view(*lead, -1)

    # ------------------------------------------------------------- the affine map by replay

    def __call__(self, embeddings: Tensor, *, without_constants: bool = False) -> Tensor:
        """Evaluates the frozen map `F` at other embeddings, with this prompt's coefficients.

        Args:
            embeddings: (T, d).
            without_constants: leave out every additive constant (biases, learned positions).

        Returns:
            (m,), `F(embeddings)`.

        Raises:
            UnsupportedModelError: if the model takes another course for these embeddings.
        """
        return self._replayed((embeddings, without_constants))[0]

    def _replayed(self, *inputs: tuple[Tensor, bool]) -> list[Tensor]:
        """`F(z)` (m,) for several embeddings, with or without constants: recorded only once."""
        values = [z[None].to(self.inputs) for z, _ in inputs]
        with torch.no_grad(), self.model.frozen():
            for segment in self.segments:
                tape = Tape()
                with self._freezing(segment.name, record=tape):
                    segment.function(linear(segment.input))
                for i, (_, without) in enumerate(inputs):
                    with self._freezing(segment.name, replay=tape, without_constants=without):
                        values[i] = segment.function(linear(values[i]))
                    if not tape.finished:
                        raise UnsupportedModelError(
                            f"{segment.name}: takes another course for another input, so it cannot "
                            "be linearised exactly"
                        )
        return [z[0, 0].detach().to(self.inputs.device) for z in values]

    @cached_property
    def constant(self) -> Tensor:
        """(m,), the constant `c = F(0)` that biases leave behind."""
        return self(torch.zeros_like(self.inputs))

    @cached_property
    def prediction(self) -> Prediction:
        """What the untouched model computes for the same input at the same position."""
        given = self.inputs if self.ids is None else self.ids
        return self.model.predict(given, self.position)

    def _raised_output(self) -> Tensor:
        """Runs the model's own code, unfrozen, with its casts to a lower precision left out."""
        model = self.model
        with model.unfrozen(len(self.inputs)), Freezing(model.compute_dtype, {}, default=unfrozen):
            hidden = model.hidden_states(linear(self.inputs[None]), self.ids)
        return hidden[0, self.position]

    def readout(self, target: int) -> Readout:
        """What the model makes of `y` to get a token's logit, frozen like the rest.

        For most models this is the token's unembedding row and bias; logit scales, soft-caps and
        other transformations after the final norm enter with their own frozen coefficients.

        Args:
            target: the token id.

        Returns:
            The linear functional and its constant.

        Raises:
            UnsupportedModelError: if the model's head is not affine once frozen.
        """

        def head(y: Tensor) -> Tensor:
            logits = self.model.head(y, self.inputs, self.position, self.ids)
            if not is_linear(logits):
                raise UnsupportedModelError(
                    f"{type(self.model.hf_model).__name__}: its logits are not affine in the final "
                    "hidden state"
                )
            return logits[target]

        with torch.no_grad(), self.model.frozen():
            tape = Tape()
            with self._freezing("the head", record=tape):
                head(linear(self.output))

            def replayed(y: Tensor) -> Tensor:
                with self._freezing("the head", replay=tape):
                    return head(linear(y))

            constant, pull_back = torch.func.vjp(replayed, torch.zeros_like(self.output))[:2]
            (cotangent,) = pull_back(torch.ones_like(constant))
        return Readout(cotangent, float(constant))

    def certificate(self, seed: int = 0) -> Certificate:
        """Measures how exactly the linear system reproduces the model (see `Certificate`).

        Args:
            seed: of the random vectors of the adjoint test.

        Returns:
            The certificate, without the figures of triplets.
        """
        y = self.output.double()
        reference = self.prediction.hidden.double().to(y.device)
        raised = self._raised_output().double().to(y.device)
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(self.output.shape, generator=generator, dtype=torch.float64).to(self.output)
        v = torch.randn(self.inputs.shape, generator=generator, dtype=torch.float64).to(self.inputs)
        zero = torch.zeros_like(self.inputs)
        with self.model.frozen():
            self.constant, leak, Fv = self._replayed((zero, False), (zero, True), (v, False))
            Jx, Jv = self.jvp(torch.stack([self.inputs, v])).double()
            JTu, Fv = self.vjp(u).double(), Fv.double()
        rebuilt = Jx + self.constant.double()
        forward, backward = u.double() @ Jv, (JTu * v.double()).sum()
        return Certificate(
            fidelity=float((y - reference).norm() / reference.norm()),
            raised=float((y - raised).norm() / raised.norm()),
            reconstruction=float((y - rebuilt).norm() / y.norm()),
            leak=float(leak.double().norm() / y.norm()),
            adjoint=float((forward - backward).abs() / (u.double().norm() * Jv.norm())),
            affinity=float((Fv - self.constant.double() - Jv).norm() / Fv.norm()),
            dtype="tf32" if self.precision == "tf32" else str(self.output.dtype)[6:],
            not_a_chain=self.not_a_chain,
        )

    # ------------------------------------------------------------------------ operators

    def token(self, index: int) -> TokenOperator:
        """Returns the detached Jacobian `J_index` of one token as a LinearOperator (m, d)."""
        from elm_lanczos.operators import TokenOperator

        return TokenOperator(self, index)

    def joint(self) -> JointOperator:
        """Returns `[J_0 … J_{T-1}]` as one LinearOperator (m, T·d)."""
        from elm_lanczos.operators import JointOperator

        return JointOperator(self)
