"""Layers of prompts that a run has stored: decomposed as `analysis.layers` does, and kept there.

They lie beside the prompt's own arrays, as groups of the same form: `layer_07/mlp` for the kind
`cumulative`, `layer_07/mlp_layerwise` and `layer_07/residual_to-end` for the others. A group counts
once it is finished; one whose making was interrupted is made again by the next call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import ValidationError

from elm_lanczos.analysis.layer_spectra import (
    DEFAULT_K,
    DEFAULT_TOL,
    DEFAULT_TOP,
    LayerSpectra,
    LayerTriplets,
    layers,
)
from elm_lanczos.analysis.result import Progress
from elm_lanczos.config import select_tokens
from elm_lanczos.errors import StoreError, UsageError, first_line
from elm_lanczos.layer_operators import CUMULATIVE, MODULES
from elm_lanczos.linearization import Linearization
from elm_lanczos.run import load_model, stored_config, weights_digest
from elm_lanczos.store import PromptGroup, PromptHeader, PromptResult, ResultStore
from elm_lanczos.store.faults import FINISHED
from elm_lanczos.sublayers import Sublayers


@dataclass(frozen=True)
class LayerOptions:
    """What is asked of layers, as text.

    Attributes:
        layers: which, as `config.select_tokens` reads it.
        modules: of `residual`, `attention` and `mlp`.
        kinds: of `cumulative`, `layerwise` and `to-end`.
        readout: `norm` or `raw`.
        tokens: positions, as `config.select_tokens` reads it; up to the output position.
        k: triplets of each Jacobian.
        tol: residual relative to σ₁.
        top: words of each singular vector.
    """

    layers: str = "all"
    modules: tuple[str, ...] = MODULES
    kinds: tuple[str, ...] = (CUMULATIVE,)
    readout: str = "norm"
    tokens: str = "all"
    k: int = DEFAULT_K
    tol: float = DEFAULT_TOL
    top: int = DEFAULT_TOP

    def solve(self, lin: Linearization, progress: Progress | None = None) -> LayerSpectra:
        """Decomposes the layers of a linear system.

        Args:
            lin: the system.
            progress: told how far it is.

        Returns:
            The triplets.

        Raises:
            UsageError: if an option cannot be used.
            UnsupportedModelError: if the model is not a chain of layers (see `layers`).
        """
        depth = len(Sublayers.places(lin.decoder))
        return layers(
            lin,
            select_tokens(self.layers, depth, "--layers", of="the model", what="layers", start=1),
            self.modules,
            self.kinds,
            readout=self.readout,
            tokens=select_tokens(self.tokens, lin.position + 1),
            k=self.k,
            tol=self.tol,
            top=self.top,
            progress=progress,
        )


def add_layers(
    path: str,
    options: LayerOptions,
    numbers: Sequence[int] | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Iterator[LayerSpectra]:
    """Decomposes layers of the prompts of a store, and keeps them there.

    Args:
        path: the store of a run, which no other run uses.
        options: what to compute. Earlier results of the same layers are replaced.
        numbers: numbers of prompts, from 1; all if not given.
        memory: bytes to work within.
        progress: told how far each is.

    Yields:
        The result of each prompt, once it is in the store.

    Raises:
        StoreError: if the store cannot be read or written, or its model is another one now.
        UsageError: if there is no such prompt, or an option cannot be used.
    """
    with ResultStore.open(path, "r+") as store:
        fingerprint: Any = store.attrs.get("fingerprint")
        if not (isinstance(fingerprint, dict) and "weights" in fingerprint):
            raise StoreError(f"{path} has no fingerprint to go by")
        try:
            config = stored_config(store.attrs)
        except ValidationError as error:
            raise StoreError(f"{path} has no options to go by: {first_line(error)}") from error
        store.resume(fingerprint)
        groups = store.prompts
        for number in numbers or ():
            if not 1 <= number <= len(groups):
                raise UsageError(f"--prompt {number}: {path} has prompts 1 to {len(groups)}")
        model = load_model(config)
        if fingerprint["weights"] != weights_digest(model):
            raise StoreError(f"{path}: {model.name} has other weights now than when it was made")
        for number in numbers or range(1, len(groups) + 1):
            group = groups[number - 1]
            prompt = store.result(group)
            ids = torch.as_tensor(prompt.token_ids).long()
            lin = model.linearize(ids, prompt.position, memory=memory)
            found = options.solve(lin, progress)
            for one in found.results.values():
                _write(group, prompt, found, one)
            yield found


def _write(
    group: PromptGroup, prompt: PromptResult, whole: LayerSpectra, one: LayerTriplets
) -> None:
    """Writes one layer and module, and marks it as finished."""
    found = one.triplets
    (_, k, m), d = found.U.shape, found.V.shape[2]
    header = PromptHeader(
        id=prompt.id,
        text=prompt.text,
        token_ids=prompt.token_ids.tolist(),
        token_strings=prompt.tokens,
        m=m,
        d=d,
        k=k,
        top=one.u.ids.shape[2],
        dtype=str(found.U.dtype).removeprefix("torch."),
        requested=one.index,
        position=whole.position,
        plan={"svd": asdict(found.plan)},
        attrs={
            "layer": one.layer,
            "module": one.module,
            "kind": one.kind,
            "readout": whole.readout,
            "tol": whole.tol,
            "certificate": None if whole.certificate is None else whole.certificate.to_dict(),
            "doubts": whole.doubts,
        },
    )
    suffix = "" if one.kind == CUMULATIVE else f"_{one.kind}"
    made = group.create_layer(f"layer_{one.layer:02d}/{one.module}{suffix}", header)
    assert found.contribution is not None
    computed = {
        name: getattr(found, name)
        for name in "U V S residual error_bound stable_rank stable_rank_error n_iter status".split()
    }
    computed |= {
        "contribution_norm": found.contribution.norm(dim=-1),
        "u_token": one.u.ids,
        "u_score": one.u.scores,
        "v_token": one.v.ids,
        "v_score": one.v.scores,
    }
    for owner, tokens in enumerate(made.owners()):
        here = [i for i, token in enumerate(one.index) if token in tokens]
        if not here:
            continue
        rows = made.empty_rows(owner)
        places = [one.index[i] - tokens.start for i in here]
        for name, values in computed.items():
            rows[name][places] = values[here].numpy()
        made.write_rows(owner, rows)
        made.commit(owner)
    made.set_attrs({FINISHED: True})
