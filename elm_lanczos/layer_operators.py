r"""Detached Jacobians of layers and of their modules, in batches that share their work.

With p the output position, `h_l` the residual stream behind layer l, and `C_l` what a module of it
adds there (see `sublayers`), read by the final norm `N` frozen at `h_l[p]` or as it is:

| kind | of `residual` | of a module |
|---|---|---|
| `cumulative` | `N ∂h_l[p]/∂x_i` | `N ∂C_l[p]/∂x_i` |
| `layerwise` | `N ∂h_l[p]/∂h_{l-1}[i]` | `N ∂C_l[p]/∂h_{l-1}[i]` |
| `to-end` | `∂y/∂h_l[i]` | – |

Norms frozen at different points are the same map up to a factor, so that one cotangent `u` serves
all layers. As `h_l = h_{l-1} + Σ C_l`, its row of a residual stream is the sum of the row of the
one before and of those of the modules; a group of g layers takes two pulls of `u` a layer, and one
more below the group, all pulled through the layers below in one block, for which each is linearised
once.
One pull from the output passes by all `to-end` rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from elm_lanczos.frozen_decoder import LinearMap
from elm_lanczos.operators import OperatorBatch
from elm_lanczos.sublayers import ATTENTION, MLP, Sublayers

RESIDUAL = "residual"
MODULES = (RESIDUAL, ATTENTION, MLP)
CUMULATIVE, LAYERWISE, TO_END = "cumulative", "layerwise", "to-end"
KINDS = (CUMULATIVE, LAYERWISE, TO_END)


class Place(NamedTuple):
    """Which Jacobian an operator is.

    Attributes:
        layer: the layer's number from 0.
        module: one of MODULES.
        token: the position i.
    """

    layer: int
    module: str
    token: int


@dataclass(frozen=True)
class LayerReadout:
    """How the residual stream at the output position is read behind some layers.

    Attributes:
        features: m, of what is read.
        map: of (b, d) to (b, m); None reads it as it is.
        factors: by layer, what its own readout is of that map; 1 for others.
    """

    features: int
    map: LinearMap | None = None
    factors: dict[int, float] = field(default_factory=dict)

    def vjp(self, u: Tensor) -> Tensor:
        """Returns `Nᵀu`, (b, m) -> (b, d), without the factor."""
        return u if self.map is None else self.map.vjp(u)

    def jvp(self, v: Tensor) -> Tensor:
        """Returns `N v`, (b, d) -> (b, m), without the factor."""
        return v if self.map is None else self.map.jvp(v)


def readouts(sub: Sublayers, layers: Sequence[int], *, raw: bool) -> list[LayerReadout]:
    """Returns the readouts of some layers, adjacent ones in one wherever they are one map.

    Args:
        sub: the layers.
        layers: their numbers, ascending.
        raw: read the stream as it is, and not through the final norm.

    Returns:
        The readouts; each layer is in one.
    """
    if raw:
        return [LayerReadout(sub.decoder.inputs.shape[-1], factors=dict.fromkeys(layers, 1.0))]
    decoder = sub.decoder
    m = decoder.outputs.shape[-1]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, m, generator=generator, dtype=torch.float64).to(decoder.outputs)
    tolerance = 1e-2 if decoder.precision == "tf32" else 64 * torch.finfo(probe.dtype).eps
    found: list[LayerReadout] = []
    reference = probe.new_zeros(0)
    for layer in layers:
        norm = sub.norm(layer)
        own = norm.vjp(probe)[0]
        if found:
            factor = float((own.double() @ reference.double()) / reference.double().square().sum())
            if float((own - factor * reference).norm()) <= tolerance * float(own.norm()):
                found[-1].factors[layer] = factor
                continue
        found.append(LayerReadout(m, norm, {layer: 1.0}))
        reference = own
    return found


class LayerOperators(OperatorBatch):
    """Detached Jacobians of some layers, modules and tokens; see the kinds below.

    Args:
        sub: the layers.
        places: which; sorted, all tokens the same for each layer and module.
        readout: how they are read.
        inputs: (n, d), what each Jacobian is multiplied with.
    """

    def __init__(
        self, sub: Sublayers, places: Sequence[Place], readout: LayerReadout, inputs: Tensor
    ) -> None:
        decoder = sub.decoder
        self.sub, self.places, self.readout = sub, tuple(places), readout
        self.inputs = inputs
        self.dtype, self.device = decoder.outputs.dtype, decoder.outputs.device
        self.shape = (len(places), readout.features, inputs.shape[-1])
        length = decoder.inputs.shape[1]
        self.labels = tuple(
            (layer * len(MODULES) + MODULES.index(module)) * length + token
            for layer, module, token in places
        )
        self.precision = decoder.precision
        self.tokens = sorted({place.token for place in places})
        self.wanted = {
            layer: [m for m in MODULES if any(p[:2] == (layer, m) for p in places)]
            for layer in sorted({place.layer for place in places})
        }
        pushes = self._pushes_of_row()
        self.vectors = max(1, decoder.block // max(1, self._widest))
        self.row_cost = max(1.0, pushes / self._pushes_of_product())

    @property
    def _widest(self) -> int:
        """Vectors that go through a segment together in `rows`, for each cotangent."""
        return 1

    @abstractmethod
    def _pushes_of_row(self) -> float:
        """Segments that vectors of `rows` are pushed through, for each cotangent."""

    @abstractmethod
    def _pushes_of_product(self) -> float:
        """Segments that the vector of a product is pushed through, on average."""

    @abstractmethod
    def _rows(self, Y: Tensor, put: Callable[[int, str, Tensor], None]) -> None:
        """Gives the rows (b, T, d) of each layer and module wanted to `put`."""

    @abstractmethod
    def _pushed(self, V: Tensor, places: Sequence[Place]) -> Tensor:
        """The product of each place's operator with a vector, (a, d) -> (a, m)."""

    @abstractmethod
    def _pulled(self, U: Tensor, places: Sequence[Place]) -> Tensor:
        """The product of each place's transpose with a vector, (a, m) -> (a, d)."""

    def matvec(self, V: Tensor, index: Tensor) -> Tensor:
        """See `OperatorBatch.matvec`: JVPs of tangents that are zero but at one token."""
        return self._in_blocks(self._pushed, V, index)

    def rmatvec(self, U: Tensor, index: Tensor) -> Tensor:
        """See `OperatorBatch.rmatvec`: VJPs of which one token's part is kept."""
        return self._in_blocks(self._pulled, U, index)

    def _in_blocks(
        self, product: Callable[[Tensor, Sequence[Place]], Tensor], X: Tensor, index: Tensor
    ) -> Tensor:
        places = [self.places[i] for i in index.tolist()]
        size = self.sub.decoder.block
        starts = range(0, len(places), size)
        return torch.cat([product(X[i : i + size], places[i : i + size]) for i in starts])

    def rows(self, Y: Tensor) -> Tensor:
        """See `OperatorBatch.rows`."""
        n, _, d = self.shape
        found = Y.new_empty(len(Y), n, d)
        count = len(self.tokens)
        starts = {(p.layer, p.module): i for i, p in reversed(list(enumerate(self.places)))}
        every = torch.tensor(self.tokens, device=Y.device)

        def put(layer: int, module: str, rows: Tensor) -> None:
            start = starts[layer, module]
            factor = self.readout.factors.get(layer, 1.0)
            found[:, start : start + count] = factor * rows.index_select(1, every)

        self._rows(Y, put)
        return found

    # ------------------------------------------------------------- the parts of one layer

    def _parts_vjp(self, layer: int, u: Tensor, whole: Tensor | None) -> dict[str, Tensor]:
        """What a layer's modules make of cotangents at the output position, before the layer.

        Args:
            layer: the layer.
            u: (b, d).
            whole: (b, T, d), `Λᵀu`, if it is known.

        Returns:
            `Cᵀu` of each module wanted, and of what else the layer adds if the residual stream is
            wanted too; their sum is `Λᵀu − u` then. (b, T, d) each.
        """
        modules = self.wanted[layer]
        behind = self.sub.before(u, layer + 1)
        parts = {}
        for module in modules:
            if module == RESIDUAL:
                continue
            if self.sub.layers[layer].mid is None:
                assert whole is not None
                parts[module] = whole - self.sub.before(u, layer)
            elif module == ATTENTION:
                parts[module] = self.sub.mid_vjp(layer, behind) - self.sub.before(u, layer)
            elif ATTENTION in parts:
                assert whole is not None
                parts[module] = whole - self.sub.before(u, layer) - parts[ATTENTION]
            else:
                assert whole is not None
                parts[module] = whole - self.sub.mid_vjp(layer, behind)
        if RESIDUAL in modules and self._has_rest(layer):
            assert whole is not None
            parts[RESIDUAL] = whole - self.sub.before(u, layer) - sum(parts.values())
        return parts

    def _has_rest(self, layer: int) -> bool:
        """Whether a layer adds more to the stream than the modules wanted of it."""
        return set(self.sub.layers[layer].modules) - set(self.wanted[layer]) != set() or (
            not self.sub.layers[layer].modules
        )

    def _needs_whole(self, layer: int) -> bool:
        """Whether `Λ` of a layer is applied to its own cotangents."""
        modules = set(self.wanted[layer])
        return modules != {ATTENTION} or self.sub.layers[layer].mid is None

    def _own_pushes(self, layer: int) -> int:
        """Vectors pushed through a layer for its own rows, for each cotangent."""
        mid = self.sub.layers[layer].mid is not None and self.wanted[layer] != [RESIDUAL]
        return int(self._needs_whole(layer)) + int(mid)

    def _part_jvp(self, layer: int, v: Tensor, modules: Sequence[str]) -> Tensor:
        """What one module of a layer makes of each stream before it, at the output position.

        Args:
            layer: the layer.
            v: (a, T, d).
            modules: the module of each.

        Returns:
            (a, d).
        """
        mid = self.sub.layers[layer].mid is not None
        out = v.new_zeros(len(v), v.shape[-1])
        for plus, product, chosen in (
            (1, self.sub.jvp, [m != ATTENTION or not mid for m in modules]),
            (1, self.sub.mid_jvp, [m == ATTENTION and mid for m in modules]),
            (-1, self.sub.mid_jvp, [m == MLP and mid for m in modules]),
        ):
            where = torch.tensor(chosen, device=v.device).nonzero()[:, 0]
            if len(where):
                out[where] += plus * self.sub.at_position(product(layer, v[where]))
        passed = torch.tensor(
            [m == ATTENTION or (m == MLP and not mid) for m in modules], device=v.device
        )
        return out - passed[:, None] * self.sub.at_position(v)

    def _part_vjp(self, layer: int, u: Tensor, modules: Sequence[str]) -> Tensor:
        """The transpose of `_part_jvp`: (a, d) -> (a, T, d)."""
        mid = self.sub.layers[layer].mid is not None
        behind, before = self.sub.before(u, layer + 1), self.sub.before(u, layer)
        out = torch.zeros_like(before)
        for plus, product, chosen in (
            (1, self.sub.vjp, [m != ATTENTION or not mid for m in modules]),
            (1, self.sub.mid_vjp, [m == ATTENTION and mid for m in modules]),
            (-1, self.sub.mid_vjp, [m == MLP and mid for m in modules]),
        ):
            where = torch.tensor(chosen, device=u.device).nonzero()[:, 0]
            if len(where):
                out[where] += plus * product(layer, behind[where])
        passed = torch.tensor(
            [m == ATTENTION or (m == MLP and not mid) for m in modules], device=u.device
        )
        return out - passed[:, None, None] * before

    def _factors(self, places: Sequence[Place], like: Tensor) -> Tensor:
        """The factor of each place's readout, (a, 1)."""
        factors = [self.readout.factors.get(place.layer, 1.0) for place in places]
        return torch.tensor(factors, dtype=like.dtype, device=like.device)[:, None]

    def _tangents(self, V: Tensor, places: Sequence[Place]) -> Tensor:
        """Vectors (a, d) as streams (a, T, d) that are zero but at their token."""
        X = V.new_zeros(len(V), *self.sub.decoder.inputs.shape[1:])
        X[torch.arange(len(V), device=V.device), self._tokens(places, V)] = V
        return X

    def _at_tokens(self, X: Tensor, places: Sequence[Place]) -> Tensor:
        """Of streams (a, T, d) what is at their token, (a, d)."""
        return X[torch.arange(len(X), device=X.device), self._tokens(places, X)]

    @staticmethod
    def _tokens(places: Sequence[Place], like: Tensor) -> Tensor:
        return torch.tensor([place.token for place in places], device=like.device)


