"""Leading singular triplets of batches of matrix-free operators, with evidence for each."""

from typing import TYPE_CHECKING

from elm_lanczos.lazy import lazy_names

if TYPE_CHECKING:
    from elm_lanczos.svd.plan import Plan
    from elm_lanczos.svd.result import SVDResult
    from elm_lanczos.svd.solve import svd

__all__ = ["Plan", "SVDResult", "svd"]
__getattr__ = lazy_names(
    __name__,
    {
        "Plan": "elm_lanczos.svd.plan",
        "SVDResult": "elm_lanczos.svd.result",
        "svd": "elm_lanczos.svd.solve",
    },
)
