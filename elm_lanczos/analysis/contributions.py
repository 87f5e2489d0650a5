r"""What each layer's attention and MLP contribute to a logit, and one token's Jacobian in numbers.

**Direct.** With `h_l = h_{l-1} + a_l + m_l` (see `layer_parts`) and the final norm frozen, a logit
`⟨w, N h_L⟩ + const` at position p is the sum of `⟨Nᵀw, h_0⟩`, of `⟨Nᵀw, a_l⟩` and `⟨Nᵀw, m_l⟩` for
every layer, all at p, and of the constant of norm and head: nothing is left over.

**Ablated.** Setting the output of a module to zero at all positions changes the logit by
`⟨∂logit/∂h_l, Λ_l(h; module at 0) − Λ_l(h)⟩` in the frozen linear system, exactly, because it is
affine: one backward pass gives `∂logit/∂h_l` for all layers. In the model as it is, the change is
that of a forward pass with the module's output at zero, where everything behind it answers.

**Jacobian.** One stream of m VJPs, `e_rᵀJ_i` for every row r, gives row and column norms of the
Jacobian of every token exactly, and the mean of |J_i| over blocks of rows and columns: no m×d
matrix is ever held. The largest rows are read through the input embeddings, what the largest
columns write through the unembedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from elm_lanczos.analysis.result import Analysis, Progress
from elm_lanczos.decode import decode_input, decode_output
from elm_lanczos.errors import UsageError
from elm_lanczos.layer_parts import layer_parts, outputs_zeroed, replayed
from elm_lanczos.linearization import Linearization
from elm_lanczos.svd.solve import svd

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_BOUNDS = {"float64": 1e-12, "float32": 1e-5, "tf32": 2e-3}
"""How far from the logit direct contributions may sum to, relative to the sum of their sizes."""

BINS = 128
"""Rows and columns of the heat map of a Jacobian, at most."""


@dataclass(frozen=True)
class Component:
    """What one part of the network contributes to a logit.

    Attributes:
        layer: number of the layer, from 1; 0 for the embedding, one more than there are layers for
            the constant.
        module: "embedding", "attention", "mlp" or "constant".
        direct: through the residual stream and the frozen final norm.
        ablated: change of the logit in the frozen linear system without it; None where there is
            nothing to ablate.
        ablated_model: the same in the model as it is.
    """

    layer: int
    module: str
    direct: float
    ablated: float | None = None
    ablated_model: float | None = None


@dataclass(frozen=True)
class JacobianNorms:
    """Norms of the rows and columns of every token's Jacobian, and one of them coarsened.

    Attributes:
        rows: (T, m) float64, ‖J_iᵀe_r‖.
        columns: (T, d) float64, ‖J_i e_c‖.
        map: (at most `BINS`, at most `BINS`) float64, the mean of |J| of one token over blocks of
            rows and columns.
    """

    rows: Tensor
    columns: Tensor
    map: Tensor


def jacobian_norms(
    lin: Linearization, token: int, progress: Progress | None = None
) -> JacobianNorms:
    """Streams the rows of all Jacobians by, and keeps their norms.

    Args:
        lin: the linear system.
        token: the token whose Jacobian is coarsened.
        progress: told how many rows of how many are done.

    Returns:
        The norms, exact to rounding.
    """
    T, m, d = lin.shape
    device = lin.inputs.device
    rows = torch.empty(T, m, dtype=torch.float64, device=device)
    columns = torch.zeros(T, d, dtype=torch.float64, device=device)
    size = min(m, BINS), min(d, BINS)
    sums = torch.zeros(size[0], size[1], dtype=torch.float64, device=device)
    across = torch.arange(d, device=device) * size[1] // d
    down = torch.arange(m, device=device) * size[0] // m
    for start in range(0, m, lin.block):
        numbers = torch.arange(start, min(start + lin.block, m), device=device)
        unit = torch.zeros(len(numbers), m, dtype=lin.output.dtype, device=device)
        unit[torch.arange(len(numbers), device=device), numbers] = 1
        J = lin.vjp(unit)
        rows[:, numbers] = torch.linalg.vector_norm(J, dim=-1, dtype=torch.float64).T
        columns += torch.linalg.vector_norm(J, dim=0, dtype=torch.float64).square()
        narrow = torch.zeros(len(numbers), size[1], dtype=torch.float64, device=device)
        narrow.index_add_(1, across, J[:, token].abs().double())
        sums.index_add_(0, down[numbers], narrow)
        if progress is not None:
            progress(int(numbers[-1]) + 1, m)
    counts = torch.bincount(down)[:, None] * torch.bincount(across)[None]
    return JacobianNorms(rows, columns.sqrt(), sums / counts)


@dataclass(frozen=True, kw_only=True)
class Components(Analysis):
    """What attention and MLP of every layer contribute to a logit, and one token's Jacobian.

    Attributes:
        target: the token id whose logit it is about.
        target_token: its text.
        logit: the logit that the model's own head gives at the system's output.
        model_logit: that of the untouched model.
        parts: embedding, attention and MLP of each layer, constant.
        tokens: the T input tokens as text.
        token: place of the token whose Jacobian is shown.
        norms: norms of the rows and columns of all Jacobians.
        rows: numbers of the largest rows of the token's Jacobian, largest first.
        reads: for each of them the words it reads.
        columns: numbers of its largest columns.
        writes: for each of them the words it writes.
        S: (k,), its leading singular values.
        residual: (k,), their residuals.
        converged: whether they meet the tolerance.
    """

    kind: ClassVar[str] = "components"

    target: int
    target_token: str
    logit: float
    model_logit: float
    parts: list[Component]
    tokens: list[str]
    token: int
    norms: JacobianNorms
    rows: list[int]
    reads: list[list[str]]
    columns: list[int]
    writes: list[list[str]]
    S: Tensor
    residual: Tensor
    converged: bool

    @property
    def total(self) -> float:
        """The sum of all direct contributions, in float64."""
        return sum(part.direct for part in self.parts)

    @property
    def error(self) -> float:
        """|total − logit|, relative to the sum of their sizes."""
        size = sum(abs(part.direct) for part in self.parts)
        return abs(self.total - self.logit) / max(size, 1.0)

    @property
    def frobenius(self) -> float:
        """‖J‖_F of the token."""
        return float(self.norms.rows[self.token].norm())

    @property
    def stable_rank(self) -> float:
        """‖J‖_F² / σ_1² of the token; 0 if J is."""
        largest = float(self.S[0])
        return (self.frobenius / largest) ** 2 if largest else 0.0

    @property
    def facts(self) -> list[str]:
        """How the direct contributions sum, and the size of the Jacobian."""
        sums = {
            name: sum(part.direct for part in self.parts if part.module == name)
            for name in ("embedding", "attention", "mlp", "constant")
        }
        return [
            f"logit of {self.target_token!r}: {self.logit:.6f} = "
            + " + ".join(f"{value:.6f} ({name})" for name, value in sums.items())
            + " directly",
            f"they sum to it within {self.error:.1e} of their sizes; the untouched model has "
            f"{self.model_logit:.6f}",
            "ablated: change of the logit with the module's output at zero at all positions, in "
            "the frozen linear system (exact) and in the untouched model",
            f"Jacobian of token {self.token} {self.tokens[self.token]!r}: ‖J‖_F "
            f"{self.frobenius:.4g}, σ_1 {float(self.S[0]):.4g}, stable rank {self.stable_rank:.4g}",
        ]

    @property
    def doubts(self) -> list[str]:
        """Also names contributions that do not sum to the logit, and triplets not converged."""
        found = super().doubts
        bound = _BOUNDS[self.certificate.dtype if self.certificate else "float32"]
        if not self.error <= bound:
            found = [*found, f"the contributions sum to the logit only within {self.error:.1e}"]
        return found if self.converged else [*found, "the spectrum did not converge"]

    def to_dataframe(self) -> pd.DataFrame:
        """Returns one row for each part of the network."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": [part.layer for part in self.parts],
                "module": [part.module for part in self.parts],
                "direct": [part.direct for part in self.parts],
                "ablated": _column(part.ablated for part in self.parts),
                "ablated_model": _column(part.ablated_model for part in self.parts),
            }
        )

    def jacobian(self) -> pd.DataFrame:
        """Returns the largest rows and columns of the token's Jacobian, side by side."""
        import pandas as pd

        rows, columns = self.norms.rows[self.token], self.norms.columns[self.token]
        return pd.DataFrame(
            {
                "row": self.rows,
                "row_norm": rows[self.rows].tolist(),
                "reads": self.reads,
                "column": self.columns,
                "column_norm": columns[self.columns].tolist(),
                "writes": self.writes,
            }
        )

    def tables(self) -> list[pd.DataFrame]:
        """Returns the parts, and the largest rows and columns."""
        return [self.to_dataframe(), self.jacobian()]

    def facts_to_dict(self) -> dict[str, Any]:
        """Returns the logit, its sum, and everything of the token's Jacobian."""
        names = "target target_token logit model_logit total error tokens token frobenius"
        return {name: getattr(self, name) for name in f"{names} stable_rank".split()} | {
            "singular_values": self.S.tolist(),
            "residual": self.residual.tolist(),
            "jacobian": self.jacobian().to_dict(orient="records"),
            "row_norms": self.norms.rows[self.token].tolist(),
            "column_norms": self.norms.columns[self.token].tolist(),
            "map": self.norms.map.tolist(),
        }

    def plot(self) -> Figure:
        """Draws the Jacobian with its spectrum, and the contributions of the layers."""
        from elm_lanczos.report.figures.contributions import draw

        return draw(self)