def _where(places: Sequence[Place], of: Iterable[int], like: Tensor) -> Tensor:
    """Numbers of the places whose layer is among some."""
    chosen = set(of)
    found = [i for i, place in enumerate(places) if place.layer in chosen]
    return torch.tensor(found, dtype=torch.int64, device=like.device)


class CumulativeOperators(LayerOperators):
    """Of each token's embedding: `N ∂h_l[p]/∂x_i`, and of what modules add to `h_l[p]`."""

    @property
    def _widest(self) -> int:
        return sum(max(1, len(self._names(layer))) for layer in self.wanted)

    def _names(self, layer: int) -> list[str]:
        """What is pulled down from a layer for each cotangent; `below` from before it."""
        wanted = self.wanted[layer]
        names = [m for m in wanted if m != RESIDUAL]
        if RESIDUAL in wanted:
            names += [RESIDUAL] if self._has_rest(layer) else []
            names += [] if RESIDUAL in self.wanted.get(layer - 1, ()) else ["below"]
        return names

    def _pushes_of_row(self) -> float:
        below = sum(
            (layer + self.sub.has_prelude) * len(self._names(layer)) for layer in self.wanted
        )
        return below + sum(map(self._own_pushes, self.wanted))

    def _pushes_of_product(self) -> float:
        each = [layer + self.sub.has_prelude + 1.3 for layer in self.wanted]
        return sum(each) / len(each)

    def _rows(self, Y: Tensor, put: Callable[[int, str, Tensor], None]) -> None:
        sub, b = self.sub, len(Y)
        u = self.readout.vjp(Y)
        held: list[tuple[int, str]] = []
        X = u.new_empty(0, *sub.decoder.inputs.shape[1:])
        for layer in range(max(self.wanted), -1, -1):
            if layer not in self.wanted:
                X = sub.vjp(layer, X)
                continue
            whole = None
            if self._needs_whole(layer):
                behind = sub.before(u, layer + 1)
                pulled = sub.vjp(layer, torch.cat([X, behind]) if len(X) else behind)
                X, whole = pulled[: len(X)], pulled[len(X) :]
            elif len(X):
                X = sub.vjp(layer, X)
            parts = self._parts_vjp(layer, u, whole)
            if "below" in self._names(layer):
                parts["below"] = sub.before(u, layer)
            X = torch.cat([X, *parts.values()])
            held += [(layer, name) for name in parts]
        X = sub.prelude_vjp(X)
        found = dict(zip(held, X.split(b), strict=True))
        residual: Tensor | None = None
        for layer in sorted(self.wanted):
            for module in self.wanted[layer]:
                if module != RESIDUAL:
                    put(layer, module, found[layer, module])
            if RESIDUAL in self.wanted[layer]:
                if (layer, "below") in found:
                    residual = found[layer, "below"]
                assert residual is not None
                names = [name for name in self._names(layer) if name != "below"]
                residual = residual + sum(found[layer, name] for name in names)
                put(layer, RESIDUAL, residual)

    def _pushed(self, V: Tensor, places: Sequence[Place]) -> Tensor:
        X = self.sub.prelude_jvp(self._tangents(V, places))
        out = V.new_empty(len(V), V.shape[-1])
        top = max(place.layer for place in places)
        left = torch.arange(len(V), device=V.device)
        for layer in range(top + 1):
            ending = _where([places[i] for i in left.tolist()], [layer], V)
            if len(ending):
                ends = left[ending]
                modules = [places[i].module for i in ends.tolist()]
                out[ends] = self._part_jvp(layer, X[ending], modules)
            if layer < top:
                going = _where([places[i] for i in left.tolist()], range(layer + 1, top + 1), V)
                X, left = self.sub.jvp(layer, X[going]), left[going]
        return self._factors(places, V) * self.readout.jvp(out)

    def _pulled(self, U: Tensor, places: Sequence[Place]) -> Tensor:
        u = self.readout.vjp(U)
        X = U.new_empty(0, *self.sub.decoder.inputs.shape[1:])
        order = torch.empty(0, dtype=torch.int64, device=U.device)
        for layer in range(max(place.layer for place in places), -1, -1):
            if len(X):
                X = self.sub.vjp(layer, X)
            joining = _where(places, [layer], U)
            if len(joining):
                modules = [places[i].module for i in joining.tolist()]
                X = torch.cat([X, self._part_vjp(layer, u[joining], modules)])
                order = torch.cat([order, joining])
        X = self.sub.prelude_vjp(X)
        found = U.new_empty(len(U), X.shape[-1])
        found[order] = self._at_tokens(X, [places[i] for i in order.tolist()])
        return self._factors(places, U) * found


