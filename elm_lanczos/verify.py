"""Whether a finished store says what its run computed: every file read, samples computed again.

Three questions, each answered by naming what is wrong: can every file be read (a crc32c on each
chunk); do the numbers agree with each other (done marks with status, singular values in descending
order, UᵀU = VᵀV = I, residuals below the tolerance, the certificate, the summary); and does the
model give them, that is, are ‖J v − σu‖ and ‖Jᵀu − σv‖ by fresh JVPs and VJPs of some rows the
residuals that are stored. Nothing is ever written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

from elm_lanczos.certificate import Certificate
from elm_lanczos.config import RunConfig
from elm_lanczos.errors import DamagedError, ElmLanczosError, first_line
from elm_lanczos.model import DetachedModel
from elm_lanczos.operators import TokenOperators
from elm_lanczos.prompts import Prompt
from elm_lanczos.run import load_model, run_fingerprint, stored_config
from elm_lanczos.status import Status
from elm_lanczos.store import PromptResult, Results, open_results
from elm_lanczos.store.attributes import first_difference, to_json
from elm_lanczos.store.faults import (
    Fault,
    computed,
    layout_faults,
    read_owners,
    whole_faults,
)
from elm_lanczos.store.layout import OUTPUT_ARRAYS, ROW_ARRAYS, Array
from elm_lanczos.store.place import Address, Place, place_at
from elm_lanczos.store.reading import below, layer_names, position_names, read_array
from elm_lanczos.store.summary import SUMMARY, summary_columns
from elm_lanczos.svd.plan import TF32_TOL, Plan
from elm_lanczos.svd.result import rounding_level

SAMPLE = 4
"""Rows of each prediction that are computed again."""

_OF_THIS_MACHINE = ("device", "versions")
"""Fields of a fingerprint that another machine may have different."""

_SLACK = 1e-3
"""Relative difference of two residuals that are sums of roundings in another order."""


@dataclass(frozen=True)
class Verification:
    """What reading a store came to.

    Attributes:
        path: the store.
        complete: whether its run has ended.
        predictions: groups read, one for each prompt and further output position.
        done: rows that are done.
        pending: rows that were asked for and are not done.
        not_converged: rows that say themselves that they did not reach the tolerance.
        recomputed: rows whose residuals were computed again.
        faults: everything that is wrong.
        unfinished: paths of layers' groups whose making was interrupted.
    """

    path: Address
    complete: bool
    predictions: int
    done: int
    pending: int
    not_converged: int
    recomputed: int
    faults: tuple[Fault, ...]
    unfinished: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        counts = ("predictions", "done", "pending", "not_converged", "recomputed")
        return {
            "store": str(self.path),
            "complete": self.complete,
            **{name: getattr(self, name) for name in counts},
            "unfinished_layers": list(self.unfinished),
            "problems": [
                {
                    "prompt": fault.group or None,
                    "array": fault.array or None,
                    "tokens": fault.tokens and [fault.tokens.start, fault.tokens.stop],
                    "file": fault.file and str(fault.file),
                    "problem": fault.reason,
                }
                for fault in self.faults
            ],
        }


class _Chain(BaseModel):
    block: int
    keep: bool
    narrow: bool


class _LayerPlan(BaseModel):
    svd: Plan


class _StoredPlan(_LayerPlan):
    chain: _Chain


class _AnyAttributes(BaseModel):
    """What the attributes of every group must hold."""

    id: StrictStr
    text: StrictStr
    position: NonNegativeInt
    plan: _LayerPlan
    certificate: Certificate | None = None
    finished: StrictBool = False


class _Attributes(_AnyAttributes):
    """What the attributes of a prediction's group must hold."""

    plan: _StoredPlan


class _LayerAttributes(_AnyAttributes):
    """What the attributes of a layer's group must hold."""

    layer: StrictInt = Field(ge=1)
    module: Literal["residual", "attention", "mlp"]
    kind: Literal["cumulative", "layerwise", "to-end"]


