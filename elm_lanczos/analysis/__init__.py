"""What the linear system says: analyses of prompts, each of which returns an `Analysis`."""

from elm_lanczos.analysis.attribution import Attribution, attribute
from elm_lanczos.analysis.ordinary_jacobian import OrdinaryJacobian, ordinary
from elm_lanczos.analysis.result import Analysis

__all__ = ["Analysis", "Attribution", "OrdinaryJacobian", "attribute", "ordinary"]
