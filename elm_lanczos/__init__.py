"""A language model's computation as linear algebra.

For one input, a transformer decoder is rewritten exactly as `y = Σ J_i x_i + c`, one detached
Jacobian per input token; their leading singular triplets are found without forming them, and
decode to words. See `DetachedModel`, `svd` and `open_results`.
"""

from typing import TYPE_CHECKING

import elm_lanczos.svd  # noqa: F401 (the package, once and for all, so that it never hides the function)
from elm_lanczos.lazy import lazy_names

del svd  # noqa: F821 (bound by the import above)

if TYPE_CHECKING:
    from elm_lanczos.certificate import Certificate
    from elm_lanczos.errors import ElmLanczosError, UnsupportedModelError
    from elm_lanczos.linearization import Linearization
    from elm_lanczos.model import DetachedModel
    from elm_lanczos.operators import LinearOperator, aslinearoperator
    from elm_lanczos.store import open_results
    from elm_lanczos.svd.result import SVDResult
    from elm_lanczos.svd.solve import svd

__version__ = "0.1.0"
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
__getattr__ = lazy_names(
    __name__,
    {
        "Certificate": "elm_lanczos.certificate",
        "DetachedModel": "elm_lanczos.model",
        "ElmLanczosError": "elm_lanczos.errors",
        "LinearOperator": "elm_lanczos.operators",
        "Linearization": "elm_lanczos.linearization",
        "SVDResult": "elm_lanczos.svd.result",
        "UnsupportedModelError": "elm_lanczos.errors",
        "aslinearoperator": "elm_lanczos.operators",
        "open_results": "elm_lanczos.store",
        "svd": "elm_lanczos.svd.solve",
    },
)