@dataclass
class _Group:
    """One prediction, or one layer, while it is read.

    Attributes:
        result: its results.
        attributes: its attributes, None if they are not as they should be.
        level: the residual, relative to σ₁, that is rounding; by default that of its dtype.
        rows: where triplets are stored, bool (T,).
        done: rows that were asked for and are done.
        pending: rows that were asked for and are not.
        not_converged: rows that did not reach the tolerance.
        faults: what is wrong with it.
    """

    result: PromptResult
    attributes: _AnyAttributes | None = None
    level: float | None = None
    rows: Array = field(default_factory=lambda: np.zeros(0, dtype=bool))
    done: int = 0
    pending: int = 0
    not_converged: int = 0
    faults: list[Fault] = field(default_factory=list)


def verify(
    path: str | Address,
    *,
    sample: int = SAMPLE,
    load: Callable[[RunConfig], DetachedModel] | None = load_model,
) -> Verification:
    """Reads a whole store and computes some of its rows again.

    A run that goes on, or that was interrupted, is read as far as it is done.

    Args:
        path: the folder of the store, or its URL.
        sample: rows of each prediction to compute again.
        load: loads the model of the run's options; None reads without a model.

    Returns:
        What was found.

    Raises:
        StoreError: if there is no result store at the path.
    """
    results = open_results(path)
    place = place_at(results.path)
    faults: list[Fault] = []
    groups = [
        _read_group(place, results.group(name), results.attrs)
        for prompt in results
        for name in _names(place, prompt)
    ]
    ended = _is_complete(results, faults)
    if ended:  # before, prompts are created in any order
        faults += _gaps(results)
    complete = ended and all(
        group.attributes is not None and group.attributes.finished for group in groups
    )
    faults += [fault for group in groups for fault in group.faults]
    layers = [
        _read_layer(place, results.group(name), results.attrs)
        for prompt in results
        for name in layer_names(place, prompt.name)
    ]
    faults += [fault for layer in layers for fault in layer.faults]
    if complete and not faults:
        faults += _summary_faults(place, results)
    recomputed = 0
    if load is not None:
        recomputed = _recompute(results, groups, complete, sample, load, faults)
    return Verification(
        path=results.path,
        complete=complete,
        predictions=len(groups),
        done=sum(group.done for group in groups),
        pending=sum(group.pending for group in groups),
        not_converged=sum(group.not_converged for group in groups),
        recomputed=recomputed,
        faults=tuple(faults),
        unfinished=tuple(layer.result.name for layer in layers if _is_unfinished(layer)),
    )


def _names(place: Place, prompt: PromptResult) -> list[str]:
    """The paths of a prompt's group and of those of its further positions."""
    return [prompt.name, *position_names(place, prompt.name)]


def _gaps(results: Results) -> Iterator[Fault]:
    """One fault for each row of prompts that are not there though later ones are."""
    numbers = [-1, *(int(prompt.path.name) for prompt in results)]
    for before, after in pairwise(numbers):
        if after > before + 1:
            several = f", like all up to {after - 1:06d}" if after > before + 2 else ""
            yield Fault(f"is missing{several}", f"prompts/{before + 1:06d}")


def _is_complete(results: Results, faults: list[Fault]) -> bool:
    try:
        return results.complete
    except DamagedError as error:
        faults.append(Fault(str(error), SUMMARY))
        return True  # there is a summary, if a damaged one


# ----------------------------------------------------------------------------- one prediction


def _read_group(place: Place, result: PromptResult, root: Mapping[str, Any]) -> _Group:
    """Reads everything of one prediction."""
    group = _Group(result)
    if _read_attributes(group, _Attributes):
        certificate = group.attributes.certificate if group.attributes is not None else None
        if certificate is not None and certificate.dtype == "tf32":
            group.level = TF32_TOL
        _read_rows(place, group, root)
    if not group.faults:
        group.faults += _prompt_faults(group, _vocabulary(root))
    return group


def _read_layer(place: Place, result: PromptResult, root: Mapping[str, Any]) -> _Group:
    """Reads everything of one layer's group, unless it was left unfinished."""
    group = _Group(result)
    if _read_attributes(group, _LayerAttributes) and not _is_unfinished(group):
        config = root.get("config")
        if isinstance(config, dict) and config.get("precision") == "tf32":
            group.level = TF32_TOL
        _read_rows(place, group, root)
    return group


def _is_unfinished(layer: _Group) -> bool:
    return layer.attributes is not None and not layer.attributes.finished