def components(
    lin: Linearization,
    token: int | None = None,
    *,
    target: int | None = None,
    k: int = 16,
    largest: int = 8,
    top: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Components:
    """Says what attention and MLP of every layer contribute to a logit.

    Args:
        lin: the linear system of a decoder that is a chain of layers.
        token: the token whose Jacobian is looked at; that at the output position if not given.
        target: id of the token whose logit it is about; the model's own prediction if not given.
        k: singular values of the token's Jacobian.
        largest: rows and columns of it that are decoded.
        top: words for each of them.
        seed: of the random vectors.
        progress: told how much of how much is done.

    Returns:
        Contributions, effects of ablation, and the Jacobian in numbers.

    Raises:
        UnsupportedModelError: if the layers cannot be told apart (see `layer_parts`).
        UsageError: if there is no such token, or k or a number of rows cannot be used.
    """
    T, m, d = lin.shape
    token = lin.position if token is None else token
    if not -T <= token < T:
        raise UsageError(f"token {token} is outside the {T} tokens")
    if token % T > lin.position:
        raise UsageError(f"token {token} is behind the output position, which does not see it")
    if min(largest, top) < 1:
        raise UsageError("at least one row and one word have to be shown")
    token %= T
    logits = lin.prediction.logits
    target = int(logits.argmax()) if target is None else target
    steps = 2 * len(lin.model.layers) + m

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, steps)

    parts, logit = _contributions(lin, target, tell)
    norms = jacobian_norms(lin, token, lambda done, _: tell(steps - m + done))
    rows = norms.rows[token].topk(min(largest, m)).indices
    columns = norms.columns[token].topk(min(largest, d)).indices
    count = min(len(rows), len(columns))
    J = lin.token(token)
    found_rows = J.T @ _units(rows[:count], m, lin.output)
    found_columns = J @ _units(columns[:count], d, lin.output)
    triplets = svd(lin, min(k, m, d), tokens=[token], seed=seed, memory=lin.spare_bytes)
    model = lin.model
    return Components(
        model=model.name,
        prompt=lin.text,
        certificate=lin.certificate(),
        target=target,
        target_token=model.token_strings([target])[0],
        logit=logit,
        model_logit=float(logits[target]),
        parts=parts,
        tokens=lin.tokens,
        token=token,
        norms=JacobianNorms(norms.rows.cpu(), norms.columns.cpu(), norms.map.cpu()),
        rows=rows[:count].tolist(),
        reads=[model.token_strings(w) for w in decode_input(found_rows.T, model, top).ids],
        columns=columns[:count].tolist(),
        writes=[model.token_strings(w) for w in decode_output(found_columns.T, model, top).ids],
        S=triplets.S[0].cpu(),
        residual=triplets.residual[0].cpu(),
        converged=bool(triplets.converged.all()),
    )


