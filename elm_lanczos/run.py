"""One run: prompts → linear systems → triplets → words → store, prompt by prompt.

Everything that decides the bits of a result (method, block sizes, number of threads, seed) is
resolved when a prompt's group is created and stored with it, so that a resumed run repeats it. Rows
are computed and committed one owner (see `store`) at a time; a prompt is finished when its last
attributes are written.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from elm_lanczos.analysis.attribution import shares_of
from elm_lanczos.certificate import Certificate
from elm_lanczos.config import (
    ModelConfig,
    RunConfig,
    output_positions,
    select_positions,
    select_tokens,
)
from elm_lanczos.decode import decode_triplets
from elm_lanczos.errors import UnsupportedModelError, UsageError
from elm_lanczos.linearization import Linearization, Together
from elm_lanczos.memory import ceiling, size
from elm_lanczos.model import DetachedModel
from elm_lanczos.operators import OperatorBatch, TokenOperators
from elm_lanczos.prompts import Prompt, read_prompts
from elm_lanczos.storage import checksum
from elm_lanczos.store import (
    PromptGroup,
    PromptHeader,
    PromptResult,
    ResultStore,
    Status,
    open_results,
)
from elm_lanczos.store.faults import FINISHED
from elm_lanczos.store.place import Address, place_at
from elm_lanczos.store.provenance import package_versions
from elm_lanczos.svd.cost import faster_dense, predict
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import SVDResult
from elm_lanczos.svd.solve import plan_for, solve

_TOGETHER = 256
"""Tokens of short prompts of one length that are solved together."""

_WORTH_SECONDS = 1.0
"""Nobody chooses another method to save less than this on a prompt."""

RUNNERS_UP = 5
"""Predicted tokens that are stored beside the best one, itself included."""


class Observer(Protocol):
    """What a run tells while it works; every method may do nothing."""

    def note(self, message: str) -> None:
        """Something the user should know."""

    def opened(self, path: Address, words: Callable[[Sequence[int]], list[str]]) -> None:
        """The store is open; `words` spells token ids."""

    def started(self, number: int, total: int, text: str) -> None:
        """Work on one prediction begins."""

    def planned(self, plan: Plan, passes: int) -> None:
        """The method is chosen; `passes` are predicted."""

    def passes(self, made: int) -> None:
        """So many passes have been made for this prediction."""

    def finished(self, result: PromptResult) -> None:
        """One prediction is in the store."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        path: the store.
        not_converged: rows that did not reach the tolerance.
        not_exact: predictions whose certificate misses a bound.
    """

    path: Address
    not_converged: int
    not_exact: int


@dataclass(frozen=True)
class Prediction:
    """One linear system to solve: the tokens up to and including the output position.

    Attributes:
        prompt: the prompt it belongs to.
        number: the number of that prompt, from 0.
        ids: (T,) token ids; the output position is the last.
        text: the text of these tokens.
        continuation: how many of the tokens were generated.
    """

    prompt: Prompt
    number: int
    ids: Tensor
    text: str
    continuation: int

    @property
    def position(self) -> int:
        """The output position."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Job:
    """A run of which everything that can be refused has been accepted.

    Attributes:
        config: what to compute.
        model: the model, loaded.
        prompts: the prompts.
        ids: the token ids of each.
        fingerprint: everything that must be equal for the run to be continued.
    """

    config: RunConfig
    model: DetachedModel
    prompts: Sequence[Prompt]
    ids: Sequence[Tensor]
    fingerprint: Mapping[str, object]

    def positions(self, number: int) -> list[int]:
        """The output positions of a prompt, by its number (see `config.output_positions`)."""
        return output_positions(self.config, len(self.ids[number]))


Operators = Callable[[Sequence[Linearization], Sequence[int]], OperatorBatch]
"""Makes the operators of some tokens of linearised prompts (see `token_operators`)."""


