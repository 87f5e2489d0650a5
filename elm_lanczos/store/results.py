"""Reading a store: prompts as objects whose arrays are read when they are first used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from elm_lanczos.errors import DamagedError, StoreError
from elm_lanczos.status import Status
from elm_lanczos.store.attributes import Json
from elm_lanczos.store.faults import FINISHED
from elm_lanczos.store.layout import Array
from elm_lanczos.store.place import Address, Place, place_at
from elm_lanczos.store.reading import (
    below,
    check_result_store,
    layer_names,
    position_names,
    prompt_names,
    read_array,
    read_attributes,
)
from elm_lanczos.store.summary import SUMMARY

if TYPE_CHECKING:
    import xarray

_Kind = TypeVar("_Kind", str, int, dict[str, Any])

_SHOWN_PROMPTS = 8
_SHOWN_CHARACTERS = 60


def open_results(path: str | Address) -> Results:
    """Open a result store for reading.

    Args:
        path: Its folder, or a URL such as `s3://bucket/run.zarr`.

    Returns:
        The results; arrays are read when they are first used.

    Raises:
        StoreError: The path holds no store that this version can read.
    """
    place = place_at(path)
    check_result_store(place)
    return Results(place)


class Results(Sequence["PromptResult"]):
    """The results of one run: a sequence of prompts.

    Attributes:
        path: The folder of the store, or its URL.
        attrs: The attributes of the run: model, configuration, versions, fingerprint.
        prompts: The prompts in order.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self.path = place.path
        self.attrs = read_attributes(place)
        self.prompts = [PromptResult(place, name) for name in prompt_names(place)]

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> PromptResult: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PromptResult]: ...
    def __getitem__(self, index: int | slice) -> PromptResult | Sequence[PromptResult]:
        return self.prompts[index]

    def __iter__(self) -> Iterator[PromptResult]:
        return iter(self.prompts)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "not complete"
        count = f"{len(self)} prompt{'' if len(self) == 1 else 's'}"
        lines = [f"<Results {self.path}: {count}, {state}>"]
        lines += [f"  {index} {prompt!r}" for index, prompt in enumerate(self[:_SHOWN_PROMPTS])]
        if len(self) > _SHOWN_PROMPTS:
            lines.append(f"  … {len(self) - _SHOWN_PROMPTS} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Shows it in a notebook."""
        from elm_lanczos.report import notebook

        return notebook.results(self)

    def group(self, name: str) -> PromptResult:
        """One prompt's results by the path of its group, for example `prompts/000000`."""
        return PromptResult(self._place, name)

    @property
    def complete(self) -> bool:
        """Whether the run has ended: its summary is written."""
        return bool(read_attributes(self._place, SUMMARY))

    def to_datatree(self) -> xarray.DataTree:
        """Give all prompts and their further positions as one tree of labelled datasets.

        Returns:
            The tree: `prompts/000000` and so on, and beside it, as it may have more tokens,
            `prompts/000000_position_0012` for a further position. Arrays are read when used.
        """
        import xarray

        groups = {
            one.name.replace("/position", "_position"): one.to_xarray()
            for prompt in self
            for one in (prompt, *prompt.positions.values())
        }
        return xarray.DataTree.from_dict(groups)

    @property
    def summary(self) -> xarray.Dataset:
        """The flat table over all tokens of all prompts.

        Raises:
            StoreError: The run has not ended.
        """
        if not self.complete:
            raise StoreError(f"{self.path} has no summary yet: end its run with --resume")
        return _open_dataset(self._place, SUMMARY)


class PromptResult:
    """The results of one prompt, or of one of its further output positions.

    With T tokens, k triplets per token, m output features and d input features, `J_i ≈ Σ_j
    S[i, j] · U[i, j] V[i, j]ᵀ`. Rows that were not requested, or not done when the run ended, are
    NaN.

    Args:
        place: Where the store lies.
        name: Path of the group.
    """

    def __init__(self, place: Place, name: str) -> None:
        self._place = place
        self.name = name

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN_CHARACTERS else self.text[:59] + "…"
        counts = [(status, int((self.status == status).sum())) for status in Status]
        states = [f"{n} {status.name.lower().replace('_', ' ')}" for status, n in counts if n]
        return f"<PromptResult {text!r}: {len(self.tokens)} tokens, {', '.join(states)}>"

    def _repr_html_(self) -> str:
        """Shows it in a notebook."""
        from elm_lanczos.report import notebook

        return notebook.prompt_result(self)

    @property
    def path(self) -> Address:
        """The folder of the group, or its URL."""
        return self._place.path / self.name

    @cached_property
    def attrs(self) -> dict[str, Json]:
        """All attributes of the group."""
        return read_attributes(self._place, self.name)

    @property
    def id(self) -> str:
        """The name of the prompt."""
        return self._attribute("id", str)

    @property
    def text(self) -> str:
        """The tokens up to the output position as text: the prompt, or a part of it, or more."""
        return self._attribute("text", str)

    @property
    def prompt(self) -> str:
        """The prompt, which is longer than `text` where no prediction at its end was asked for."""
        return self._attribute("prompt", str) if "prompt" in self.attrs else self.text

    @property
    def position(self) -> int:
        """The output position whose prediction is explained."""
        return self._attribute("position", int)

    @property
    def plan(self) -> dict[str, Any]:
        """Method, block sizes, precision and seed that the rows were computed with."""
        return self._attribute("plan", dict)

    @property
    def certificate(self) -> dict[str, Any]:
        """The certificate's figures by name; empty while they are not written."""
        return self._attribute("certificate", dict) if "certificate" in self.attrs else {}

    @cached_property
    def token_ids(self) -> Array:
        """Token ids, int32 (T,)."""
        return self._read("token_id")

    @cached_property
    def tokens(self) -> list[str]:
        """The T tokens as text."""
        return [str(token) for token in self._read("token_str")]

    @cached_property
    def U(self) -> Array:
        """Left singular vectors, (T, k, m)."""
        return self._read("U")

    @cached_property
    def S(self) -> Array:
        """Singular values, descending, (T, k)."""
        return self._read("S")

    @cached_property
    def V(self) -> Array:
        """Right singular vectors, (T, k, d)."""
        return self._read("V")

    @cached_property
    def residual(self) -> Array:
        """Two-sided residual of each triplet, max(‖J_i v − σu‖, ‖J_iᵀu − σv‖), (T, k)."""
        return self._read("residual")

    @cached_property
    def error_bound(self) -> Array:
        """Bound on the error of each singular value, (T, k)."""
        return self._read("error_bound")

    @cached_property
    def stable_rank(self) -> Array:
        """‖J_i‖_F² / σ₁², (T,)."""
        return self._read("stable_rank")

    @cached_property
    def stable_rank_error(self) -> Array:
        """Standard error of the stable rank, (T,)."""
        return self._read("stable_rank_error")

    @cached_property
    def contribution_norm(self) -> Array:
        """‖J_i x_i‖, (T,)."""
        return self._read("contribution_norm")

    @cached_property
    def n_iter(self) -> Array:
        """Iterations of the method, int32 (T,), -1 where there were none."""
        return self._read("n_iter")

    @cached_property
    def status(self) -> Array:
        """Values of `Status`, uint8 (T,)."""
        return self._read("status")

    @cached_property
    def done(self) -> Array:
        """Whether each row is committed, bool (T,)."""
        return self._read("done")

    @cached_property
    def u_token(self) -> Array:
        """Token ids decoded from each u, best first, int32 (T, k, top)."""
        return self._read("u_token")

    @cached_property
    def u_score(self) -> Array:
        """Their scores, (T, k, top)."""
        return self._read("u_score")

    @cached_property
    def v_token(self) -> Array:
        """Token ids decoded from each v, best first, int32 (T, k, top)."""
        return self._read("v_token")

    @cached_property
    def v_score(self) -> Array:
        """Their cosines with v, (T, k, top)."""
        return self._read("v_score")

    @cached_property
    def output(self) -> Array:
        """The hidden state y after the final norm, (m,)."""
        return self._read("output")

    @cached_property
    def constant(self) -> Array:
        """The constant c in y = Σ J_i x_i + c, (m,)."""
        return self._read("constant")

    @cached_property
    def attribution(self) -> Array:
        """Part of the predicted token's logit that comes through each token, (T,)."""
        return self._read("attribution")

    @property
    def positions(self) -> dict[int, PromptResult]:
        """The results for further output positions, by position."""
        names = position_names(self._place, self.name)
        groups = [PromptResult(self._place, name) for name in names]
        return {group.position: group for group in groups}

    @property
    def layers(self) -> dict[tuple[int, str, str], LayerResult]:
        """The results of layers that `elm-lanczos layers` has added, by layer, module and kind."""
        groups = [LayerResult(self._place, name) for name in layer_names(self._place, self.name)]
        complete = [group for group in groups if group.attrs.get(FINISHED) is True]
        complete.sort(key=lambda group: (group.kind, group.layer, group.module != "residual"))
        return {(group.layer, group.module, group.kind): group for group in complete}

    def to_xarray(self) -> xarray.Dataset:
        """Give all arrays as one labelled dataset, read when used.

        Returns:
            The dataset, with the tokens as coordinates.
        """
        return _open_dataset(self._place, self.name)

    def _read(self, name: str) -> Array:
        return np.asarray(read_array(self._place, below(self.name, name)))

    def _attribute(self, name: str, kind: type[_Kind]) -> _Kind:
        value = self.attrs.get(name)
        if type(value) is not kind:
            found = "is missing" if value is None else f"is a {type(value).__name__}"
            raise DamagedError(f"{self.path / 'zarr.json'} is damaged: {name!r} {found}")
        return value


class LayerResult(PromptResult):
    """The results of one layer and module: `S`, `U`, `V` and the others are of its Jacobians.

    Output, constant and attribution belong to the prompt, and are not written here.
    """

    def __repr__(self) -> str:
        return f"<LayerResult {self.kind} {self.module} of layer {self.layer}: {self.name}>"

    def _repr_html_(self) -> str:
        """Shows it in a notebook."""
        from elm_lanczos.report import notebook

        return notebook.layer_result(self)

    @property
    def layer(self) -> int:
        """The layer's number, counted from 1."""
        return self._attribute("layer", int)

    @property
    def module(self) -> str:
        """`residual`, `attention` or `mlp`."""
        return self._attribute("module", str)

    @property
    def kind(self) -> str:
        """`cumulative`, `layerwise` or `to-end`."""
        return self._attribute("kind", str)

    @property
    def readout(self) -> str:
        """`norm`: through the final norm frozen at `h_l`; `raw`: the stream as it is."""
        return self._attribute("readout", str)


def _open_dataset(place: Place, group: str) -> xarray.Dataset:
    import xarray

    return xarray.open_zarr(place.zarr, group=group, consolidated=False, chunks=None, zarr_format=3)
