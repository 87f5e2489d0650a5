"""Attribution as bars: what each token adds to the logit, and what the constant does."""

from __future__ import annotations

from matplotlib.figure import Figure

from elm_lanczos.analysis.attribution import Attribution
from elm_lanczos.report.figures.style import (
    BLACK,
    BLUE,
    VERMILION,
    figure,
    styled,
    token_axis,
    token_label,
)

_BARS = 60
"""Tokens that get a line each."""


@styled
def draw(result: Attribution) -> Figure:
    """Draws the shares of a logit.

    Args:
        result: the attribution.

    Returns:
        A figure with one bar a token, the constant and the bias last.
    """
    names = [*result.tokens, "constant", "bias"]
    values = [*result.shares.tolist(), result.constant, result.bias]
    colours = [BLUE if value >= 0 else VERMILION for value in values]
    across = len(result.tokens) <= _BARS
    drawing = figure(max(2.2, 0.9 + 0.19 * len(names)) if across else 3.2)
    axes = drawing.add_subplot()
    if across:
        axes.barh(range(len(names)), values, color=colours, height=0.75)
        token_axis(axes, names, "y")
        axes.axvline(0, color=BLACK, linewidth=0.6)
        axes.set_xlabel("share of the logit")
        axes.grid(axis="x", linewidth=0.3)
    else:
        axes.bar(range(len(names)), values, color=colours, width=1.0)
        token_axis(axes, names)
        axes.axhline(0, color=BLACK, linewidth=0.6)
        axes.set_ylabel("share of the logit")
        axes.grid(axis="y", linewidth=0.3)
    against = f" − {token_label(result.contrast_token)}" if result.contrast is not None else ""
    axes.set_title(
        "logit of " + token_label(result.target_token) + against + f" = {result.logit:.4f}"
    )
    return drawing