def _read_attributes(group: _Group, form: type[_AnyAttributes]) -> bool:
    """Reads the attributes of a group; returns whether its metadata can be read at all."""
    result = group.result
    try:
        group.attributes = form.model_validate(result.attrs)
    except DamagedError as error:
        group.faults.append(Fault(str(error), result.name))
        return False
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = f"attribute {key}: {first['msg'][0].lower()}{first['msg'][1:]}"
        group.faults.append(Fault(reason, result.name, file=result.path / "zarr.json"))
    return True


def _read_rows(place: Place, group: _Group, root: Mapping[str, Any]) -> None:
    """Reads all arrays of a group, and compares the numbers of its rows with each other."""
    result = group.result
    group.faults += layout_faults(place, result.name)
    if group.faults:  # of arrays of another form nothing more can be said
        return
    for tokens, rows, faults in read_owners(place, result.name):
        group.faults += faults
        if not faults:
            group.faults += _row_faults(group, tokens, rows, _vocabulary(root))
            asked = rows["status"] != Status.NOT_REQUESTED
            group.done += int((rows["done"] & asked).sum())
            group.pending += int((~rows["done"] & asked).sum())
            given_up = rows["done"] & (rows["status"] == Status.NOT_CONVERGED)
            group.not_converged += int(given_up.sum())
            group.rows = np.concatenate([group.rows, computed(rows)])
    group.faults += whole_faults(place, result.name)


def _vocabulary(root: Mapping[str, Any]) -> int:
    """Token ids of the model there are at most, as far as the store says."""
    try:
        config = json.loads(root["model"]["config"])
        sizes = [c["vocab_size"] for c in (config, config.get("text_config")) if c]
        return int(sizes[-1])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError):
        return 2**31


def _row_faults(
    group: _Group, tokens: range, rows: Mapping[str, Array], vocabulary: int
) -> Iterator[Fault]:
    """What is wrong with the numbers of one owner."""
    assert group.attributes is not None
    plan = group.attributes.plan.svd
    done, status = rows["done"], rows["status"]

    def fault(array: str, wrong: Array, reason: str) -> Iterator[Fault]:
        """One fault for the rows from the first to the last that is wrong."""
        where = np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))
        if len(where):
            span = range(tokens.start + int(where[0]), tokens.start + int(where[-1]) + 1)
            yield Fault(reason, group.result.name, array, span)

    known = np.isin(status, [int(s) for s in Status])
    yield from fault("status", ~known, "is none of the known states")
    skipped = status == Status.NOT_REQUESTED
    yield from fault("done", skipped & ~done, "does not mark a row that was not requested")
    yield from fault(
        "status", (status == Status.PENDING) & done, "is pending in a row that is done"
    )
    if (done & ~skipped).any():
        yield from fault("done", ~skipped & ~done, "marks only a part of what is written at once")
    live = computed(rows)
    for spec in ROW_ARRAYS:
        values = rows[spec.name]
        blank = np.isnan(values) if spec.dtype == "real" else values == spec.fill
        if spec.name != "status":
            wrong = blank.reshape(len(values), -1)
            yield from fault(spec.name, live & wrong.any(1), "holds NaN or nothing in a done row")
            reason = "holds values in a row that was not requested"
            yield from fault(spec.name, skipped & ~wrong.all(1), reason)
    if not live.any() or any(np.isnan(rows[n][live]).any() for n in ("U", "S", "V", "residual")):
        return
    S, residual = rows["S"].astype(float), rows["residual"].astype(float)
    largest, eps = S[:, :1], float(np.finfo(rows["S"].dtype).eps)
    m, d = rows["U"].shape[-1], rows["V"].shape[-1]
    level = group.level or max(64.0, 4 * max(m, d) ** 0.5) * eps  # as `rounding_level`
    for name in ("S", "residual", "error_bound"):
        wrong = ~(np.isfinite(rows[name]) & (rows[name] >= 0))
        yield from fault(name, live[:, None] & wrong, "is negative or not finite")
    rising = S[:, 1:] > S[:, :-1] + 8 * eps * largest
    yield from fault("S", live[:, None] & rising, "is not in descending order")
    met = live & (status != Status.NOT_CONVERGED)
    for name in ("U", "V"):
        X = rows[name].astype(float)
        gap = np.abs(X @ X.swapaxes(1, 2) - np.eye(X.shape[1])).max((1, 2))
        # twice what the run accepts: it measures in its own precision
        yield from fault(name, met & ~(gap <= 2 * level), "is not orthonormal")
    limits = np.where(status == Status.CONVERGED, plan.tol, level)[:, None] * largest
    wrong = met[:, None] & (residual > limits * (1 + _SLACK))
    yield from fault("residual", wrong, f"is above the tolerance, {plan.tol:.0e} of σ₁")
    for name in ("u_token", "v_token"):
        wrong = (rows[name] < 0) | (rows[name] >= vocabulary)
        yield from fault(name, live[:, None, None] & wrong, "holds an id that is no token")


