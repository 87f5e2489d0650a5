"""One token's Jacobian as a heat map with its spectrum; contributions of layers as bars."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from elm_lanczos.analysis.contributions import Components
from elm_lanczos.report.figures.style import (
    BLACK,
    BLUE,
    SEQUENTIAL,
    VERMILION,
    figure,
    legible,
    styled,
    token_label,
)

_SHOWN, _FARTHEST = (1, 99.5), 1e4
"""Percentiles between which the heat map has colours, and the largest ratio of the two."""


@styled
def draw(result: Components) -> Figure:
    """Draws the Jacobian and the contributions.

    Args:
        result: the components.

    Returns:
        A figure: the heat map with the spectrum as inset; direct contributions; ablations.
    """
    drawing = figure(3.9)
    halves: Any = drawing.subfigures(1, 2)
    left, right = halves
    heat = left.add_subplot()
    _heat_map(heat, result)
    above, below = right.subplots(2, 1, sharex=True)
    layers = sorted({part.layer for part in result.parts})
    ends = (layers[0], layers[-1])
    for name, colour, shift in (("attention", BLUE, -0.2), ("mlp", VERMILION, 0.2)):
        parts = [part for part in result.parts if part.module == name]
        places = np.array([part.layer for part in parts], dtype=float)
        direct = [part.direct for part in parts]
        above.bar(places + shift, direct, width=0.4, color=colour, label=_LABELS[name])
        frozen = [part.ablated or 0.0 for part in parts]
        real = [part.ablated_model or 0.0 for part in parts]
        below.bar(places + shift, frozen, width=0.4, color=colour)
        below.plot(
            places + shift,
            real,
            linestyle="none",
            marker="o",
            markersize=max(1.5, min(4.0, 60 / len(layers))),
            markerfacecolor="white",
            markeredgecolor=BLACK,
            markeredgewidth=0.7,
        )
    others = [part for part in result.parts if part.module in ("embedding", "constant")]
    above.bar([part.layer for part in others], [part.direct for part in others], 0.5, color="0.5")
    for axes in (above, below):
        axes.axhline(0, color=BLACK, linewidth=0.6)
        axes.grid(axis="y", linewidth=0.3)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    above.legend(fontsize=7.5, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.98))
    above.set_ylabel("direct")
    below.set_ylabel("change if ablated")
    below.plot([], [], "o", color=BLACK, markerfacecolor="white", label="in the model itself")
    below.bar([0], [0], color="0.5", label="frozen linear system")
    below.legend(
        fontsize=7.5,
        ncols=2,
        loc="lower left",
        bbox_to_anchor=(0, 0.98),
        columnspacing=1.0,
        handletextpad=0.4,
    )
    inner = [layer for layer in layers[1:-1] if layer % max(1, -(-len(layers) // 10)) == 0]
    below.set_xticks([ends[0], *inner, ends[1]], ["emb.", *map(str, inner), "const."])
    below.tick_params(axis="x", labelsize=7.5)
    below.set_xlabel("layer")
    right.suptitle(
        legible("logit of ") + token_label(result.target_token) + f" = {result.logit:.4f}",
        fontsize=9.5,
    )
    return drawing


_LABELS = {"attention": "attention", "mlp": "MLP"}


def _heat_map(axes: Axes, result: Components) -> None:
    values = result.norms.map.numpy()
    m, d = result.norms.rows.shape[1], result.norms.columns.shape[1]
    low, high = np.percentile(values, _SHOWN)
    high = max(float(high), np.finfo(float).tiny)
    low = max(float(low), high / _FARTHEST)
    image = axes.imshow(
        np.maximum(values, low),
        norm=LogNorm(low, high) if values.max() > 0 and low < high else None,
        cmap=SEQUENTIAL,
        extent=(0, d, m, 0),
        aspect="auto",
        interpolation="nearest",
    )
    name = token_label(result.tokens[result.token])
    axes.set_title(f"Jacobian of token {result.token} {name}")
    axes.set_xlabel("input dimension")
    axes.set_ylabel("output dimension")
    binned = values.shape != (m, d)
    axes.figure.colorbar(
        image, ax=axes, pad=0.02, label="mean |J| over blocks" if binned else "|J|"
    )
    axes.add_patch(
        Rectangle((0.5, 0.57), 0.5, 0.43, transform=axes.transAxes, facecolor="white", alpha=0.93)
    )
    inset = axes.inset_axes((0.61, 0.645, 0.36, 0.275))
    places = range(1, len(result.S) + 1)
    inset.plot(places, result.S.numpy(), color=BLACK, marker="o", markersize=2, linewidth=0.8)
    inset.set_ylim(0, None)
    inset.set_title(f"σ, stable rank {result.stable_rank:.3g}", fontsize=7, pad=3)
    inset.tick_params(labelsize=6.5, length=2, pad=1.5)
    inset.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    inset.yaxis.set_major_locator(MaxNLocator(4))
