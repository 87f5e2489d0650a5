"""What the linear system says: analyses that use a `Linearization` and its triplets."""

from elm_lanczos.analysis.attribution import Attribution, attribute

__all__ = ["Attribution", "attribute"]
