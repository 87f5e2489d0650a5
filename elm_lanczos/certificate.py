"""How exactly a linear system reproduces the model it was made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

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

    def _repr_html_(self) -> str:
        """Shows it in a notebook."""
        from elm_lanczos.report import notebook

        return notebook.certificate(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures and the verdict as plain data."""
        return {**asdict(self), "exact": self.exact, "failures": self.failures}
