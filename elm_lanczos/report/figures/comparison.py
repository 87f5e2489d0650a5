"""Distributions of stable rank by position for each model, and their spectra."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from elm_lanczos.analysis.comparison import Comparison
from elm_lanczos.report.figures.style import BLACK, PALETTE, figure, legible, styled

_POSITIONS = 10
"""Positions that get a violin each; the others are few and left out."""

_FEWEST = 5
"""Tokens that a violin is drawn of; fewer are shown as points alone."""


@styled
def draw(result: Comparison) -> Figure:
    """Draws the distributions.

    Args:
        result: the comparison.

    Returns:
        A figure: stable rank by position with a violin, points, median and quartiles for each
        model; median spectra with bands from quartile to quartile.
    """
    drawing = figure(3.4 if len(result.models) <= 3 else 4.2)
    ranks, spectra = drawing.subplots(1, 2, width_ratios=(2.4, 1))
    _draw_ranks(ranks, result)
    _draw_spectra(spectra, result)
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(result.models))]
    handles = [
        Patch(color=colour, label=legible(each.model))
        for colour, each in zip(colours, result.models, strict=True)
    ]
    drawing.legend(handles=handles, loc="outside upper left", ncols=min(3, len(handles)))
    return drawing


def _draw_ranks(axes: Axes, result: Comparison) -> None:
    every = {int(place) for each in result.models for place in result.places(each)}
    ordered = sorted(every, reverse=result.origin == "end")[:_POSITIONS]
    places = ordered[::-1] if result.origin == "end" else ordered
    width = 0.85 / len(result.models)
    jitter = np.random.default_rng(0)
    for i, each in enumerate(result.models):
        colour = PALETTE[i % len(PALETTE)]
        shift = (i - (len(result.models) - 1) / 2) * width
        for x, place in enumerate(places):
            values = each.stable_rank[result.places(each) == place].astype(float)
            if len(values) == 0:
                continue
            at = x + shift
            if len(values) >= _FEWEST and np.ptp(values) > 0:
                violin: Any = axes.violinplot(values, [at], widths=width, showextrema=False)
                violin["bodies"][0].set(facecolor=colour, alpha=0.35, linewidth=0)
            spread = jitter.uniform(-0.25, 0.25, len(values)) * width
            axes.plot(at + spread, values, ".", color=colour, markersize=2, alpha=0.6, zorder=2)
            q1, median, q3 = np.percentile(values, (25, 50, 75))
            axes.vlines(at, q1, q3, color=BLACK, linewidth=1.6, zorder=3)
            axes.plot([at], [median], "o", color="white", mec=BLACK, ms=3, mew=0.7, zorder=4)
    axes.set_xticks(range(len(places)), [f"{place}".replace("-", "−") for place in places])
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_ylim(0, None)
    axes.set_xlabel(f"token position from the {result.origin}")
    axes.set_ylabel("stable rank")
    axes.grid(axis="y", linewidth=0.3)


def _draw_spectra(axes: Axes, result: Comparison) -> None:
    for i, each in enumerate(result.models):
        colour = PALETTE[i % len(PALETTE)]
        q1, median, q3 = np.percentile(each.S.astype(float), (25, 50, 75), axis=0)
        places = np.arange(1, len(median) + 1)
        axes.fill_between(places, q1, q3, color=colour, alpha=0.25, linewidth=0)
        axes.plot(places, median, color=colour, marker="o", markersize=3, linewidth=1.2)
    if all((each.S > 0).all() for each in result.models):
        axes.set_yscale("log")
    axes.set_xticks(np.unique(np.linspace(1, len(places), min(8, len(places))).astype(int)))
    axes.set_xlabel("singular value")
    axes.set_ylabel("σ, median and quartiles")
    axes.grid(axis="y", linewidth=0.3)
