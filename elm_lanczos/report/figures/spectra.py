"""Spectra of a prompt's tokens, with what the leading directions read and write beside them."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elm_lanczos.report.figures.style import (
    BLACK,
    BLUE,
    VERMILION,
    figure,
    legible,
    styled,
    token_label,
)
from elm_lanczos.report.record import Words
from elm_lanczos.status import Status
from elm_lanczos.store import PromptResult

_TOKENS = 12
"""Tokens that are drawn: of a longer prompt those of the largest attribution."""

_DIRECTIONS = 3
"""Leading directions whose words stand beside a spectrum."""

_CHARACTERS = 32
"""Room for the words of one side."""


@styled
def draw(result: PromptResult, words: Words) -> Figure:
    """Draws one spectrum a token.

    Args:
        result: one prediction of a store.
        words: texts of token ids.

    Returns:
        A figure with a row a token: its singular values, and words of its leading directions.
    """
    chosen = chosen_tokens(result)
    drawing = figure(0.75 + 0.82 * max(1, len(chosen)))
    title = legible(result.text if len(result.text) <= 80 else f"…{result.text[-79:]}")
    drawing.suptitle(title, fontsize=9.5)
    if not len(chosen):
        drawing.text(0.5, 0.4, "no token has triplets yet", ha="center")
        return drawing
    panels = drawing.subplots(
        len(chosen), 2, sharex="col", squeeze=False, gridspec_kw={"width_ratios": [2, 5]}
    )
    k = result.S.shape[1]
    top = float(np.nanmax(result.S[chosen]))
    for (curve, text), token in zip(panels, chosen, strict=True):
        _spectrum(curve, result, token)
        curve.set_xlim(0.5, k + 0.5)
        curve.set_ylim(0, 1.1 * top)
        _words(text, result, token, words)
    panels[-1, 0].set_xlabel("direction")
    panels[0, 1].set_title("reads (v)  →  writes (u)", fontsize=8, loc="left")
    panels[0, 0].set_title("singular values", fontsize=8, loc="left")
    return drawing


def chosen_tokens(result: PromptResult) -> list[int]:
    """Returns the tokens that are drawn, in order.

    Args:
        result: one prediction of a store.

    Returns:
        Those with triplets; of many, those of the largest attribution.
    """
    solved = np.flatnonzero(~np.isin(result.status, (Status.PENDING, Status.NOT_REQUESTED)))
    size = np.nan_to_num(np.abs(result.attribution[solved]), nan=0.0)
    return sorted(solved[np.argsort(-size, kind="stable")[:_TOKENS]].tolist())


def _spectrum(axes: Axes, result: PromptResult, token: int) -> None:
    values = result.S[token]
    missed = result.status[token] == Status.NOT_CONVERGED
    axes.errorbar(
        range(1, len(values) + 1),
        values,
        yerr=result.error_bound[token],
        marker=".",
        markersize=4,
        linewidth=0.9,
        color=VERMILION if missed else BLUE,
    )
    label = f"{token} {token_label(result.tokens[token])}"
    label = label if len(label) <= 16 else label[:15] + "…"
    label += f"\n{result.attribution[token]:+.2f}"
    if missed:
        label += "\nnot converged"
    axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", linewidth=0.3)


def _words(axes: Axes, result: PromptResult, token: int, words: Words) -> None:
    axes.set_axis_off()
    count = min(_DIRECTIONS, result.S.shape[1])
    for j in range(count):
        height = 1 - (j + 0.5) / _DIRECTIONS
        axes.text(0, height, f"{j + 1}", va="center", fontsize=7, color=BLUE)
        for place, ids in ((0.035, result.v_token[token, j]), (0.52, result.u_token[token, j])):
            line = _line(words(ids.tolist()))
            axes.text(place, height, line, va="center", fontsize=7, color=BLACK, clip_on=True)


def _line(words: list[str]) -> str:
    """As many words as there is room for, at least one."""
    line = ""
    for word in words:
        shown = token_label(word.strip() or word)
        if line and len(line) + 2 + len(shown) > _CHARACTERS:
            break
        line += ("  " if line else "") + shown
    return line if len(line) <= _CHARACTERS else line[: _CHARACTERS - 1] + "…"
