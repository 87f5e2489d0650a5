"""The result store: one Zarr v3 store per run, one group per prompt.

with ResultStore.create("run.zarr", attrs={…}, fingerprint={…}) as store:
    group = store.create_prompt(PromptHeader(…), 0)
    group.write_outputs(output=y, constant=c, attribution=a)
    for owner in group.pending():
        group.write_rows(owner, rows)
        group.commit(owner)
    store.write_summary()

results = open_results("run.zarr")  # or "s3://bucket/run.zarr"
results.prompts[0].S
"""

from elm_lanczos.status import Status
from elm_lanczos.store.layout import PromptHeader
from elm_lanczos.store.prompt_group import PromptGroup
from elm_lanczos.store.result_store import ResultStore
from elm_lanczos.store.results import PromptResult, Results, open_results

__all__ = [
    "PromptGroup",
    "PromptHeader",
    "PromptResult",
    "ResultStore",
    "Results",
    "Status",
    "open_results",
]
