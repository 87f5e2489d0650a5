r"""Exact attribution of a logit to the input tokens.

With `y = Σ_i J_i x_i + c`, a logit `s · (⟨w_t, y⟩ + b_t)` is the sum over tokens of
`s ⟨w_t, J_i x_i⟩ = s ⟨J_iᵀ w_t, x_i⟩`, plus `s ⟨w_t, c⟩` and `s b_t`: nothing is left over. One VJP
with the cotangent `w_t` gives all of them. `s` holds what the model does after the unembedding
(logit scale, final soft-cap) as a frozen factor; it is 1 for most models.
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
        tokens: (T,), each input token's share.
        constant: the share of the constant `c`.
        bias: the share of the unembedding's bias.
    """

    target: int
    logit: float
    tokens: Tensor
    constant: float
    bias: float

    @property
    def total(self) -> float:
        """The sum of all shares, in float64."""
        return float(self.tokens.double().sum()) + self.constant + self.bias

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
    """
    logits = lin.prediction.logits
    target = int(logits.argmax()) if target is None else target
    unembedding = lin.model.unembedding
    w = unembedding.weight[target].detach().to(lin.output)
    bias = 0.0 if unembedding.bias is None else float(unembedding.bias[target])
    logit = float(logits[target])
    plain = float(w.double() @ lin.output.double()) + bias
    scale = logit / plain if abs(logit - plain) > 1e-4 * abs(plain) and plain else 1.0
    shares = scale * (lin.vjp(w) * lin.inputs).double().sum(-1)
    constant = scale * float(w.double() @ lin.constant.double())
    return Attribution(target, logit, shares, constant, scale * bias)
