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
        A figure of three panels, and above them the tokens of the largest attributions with the
        leading word that each reads and writes.
    """
    drawing = figure(6.8)
    names, share, sigma, rank = drawing.subplots(4, 1, sharex=True, height_ratios=[1.35, 1.2, 1, 1])
    places = np.arange(len(result.tokens))
    values = np.nan_to_num(result.attribution)
    colours = np.where(values >= 0, BLUE, VERMILION)
    width = 8.0 if len(places) <= 20 else 2.0 if len(places) <= _FEW else 0.5
    share.vlines(places, 0, values, colors=colours, linewidth=width)
    share.axhline(0, color=BLACK, linewidth=0.5)
    share.set_ylabel("attribution")
    share.grid(axis="y", linewidth=0.3)
    _name_largest(names, result, words)
    _curve(sigma, places, result.S[:, 0], GREEN, "σ₁")
    missed = np.flatnonzero(result.status == Status.NOT_CONVERGED)
    if len(missed):
        values = result.S[missed, 0]
        sigma.plot(missed, values, "x", color=VERMILION, markersize=4, label="not converged")
        sigma.legend(fontsize=7)
    _curve(rank, places, result.stable_rank, ORANGE, "stable rank")
    token_axis(rank, result.tokens)
    title = legible(result.text if len(result.text) <= 80 else f"…{result.text[-79:]}")
    drawing.suptitle(title, fontsize=9.5)
    return drawing


def _curve(axes: Axes, places: Array, values: Array, colour: str, name: str) -> None:
    marker = "." if len(places) <= _FEW else ""
    axes.plot(
        places,
        values,
        color=colour,
        linewidth=0.8 if len(places) <= 1000 else 0.3,
        marker=marker,
        markersize=4,
    )
    axes.set_ylabel(name)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", linewidth=0.3)


def _name_largest(axes: Axes, result: PromptResult, words: Words) -> None:
    """Names the largest attributions above their places, as many as do not overlap."""
    axes.set_axis_off()
    axes.set_ylim(0, 1)
    size = np.abs(np.nan_to_num(result.attribution))
    apart = 0.02 * len(size)  # a line of text across
    named: list[int] = []
    for i in np.argsort(-size, kind="stable").tolist():
        if len(named) == _NAMED:
            break
        if all(abs(i - other) >= apart for other in named):
            named.append(i)
            label = _label(result, words, i)
            axes.text(i, 0.02, label, rotation=90, ha="center", va="bottom", fontsize=6.5)


def _label(result: PromptResult, words: Words, token: int) -> str:
    name = token_label(result.tokens[token])
    if result.status[token] in (Status.PENDING, Status.NOT_REQUESTED):
        return name
    read, written = (
        token_label(words([int(ids[token, 0, 0])])[0].strip())
        for ids in (result.v_token, result.u_token)
    )
    label = f"{name}: {read} → {written}"
    return label if len(label) <= 28 else label[:27] + "…"
