r"""What every layer writes and reads: singular triplets of its detached Jacobians.

For each layer, and for the residual stream, attention and the MLP: the leading triplets of

- `cumulative`: `N ∂h_l[p]/∂x_i`, from each token's embedding to the stream behind layer l at the
  output position p (for a module: to what it adds there);
- `layerwise`: `N ∂h_l[p]/∂h_{l-1}[i]`, from each token's stream before the layer;
- `to-end`: `∂y/∂h_l[i]`, from the stream behind the layer to the output.

`N` is the final norm frozen at `h_l[p]`, the convention of Golden (TMLR 2025), or the identity. How
the Jacobians share their work is told in `layer_operators`; none is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from elm_lanczos.analysis.result import Analysis, Progress
from elm_lanczos.decode import Words, decode_triplets
from elm_lanczos.errors import UnsupportedModelError, UsageError
from elm_lanczos.frozen_decoder import FrozenDecoder
from elm_lanczos.layer_operators import (
    CUMULATIVE,
    KINDS,
    LAYERWISE,
    MODULES,
    RESIDUAL,
    TO_END,
    CumulativeOperators,
    LayerOperators,
    LayerReadout,
    LayerwiseOperators,
    Place,
    ToEndOperators,
    readouts,
)
from elm_lanczos.linearization import Linearization
from elm_lanczos.status import Status
from elm_lanczos.sublayers import Sublayers
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import SVDResult
from elm_lanczos.svd.solve import plan_for, solve

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

DEFAULT_K, DEFAULT_TOL, DEFAULT_TOP = 6, 1e-3, 5
READOUTS = ("norm", "raw")

_LOCKSTEP = 192
"""Operators that are solved at a time: those of few tokens fill a block of vectors together."""

_OPERATORS: dict[str, type[LayerOperators]] = {
    CUMULATIVE: CumulativeOperators,
    LAYERWISE: LayerwiseOperators,
    TO_END: ToEndOperators,
}


@dataclass(frozen=True)
class LayerTriplets:
    """The triplets of one layer, module and kind.

    Attributes:
        kind: `cumulative`, `layerwise` or `to-end`.
        layer: the layer's number, counted from 1.
        module: `residual`, `attention` or `mlp`.
        index: positions of the n tokens.
        triplets: n operators' triplets, on the CPU.
        u: the words that they write, (n, k, top).
        v: the words that they read, (n, k, top).
    """

    kind: str
    layer: int
    module: str
    index: tuple[int, ...]
    triplets: SVDResult
    u: Words
    v: Words


@dataclass(frozen=True, kw_only=True)
class LayerSpectra(Analysis):
    """Leading singular triplets by layer, module and token, in words.

    Attributes:
        tokens: the T input tokens as text.
        token_ids: their ids; None where embeddings were given.
        position: the output position p.
        depth: layers of the model.
        readout: `norm` or `raw`.
        k: triplets of each Jacobian.
        tol: the residual asked for, relative to σ₁.
        results: the triplets by kind, layer and module, in this order.
        left_out: layers that are not taken apart into modules, by number, and why.
        spelt: texts of the ids among the words.
        passes: vectors pushed through segments of the chain, divided by their number.
    """

    kind: ClassVar[str] = "layers"

    tokens: list[str]
    token_ids: tuple[int, ...] | None
    position: int
    depth: int
    readout: str
    k: int
    tol: float
    results: dict[tuple[str, int, str], LayerTriplets]
    left_out: dict[int, str]
    spelt: dict[int, str]
    passes: float

    @property
    def kinds(self) -> list[str]:
        """The kinds there are, in their order."""
        return list(dict.fromkeys(kind for kind, _, _ in self.results))

    @property
    def modules(self) -> list[str]:
        """The modules there are, in their order."""
        return [m for m in MODULES if any(module == m for _, _, module in self.results)]

    def words(self, ids: Tensor) -> list[str]:
        """Returns the texts of some of the ids that singular vectors were decoded to."""
        return [self.spelt[i] for i in ids.tolist()]

    @property
    def facts(self) -> list[str]:
        """What was computed, how exactly, and how singular vectors are read."""
        found = list(self.results.values())
        operators = sum(len(one.index) for one in found)
        residual = max((_worst(one.triplets) for one in found), default=0.0)
        through = "the final norm frozen there" if self.readout == "norm" else "no norm"
        shown = found[0].index[-1]
        facts = [
            f"of token {shown} {self.tokens[shown]!r}; the others are in what is saved",
            f"{operators} Jacobians of {len({one.layer for one in found})} layers at position "
            f"{self.position}, {self.k} triplets each; h_l is read through {through}",
            *_read_as(self.kinds, self.readout),
            f"largest residual {residual:.1e} of σ₁ (tol {self.tol:.0e}); {self.passes:.0f} passes",
        ]
        by_reason: dict[str, list[int]] = {}
        for layer, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(layer)
        for reason, layers in by_reason.items():
            which = ", ".join(map(str, layers))
            facts.append(f"no modules of layer{'s' * (len(layers) > 1)} {which}: {reason}")
        return facts

    @property
    def doubts(self) -> list[str]:
        """Also names Jacobians that have not converged."""
        lost = [
            f"{one.kind} {one.module} of layer {one.layer}"
            for one in self.results.values()
            if not bool(one.triplets.converged.all())
        ]
        if not lost:
            return super().doubts
        shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        return [*super().doubts, f"not converged to {self.tol:.0e} of σ₁: tokens of {shown}"]

    def facts_to_dict(self) -> dict[str, Any]:
        """Returns the options and the passes by name."""
        names = "tokens position depth readout k tol passes left_out"
        return {name: getattr(self, name) for name in names.split()}

    def to_dataframe(self) -> pd.DataFrame:
        """Returns one row a triplet: kind, layer, module, token, σ and words."""
        import pandas as pd

        rows = [row for one in self.results.values() for row in self._rows(one)]
        return pd.DataFrame(rows)

    def tables(self) -> list[pd.DataFrame]:
        """Returns the leading triplet of the last token asked for, of each layer and module.

        What is the same in all rows is left out: the facts say it.
        """
        table = self.to_dataframe()
        last = table["index"] == table["index"].max()
        names = ["layer", "module", "sigma", "stable_rank", "writes", "reads"]
        if (table["stable_rank_error"] > 0).any():  # an estimate, where no stream had all rows
            names.insert(4, "stable_rank_error")
        names = ["kind"] * (len(self.kinds) > 1) + names
        return [table[last & (table["component"] == 0)][names].reset_index(drop=True)]

    def _rows(self, one: LayerTriplets) -> Iterator[dict[str, Any]]:
        found = one.triplets
        S, residual = found.S.tolist(), found.residual.tolist()
        rank, spread = found.stable_rank.tolist(), found.stable_rank_error.tolist()
        for row, index in enumerate(one.index):
            for j in range(found.S.shape[1]):
                yield {
                    "kind": one.kind,
                    "layer": one.layer,
                    "module": one.module,
                    "index": index,
                    "token": self.tokens[index],
                    "component": j,
                    "sigma": S[row][j],
                    "residual": residual[row][j],
                    "status": Status(int(found.status[row])).name.lower(),
                    "stable_rank": rank[row],
                    "stable_rank_error": spread[row],
                    "writes": self.words(one.u.ids[row, j]),
                    "reads": self.words(one.v.ids[row, j]),
                }

    def plot(self, kind: str | None = None, token: int | None = None) -> Figure:
        """Draws stable ranks and the path of leading directions, and spectra with their words.

        Args:
            kind: one of `kinds`; the first if not given.
            token: position of a token asked for; the last one if not given.

        Returns:
            The figure.
        """
        from elm_lanczos.report.figures.layer_spectra import draw

        return draw(self, kind, token)


def _read_as(kinds: Sequence[str], readout: str) -> list[str]:
    """What is to be known of words of vectors that lie in the residual stream."""
    found = []
    if set(kinds) - {CUMULATIVE}:
        found.append(
            "of layerwise and to-end Jacobians the v lie in the residual stream; they too are read "
            "by their cosine with input embeddings"
        )
    if readout == "raw" and set(kinds) - {TO_END}:
        found.append("the u lie in the residual stream, and are read without the final norm")
    return found


def _worst(found: SVDResult) -> float:
    """The largest residual relative to σ₁."""
    largest = found.S[:, :1].double()
    ratio = found.residual.double() / torch.where(largest == 0, 1.0, largest)
    return float(ratio.max())


def layers(
    lin: Linearization,
    layers: Sequence[int] | None = None,
    modules: Sequence[str] = MODULES,
    kinds: Sequence[str] = (CUMULATIVE,),
    *,
    readout: str = "norm",
    tokens: Sequence[int] | None = None,
    k: int = DEFAULT_K,
    tol: float = DEFAULT_TOL,
    top: int = DEFAULT_TOP,
    seed: int = 0,
    progress: Progress | None = None,
) -> LayerSpectra:
    """Computes the leading triplets of the Jacobians of layers and their modules.

    Args:
        lin: the linear system.
        layers: numbers of layers, counted from 1; all if not given.
        modules: of `residual`, `attention` and `mlp`. The kind `to-end` is of the stream alone.
        kinds: of `cumulative`, `layerwise` and `to-end`.
        readout: `norm`, the stream at p through the final norm frozen there; or `raw`, as it is.
        tokens: positions i; all up to the output position if not given.
        k: triplets of each Jacobian.
        tol: the residual to reach, relative to σ₁.
        top: words of each singular vector.
        seed: of every random vector.
        progress: told how far it is.

    Returns:
        The triplets, those that have not converged among them, which the result says.

    Raises:
        UnsupportedModelError: if the model is not a chain of layers, or none of them can be taken
            apart into the modules asked for.
        UsageError: if an option cannot be used, or the memory has no room for one operator.
    """
    if lin.decoder.layer is not None:
        raise UsageError("layers are those of the whole decoder: linearise it without layer=")
    decoder = _alone(lin)
    sub = Sublayers(decoder)
    begun = decoder.pushed
    _check_options(modules, kinds, readout)
    numbers = _chosen(layers, len(sub), "layer", "the model has layers", start=1)
    chosen = [number - 1 for number in numbers]
    upto = decoder.position + 1
    some = _chosen(tokens, upto, "token", "behind which the output sees")
    work = [
        (kind, batch, plan)
        for kind in KINDS
        if kind in kinds
        for batch, plan in _work(sub, kind, chosen, modules, some, readout, (k, tol, seed))
    ]
    if not work:
        raise UnsupportedModelError(
            f"{lin.model.name}: none of these layers can be taken apart into {', '.join(modules)}: "
            + next((layer.whole for layer in sub.layers if layer.whole), "it has no such module")
        )
    results: dict[tuple[str, int, str], LayerTriplets] = {}
    total = sum(_predicted(batch, plan) for _, batch, plan in work)
    before = 0
    for kind, batch, plan in work:
        cost = _predicted(batch, plan)

        tell = partial(_tell, progress, before, cost, total, batch.row_cost)
        for (layer, module), found in _solved(batch, plan, tell):
            words = decode_triplets(found, lin.model, top)
            results[kind, layer + 1, module] = LayerTriplets(
                kind,
                layer + 1,
                module,
                tuple(some),
                _to_cpu(found),
                _words(words.u),
                _words(words.v),
            )
        before += cost
    order = sorted(results, key=lambda key: (KINDS.index(key[0]), key[1], MODULES.index(key[2])))
    results = {key: results[key] for key in order}
    ids = {i for one in results.values() for w in (one.u, one.v) for i in w.ids.unique().tolist()}
    spelt = dict(zip(ids, lin.model.token_strings(list(ids)), strict=True))
    apart = set(modules) - {RESIDUAL}
    return LayerSpectra(
        model=lin.model.name,
        prompt=lin.text,
        certificate=lin.certificate(),
        tokens=lin.tokens,
        token_ids=None if lin.ids is None else tuple(lin.ids.tolist()),
        position=decoder.position,
        depth=len(sub),
        readout=readout,
        k=k,
        tol=tol,
        results=results,
        left_out={i + 1: sub.layers[i].whole for i in chosen if apart and sub.layers[i].whole},
        spelt=spelt,
        passes=(decoder.pushed - begun) / len(decoder.segments),
    )


def _alone(lin: Linearization) -> FrozenDecoder:
    """The frozen decoder at one prompt."""
    if len(lin.decoder.inputs) == 1:
        return lin.decoder
    ids = None if lin.ids is None else lin.ids[None]
    return FrozenDecoder(
        lin.model, lin.inputs[None], lin.position, ids=ids, block=lin.block, memory=lin.memory
    )


def _check_options(modules: Sequence[str], kinds: Sequence[str], readout: str) -> None:
    if isinstance(modules, str) or isinstance(kinds, str):
        raise UsageError("modules and kinds are lists of names")
    for what, given, known in (
        ("module", modules, MODULES),
        ("kind", kinds, KINDS),
        ("readout", (readout,), READOUTS),
    ):
        if not given:
            raise UsageError(f"give at least one {what} of {', '.join(known)}")
        for one in given:
            if one not in known:
                raise UsageError(f"unknown {what} {one!r}: use {', '.join(known)}")
    if RESIDUAL not in modules and TO_END in kinds:
        raise UsageError("the kind to-end is of the residual stream: add the module residual")


def _chosen(
    numbers: Sequence[int] | None, count: int, what: str, there: str, start: int = 0
) -> list[int]:
    """Numbers asked for in ascending order, each once; all if none are."""
    if numbers is None:
        return list(range(start, start + count))
    found = sorted({int(number) for number in numbers})
    if not found or found[0] < start or found[-1] >= start + count:
        raise UsageError(f"{what}s {found}: {there} {start} … {start + count - 1}")
    return found


def _work(
    sub: Sublayers,
    kind: str,
    layers: Sequence[int],
    modules: Sequence[str],
    tokens: Sequence[int],
    readout: str,
    options: tuple[int, float, int],
) -> Iterator[tuple[LayerOperators, Plan]]:
    """The operators of one kind in batches that share their work and fit the memory."""
    end = LayerReadout(sub.decoder.outputs.shape[-1], factors=dict.fromkeys(layers, 1.0))
    reads = [end] if kind == TO_END else readouts(sub, layers, raw=readout == "raw")
    for read in reads:
        rest = sorted(read.factors)
        while rest:
            size = len(rest)
            while True:
                batch = _batch(sub, kind, rest[:size], modules, tokens, read)
                if batch is None:
                    break
                plan = _plan(batch, sub.decoder.spare_bytes, *options)
                if size == 1 or plan.method != "stream" or plan.panel >= batch.shape[0]:
                    yield batch, plan
                    break
                size = max(1, min(size - 1, size * plan.panel // batch.shape[0]))
            rest = rest[size:]


def _batch(
    sub: Sublayers,
    kind: str,
    layers: Sequence[int],
    modules: Sequence[str],
    tokens: Sequence[int],
    readout: LayerReadout,
) -> LayerOperators | None:
    """The operators of some layers; None if none has the modules asked for."""
    places, inputs = [], []
    for layer in layers:
        there = sub.layers[layer].modules if kind != TO_END else ()
        for module in (m for m in MODULES if m in modules and (m == RESIDUAL or m in there)):
            places += [Place(layer, module, token) for token in tokens]
            if kind == CUMULATIVE:
                x = sub.decoder.inputs[0]
            elif kind == LAYERWISE:
                x = sub.layers[layer].input
            else:
                x = sub.widened(sub.stream(layer)[None])[0]
            inputs.append(x[list(tokens)])
    if not places:
        return None
    device = sub.decoder.inputs.device
    together = torch.cat([x.detach().to(device) for x in inputs])
    return _OPERATORS[kind](sub, places, readout, together)


def _plan(batch: LayerOperators, memory: int, k: int, tol: float, seed: int) -> Plan:
    """The matrix-free method that takes fewer passes, given what a row of all operators costs."""
    # A stream costs many times what it does for the tokens of one Jacobian, and wider blocks save
    # one: of the bundled model's layers, some need a third one with the width that is enough there,
    # and none with half as much more.
    stream = plan_for(batch, k, "stream", tol, seed, memory)
    width = min(batch.shape[1], batch.shape[2], stream.width * 3 // 2)
    stream = replace(
        stream,
        width=width,
        basis=min(batch.shape[2], max(stream.basis, 3 * width)),
        panel=max(1, stream.panel * 2 // 3) if stream.panel < batch.shape[0] else stream.panel,
    )
    lanczos = plan_for(batch, k, "lanczos", tol, seed, memory)
    by_rows, one_by_one = stream.passes["stream"] * batch.row_cost, lanczos.passes["lanczos"]
    plan = lanczos if one_by_one <= by_rows and not lanczos.refusal else stream
    if plan.refusal:
        raise UsageError(plan.refusal)
    return plan


def _tell(
    progress: Progress | None, before: int, most: int, total: int, row_cost: float, made: int
) -> None:
    """Tells how much is done, of a batch no more than was predicted."""
    if progress is not None:
        progress(before + min(most, int(made * row_cost)), total)


def _predicted(batch: LayerOperators, plan: Plan) -> int:
    """Products that a batch is expected to take."""
    rows = plan.method == "stream"
    return int(plan.passes[plan.method] * (batch.row_cost if rows else 1.0)) + 1


def _solved(
    batch: LayerOperators, plan: Plan, tell: Callable[[int], None]
) -> Iterator[tuple[tuple[int, str], SVDResult]]:
    """The triplets of each layer and module of a batch."""
    count, total = len(batch.tokens), len(batch.places)
    size = min(_LOCKSTEP, plan.panel)
    groups = [range(start, min(start + size, total)) for start in range(0, total, size)]
    found = dict(solve(batch, plan, groups, tell))
    whole = SVDResult.concatenate([found[i] for i in range(len(groups))], 0)
    for start in range(0, total, count):
        layer, module, _ = batch.places[start]
        yield (layer, module), whole.rows(start, start + count)


def _to_cpu(found: SVDResult) -> SVDResult:
    tensors: dict[str, Any] = {n: v.cpu() for n, v in vars(found).items() if isinstance(v, Tensor)}
    return replace(found, **tensors)


def _words(words: Words) -> Words:
    return Words(words.ids.cpu(), words.scores.cpu())
