r"""One prompt at one output position as a linear system, `y = Σ J_i x_i + c`.

With `F` the frozen decoder (see `frozen_decoder`), `y = F(x)`, and J its derivative. The constant
`c = F(0)` and the leak come from replaying the recorded coefficients at zero, independently of `J`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elm_lanczos.certificate import Certificate
from elm_lanczos.chain import is_linear
from elm_lanczos.errors import UnsupportedModelError, UsageError
from elm_lanczos.freezing import Tape, linear
from elm_lanczos.frozen_decoder import FrozenDecoder
from elm_lanczos.model import Prediction

if TYPE_CHECKING:
    from elm_lanczos.operators import JointOperator, TokenOperator


@dataclass(frozen=True)
class Readout:
    """A token's logit as an affine functional of the output, `⟨cotangent, y⟩ + constant`.

    Attributes:
        cotangent: (m,).
        constant: what does not come from y, such as the unembedding's bias.
        value: the logit that the model's own head gives at the output.
    """

    cotangent: Tensor
    constant: float
    value: float

    def __sub__(self, other: Readout) -> Readout:
        """Returns the functional of a difference of two logits."""
        return Readout(
            self.cotangent - other.cotangent,
            self.constant - other.constant,
            self.value - other.value,
        )


class Linearization:
    """The linear system `y = Σ J_i x_i + c` of one prompt at one output position.

    Args:
        decoder: the frozen decoder at this prompt, and perhaps others of its length: products of
            this system go through it with zeros for them.
        number: which of them this is.

    Attributes:
        model: the model.
        inputs: (T, d), the input embeddings.
        position: the position whose hidden state is the output.
        layer: the layer behind which it is taken; None behind the final norm.
        output: (m,), that hidden state.
        ids: (T,), the token ids the embeddings came from, if any.
    """

    def __init__(self, decoder: FrozenDecoder, number: int = 0) -> None:
        self.decoder, self.number = decoder, number
        self.model, self.position, self.layer = decoder.model, decoder.position, decoder.layer
        self.inputs, self.output = decoder.inputs[number], decoder.outputs[number]
        self.ids = None if decoder.ids is None else decoder.ids[number]
        self.block, self.memory, self.keep = decoder.block, decoder.memory, decoder.keep
        self.narrowed, self.not_a_chain = decoder.narrowed, decoder.not_a_chain
        self.segments, self.footprint = decoder.segments, decoder.footprint

    def __repr__(self) -> str:
        """Returns one line with the shapes of the system."""
        T, d = self.inputs.shape
        return f"Linearization({self.model.name}, T={T}, d={d}, position={self.position})"

    def _repr_html_(self) -> str:
        """Shows it in a notebook."""
        from elm_lanczos.report import notebook

        return notebook.linearization(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, m, d): number of tokens, width of the output, width of an input embedding."""
        return (self.inputs.shape[0], self.output.shape[0], self.inputs.shape[1])

    @property
    def tokens(self) -> list[str]:
        """The T input tokens as text; their places where embeddings were given."""
        if self.ids is None:
            return [f"x{i}" for i in range(len(self.inputs))]
        return self.model.token_strings(self.ids)

    @property
    def text(self) -> str:
        """The prompt as text, without special tokens; empty where embeddings were given."""
        return "" if self.ids is None else self.model.text(self.ids)

    @property
    def precision(self) -> str:
        """The precision of float32 matrix products, 'ieee' or 'tf32'."""
        return self.model.precision

    @property
    def held_bytes(self) -> int:
        """Estimates the bytes that linearised layers and a block of vectors take."""
        return self.decoder.held_bytes

    @property
    def spare_bytes(self) -> int:
        """What `memory` leaves for what is done with the products (see `footprint.spare`)."""
        return self.decoder.spare_bytes

    # ---------------------------------------------------------------------- linear maps

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Returns `J_iᵀ u` for every token at once: one backward pass per cotangent.

        Args:
            cotangents: (..., m).

        Returns:
            (..., T, d).
        """
        flat = self._among(cotangents.reshape(-1, cotangents.shape[-1]))
        found = self.decoder.vjp(flat)[:, self.number]
        return found.reshape(*cotangents.shape[:-1], *self.inputs.shape)

    def jvp(self, tangents: Tensor) -> Tensor:
        """Returns `Σ_i J_i v_i`: one forward pass per tangent.

        Args:
            tangents: (..., T, d).

        Returns:
            (..., m).
        """
        flat = self._among(tangents.reshape(-1, *self.inputs.shape))
        return self.decoder.jvp(flat)[:, self.number].reshape(*tangents.shape[:-2], -1)

    def _among(self, X: Tensor) -> Tensor:
        """Vectors (b, ...) of this prompt as (b, B, ...), zero for the others."""
        if len(self.decoder.inputs) == 1:
            return X[:, None]
        every = X.new_zeros(len(X), len(self.decoder.inputs), *X.shape[1:])
        every[:, self.number] = X
        return every

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
        z = self.decoder.inputs.clone()
        z[self.number] = embeddings
        return self.decoder.replayed((z, without_constants))[0][self.number]

    @property
    def constant(self) -> Tensor:
        """(m,), the constant `c = F(0)` that biases leave behind."""
        return self.decoder.constants[self.number]

    @property
    def prediction(self) -> Prediction:
        """What the untouched model computes for the same input at the same position."""
        return self.decoder.predictions[self.number]

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
            UsageError: if the output is that of a layer, which is not what the head reads, or if
                there is no such token.
        """
        if self.layer is not None:
            raise UsageError(f"logits are not read from layer {self.layer} but from the output")
        vocabulary = self.model.unembedding.weight.shape[0]
        if not 0 <= target < vocabulary:
            raise UsageError(f"token id {target}: ids are 0 … {vocabulary - 1}")

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
            with self.decoder.freezing("the head", record=tape):
                value = head(linear(self.output))

            def replayed(y: Tensor) -> Tensor:
                with self.decoder.freezing("the head", replay=tape):
                    return head(linear(y))

            constant, pull_back = torch.func.vjp(replayed, torch.zeros_like(self.output))[:2]
            (cotangent,) = pull_back(torch.ones_like(constant))
        return Readout(cotangent, float(constant), float(value))

    def certificate(self, seed: int = 0) -> Certificate:
        """Measures how exactly the linear system reproduces the model (see `Certificate`).

        Args:
            seed: of the random vectors of the adjoint test.

        Returns:
            The certificate, without the figures of triplets.
        """
        return self.decoder.certificates(seed)[self.number]

    # ------------------------------------------------------------------------ operators

    def token(self, index: int) -> TokenOperator:
        """Returns the detached Jacobian `J_index` of one token as a LinearOperator (m, d)."""
        from elm_lanczos.operators import TokenOperator

        return TokenOperator(self, index)

    def joint(self, tokens: Sequence[int] | None = None) -> JointOperator:
        """Returns the Jacobians of several tokens, or of all, as one LinearOperator (m, n·d)."""
        from elm_lanczos.operators import JointOperator

        return JointOperator(self, tokens)


class Together:
    """The systems of several prompts as one, whose output is the sum of theirs.

    No prompt enters into another one's output: the Jacobians of all its tokens are theirs.

    Args:
        decoder: the frozen decoder at the prompts.

    Attributes:
        inputs: (B·T, d), the input embeddings of all prompts.
        output: (m,), the sum of their outputs.
        block: how many vectors are pushed through a segment at once.
        precision: of float32 matrix products.
    """

    def __init__(self, decoder: FrozenDecoder) -> None:
        self.decoder = decoder
        self.inputs, self.output = decoder.inputs.flatten(0, 1), decoder.outputs.sum(0)
        self.block, self.precision = decoder.block, decoder.precision

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Returns `J_iᵀ u` for every token of every prompt, (b, m) -> (b, B·T, d)."""
        every = cotangents[:, None].expand(-1, len(self.decoder.inputs), -1)
        return self.decoder.vjp(every).flatten(1, 2)

    def jvp(self, tangents: Tensor) -> Tensor:
        """Returns `Σ_i J_i v_i` over the tokens of all prompts, (b, B·T, d) -> (b, m)."""
        return self.decoder.jvp(tangents.reshape(-1, *self.decoder.inputs.shape)).sum(1)