class LayerwiseOperators(LayerOperators):
    """Of the stream before the layer: `N ∂h_l[p]/∂h_{l-1}[i]`, and of what modules add."""

    def _pushes_of_row(self) -> float:
        return float(sum(map(self._own_pushes, self.wanted)))

    def _pushes_of_product(self) -> float:
        return 1.3

    def _rows(self, Y: Tensor, put: Callable[[int, str, Tensor], None]) -> None:
        u = self.readout.vjp(Y)
        for layer, wanted in self.wanted.items():
            whole = None
            if self._needs_whole(layer):
                whole = self.sub.vjp(layer, self.sub.before(u, layer + 1))
            parts = self._parts_vjp(layer, u, whole)
            for module in wanted:
                rows = whole if module == RESIDUAL else parts[module]
                assert rows is not None
                put(layer, module, rows)

    def _pushed(self, V: Tensor, places: Sequence[Place]) -> Tensor:
        X, out = self._tangents(V, places), torch.empty_like(V)
        for layer in self.wanted:
            here = _where(places, [layer], V)
            if len(here):
                modules = [places[i].module for i in here.tolist()]
                out[here] = self._part_jvp(layer, X[here], modules)
        return self._factors(places, V) * self.readout.jvp(out)

    def _pulled(self, U: Tensor, places: Sequence[Place]) -> Tensor:
        u = self.readout.vjp(U)
        found = torch.empty_like(u)
        for layer in self.wanted:
            here = _where(places, [layer], U)
            if len(here):
                some = [places[i] for i in here.tolist()]
                X = self._part_vjp(layer, u[here], [place.module for place in some])
                found[here] = self._at_tokens(X, some)
        return self._factors(places, U) * found


