"""Leading singular triplets of batches of matrix-free operators, with evidence for each."""

from elm_lanczos.status import Status
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import SVDResult
from elm_lanczos.svd.solve import svd

__all__ = ["Plan", "SVDResult", "Status", "svd"]
