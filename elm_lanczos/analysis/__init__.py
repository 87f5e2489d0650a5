"""What the linear system says: analyses of prompts, each of which returns an `Analysis`."""

from elm_lanczos.analysis.attribution import Attribution, attribute
from elm_lanczos.analysis.comparison import Comparison, Spectra, compare
from elm_lanczos.analysis.contributions import Components, components
from elm_lanczos.analysis.layer_spectra import LayerSpectra, LayerTriplets, layers
from elm_lanczos.analysis.ordinary_jacobian import OrdinaryJacobian, ordinary
from elm_lanczos.analysis.result import Analysis
from elm_lanczos.analysis.steering import (
    Steering,
    SteeringOperator,
    SteeringSweep,
    steer,
    steering_operator,
    sweep_steering,
)

__all__ = [
    "Analysis",
    "Attribution",
    "Comparison",
    "Components",
    "LayerSpectra",
    "LayerTriplets",
    "OrdinaryJacobian",
    "Spectra",
    "Steering",
    "SteeringOperator",
    "SteeringSweep",
    "attribute",
    "compare",
    "components",
    "layers",
    "ordinary",
    "steer",
    "steering_operator",
    "sweep_steering",
]
