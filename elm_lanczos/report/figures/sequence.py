"""A prompt of any length as a sequence: attribution, σ₁ and stable rank along its tokens."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elm_lanczos.report.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    VERMILION,
    figure,
    legible,
    styled,
    token_axis,
    token_label,
)
from elm_lanczos.report.record import Words
from elm_lanczos.status import Status
from elm_lanczos.store import PromptResult
from elm_lanczos.store.layout import Array

_NAMED = 14
"""Places that may be named with their token and its leading words."""

_FEW = 120
"""Tokens up to which each is a mark of its own."""


@styled
def draw(result: PromptResult, words: Words) -> Figure:
    """Draws a prediction along its tokens.

    Args:
        result: one prediction of a store.
        words: texts of token ids.

    Returns:
        A figure of three panels; the largest attributions are named with the leading word that
        their token reads and writes.
    """
    drawing = figure(5.4)
    share, sigma, rank = drawing.subplots(3, 1, sharex=True, height_ratios=[1.5, 1, 1])
    places = np.arange(len(result.tokens))
    share.bar(
        places,
        np.nan_to_num(result.attribution),
        color=np.where(np.nan_to_num(result.attribution) >= 0, BLUE, VERMILION),
        width=0.8 if len(places) <= _FEW else 1.0,
        rasterized=len(places) > 1000,
    )
    share.axhline(0, color=BLACK, linewidth=0.5)
    share.set_ylabel("attribution")
    _name_largest(share, result, words)
    _curve(sigma, places, result.S[:, 0], GREEN, "σ₁")
    missed = np.flatnonzero(result.status == Status.NOT_CONVERGED)
    if len(missed):
        values = result.S[missed, 0]
        sigma.plot(missed, values, "x", color=VERMILION, markersize=4, label="not converged")
        sigma.legend(fontsize=7)
    _curve(rank, places, result.stable_rank, ORANGE, "stable rank")
    token_axis(rank, result.tokens)
    title = legible(result.text if len(result.text) <= 80 else f"…{result.text[-79:]}")
    share.set_title(title)
    return drawing


def _curve(axes: Axes, places: Array, values: Array, colour: str, name: str) -> None:
    marker = "." if len(places) <= _FEW else ""
    axes.plot(places, values, color=colour, linewidth=0.8, marker=marker, markersize=4)
    axes.set_ylabel(name)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", linewidth=0.3)


def _name_largest(axes: Axes, result: PromptResult, words: Words) -> None:
    """Names the largest attributions, as many as do not overlap."""
    share = np.nan_to_num(result.attribution)
    count = len(share)
    low, high = min(0.0, float(share.min())), max(0.0, float(share.max()))
    room = (high - low) or 1.0
    axes.set_ylim(low - 0.62 * room * (low < 0), high + 0.75 * room)
    apart = 0.028 * count  # a line of text across
    named: list[int] = []
    for i in np.argsort(-np.abs(share), kind="stable").tolist():
        if len(named) == _NAMED or abs(share[i]) < 0.02 * room:
            break
        if all(abs(i - other) >= apart for other in named):
            named.append(i)
            above = share[i] >= 0
            axes.annotate(
                _label(result, words, i),
                (i, share[i]),
                xytext=(0, 3 if above else -3),
                textcoords="offset points",
                rotation=90,
                ha="center",
                va="bottom" if above else "top",
                fontsize=6.5,
            )


def _label(result: PromptResult, words: Words, token: int) -> str:
    name = token_label(result.tokens[token])
    if result.status[token] in (Status.PENDING, Status.NOT_REQUESTED):
        return name
    read, written = (
        token_label(words([int(ids[token, 0, 0])])[0].strip())
        for ids in (result.v_token, result.u_token)
    )
    label = f"{name}: {read} → {written}"
    return label if len(label) <= 30 else label[:29] + "…"
