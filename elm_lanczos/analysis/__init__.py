"""What the linear system says: analyses of prompts, each of which returns an `Analysis`."""

from elm_lanczos.analysis.attribution import Attribution, attribute
from elm_lanczos.analysis.layer_spectra import LayerSpectra, LayerTriplets, layers
from elm_lanczos.analysis.result import Analysis

__all__ = ["Analysis", "Attribution", "LayerSpectra", "LayerTriplets", "attribute", "layers"]