def _contributions(lin: Linearization, target: int, tell: Any) -> tuple[list[Component], float]:
    """The contributions of all parts, and the logit that they are to sum to."""
    decoder, number, model = lin.decoder, lin.number, lin.model
    layers = layer_parts(decoder)
    readout = lin.readout(target)
    w = lin.output.new_zeros(1, *decoder.outputs.shape)
    w[0, number] = readout.cotangent
    gradients = [g[0, number].double() for g in decoder.pulled_back(w)][::-1]
    final = decoder.segments[-1]
    p = 0 if decoder.narrowed else lin.position
    direct = gradients[-1][p]  # the final norm looks at one position
    (at_zero,) = replayed(decoder, final, (torch.zeros_like(final.input), ()))
    constant = readout.cotangent.double() @ at_zero[number, 0].double().to(direct.device)

    given = lin.inputs if lin.ids is None else lin.ids
    whole = lin.prediction.logits[target]

    def without(modules: Any) -> float | None:
        if not modules:
            return None
        with outputs_zeroed(modules):
            return float(model.predict(given, lin.position).logits[target] - whole)

    embedding = layers[0].segment.input[number, lin.position].double().to(direct)
    parts = [Component(0, "embedding", float(direct @ embedding))]
    offset = len(decoder.segments) - 1 - len(layers)
    for index, layer in enumerate(layers):
        values, after = layer.values(), gradients[offset + index + 1]
        row = 0 if layer.narrowed else lin.position
        attention, mlp, no_attention = (
            value[number].double().to(after)
            for value in (values.attention, values.mlp, values.without_attention)
        )
        for name, value, change, modules in (
            ("attention", attention, no_attention - attention - mlp, layer.modules.attention),
            ("mlp", mlp, -mlp, layer.modules.mlp),
        ):
            if not modules:
                continue
            effect = float((after * change).sum())
            parts.append(
                Component(
                    index + 1, name, float(direct @ value[row].to(direct)), effect, without(modules)
                )
            )
        tell(2 * (index + 1))
    end = float(constant) + readout.constant
    return [*parts, Component(len(layers) + 1, "constant", end)], readout.value


def _units(numbers: Tensor, size: int, like: Tensor) -> Tensor:
    """Unit vectors as columns, (size, b)."""
    unit = like.new_zeros(size, len(numbers))
    unit[numbers, torch.arange(len(numbers), device=like.device)] = 1
    return unit


def _column(values: Any) -> list[float]:
    return [float("nan") if value is None else value for value in values]
