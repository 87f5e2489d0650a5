r"""Exact attribution of a logit to the input tokens.

A logit is an affine functional of the output, `⟨w, y⟩ + b` (see `Linearization.readout`), and
`y = Σ_i J_i x_i + c`. So it is the sum over tokens of `⟨w, J_i x_i⟩ = ⟨J_iᵀ w, x_i⟩`, plus `⟨w, c⟩`
and `b`: nothing is left over. One VJP with the cotangent `w` gives all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from elm_lanczos.linearization import Linearization


@dataclass(frozen=True)
class Attribution:
    """A logit as a sum over input tokens.

    Attributes:
        target: the token id whose logit is attributed.
        logit: the untouched model's own logit.
        tokens: (T,), each input token's share, float64.
        constant: the share of the constant `c`.
        bias: the share of what the head adds, such as the unembedding's bias.
    """

    target: int
    logit: float
    tokens: Tensor
    constant: float
    bias: float

    @property
    def total(self) -> float:
        """The sum of all shares, in float64."""
        return float(self.tokens.sum()) + self.constant + self.bias

    @property
    def error(self) -> float:
        """|total − logit| / max(|logit|, 1): how exactly the shares sum to the model's logit."""
        return abs(self.total - self.logit) / max(abs(self.logit), 1.0)


def attribute(lin: Linearization, target: int | None = None) -> Attribution:
    """Attributes a logit at the output position to every input token, exactly.

    Args:
        lin: the linear system.
        target: token id; the model's own prediction if not given.

    Returns:
        The shares of the tokens, the constant and the bias.

    Raises:
        UnsupportedModelError: if the model's head is not affine once frozen.
    """
    logits = lin.prediction.logits
    target = int(logits.argmax()) if target is None else target
    readout = lin.readout(target)
    w = readout.cotangent
    shares = (lin.vjp(w) * lin.inputs).double().sum(-1)
    constant = float(w.double() @ lin.constant.double())
    return Attribution(target, float(logits[target]), shares, constant, readout.constant)
