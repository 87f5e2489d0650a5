r"""The ordinary Jacobian beside the detached one.

The ordinary Jacobian `J° = ∂y/∂x` of the untouched decoder also follows how norms, attention and
gates change with the input. So `J° x` is not the output: the model is not homogeneous in its input
embeddings. The detached Jacobian holds them fixed, and `J x + c` is the output, as in the first
figure of Golden, "Large language models are locally linear mappings" (TMLR 2025).

`J° x` is one product along `x`, by dual numbers through the whole decoder: no Jacobian is formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from elm_lanczos.analysis.result import Analysis
from elm_lanczos.chain import is_out_of_memory
from elm_lanczos.errors import UnsupportedModelError, first_line
from elm_lanczos.linearization import Linearization

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SAME = 1e-5
"""How far, relatively, the output of the differentiated model may be from that of the system; the
model's own norms and softmax compute in float32 even where all else is in float64."""


@dataclass(frozen=True, kw_only=True)
class OrdinaryJacobian(Analysis):
    """The output, and what the ordinary and the detached Jacobian make of the input.

    Attributes:
        output: (m,), the system's output y.
        ordinary: (m,), `J° x` of the untouched model.
        detached: (m,), `J x`, the sum over all tokens.
        constant: (m,), the constant `c`; `J x + c` is the output.
        differentiated: (m,), the output of the untouched model where it was differentiated.
    """

    kind: ClassVar[str] = "ordinary"

    output: Tensor
    ordinary: Tensor
    detached: Tensor
    constant: Tensor
    differentiated: Tensor

    @property
    def reconstructions(self) -> dict[str, Tensor]:
        """What each Jacobian reconstructs of the output: `J° x` and `J x + c`."""
        return {"ordinary": self.ordinary, "detached": self.detached + self.constant}

    def error(self, name: str) -> float:
        """Returns ‖y − ŷ‖ / ‖y‖ of a reconstruction, 'ordinary' or 'detached'."""
        off = self.output - self.reconstructions[name]
        return float(off.norm() / self.output.norm())

    def deviation(self, name: str) -> float:
        """Returns std(y − ŷ) / std(y) over the features, the figure of the paper."""
        off = self.output - self.reconstructions[name]
        return float(off.std() / self.output.std())

    @property
    def fidelity(self) -> float:
        """How far the differentiated model's output is from the system's, relatively."""
        return float((self.differentiated - self.output).norm() / self.output.norm())

    @property
    def facts(self) -> list[str]:
        """The errors of both, and the constant's share."""
        lines = [
            f"{name} Jacobian: ‖y − {formula}‖ / ‖y‖ = {self.error(name):.2e}, "
            f"std(error) / std(y) = {self.deviation(name):.2e}"
            for name, formula in (("ordinary", "J°x"), ("detached", "(Jx + c)"))
        ]
        share = float(self.constant.norm() / self.output.norm())
        return [*lines, f"constant: ‖c‖ / ‖y‖ = {share:.2e}"]

    @property
    def doubts(self) -> list[str]:
        """Also says if it was another function that was differentiated."""
        if self.fidelity <= _SAME:
            return super().doubts
        off = f"the differentiated model's output is off by {self.fidelity:.1e}"
        return [*super().doubts, off]

    def facts_to_dict(self) -> dict[str, Any]:
        """Returns the errors of both by name."""
        both = ("ordinary", "detached")
        return (
            {f"{name}_error": self.error(name) for name in both}
            | {f"{name}_deviation": self.deviation(name) for name in both}
            | {"fidelity_of_the_differentiated": self.fidelity}
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Returns one row a feature: the output, both reconstructions and the constant in them."""
        import pandas as pd

        return pd.DataFrame(
            {
                "feature": range(len(self.output)),
                "output": self.output.tolist(),
                **{name: made.tolist() for name, made in self.reconstructions.items()},
                "constant": self.constant.tolist(),
            }
        )

    def plot(self) -> Figure:
        """Draws the output against both reconstructions."""
        from elm_lanczos.report.figures.ordinary_jacobian import draw

        return draw(self)


def ordinary(lin: Linearization) -> OrdinaryJacobian:
    """Compares what the ordinary and the detached Jacobian make of the input.

    Args:
        lin: the linear system, of the whole decoder or to a layer.

    Returns:
        The output and both reconstructions.

    Raises:
        UnsupportedModelError: if torch cannot differentiate the untouched model.
    """
    differentiated, ordinary = _product_of_the_untouched(lin)
    return OrdinaryJacobian(
        model=lin.model.name,
        prompt=lin.text,
        certificate=lin.certificate(),
        output=lin.output.cpu(),
        ordinary=ordinary.to(lin.output).cpu(),
        detached=lin.jvp(lin.inputs).cpu(),
        constant=lin.constant.cpu(),
        differentiated=differentiated.to(lin.output).cpu(),
    )


def _product_of_the_untouched(lin: Linearization) -> tuple[Tensor, Tensor]:
    """The untouched decoder's output (m,) and `J° x` (m,)."""
    x, model = lin.inputs[None], lin.model
    ids = None if lin.ids is None else lin.ids[None]
    with model.differentiable(), forward_ad.dual_level():
        try:
            hidden = model.hidden_states(forward_ad.make_dual(x, x.clone()), ids, lin.layer)
            output, product = forward_ad.unpack_dual(hidden[0, lin.position])
        except (NotImplementedError, RuntimeError) as error:  # an operation without a derivative
            if is_out_of_memory(error):
                raise
            raise UnsupportedModelError(
                f"{model.name}: torch has no forward derivative of it ({first_line(error)})"
            ) from error
    return output, torch.zeros_like(output) if product is None else product