class ToEndOperators(LayerOperators):
    """Of the residual stream behind a layer: `∂y/∂h_l[i]`."""

    @property
    def _last(self) -> int:
        return len(self.sub) - 1

    def _pushes_of_row(self) -> float:
        return float(self._last - min(self.wanted) + 1)

    def _pushes_of_product(self) -> float:
        return sum(self._last - layer + 1 for layer in self.wanted) / len(self.wanted)

    def _rows(self, Y: Tensor, put: Callable[[int, str, Tensor], None]) -> None:
        X = self.sub.final_vjp(Y)
        for layer in range(self._last, min(self.wanted) - 1, -1):
            if layer in self.wanted:
                put(layer, RESIDUAL, self.sub.widened(X))
            if layer > min(self.wanted):
                X = self.sub.vjp(layer, X)

    def _pushed(self, V: Tensor, places: Sequence[Place]) -> Tensor:
        every = self._tangents(V, places)
        X, order = every[:0], torch.empty(0, dtype=torch.int64, device=V.device)
        for layer in range(min(place.layer for place in places), len(self.sub)):
            X = self.sub.jvp(layer, X) if len(X) else X
            joining = _where(places, [layer], V)
            entering = self.sub.behind(layer, every[joining])
            X, order = (
                torch.cat([X, entering] if len(X) else [entering]),
                torch.cat([order, joining]),
            )
        out = V.new_empty(len(V), self.shape[1])
        out[order] = self.sub.final_jvp(X)
        return out

    def _pulled(self, U: Tensor, places: Sequence[Place]) -> Tensor:
        found = U.new_empty(len(U), self.shape[2])
        X = self.sub.final_vjp(U)
        left = torch.arange(len(U), device=U.device)
        for layer in range(self._last, min(place.layer for place in places) - 1, -1):
            there = [places[i] for i in left.tolist()]
            ending = _where(there, [layer], U)
            if len(ending):
                streams = self.sub.widened(X[ending])
                found[left[ending]] = self._at_tokens(streams, [there[i] for i in ending.tolist()])
            going = _where(there, range(layer), U)
            X, left = X[going], left[going]
            if len(X):
                X = self.sub.vjp(layer, X)
        return found