def token_operators(lins: Sequence[Linearization], tokens: Sequence[int]) -> TokenOperators:
    """Returns the Jacobians of some tokens of one prompt, or of several of one length.

    Args:
        lins: the system of each, all of one frozen decoder.
        tokens: the tokens, counted through all prompts.

    Returns:
        The operators.
    """
    return TokenOperators(lins[0] if len(lins) == 1 else Together(lins[0].decoder), tokens)


class Unshown:
    """Passes on what happens, but for results: they are shown in their turn.

    Args:
        observer: told what happens.
    """

    def __init__(self, observer: Observer) -> None:
        self.note = observer.note
        self.opened = observer.opened
        self.started = observer.started
        self.planned = observer.planned
        self._passes = observer.passes

    def passes(self, made: int) -> None:
        """So many passes have been made for this prediction."""
        self._passes(made)

    def finished(self, result: PromptResult) -> None:
        """It will be shown in its turn."""


def run(
    config: RunConfig,
    observer: Observer,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Computes the triplets of every prompt into a store.

    Args:
        config: what to compute.
        observer: told what happens.
        resume: continue the store at `config.out` if it exists.
        overwrite: replace the store at `config.out` if it exists.

    Returns:
        Where the results are and whether anything in them is not certain.

    Raises:
        UsageError: if the options or prompts cannot be used.
        ModelError: if the model cannot be loaded or linearised.
        StoreError: if the store cannot be created, continued or written.
    """
    check_destination(config, resume=resume, overwrite=overwrite)
    job = prepare(config, prompts_of(config), observer)
    with open_store(job, observer, resume=resume, overwrite=overwrite) as store:
        observer.opened(store.path, job.model.token_strings)
        forget_damaged(store, job, observer)
        solve_all(store, job, observer)
        store.write_summary()
    return outcome(store.path)


def check_destination(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuses options that contradict each other about the store.

    Args:
        config: what to compute.
        resume: continue the store at `config.out` if it exists.
        overwrite: replace it if it exists.

    Raises:
        UsageError: if they do.
        StoreError: if `config.out` is a URL that cannot be used.
    """
    if resume and overwrite:
        raise UsageError("--resume keeps a store and --overwrite replaces it: choose one")
    if resume and config.out is None:
        raise UsageError("--resume needs the store to continue: add --out FOLDER")
    if config.out == "":
        raise UsageError("--out is empty")
    if config.out is not None:
        place_at(config.out)


def prepare(config: RunConfig, prompts: Sequence[Prompt], observer: Observer) -> Job:
    """Loads the model and refuses what can be refused before a store is made or replaced.

    Args:
        config: what to compute.
        prompts: the prompts.
        observer: told what the user should know of them.

    Returns:
        The run, ready to begin.

    Raises:
        UsageError: if the options or prompts cannot be used.
    """
    model = load_model(config)
    if config.k > model.hidden_size:
        raise UsageError(
            f"--k {config.k} is more than the {model.hidden_size} dimensions of {model.name}"
        )
    ids = [_encode(model, prompt, config, observer) for prompt in prompts]
    model.linearize(ids[0], block=config.batch)
    return Job(config, model, prompts, ids, run_fingerprint(config, model, prompts, ids))


def resources(store: ResultStore) -> dict[str, int]:
    """The memory and threads that plans are made for: those of the machine the run began on."""
    resources: Any = store.attrs["resources"]
    return {name: int(resources[name]) for name in ("memory", "threads")}


def load_model(config: ModelConfig) -> DetachedModel:
    """Loads the model a run is about.

    Args:
        config: which model, and how it is to be loaded.

    Returns:
        The model.

    Raises:
        ModelError: if it cannot be loaded.
        UsageError: if the device or a dtype cannot be used.
    """
    options: dict[str, Any] = {
        name: value
        for name in ("revision", "device_map")
        if (value := getattr(config, name)) is not None
    }
    return DetachedModel.from_pretrained(
        config.model,
        dtype=config.dtype,
        compute_dtype=config.compute_dtype,
        gate=config.gate,
        precision=config.precision,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=not config.allow_pickle,
        **options,
    )


def default_path() -> Path:
    """Returns a new path `runs/<date>_<time>.zarr` that nothing uses yet."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    candidates = [Path("runs") / f"{name}.zarr"]
    while candidates[-1].exists():
        candidates.append(Path("runs") / f"{name}-{len(candidates) + 1}.zarr")
    return candidates[-1]


def run_fingerprint(
    config: RunConfig, model: DetachedModel, prompts: Sequence[Prompt], ids: Sequence[Tensor]
) -> dict[str, object]:
    """Returns everything that must be equal for a run to be continued.

    Args:
        config: the options.
        model: the model, identified by its config and its weights.
        prompts: the prompts.
        ids: their token ids.

    Returns:
        Plain data.
    """
    texts = [(p.id, p.text, i.tolist()) for p, i in zip(prompts, ids, strict=True)]
    hf_config = {
        name: value
        for name, value in model.hf_model.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version")
    }
    names = "k generate method tol tokens positions batch top seed gate precision revision".split()
    versions = {k: v for k, v in package_versions().items() if k != "python"}
    return {
        "model": model.name,
        "weights": weights_digest(model),
        "stored_dtype": str(model.dtype),
        "compute_dtype": str(model.compute_dtype),
        "device": model.device.type,
        "model_config": _digest(sorted(hf_config.items())),
        "prompts": _digest(texts),
        "options": {name: getattr(config, name) for name in names},
        "versions": versions,
    }


def weights_digest(model: DetachedModel) -> str:
    """Returns a digest of every weight's name, shape, dtype and bytes (crc32 of each)."""
    sums = []
    for name, weight in model.storage.weights():
        sums.append((name, tuple(weight.shape), str(weight.dtype), checksum(weight)))
    return _digest(sums)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def prompts_of(config: RunConfig) -> list[Prompt]:
    """Returns the prompts of a run.

    Args:
        config: names a file of prompts, or holds one.

    Returns:
        The prompts; at least one.

    Raises:
        UsageError: if they cannot be read.
    """
    if config.seq_file is not None:
        return read_prompts(config.seq_file)
    text = config.text or ""
    if not text.strip():
        raise UsageError("--text is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("--text is not valid UTF-8") from error
    return [Prompt("0", text)]


def open_store(
    job: Job, observer: Observer, *, resume: bool, overwrite: bool, sharing: int = 1
) -> ResultStore:
    """Creates or continues the store of a run, and computes with its threads from here on.

    Args:
        job: the run.
        observer: told what the user should know of the store.
        resume: continue the store if it exists.
        overwrite: replace it if it exists.
        sharing: processes that share the memory of the device.

    Returns:
        The store, locked.

    Raises:
        StoreError: if it cannot be created or continued.
    """
    path = job.config.out or default_path()
    if resume and place_at(path).exists(""):
        store = ResultStore.open(path, "r+")
        store.resume(job.fingerprint, observer.note)
    else:
        store = _create_store(path, job, observer, overwrite, sharing)
    try:
        torch.set_num_threads(resources(store)["threads"])
    except BaseException:
        store.close()
        raise
    return store


def _create_store(
    path: str | Path, job: Job, observer: Observer, overwrite: bool, sharing: int
) -> ResultStore:
    config, model = job.config, job.model
    hf_config = model.hf_model.config
    attrs = {
        "title": f"Singular triplets of detached Jacobians of {model.name}",
        "model": {
            "name": model.name,
            "revision": getattr(hf_config, "_commit_hash", None),
            "config": hf_config.to_json_string(),
        },
        "dtype": str(model.compute_dtype).removeprefix("torch."),
        "seed": config.seed,
        "method": config.method,
        "config": config.model_dump(),
        "resources": {
            "memory": int(config.memory or ceiling(model.device) // sharing),
            "threads": torch.get_num_threads(),
        },
    }
    return ResultStore.create(
        path,
        attrs=attrs,
        fingerprint=job.fingerprint,
        overwrite=overwrite,
        note=observer.note,
    )


# ------------------------------------------------------------------------------ all prompts


def batches(job: Job) -> list[list[int]]:
    """Returns the numbers of the prompts that are solved together: short ones of one length.

    What a prompt of a few tokens takes is mostly what its operations take to be told apart, not to
    be computed (`benchmarks/batching.py`). Not with Lanczos: each of its vectors is one prompt's.
    Who is together with whom depends on the run's options and prompts alone, so that a resumed run
    repeats it.

    Args:
        job: the run.

    Returns:
        Each number once, in the order of the first ones.
    """
    found: list[list[int]] = []
    unfilled: dict[int, list[int]] = {}
    for number, ids in enumerate(job.ids):
        length = len(ids)
        several = 1 if job.config.method == "lanczos" else _TOGETHER // length
        if several < 2 or job.positions(number) != [length - 1]:
            found.append([number])
            continue
        if length not in unfilled:
            found.append(unfilled.setdefault(length, []))
        unfilled[length].append(number)
        if len(unfilled[length]) == several:
            del unfilled[length]
    return found


def solve_all(
    store: ResultStore, job: Job, observer: Observer, operators: Operators = token_operators
) -> None:
    """Solves the systems of all prompts, and shows the results in the order of the prompts.

    Args:
        store: the store, open for writing.
        job: the run.
        observer: told what happens.
        operators: makes the operators of some tokens of linearised prompts.

    Raises:
        UnsupportedModelError: if a certificate shows that the model is not rewritten exactly.
    """
    unseen, solved, later = list(range(len(job.prompts))), set[int](), Unshown(observer)
    for batch in batches(job):
        at_once = batch == unseen[:1]
        told = observer if at_once else later
        solve_batch(store, job, batch, told, hint=0 in batch, operators=operators)
        solved |= set(batch)
        unseen = unseen[1:] if at_once else unseen
        while unseen and unseen[0] in solved:
            show_prompt(store, job, unseen.pop(0), observer)


def solve_batch(
    store: ResultStore,
    job: Job,
    numbers: Sequence[int],
    observer: Observer,
    *,
    hint: bool,
    operators: Operators = token_operators,
) -> None:
    """Solves the systems of one prompt, at all its output positions, or of several at their last.

    Args:
        store: the store, open for writing.
        job: the run.
        numbers: the numbers of the prompts, one of `batches`.
        observer: told what happens.
        hint: whether to say where another method would be faster.
        operators: makes the operators of some tokens of linearised prompts.

    Raises:
        UnsupportedModelError: if a certificate shows that the model is not rewritten exactly.
    """
    options: dict[str, Any] = {"hint": hint, "operators": operators}
    if len(numbers) > 1:
        if not any(unfinished(store, job, number) for number in numbers):
            for number in numbers:
                show_prompt(store, job, number, observer)
            return
        groups = [groups_of(store, number) for number in numbers]
        predictions = [_prediction(job, number, job.ids[number]) for number in numbers]
        with suppress(_NotTogetherError):
            _solve(store, job, predictions, groups, observer, **options)
            return
    for number in numbers:
        _solve_prompt(store, job, number, observer, **options)


class _NotTogetherError(Exception):
    """Prompts cannot go through the model together."""


def unfinished(store: ResultStore, job: Job, number: int) -> list[int]:
    """Returns the output positions of a prompt that are still to be solved.

    Args:
        store: the store.
        job: the run.
        number: the number of the prompt, from 0.

    Returns:
        The positions, none where the prompt is finished.
    """
    groups = groups_of(store, number)
    return [p for p in job.positions(number) if not _is_finished(groups, p)]


def _is_finished(groups: Mapping[int, PromptGroup], position: int) -> bool:
    return position in groups and groups[position].attrs.get(FINISHED) is True


def _solve_prompt(
    store: ResultStore,
    job: Job,
    number: int,
    observer: Observer,
    *,
    hint: bool,
    operators: Operators,
) -> None:
    """Solves the systems of all output positions of one prompt, those of generated tokens too."""
    groups = groups_of(store, number)
    positions = job.positions(number)
    missing = unfinished(store, job, number)
    full = job.ids[number]
    if missing:
        full = job.model.generate(full, max(0, max(missing) + 1 - len(full)))
    for position in positions:
        if position not in missing:  # of the run that is continued
            show_stored(store, job, number, position, observer)
            continue
        prediction = _prediction(job, number, full[: position + 1])
        _solve(store, job, [prediction], [groups], observer, hint=hint, operators=operators)
        hint = False


def _solve(
    store: ResultStore,
    job: Job,
    predictions: Sequence[Prediction],
    groups: Sequence[dict[int, PromptGroup]],
    observer: Observer,
    *,
    hint: bool,
    operators: Operators,
) -> None:
    """Solves the system of one prediction, or of several of one length together."""
    first, many = predictions[0], len(predictions)
    about = first.text if many == 1 else f"{many} prompts of {len(first.ids)} tokens"
    observer.started(first.number, len(job.prompts), about)
    begun = time.perf_counter()
    lins, certificates, plan = _prepare(store, groups, job, predictions, observer if hint else None)
    own = [mine[first.position] for mine in groups]
    finished = [_is_finished(mine, first.position) for mine in groups]
    for group, lin, certificate, is_old in zip(own, lins, certificates, finished, strict=True):
        if not is_old:
            _write_outputs(group, lin, job.model, certificate)
    observer.planned(plan, plan.passes[plan.method])
    _write_triplets(own, lins, plan, job, observer, operators)
    seconds = (time.perf_counter() - begun) / many
    for group, certificate, is_old in zip(own, certificates, finished, strict=True):
        if not is_old:
            _finish(group, certificate, seconds)
        observer.finished(store.result(group))


def forget_damaged(
    store: ResultStore, job: Job, observer: Observer, beat: Callable[[], None] = lambda: None
) -> None:
    """Reads what a continued run has done, so that what is damaged is computed again.

    Args:
        store: the store, open for writing.
        job: the run.
        observer: told which files are damaged.
        beat: called before each group is read.
    """
    for number in range(len(job.prompts)):
        for group in groups_of(store, number).values():
            beat()
            for fault in group.forget_damaged():
                observer.note(f"{fault}; it is computed again")


def groups_of(store: ResultStore, number: int) -> dict[int, PromptGroup]:
    """Returns the groups of a prompt that exist, by output position.

    Args:
        store: the store.
        number: the number of the prompt, from 0.

    Returns:
        None, or the prompt's own group and those of its further positions.
    """
    main = store.prompt(number)
    return {} if main is None else {main.position: main, **main.positions}


def show_prompt(store: ResultStore, job: Job, number: int, observer: Observer) -> None:
    """Tells an observer of all predictions of a prompt, which are finished already.

    Args:
        store: the store.
        job: the run.
        number: the number of the prompt, from 0.
        observer: told what happens.
    """
    for position in job.positions(number):
        show_stored(store, job, number, position, observer)


def show_stored(
    store: ResultStore, job: Job, number: int, position: int, observer: Observer
) -> None:
    """Tells an observer of a prediction that is finished already.

    Args:
        store: the store.
        job: the run.
        number: the number of the prompt, from 0.
        position: the output position.
        observer: told what happens.
    """
    result = store.result(groups_of(store, number)[position])
    observer.started(number, len(job.prompts), result.text)
    observer.finished(result)


def _prediction(job: Job, number: int, ids: Tensor) -> Prediction:
    """The prediction behind the given tokens: a part of the prompt, or the prompt and more."""
    prompt, own = job.prompts[number], len(job.ids[number])
    if len(ids) < own:
        text = job.model.text(ids)
    else:
        text = prompt.text + "".join(job.model.token_strings(ids[own:]))
    return Prediction(prompt, number, ids, text, max(0, len(ids) - own))


def _encode(model: DetachedModel, prompt: Prompt, config: RunConfig, observer: Observer) -> Tensor:
    """The token ids of a prompt, once it is known that every token asked for exists."""
    try:
        ids = model.encode(prompt.text)
        for position in select_positions(config.positions, len(ids)):
            select_tokens(config.tokens, position + 1)
    except UsageError as error:
        raise UsageError(f"prompt {prompt.id}: {error}") from error
    longest, length = model.max_length, len(ids) + config.generate
    if longest is not None and length > longest:
        observer.note(
            f"prompt {prompt.id} has {length} tokens, more than the {longest} that {model.name} "
            "was trained for: the model itself may be poor there"
        )
    return ids


def _prepare(
    store: ResultStore,
    groups: Sequence[dict[int, PromptGroup]],
    job: Job,
    predictions: Sequence[Prediction],
    adviser: Observer | None,
) -> tuple[list[Linearization], list[Certificate], Plan]:
    """Linearises at some predictions, under the stored plan if a group of theirs exists already."""
    model, config, position = job.model, job.config, predictions[0].position
    known = next((mine[position] for mine in groups if position in mine), None)
    stored: Any = None if known is None else known.plan
    numbers = [prediction.number for prediction in predictions]
    if len(numbers) > 1 and stored is not None and stored.get("prompts") != numbers:
        raise _NotTogetherError  # as the run that is continued has found
    new = {"block": config.batch, "memory": resources(store)["memory"]}
    lins, certificates = _linearized(model, predictions, new if stored is None else stored["chain"])
    tokens = select_tokens(config.tokens, position + 1)
    if stored is None:
        plan = _new_plan(lins, tokens, config, predictions[0], adviser)
        stored = {"svd": asdict(plan), "chain": chain_options(lins[0])}
        if len(numbers) > 1:
            stored["prompts"] = numbers
    else:
        plan = Plan(**stored["svd"])
        if plan.scratch is not None and config.scratch is None:
            raise UsageError("this run keeps rows in a scratch file: add --scratch FOLDER")
        if plan.scratch is not None:
            plan = replace(plan, scratch=config.scratch)
    for mine, prediction, lin in zip(groups, predictions, lins, strict=True):
        if position in mine:
            strings = model.token_strings(prediction.ids)
            mine[position].restore(prediction.ids.tolist(), strings, tokens)
            continue
        header = _header(model, config, prediction, lin, tokens, stored)
        if mine:
            mine[position] = next(iter(mine.values())).create_position(header)
            continue
        if position + 1 < len(job.ids[prediction.number]):  # nowhere else is the whole prompt
            whole = {"prompt": prediction.prompt.text}
            header = replace(header, attrs={**header.attrs, **whole})
        mine[position] = store.create_prompt(header, prediction.number)
    return lins, certificates, plan


def _linearized(
    model: DetachedModel, predictions: Sequence[Prediction], options: Mapping[str, Any]
) -> tuple[list[Linearization], list[Certificate]]:
    """The linear systems of predictions of one length, and their certificates."""
    try:
        lins = model.linearize_together([prediction.ids for prediction in predictions], **options)
        certificates = lins[0].decoder.certificates()
        if len(predictions) > 1 and any(certificate.failures for certificate in certificates):
            raise _NotTogetherError  # perhaps only together
        for certificate in certificates:
            if certificate.refuted:
                pairs = [f"{name} {getattr(certificate, name):.0e}" for name in certificate.refuted]
                raise UnsupportedModelError(
                    f"{model.name} is not rewritten exactly ({', '.join(pairs)}): no rule fits "
                    "something in it"
                )
    except UnsupportedModelError as error:
        if len(predictions) > 1:
            raise _NotTogetherError from error
        raise
    return lins, certificates


def _new_plan(
    lins: Sequence[Linearization],
    tokens: Sequence[int],
    config: RunConfig,
    first: Prediction,
    adviser: Observer | None,
) -> Plan:
    """Resolves how some systems are solved, and says what should be known of it."""
    lin, batch = lins[0], token_operators(lins, _through_all(lins, [tokens] * len(lins)))
    plan = _plan(batch, lin.spare_bytes, config, first)
    if len(lins) > 1 and (plan.refusal or plan.panel < batch.shape[0] or plan.method == "lanczos"):
        raise _NotTogetherError  # what is shared would be done several times, or not fit
    if plan.refusal:
        raise UsageError(plan.refusal)
    if adviser is not None and lin.held_bytes > lin.memory:
        adviser.note(
            f"the linearised layers and a block of vectors take about {size(lin.held_bytes)}, more "
            f"than the {size(lin.memory)} to use"
        )
    if adviser is not None and (line := _hint(batch, config, plan)):
        adviser.note(line)
    return plan


def _through_all(lins: Sequence[Linearization], tokens: Sequence[Sequence[int]]) -> list[int]:
    """The tokens of each prompt, counted through all prompts."""
    length = lins[0].shape[0]
    return [number * length + token for number, some in enumerate(tokens) for token in some]


def chain_options(lin: Linearization) -> dict[str, Any]:
    """Returns the options under which `DetachedModel.linearize` gives the same bits again.

    Args:
        lin: a linearised prompt.

    Returns:
        Options by name.
    """
    return {"block": lin.block, "keep": lin.keep, "narrow": lin.narrowed}


def _write_triplets(
    groups: Sequence[PromptGroup],
    lins: Sequence[Linearization],
    plan: Plan,
    job: Job,
    observer: Observer,
    operators: Operators,
) -> None:
    """Computes and commits every owner that is not done yet."""
    requested = [np.flatnonzero(group.requested).tolist() for group in groups]
    tokens, length = _through_all(lins, requested), lins[0].shape[0]
    batch = operators(lins, tokens)
    place = {token: i for i, token in enumerate(tokens)}
    pending = [(number, owner) for number, group in enumerate(groups) for owner in group.pending()]
    members = [
        [
            place[number * length + token]
            for token in groups[number].owners()[owner]
            if number * length + token in place
        ]
        for number, owner in pending
    ]
    for which, result in solve(batch, plan, members, observer.passes):
        number, owner = pending[which]
        own = [token - number * length for token in result.tokens]
        rows = _rows(groups[number], owner, own, result, job.model, job.config.top)
        groups[number].write_rows(owner, rows)
        groups[number].commit(owner)


def _plan(batch: TokenOperators, memory: int, config: RunConfig, prediction: Prediction) -> Plan:
    """The plan of one linear system; its seed depends on the run's, the prompt and the position."""
    entropy = [config.seed, prediction.number, prediction.position]
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    options = (config.k, config.method, config.tol, seed, memory)
    return plan_for(batch, *options, scratch=config.scratch)


def _hint(batch: TokenOperators, config: RunConfig, plan: Plan) -> str | None:
    """One line where explicit Jacobians would be at least twice as fast, from a timed block."""
    if plan.method == "dense" or plan.passes[plan.method] < 2 * plan.passes["dense"]:
        return None
    methods = (plan.method, "dense")
    costs = predict(batch, config.k, tol=config.tol, memory=plan.memory, methods=methods)
    chosen = costs[plan.method]
    if chosen.seconds is not None and chosen.seconds < _WORTH_SECONDS:
        return None
    return faster_dense(chosen, costs["dense"])


def _header(
    model: DetachedModel,
    config: RunConfig,
    prediction: Prediction,
    lin: Linearization,
    tokens: Sequence[int],
    plan: Mapping[str, object],
) -> PromptHeader:
    _, m, d = lin.shape
    ids = prediction.ids.tolist()
    return PromptHeader(
        id=prediction.prompt.id,
        text=prediction.text,
        token_ids=ids,
        token_strings=model.token_strings(ids),
        m=m,
        d=d,
        k=config.k,
        top=min(config.top, model.embedding.weight.shape[0]),
        dtype=str(lin.output.dtype).removeprefix("torch."),
        requested=tokens,
        position=len(ids) - 1,
        plan=plan,
        attrs={"generated": prediction.continuation},
    )


def _write_outputs(
    group: PromptGroup, lin: Linearization, model: DetachedModel, certificate: Certificate
) -> None:
    """Writes what belongs to the prediction as a whole: output, constant, attribution."""
    logits = lin.prediction.logits.double()
    log_probabilities = torch.log_softmax(logits, -1)
    best = logits.topk(min(RUNNERS_UP, len(logits))).indices
    shares, logit = shares_of(lin, lin.readout(int(best[0]))), float(logits[best[0]])
    words = model.token_strings(best)
    group.write_outputs(
        output=_numpy(lin.output),
        constant=_numpy(lin.constant),
        attribution=_numpy(shares.tokens),
        attrs={
            "certificate": certificate.to_dict(),
            "predicted": [
                {
                    "id": int(i),
                    "token": word,
                    "logit": float(logits[i]),
                    "probability": float(log_probabilities[i].exp()),
                }
                for i, word in zip(best.tolist(), words, strict=True)
            ],
            "attribution": {
                "target": int(best[0]),
                "logit": logit,
                "constant": shares.constant,
                "bias": shares.bias,
                "error": abs(shares.total - logit) / max(abs(logit), 1.0),
            },
        },
    )


def _rows(
    group: PromptGroup,
    owner: int,
    tokens: Sequence[int],
    result: SVDResult,
    model: DetachedModel,
    top: int,
) -> dict[str, Any]:
    words = decode_triplets(result, model, top)
    assert result.contribution is not None  # tokens have inputs
    computed = {
        "U": result.U,
        "V": result.V,
        "S": result.S,
        "residual": result.residual,
        "error_bound": result.error_bound,
        "stable_rank": result.stable_rank,
        "stable_rank_error": result.stable_rank_error,
        "contribution_norm": result.contribution.norm(dim=-1),
        "n_iter": result.n_iter,
        "status": result.status,
        "u_token": words.u.ids,
        "u_score": words.u.scores,
        "v_token": words.v.ids,
        "v_score": words.v.scores,
    }
    rows = group.empty_rows(owner)
    place = [token - group.owners()[owner].start for token in tokens]
    for name, values in computed.items():
        rows[name][place] = _numpy(values)
    return rows


def _finish(group: PromptGroup, certificate: Certificate, seconds: float) -> None:
    """Completes the certificate from what is stored, and marks the group as finished."""
    residuals, overlaps = [0.0], [0.0]
    for owner, tokens in enumerate(group.owners()):
        asked = group.requested[tokens.start : tokens.stop]
        if not asked.any():
            continue
        S, residual, U, V = (
            group.read_rows(owner, name)[asked] for name in ("S", "residual", "U", "V")
        )
        residuals.append(float((residual / np.where(S[:, :1] > 0, S[:, :1], 1)).max()))
        overlaps += [_orthogonality(U), _orthogonality(V)]
    # A NaN stays one, which the maximum of Python's floats does not see to.
    certificate = replace(
        certificate,
        residual=float(np.max(residuals)),
        orthogonality=float(np.max(overlaps)),
    )
    group.set_attrs(
        {"certificate": certificate.to_dict(), "seconds": round(seconds, 3), FINISHED: True}
    )


def _orthogonality(vectors: Any) -> float:
    """Largest entry of XᵀX − I over all tokens, for vectors (n, k, ·)."""
    gram = np.einsum("nkd,njd->nkj", vectors, vectors, dtype=np.float64)
    return float(np.abs(gram - np.eye(vectors.shape[1])).max())


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def outcome(path: Address) -> Outcome:
    """Returns how the run of a store ended.

    Args:
        path: the store, all of whose predictions are finished.

    Returns:
        What in it is not certain.
    """
    not_converged = not_exact = 0
    for prompt in open_results(path):
        for result in (prompt, *prompt.positions.values()):
            not_converged += int((result.status == Status.NOT_CONVERGED).sum())
            not_exact += not result.certificate.get("exact", False)
    return Outcome(path, not_converged, not_exact)
