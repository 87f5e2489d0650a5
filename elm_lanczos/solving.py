"""Solving the linear systems of a run: prompts → linear systems → triplets → words → store.

Everything that decides the bits of a result (method, block sizes, number of threads, seed) is
resolved when a prompt's group is created and stored with it, so that a resumed run repeats it. Rows
are computed and committed one owner (see `store`) at a time; a prompt is finished when its last
attributes are written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from elm_lanczos.batches import batches, gains, token_operators
from elm_lanczos.certificate import Certificate
from elm_lanczos.config import RunConfig, output_positions, select_tokens
from elm_lanczos.errors import UnsupportedModelError, UsageError
from elm_lanczos.linearization import Linearization
from elm_lanczos.memory import size
from elm_lanczos.model import DetachedModel
from elm_lanczos.operators import TokenOperators
from elm_lanczos.prompts import Prompt
from elm_lanczos.recording import finish, rows_of, write_outputs
from elm_lanczos.store import PromptGroup, PromptHeader, PromptResult, ResultStore
from elm_lanczos.store.faults import FINISHED
from elm_lanczos.store.place import Address
from elm_lanczos.svd.cost import faster_dense, predict
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import SVDResult
from elm_lanczos.svd.solve import plan_for, solve

_WORTH_SECONDS = 1.0
"""Nobody chooses another method to save less than this on a prompt."""


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

    @property
    def batches(self) -> list[list[int]]:
        """The numbers of the prompts that are solved together (see `batches.batches`)."""
        return batches(self.config, [len(ids) for ids in self.ids])

    def positions(self, number: int) -> list[int]:
        """The output positions of a prompt, by its number (see `config.output_positions`)."""
        return output_positions(self.config, len(self.ids[number]))


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
class Work:
    """What is still to be solved of predictions that go through the model together.

    Attributes:
        tokens: the tokens asked for, counted through all prompts.
        owners: the owners that are not done: number of the group, and of the owner in it.
        members: of each, the positions in `tokens`.
    """

    tokens: list[int]
    owners: list[tuple[int, int]]
    members: list[list[int]]

    @classmethod
    def of(cls, groups: Sequence[PromptGroup]) -> Work:
        """The work that is left in the groups of some predictions of one length."""
        requested = [np.flatnonzero(group.requested).tolist() for group in groups]
        tokens, length = _through_all(groups[0].tokens, requested), groups[0].tokens
        place = {token: i for i, token in enumerate(tokens)}
        owners = [(n, owner) for n, group in enumerate(groups) for owner in group.pending()]
        members = [
            [
                place[number * length + token]
                for token in groups[number].owners()[owner]
                if number * length + token in place
            ]
            for number, owner in owners
        ]
        return cls(tokens, owners, members)


class Alone:
    """Solves linear systems in this process; several processes do it otherwise."""

    def linearized(self, lins: Sequence[Linearization]) -> None:
        """Something has been linearised; perhaps it is solved next."""

    def solve(
        self,
        groups: Sequence[PromptGroup],
        lins: Sequence[Linearization],
        plan: Plan,
        job: Job,
        observer: Observer,
    ) -> None:
        """Computes and commits every owner that is not done yet.

        Args:
            groups: of each prediction.
            lins: its linear system.
            plan: how they are solved.
            job: the run.
            observer: told of passes.
        """
        work = Work.of(groups)
        batch = token_operators(lins, work.tokens)
        for which, result in solve(batch, plan, work.members, observer.passes):
            commit(groups, work.owners[which], result, job)


def commit(
    groups: Sequence[PromptGroup], owner: tuple[int, int], result: SVDResult, job: Job
) -> None:
    """Writes the rows of an owner.

    Args:
        groups: of predictions that go through the model together.
        owner: number of the group, and of the owner in it.
        result: the triplets of its tokens, which are counted through all prompts.
        job: the run.
    """
    group, first = groups[owner[0]], owner[0] * groups[0].tokens
    tokens = [token - first for token in result.tokens]
    rows = rows_of(group, owner[1], tokens, result, job.model, job.config.top)
    group.write_rows(owner[1], rows)
    group.commit(owner[1])


def solve_all(
    store: ResultStore, job: Job, observer: Observer, solver: Alone | None = None
) -> None:
    """Solves the systems of all prompts, and shows the results in the order of the prompts.

    Args:
        store: the store, open for writing.
        job: the run.
        observer: told what happens.
        solver: solves linear systems; by default this process does it alone.

    Raises:
        UnsupportedModelError: if a certificate shows that the model is not rewritten exactly.
    """
    unseen, solved, later = list(range(len(job.prompts))), set[int](), Unshown(observer)
    for batch in job.batches:
        at_once = batch == unseen[:1]
        told = observer if at_once else later
        solve_batch(store, job, batch, told, hint=0 in batch, solver=solver)
        solved |= set(batch)
        unseen = unseen[1:] if at_once else unseen
        show_known(store, job, unseen, solved.__contains__, observer)


def solve_batch(
    store: ResultStore,
    job: Job,
    numbers: Sequence[int],
    observer: Observer,
    *,
    hint: bool,
    solver: Alone | None = None,
) -> None:
    """Solves the systems of one prompt, at all its output positions, or of several at their last.

    Args:
        store: the store, open for writing.
        job: the run.
        numbers: the numbers of the prompts, one of `Job.batches`.
        observer: told what happens.
        hint: whether to say where another method would be faster.
        solver: solves linear systems; by default this process does it alone.

    Raises:
        UnsupportedModelError: if a certificate shows that the model is not rewritten exactly.
    """
    options: dict[str, Any] = {"hint": hint, "solver": solver or Alone()}
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
    solver: Alone,
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
        _solve(store, job, [prediction], [groups], observer, hint=hint, solver=solver)
        hint = False


def _solve(
    store: ResultStore,
    job: Job,
    predictions: Sequence[Prediction],
    groups: Sequence[dict[int, PromptGroup]],
    observer: Observer,
    *,
    hint: bool,
    solver: Alone,
) -> None:
    """Solves the system of one prediction, or of several of one length together."""
    first, many = predictions[0], len(predictions)
    about = first.text if many == 1 else f"{many} prompts of {len(first.ids)} tokens"
    observer.started(first.number, len(job.prompts), about)
    begun = time.perf_counter()
    adviser = observer if hint else None
    lins, certificates, plan = _prepare(store, groups, job, predictions, adviser, solver)
    own = [mine[first.position] for mine in groups]
    finished = [_is_finished(mine, first.position) for mine in groups]
    for group, lin, certificate, is_old in zip(own, lins, certificates, finished, strict=True):
        if not is_old:
            write_outputs(group, lin, job.model, certificate)
    observer.planned(plan, plan.passes[plan.method])
    solver.solve(own, lins, plan, job, observer)
    seconds = (time.perf_counter() - begun) / many
    for group, certificate, is_old in zip(own, certificates, finished, strict=True):
        if not is_old:
            finish(group, certificate, seconds)
        observer.finished(store.result(group))


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


def show_known(
    store: ResultStore,
    job: Job,
    unseen: list[int],
    known: Callable[[int], bool],
    observer: Observer,
) -> None:
    """Tells an observer of the prompts whose turn it is, as far as they are finished.

    Args:
        store: the store.
        job: the run.
        unseen: the numbers of the prompts to tell of, in order; those told are taken off.
        known: whether a prompt is finished, by its number.
        observer: told what happens.
    """
    while unseen and known(unseen[0]):
        show_prompt(store, job, unseen.pop(0), observer)


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


def _prepare(
    store: ResultStore,
    groups: Sequence[dict[int, PromptGroup]],
    job: Job,
    predictions: Sequence[Prediction],
    adviser: Observer | None,
    solver: Alone,
) -> tuple[list[Linearization], list[Certificate], Plan]:
    """Linearises at some predictions, under the stored plan if a group of theirs exists already."""
    model, config, position = job.model, job.config, predictions[0].position
    known = next((mine[position] for mine in groups if position in mine), None)
    stored: Any = None if known is None else known.plan
    numbers = [prediction.number for prediction in predictions]
    if len(numbers) > 1 and stored is not None and stored.get("prompts") != numbers:
        raise _NotTogetherError  # as the run that is continued has found
    new = {"block": config.batch, "memory": resources(store)["memory"]}
    lins, certificates = _linearized(
        model, predictions, new if stored is None else stored["chain"], solver
    )
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
    model: DetachedModel,
    predictions: Sequence[Prediction],
    options: Mapping[str, Any],
    solver: Alone,
) -> tuple[list[Linearization], list[Certificate]]:
    """The linear systems of predictions of one length, and their certificates."""
    try:
        lins = model.linearize_together([prediction.ids for prediction in predictions], **options)
        solver.linearized(lins)
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
    lin = lins[0]
    batch = token_operators(lins, _through_all(lin.shape[0], [tokens] * len(lins)))
    plan = _plan(batch, lin.spare_bytes, config, first)
    if len(lins) > 1 and not gains(plan, batch.shape[0]):
        raise _NotTogetherError
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


def _through_all(length: int, tokens: Sequence[Sequence[int]]) -> list[int]:
    """The tokens of each prompt of a length, counted through all prompts."""
    return [number * length + token for number, some in enumerate(tokens) for token in some]


def chain_options(lin: Linearization) -> dict[str, Any]:
    """Returns the options under which `DetachedModel.linearize` gives the same bits again.

    Args:
        lin: a linearised prompt.

    Returns:
        Options by name.
    """
    return {"block": lin.block, "keep": lin.keep, "narrow": lin.narrowed}


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


def resources(store: ResultStore) -> dict[str, int]:
    """The memory and threads that plans are made for: those of the machine the run began on."""
    resources: Any = store.attrs["resources"]
    return {name: int(resources[name]) for name in ("memory", "threads")}
