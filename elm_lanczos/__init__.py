"""A language model's computation as linear algebra.

For one input, a transformer decoder is rewritten exactly as `y = Σ J_i x_i + c`, one detached
Jacobian per input token; their leading singular triplets are found without forming them, and
decode to words. See `DetachedModel`, `svd` and `open_results`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elm_lanczos.errors import ElmLanczosError, UnsupportedModelError
    from elm_lanczos.linearization import Certificate, Linearization
    from elm_lanczos.model import DetachedModel
    from elm_lanczos.operators import LinearOperator, aslinearoperator
    from elm_lanczos.store import open_results
    from elm_lanczos.svd import SVDResult, svd

__version__ = "0.1.0"

_HOMES = {
    "Certificate": "linearization",
    "DetachedModel": "model",
    "ElmLanczosError": "errors",
    "LinearOperator": "operators",
    "Linearization": "linearization",
    "SVDResult": "svd",
    "UnsupportedModelError": "errors",
    "aslinearoperator": "operators",
    "open_results": "store",
    "svd": "svd",
}
__all__ = [
    "Certificate",
    "DetachedModel",
    "ElmLanczosError",
    "LinearOperator",
    "Linearization",
    "SVDResult",
    "UnsupportedModelError",
    "aslinearoperator",
    "open_results",
    "svd",
]


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that `import elm_lanczos` is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elm_lanczos' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"elm_lanczos.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names."""
    return sorted(__all__)
