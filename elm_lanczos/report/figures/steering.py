"""What steering gains and what it costs: step by step, or against its strength."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from elm_lanczos.analysis.steering import Steering, SteeringSweep
from elm_lanczos.report.figures.style import (
    BLACK,
    BLUE,
    PALETTE,
    VERMILION,
    figure,
    legible,
    styled,
    token_axis,
)

_MARKERS = "osD^vP*X"


@styled
def draw(result: Steering) -> Figure:
    """Draws the concept words' log-probability and the tokens' own, step by step.

    Args:
        result: a steering.

    Returns:
        A figure of two panels; the steered tokens label the axis they share.
    """
    drawing = figure(5.0)
    above, below = drawing.subplots(2, 1, sharex=True)
    plain, steered = result.unsteered, result.steered
    series = (
        (above, plain.concept_log_probability, BLACK, "o", "without"),
        (above, steered.concept_log_probability, VERMILION, "s", "steered"),
        (below, plain.log_probability, BLACK, "o", "without: its own text"),
        (below, steered.plain_log_probability, BLUE, "D", "without: the steered text"),
        (below, steered.log_probability, VERMILION, "s", "steered: the steered text"),
    )
    for axes, values, colour, marker, label in series:
        axes.plot(
            values.tolist(), color=colour, marker=marker, markersize=3, linewidth=1, label=label
        )
    above.set_ylabel("log P(concept words)")
    below.set_ylabel("log P(token)")
    below.set_xlabel("tokens of the steered text")
    for axes in (above, below):
        axes.grid(axis="y", linewidth=0.3)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, ncols=3)
    token_axis(below, steered.tokens)
    drawing.suptitle(
        legible(f"{_short(result.concept)} onto {_short(result.prompt)}")
        + f", layer {result.operator.layer}, strength {result.strength:g}: "
        f"{result.rise(steered):+.2f} nats",
        fontsize=9.5,
    )
    return drawing


@styled
def draw_sweep(result: SteeringSweep) -> Figure:
    """Draws gain and cost against the strength.

    Args:
        result: a sweep.

    Returns:
        A figure of two panels with one line a layer.
    """
    drawing = figure(3.4)
    left, right = drawing.subplots(1, 2)
    layers = sorted({trial.operator.layer for trial in result.trials})
    left.axhline(result.unsteered.concept, color=BLACK, linewidth=0.8, linestyle="--")
    right.axhline(result.unsteered.loss, color=BLACK, linewidth=0.8, linestyle="--")
    for i, layer in enumerate(layers):
        trials = sorted(
            (trial for trial in result.trials if trial.operator.layer == layer),
            key=lambda trial: trial.strength,
        )
        strengths = [trial.strength for trial in trials]
        look = {
            "color": PALETTE[i % len(PALETTE)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 4,
            "linewidth": 1.2,
            "linestyle": "-" if i < len(PALETTE) else ":",
        }
        left.plot(strengths, [t.steered.concept for t in trials], **look)
        right.plot(strengths, [t.steered.loss for t in trials], **look, label=f"layer {layer}")
    right.plot([], [], color=BLACK, linewidth=0.8, linestyle="--", label="without")
    left.set_ylabel("log P(concept words), nats")
    right.set_ylabel("unsteered model's loss, nats a token")
    for axes in (left, right):
        axes.set_xlabel("strength, relative to ‖h‖")
        axes.grid(linewidth=0.3)
    columns = math.ceil((len(layers) + 1) / 16)
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, ncols=columns)
    drawing.suptitle(
        legible(f"{_short(result.concept)} onto {_short(result.prompt)}"), fontsize=9.5
    )
    return drawing


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
