"""What the linear system says: analyses of prompts, each of which returns an `Analysis`."""

from elm_lanczos.analysis.attribution import Attribution, attribute
from elm_lanczos.analysis.comparison import Comparison, Spectra, compare
from elm_lanczos.analysis.components import Components, components
from elm_lanczos.analysis.result import Analysis

__all__ = [
    "Analysis",
    "Attribution",
    "Comparison",
    "Components",
    "Spectra",
    "attribute",
    "compare",
    "components",
]
