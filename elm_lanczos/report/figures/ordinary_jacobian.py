"""The output against what the ordinary and the detached Jacobian reconstruct of it."""

from __future__ import annotations

from matplotlib.figure import Figure

from elm_lanczos.analysis.ordinary_jacobian import OrdinaryJacobian
from elm_lanczos.report.figures.style import BLACK, BLUE, VERMILION, figure, legible, styled

_PANELS = {"ordinary": (BLUE, "J°x"), "detached": (VERMILION, "Jx + c")}


@styled
def draw(result: OrdinaryJacobian) -> Figure:
    """Draws two panels of one point a feature, with the line of equality.

    Args:
        result: the comparison.

    Returns:
        A figure with the ordinary Jacobian on the left.
    """
    drawing = figure(3.6)
    both = drawing.subplots(1, 2, sharex=True)
    y = result.output.tolist()
    ends = (min(y), max(y))
    size = 14 if len(y) <= 512 else 5
    for axes, (name, (colour, formula)) in zip(both, _PANELS.items(), strict=True):
        axes.plot(ends, ends, color=BLACK, linewidth=0.7, zorder=1)
        made = result.reconstructions[name].tolist()
        axes.scatter(y, made, s=size, color=colour, alpha=0.6, linewidths=0, rasterized=True)
        axes.set_title(
            f"{name} Jacobian\nstd(error) / std(y) = {result.deviation(name):.1e}\n"
            f"‖error‖ / ‖y‖ = {result.error(name):.1e}"
        )
        axes.set_xlabel("output y, one point a feature")
        axes.set_ylabel(legible(formula))
        axes.grid(linewidth=0.3)
    return drawing
