"""What every figure must hold to: no text overlaps or is cut off, every character is shown."""

from __future__ import annotations

import io
import warnings
from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from elm_lanczos.report.figures.style import save_figure


def assert_legible(figure: Figure, *, smallest: float = 5.0) -> None:
    """Asserts that a figure's texts can be read: each apart from the others, whole, and shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        save_figure(figure, io.BytesIO())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page = figure.get_window_extent(renderer)
    texts = [
        (text, text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text.get_visible() and text.get_text().strip()
    ]
    undrawn = _undrawn(figure)
    shown = [(text, box) for text, box in texts if box.width > 0 and text not in undrawn]
    assert shown
    for text, box in shown:
        assert text.get_fontsize() >= smallest, text.get_text()
        cut = box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y0 < page.y0 - 1
        assert not (cut or box.y1 > page.y1 + 1), f"{text.get_text()!r} is cut off"
    for (one, box), (other, beside) in combinations(shown, 2):
        common = Bbox.intersection(box, beside)
        if common is not None:
            overlap = common.width > 1.5 and common.height > 1.5
            assert not overlap, f"{one.get_text()!r} overlaps {other.get_text()!r}"


def _undrawn(figure: Figure) -> set[Text]:
    """Labels of ticks that exist, but are outside of the limits."""
    labels = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            drawn = axis._update_ticks()  # type: ignore[attr-defined]
            ticks = [tick for tick in axis.majorTicks + axis.minorTicks if tick not in drawn]
            labels |= {label for tick in ticks for label in (tick.label1, tick.label2)}
    return labels
