"""How all figures look: the size of a journal's column, colours that everybody can tell apart.

Colours are those of Okabe and Ito, "Color Universal Design" (2008). Token texts are data, in any
script: nothing in them is taken for mathematics, control characters are escaped, and a character
that no installed font has is spelt by its Unicode name.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec

import matplotlib
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from elm_lanczos.report.text import printable

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#000000",
)
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK, YELLOW)
"""Colours in the order in which series take them."""

SEQUENTIAL, DIVERGING = "cividis", "PuOr"
"""Colour maps that read the same with and without colour vision: of sizes, and of signed values."""

WIDTH = 7.0
"""Inches of a figure over two columns of a journal."""

_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "Arial Unicode MS",
    "Noto Sans Arabic",
    "Noto Naskh Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
    "Symbola",
)
"""Fonts asked in turn for a character; DejaVu Sans comes with matplotlib."""

_LABEL, _LINE = 7.5, 1.5
"""Points of a token's label; lines of text it takes with the space around it."""

P = ParamSpec("P")


class Drawing(Figure):
    """A figure that a notebook shows by itself."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        save_figure(self, file)
        return file.getvalue()


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Lets a function draw in this style, and leaves matplotlib's settings as they were.

    Args:
        draw: the function.

    Returns:
        It, in this style.
    """

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_settings()):
            return draw(*args, **kwargs)

    return drawn


def figure(height: float, width: float = WIDTH) -> Drawing:
    """Returns an empty figure of a height and a width in inches."""
    return Drawing(figsize=(width, height), layout="constrained")


def save_figure(drawing: Figure, file: Path | BinaryIO) -> None:
    """Writes a figure.

    Args:
        drawing: the figure.
        file: where to; the suffix of a path decides between PNG, SVG and PDF; else it is PNG.
    """
    kind = file.suffix[1:] if isinstance(file, Path) else "png"
    with matplotlib.rc_context(_settings()):
        drawing.savefig(file, format=kind, dpi=200, metadata=_NO_DATE.get(kind))


_NO_DATE: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""So that equal figures are equal files."""


def legible(text: str) -> str:
    """Returns text as a figure can show it.

    Args:
        text: a token, a word or a prompt.

    Returns:
        The text with control characters escaped, characters that no font has spelt by name, and
        nothing that matplotlib would take for mathematics.
    """
    shown = "".join(c if ord(c) in _characters() else _spelt(c) for c in printable(text))
    return shown.replace("$", r"\$")


def token_label(token: str) -> str:
    """Returns a token as a label: its leading space made visible, as in `␣the`."""
    visible = "␣" if ord("␣") in _characters() else "_"
    return legible(visible + token[1:] if token.startswith(" ") else token) or '""'


def token_axis(
    axes: Axes, tokens: Sequence[str], axis: str = "x", *, numbered: bool = False
) -> None:
    """Labels an axis of tokens; of many, as many as there is room for, with their numbers.

    Args:
        axes: the axes, whose figure has its final size.
        tokens: their T texts, at 0 … T - 1.
        axis: x or y.
        numbered: put the number before every token.
    """
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    inches = drawing.get_size_inches()["xy".index(axis)] * 0.75  # labels and margins take the rest
    room = max(2, int(inches * 72 / (_LABEL * _LINE)))
    step = -(-len(tokens) // room)
    places = list(range(0, len(tokens), step))
    numbered = numbered or step > 1
    names = [(f"{i} " if numbered else "") + token_label(tokens[i]) for i in places]
    names = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    if axis == "x":
        axes.set_xticks(places, names, rotation=90, fontsize=_LABEL)
        axes.set_xlim(-0.6, len(tokens) - 0.4)
    else:
        axes.set_yticks(places, names, fontsize=_LABEL)
        axes.set_ylim(len(tokens) - 0.4, -0.6)


@cache
def _settings() -> Any:
    return {
        "font.family": _families(),
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.unicode_minus": True,
        "legend.frameon": False,
        "svg.hashsalt": "elm-lanczos",
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }


@cache
def _families() -> list[str]:
    installed = set(font_manager.get_font_names())
    return [name for name in _FAMILIES if name in installed]


@cache
def _characters() -> frozenset[int]:
    """The code points that some font of the list has."""
    paths = [font_manager.findfont(name) for name in _families()]
    return frozenset().union(*(FT2Font(path).get_charmap() for path in paths))


def _spelt(character: str) -> str:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Cf"):
        return ""
    name = unicodedata.name(character, "").lower().replace(" ", "-")
    return f":{name}:" if 0 < len(name) <= 24 else f"<U+{ord(character):04X}>"
