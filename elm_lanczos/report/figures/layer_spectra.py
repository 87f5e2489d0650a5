"""Layers as figures: stable rank and σ₁ against depth, the path of directions, spectra in words."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from elm_lanczos.analysis.layer_spectra import LayerSpectra
from elm_lanczos.errors import UsageError
from elm_lanczos.layer_operators import RESIDUAL
from elm_lanczos.report.figures.style import (
    BLACK,
    BLUE,
    ORANGE,
    SEQUENTIAL,
    VERMILION,
    figure,
    legible,
    styled,
    token_label,
)

_COLOURS = {"residual": BLUE, "attention": VERMILION, "mlp": ORANGE}
_MARKERS = {"residual": "o", "attention": "s", "mlp": "^"}
_LINES = 26
"""Layers that get a line of words each."""
_WORDS, _CHARACTERS = 4, 11


@styled
def draw(result: LayerSpectra, kind: str | None = None, token: int | None = None) -> Figure:
    """Draws the layers of one kind at one token.

    Args:
        result: the triplets.
        kind: one of its kinds; the first if not given.
        token: position of a token asked for; the last one if not given.

    Returns:
        A figure: stable rank and σ₁ against depth; the path of the leading u on the last layer's
        first two; and the spectrum of every layer and module with the words of its leading
        triplet.

    Raises:
        UsageError: if there is no such kind or token in the result.
    """
    kind = result.kinds[0] if kind is None else kind
    if kind not in result.kinds:
        raise UsageError(f"there are no triplets of kind {kind!r}: {', '.join(result.kinds)}")
    index = next(iter(result.results.values())).index
    token = index[-1] if token is None else token
    if token not in index:
        raise UsageError(f"token {token} was not asked for: {', '.join(map(str, index))}")
    row = index.index(token)
    some = {key[1:]: one for key, one in result.results.items() if key[0] == kind}
    layers = sorted({layer for layer, _ in some})
    modules = [m for m in result.modules if any(module == m for _, module in some)]
    lines = _thinned(layers)
    height = 2.5 + 0.17 * (len(lines) + 2)
    drawing = figure(height)
    grid = drawing.add_gridspec(2, 1, height_ratios=[2.3, height - 2.3])
    top = grid[0].subgridspec(1, 3)
    bottom = grid[1].subgridspec(1, len(modules))
    _against_depth(drawing.add_subplot(top[0]), some, modules, row, "stable rank")
    _against_depth(drawing.add_subplot(top[1]), some, modules, row, "σ₁")
    _path(drawing.add_subplot(top[2]), some, modules, layers, row)
    for column, module in enumerate(modules):
        axes = drawing.add_subplot(bottom[column])
        _spectra(axes, result, some, module, lines, row, first=column == 0)
    drawing.suptitle(
        legible(f"{kind}, token {token} ") + token_label(result.tokens[token]), fontsize=9.5
    )
    return drawing


def _thinned(layers: list[int]) -> list[int]:
    """The layers that get a line: all, or as many as there is room for, the last among them."""
    step = -(-len(layers) // _LINES)
    return layers[::-1][::step][::-1]


def _against_depth(axes: Axes, some: Any, modules: list[str], row: int, what: str) -> None:
    for module in modules:
        depths = [layer for layer, name in some if name == module]
        found = [some[layer, module].triplets for layer in depths]
        values = [float((one.stable_rank if what != "σ₁" else one.S[:, 0])[row]) for one in found]
        axes.plot(
            depths, values, marker=_MARKERS[module], color=_COLOURS[module], markersize=3.5,
            linewidth=1.0, label=module,
        )  # fmt: skip
    axes.set_xlabel("layer")
    axes.set_title(what)
    if what == "σ₁":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, handlelength=1.2)
    axes.grid(axis="y", linewidth=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _path(axes: Axes, some: Any, modules: list[str], layers: list[int], row: int) -> None:
    """The leading u of each layer, projected on the first two of the last layer's stream."""
    by = RESIDUAL if RESIDUAL in modules else modules[0]
    last = max(layer for layer, module in some if module == by)
    plane = some[last, by].triplets.U[row, :2].double()
    if len(plane) < 2:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "a path takes two triplets", ha="center", fontsize=7.5)
        return
    for module in modules:
        depths = [layer for layer, name in some if name == module]
        u = np.array(
            [(plane @ some[d, module].triplets.U[row, 0].double()).tolist() for d in depths]
        )
        x, y = u.T
        axes.plot(x, y, color=_COLOURS[module], linewidth=0.6, alpha=0.6)
        axes.scatter(
            x, y, c=depths, cmap=SEQUENTIAL, vmin=layers[0], vmax=layers[-1] or 1,
            marker=_MARKERS[module], s=14, edgecolors=_COLOURS[module], linewidths=0.7, zorder=3,
        )  # fmt: skip
    axes.axhline(0, color=BLACK, linewidth=0.3)
    axes.axvline(0, color=BLACK, linewidth=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.3), max(high, 0.3))
    axes.set_title("path of u₁, from dark to light")
    axes.set_xlabel(f"on u₁ of layer {last}")
    axes.set_ylabel("on u₂")


def _spectra(
    axes: Axes,
    result: LayerSpectra,
    some: Any,
    module: str,
    lines: list[int],
    row: int,
    *,
    first: bool,
) -> None:
    """Singular values relative to the module's largest, and what the leading triplet writes."""
    largest = max(float(some[d, module].triplets.S[row, 0]) for d in lines if (d, module) in some)
    for place, layer in enumerate(lines):
        if (layer, module) not in some:
            continue
        one = some[layer, module]
        values = one.triplets.S[row].double().clamp_min(0) / (largest or 1.0)
        axes.scatter(
            0.33 * values, [place] * len(values), s=9, marker="|", color=_COLOURS[module],
            linewidths=1.1,
        )  # fmt: skip
        words = [_short(word) for word in result.words(one.u.ids[row, 0, :_WORDS])]
        axes.text(0.37, place, _fitting(words, 30), fontsize=6.5, va="center", clip_on=True)
    axes.axvline(0, color=BLACK, linewidth=0.4)
    axes.set_xlim(-0.01, 1.0)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xticks([0, 0.33], ["0", f"{largest:.3g}"], fontsize=7)
    axes.set_yticks(range(len(lines)), [str(d) for d in lines] if first else [""] * len(lines))
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(f"{module}: σ, and what u₁ writes", fontsize=8)
    if first:
        axes.set_ylabel("layer")


def _short(word: str) -> str:
    shown = token_label(word.strip() or word)
    return shown if len(shown) <= _CHARACTERS else shown[: _CHARACTERS - 1] + "…"


def _fitting(words: list[str], characters: int) -> str:
    """As many words as there is room for."""
    text = ""
    for word in words:
        if text and len(text) + len(word) + 2 > characters:
            break
        text += ("  " if text else "") + word
    return text
