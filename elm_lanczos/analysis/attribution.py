r"""Exact attribution of a logit to the input tokens.

A logit is an affine functional of the output, `⟨w, y⟩ + b` (see `Linearization.readout`), and
`y = Σ_i J_i x_i + c`. So it is the sum over tokens of `⟨w, J_i x_i⟩ = ⟨J_iᵀ w, x_i⟩`, plus `⟨w, c⟩`
and `b`: nothing is left over. One VJP with the cotangent `w` gives all of them. The difference of
two logits is attributed by the difference of their functionals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from elm_lanczos.analysis.result import Analysis
from elm_lanczos.errors import UsageError
from elm_lanczos.linearization import Linearization, Readout

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_BOUNDS = {"float64": 1e-12, "float32": 1e-5, "tf32": 2e-3}
"""How far from the logit the shares may sum to, relative to it or to 1."""


class Shares(NamedTuple):
    """What the parts of the linear system add to an affine functional of its output.

    Attributes:
        tokens: (T,), each input token's share, float64.
        constant: the share of the constant `c`.
        bias: the share of what the head adds, such as the unembedding's bias.
    """

    tokens: Tensor
    constant: float
    bias: float

    @property
    def total(self) -> float:
        """The sum of all shares, in float64."""
        return float(self.tokens.sum()) + self.constant + self.bias


def shares_of(lin: Linearization, readout: Readout) -> Shares:
    """Returns the shares of one functional, by one VJP.

    Args:
        lin: the linear system.
        readout: the functional of its output.

    Returns:
        The shares; they sum to the functional's value at the output.
    """
    w = readout.cotangent
    tokens = (lin.vjp(w) * lin.inputs).double().sum(-1)
    return Shares(tokens, float(w.double() @ lin.constant.double()), readout.constant)


@dataclass(frozen=True, kw_only=True)
class Attribution(Analysis):
    """A logit, or a difference of two, as a sum over input tokens.

    Attributes:
        target: the token id whose logit is attributed.
        contrast: the token id whose logit is subtracted, if any.
        target_token: text of the target.
        contrast_token: text of the contrast; empty if there is none.
        logit: the logit (or difference) that the model's own head gives at the system's output.
        model_logit: the same of the untouched model.
        tokens: the T input tokens as text.
        shares: (T,), each input token's share, float64.
        constant: the share of the constant `c`.
        bias: the share of what the head adds, such as the unembedding's bias.
        bound: how large `error` may be.
    """

    kind: ClassVar[str] = "attribute"

    target: int
    contrast: int | None
    target_token: str
    contrast_token: str
    logit: float
    model_logit: float
    tokens: list[str]
    shares: Tensor
    constant: float
    bias: float
    bound: float

    @property
    def total(self) -> float:
        """The sum of all shares, in float64."""
        return float(self.shares.sum()) + self.constant + self.bias

    @property
    def error(self) -> float:
        """|total − logit| / max(|logit|, 1): how exactly the shares sum to the logit."""
        return abs(self.total - self.logit) / max(abs(self.logit), 1.0)

    @property
    def facts(self) -> list[str]:
        """How the shares sum."""
        against = f" − {self.contrast_token!r}" if self.contrast is not None else ""
        return [
            f"logit of {self.target_token!r}{against}: {self.logit:.6f} = "
            f"{float(self.shares.sum()):.6f} (tokens) + {self.constant:.6f} (constant) + "
            f"{self.bias:.6f} (bias)",
            f"the shares sum to it within {self.error:.1e} of it; the untouched model has "
            f"{self.model_logit:.6f}",
        ]

    @property
    def doubts(self) -> list[str]:
        """Also names shares that do not sum to the logit."""
        if self.error <= self.bound:
            return super().doubts
        missed = f"the shares sum to the logit only within {self.error:.1e}"
        return [*super().doubts, missed]

    def facts_to_dict(self) -> dict[str, Any]:
        """Returns target, contrast, logits, sums and errors by name."""
        names = (
            "target target_token contrast contrast_token logit model_logit constant bias total "
            "error"
        )
        return {name: getattr(self, name) for name in names.split()}

    def to_dataframe(self) -> pd.DataFrame:
        """Returns one row a token: its place, text, and share of the logit."""
        import pandas as pd

        total = float(self.shares.abs().sum()) or 1.0
        return pd.DataFrame(
            {
                "index": range(len(self.tokens)),
                "token": self.tokens,
                "share": self.shares.tolist(),
                "of_absolute_sum": (self.shares.abs() / total).tolist(),
            }
        )

    def plot(self) -> Figure:
        """Draws one bar a token, the constant and the bias."""
        from elm_lanczos.report.figures.attribution import draw

        return draw(self)


def attribute(
    lin: Linearization, target: int | None = None, contrast: int | None = None
) -> Attribution:
    """Attributes a logit at the output position to every input token, exactly.

    Args:
        lin: the linear system.
        target: token id; the model's own prediction if not given.
        contrast: token id whose logit is subtracted: what speaks for one rather than the other.

    Returns:
        The shares of the tokens, the constant and the bias.

    Raises:
        UnsupportedModelError: if the model's head is not affine once frozen.
        UsageError: if target and contrast are the same.
    """
    logits = lin.prediction.logits
    target = int(logits.argmax()) if target is None else target
    if target == contrast:
        raise UsageError("target and contrast are the same token: their difference is zero")
    readout = lin.readout(target)
    model_logit = float(logits[target])
    if contrast is not None:
        other = lin.readout(contrast)
        readout = readout - other
        model_logit -= float(logits[contrast])
    shares, certificate = shares_of(lin, readout), lin.certificate()
    return Attribution(
        model=lin.model.name,
        prompt=lin.text,
        certificate=certificate,
        target=target,
        contrast=contrast,
        target_token=lin.model.token_strings([target])[0],
        contrast_token="" if contrast is None else lin.model.token_strings([contrast])[0],
        logit=readout.value,
        model_logit=model_logit,
        tokens=lin.tokens,
        shares=shares.tokens.cpu(),
        constant=shares.constant,
        bias=shares.bias,
        bound=_BOUNDS[certificate.dtype],
    )