def _prompt_faults(group: _Group, vocabulary: int) -> Iterator[Fault]:
    """What is wrong with what belongs to a prediction as a whole."""
    result, attributes = group.result, group.attributes
    assert attributes is not None
    name, metadata = result.name, result.path / "zarr.json"
    wrong = np.flatnonzero((result.token_ids < 0) | (result.token_ids >= vocabulary))
    if len(wrong):
        span = range(int(wrong[0]), int(wrong[-1]) + 1)
        yield Fault("holds an id that is no token", name, "token_id", span)
    if attributes.position >= len(result.token_ids):
        yield Fault(f"position {attributes.position} lies beyond the prompt", name, file=metadata)
    if attributes.plan.svd.k != result.S.shape[1]:
        reason = f"plan.svd.k is {attributes.plan.svd.k}, but {result.S.shape[1]} are stored"
        yield Fault(reason, name, file=metadata)
    if not attributes.finished:
        return
    for spec in OUTPUT_ARRAYS:
        if not np.isfinite(getattr(result, spec.name)).all():
            yield Fault("holds NaN or infinity", name, spec.name)
    certificate = attributes.certificate
    given_up = group.done > int(group.rows.sum())  # rows of NaN, whose residuals are NaN too
    if certificate is not None and given_up:
        certificate = replace(
            certificate,
            residual=_nan_for_none(certificate.residual),
            orthogonality=_nan_for_none(certificate.orthogonality),
        )
    if certificate is None or certificate.residual is None:
        yield Fault("is finished but has no certificate", name, file=metadata)
        return
    if certificate.dtype not in ("float32", "float64", "tf32"):
        yield Fault(f"certificate of dtype {certificate.dtype!r}", name, file=metadata)
    elif sorted(map(str, result.certificate.get("failures") or ())) != sorted(certificate.failures):
        yield Fault("the certificate's verdict is not that of its figures", name, file=metadata)
    if not given_up:
        S, residual = result.S[group.rows].astype(float), result.residual[group.rows].astype(float)
        scale = np.where(S[:, :1] > 0, S[:, :1], 1)
        worst = float((residual / scale).max(initial=0.0))
        if not abs(worst - certificate.residual) <= _SLACK * worst:
            reason = f"the certificate's residual is {certificate.residual:.3g}, that of the rows "
            yield Fault(f"{reason}{worst:.3g}", name, file=metadata)


def _nan_for_none(figure: float | None) -> float:
    """A figure as it was before it was written: JSON has no NaN."""
    return float("nan") if figure is None else figure


def _summary_faults(place: Place, results: Results) -> Iterator[Fault]:
    """Where the summary differs from the prompts."""
    names = [_names(place, prompt) for prompt in results]
    for name, values in (summary_columns(place, names) if names else {}).items():
        try:
            stored = read_array(place, below(SUMMARY, name))
        except DamagedError as error:
            yield Fault(str(error), SUMMARY, name)
            continue
        same = stored.shape == values.shape and stored.dtype == values.dtype
        if not (same and np.array_equal(stored, values, equal_nan=values.dtype.kind == "f")):
            yield Fault("is not what the prompts hold", SUMMARY, name)


# --------------------------------------------------------------------------- with the model


def _recompute(
    results: Results,
    groups: list[_Group],
    complete: bool,
    sample: int,
    load: Callable[[RunConfig], DetachedModel],
    faults: list[Fault],
) -> int:
    """Compares with the model of the run; returns how many rows were computed again."""
    metadata = results.path / "zarr.json"
    try:
        config = stored_config(results.attrs)
    except ValidationError as error:
        faults.append(Fault(f"config: {first_line(error)}", file=metadata))
        return 0
    try:
        model = load(config)
        found = _other_model(results, config, model, whole=complete and not faults)
    except ElmLanczosError as error:
        faults.append(Fault(f"the model of this run cannot be used: {error}"))
        return 0
    if found is not None:
        field_, stored, given = found
        reason = f"fingerprint: {field_} was {stored!r} and is {given!r} now"
        faults.append(Fault(reason, file=metadata))
        return 0
    recomputed = 0
    for group in groups:
        if group.faults or not group.rows.any():
            continue
        rows = np.flatnonzero(group.rows)
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, sample).round().astype(int))]
        try:
            faults += _residual_faults(group, model, chosen)
        except ElmLanczosError as error:
            faults.append(Fault(f"cannot be computed again: {error}", group.result.name))
            continue
        recomputed += len(chosen)
    return recomputed


def _other_model(
    results: Results, config: RunConfig, model: DetachedModel, *, whole: bool
) -> tuple[str, Any, Any] | None:
    """The first field in which the run's fingerprint is not that of the model loaded now.

    Args:
        results: the store.
        config: the run's options.
        model: the model that these load.
        whole: whether all prompts are there and can be read, so that they are compared too.

    Returns:
        Its name, the stored value and the one now; None if there is none.
    """
    prompts = [Prompt(p.id, p.prompt) for p in results] if whole else []
    ids = [_whole_ids(p, model) for p in results] if whole else []
    now: Any = to_json(run_fingerprint(config, model, prompts, ids))
    stored: Any = results.attrs.get("fingerprint")
    if not isinstance(stored, dict):
        return "all", stored, now
    left_out = _OF_THIS_MACHINE if whole else (*_OF_THIS_MACHINE, "prompts")
    kept = [{k: v for k, v in fields.items() if k not in left_out} for fields in (stored, now)]
    return first_difference(kept[0], kept[1])


def _whole_ids(result: PromptResult, model: DetachedModel) -> torch.Tensor:
    """The token ids of a prompt; the stored ones, if only of its beginning, and the others."""
    stored = torch.as_tensor(result.token_ids).long()
    if result.prompt == result.text:
        return stored
    return torch.cat([stored, model.encode(result.prompt)[len(stored) :].cpu()])


def _residual_faults(group: _Group, model: DetachedModel, chosen: Array) -> Iterator[Fault]:
    """Compares the residuals of some rows with those by products of the model."""
    result, attributes = group.result, group.attributes
    assert isinstance(attributes, _Attributes)
    ids = torch.as_tensor(result.token_ids).long()
    lin = model.linearize(ids, attributes.position, **attributes.plan.chain.model_dump())
    batch = TokenOperators(lin, chosen.tolist())
    count, k, m = result.U[chosen].shape
    if batch.shape != (count, m, result.V.shape[-1]):
        reason = f"J is {batch.shape[1]}×{batch.shape[2]}, not {m}×{result.V.shape[-1]}"
        yield Fault(reason, result.name)
        return
    U, S, V = (
        torch.as_tensor(values[chosen]).to(batch.device, batch.dtype)
        for values in (result.U, result.S, result.V)
    )
    index = torch.arange(count).repeat_interleave(k)
    Jv = batch.matvec(V.flatten(0, 1), index).view_as(U)
    Ju = batch.rmatvec(U.flatten(0, 1), index).view_as(V)
    right = (Jv - S[..., None] * U).double().norm(dim=-1)
    left = (Ju - S[..., None] * V).double().norm(dim=-1)
    now = torch.maximum(right, left).cpu().numpy()
    stored, largest = result.residual[chosen].astype(float), result.S[chosen, :1].astype(float)
    rounding = rounding_level(batch) * largest
    for place, token in enumerate(chosen.tolist()):
        gap = np.abs(now[place] - stored[place])
        if not (gap <= rounding[place] + _SLACK * stored[place]).all():
            worst = int(np.nanargmax(gap)) if np.isfinite(gap).any() else 0
            reason = f"was {stored[place, worst]:.2e} and is {now[place, worst]:.2e} by the model"
            yield Fault(reason, result.name, "residual", range(token, token + 1))
        elif result.status[token] == Status.CONVERGED:
            limit = attributes.plan.svd.tol * largest[place] + rounding[place]
            if not (now[place] <= limit).all():
                reason = f"is {now[place].max():.2e} by the model, above the tolerance"
                yield Fault(reason, result.name, "residual", range(token, token + 1))
