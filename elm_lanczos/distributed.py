"""Several processes, one store: `torchrun --nproc-per-node N -m elm_lanczos run …`.

The processes agree through the key-value store that torchrun gives them. The first one coordinates:
it holds the store's lock, deals the work, writes the summary and shows the results. Prompts are
dealt one at a time, longest first, each with all its positions to one process. Where fewer prompts
are left at the start than there are processes, the first one solves them in turn and the *blocks*
of vectors that go through the model are dealt instead, one to each process a round. A block has the
borders and the composition that it has in one process, and every process computes under the options
in the store, so the bits of a store do not depend on how many processes made it.

Waiting is polling: a signal is answered at once, a failure elsewhere is seen, and nothing waits for
ever for processes that give no sign of life.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import count, islice, tee
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from elm_lanczos.batches import token_operators
from elm_lanczos.config import RunConfig
from elm_lanczos.errors import ElmLanczosError, PeerError, StoreError
from elm_lanczos.linearization import Linearization
from elm_lanczos.operators import OperatorBatch, TokenOperators
from elm_lanczos.prompts import Prompt
from elm_lanczos.run import (
    Outcome,
    check_destination,
    forget_damaged,
    open_store,
    outcome,
    prepare,
    prompts_of,
)
from elm_lanczos.solving import (
    Job,
    Observer,
    Unshown,
    chain_options,
    resources,
    show_known,
    solve_all,
    solve_batch,
    unfinished,
)
from elm_lanczos.store import ResultStore
from elm_lanczos.store.attributes import first_difference, to_json

_JOINING = timedelta(minutes=5)
_PATIENCE = timedelta(hours=2)
"""How long the others may give no sign of life."""

_POLL, _LOOK, _BEAT, _GRACE = 0.02, 1.0, 2.0, 10.0
"""Seconds between looks at the key-value store, the same during an exchange, and between signs of
life; and those in which a lost process may say why, or its launcher may end the
others."""

_LOST = (
    "another process of this run has ended; finished rows are kept: go on with --resume --out STORE"
)

_RUNS = count()
"""Numbers the runs of this process: each has its own part of the key-value store."""

Result = TypeVar("Result")


def run(
    config: RunConfig, observer: Observer, *, resume: bool = False, overwrite: bool = False
) -> Outcome:
    """Computes the triplets of every prompt into a store, as one of several processes.

    Args:
        config: what to compute; the same in every process.
        observer: told what happens, by the first process.
        resume: continue the store at `config.out` if it exists, whatever processes made it.
        overwrite: replace the store at `config.out` if it exists.

    Returns:
        Where the results are and whether anything in them is not certain.

    Raises:
        PeerError: if another process has failed, and said why.
        ElmLanczosError: if this one has, or another has vanished.
    """
    check_destination(config, resume=resume, overwrite=overwrite)
    with _joined() as processes:
        if processes.rank == 0:
            processes.tell("prompts", [asdict(prompt) for prompt in prompts_of(config)])
        prompts = [Prompt(**prompt) for prompt in processes.ask("prompts")]
        own = _own_device(config)
        job = processes.together("prepared", lambda: prepare(own or config, prompts, observer))
        if processes.rank == 0:
            processes.tell("fingerprint", to_json(job.fingerprint))
        processes.together("agreed", lambda: _agree(processes.ask("fingerprint"), job))
        if processes.rank == 0:
            sharing = 1 if own else int(os.environ.get("LOCAL_WORLD_SIZE", processes.count))
            options = {"resume": resume, "overwrite": overwrite}
            with open_store(job, observer, **options, sharing=sharing) as store:
                observer.opened(store.path, job.model.token_strings)
                forget_damaged(store, job, observer, processes.beat)
                left = [
                    batch
                    for batch in job.batches
                    if any(unfinished(store, job, number) for number in batch)
                ]
                left.sort(key=lambda batch: -sum(len(job.ids[number]) for number in batch))
                processes.tell("work", {"path": str(store.path), "left": left})
                _compute(processes, store, job, left, observer, own)
                store.write_summary()
        else:
            work = processes.ask("work")
            with ResultStore.open(work["path"], "r+") as store:
                store.join(processes.rank, observer.note)
                torch.set_num_threads(resources(store)["threads"])
                _compute(processes, store, job, work["left"], observer, own)
        processes.leave()
    return outcome(store.path)


def _own_device(config: RunConfig) -> RunConfig | None:
    """The options with a CUDA device of this process's own, if nothing else is asked for."""
    if config.device or config.device_map or not torch.cuda.is_available():
        return None
    return config.model_copy(update={"device": f"cuda:{os.environ.get('LOCAL_RANK', '0')}"})


def _agree(stored: Any, job: Job) -> None:
    """Refuses a process that would compute something else than the first one."""
    found = first_difference(stored, to_json(job.fingerprint))
    if found is not None:
        field, theirs, ours = found
        raise StoreError(f"{field} is {ours!r} here and {theirs!r} in the first process")


def _compute(
    processes: Processes,
    store: ResultStore,
    job: Job,
    left: Sequence[Sequence[int]],
    observer: Observer,
    own: RunConfig | None,
) -> None:
    """Computes what is left, and shows everything in the first process."""
    if not 0 < len(left) < processes.count:
        _deal_prompts(processes, store, job, left, observer)
        return
    rounds = Rounds(processes, job, cuda=own is not None)
    if processes.rank > 0:
        rounds.serve()
        return

    def split(lins: Sequence[Linearization], tokens: Sequence[int]) -> SplitOperators:
        return SplitOperators(lins, tokens, rounds)

    solve_all(store, job, observer, split)
    rounds.stop()


# ---------------------------------------------------------------------------------- agreement


class Processes:
    """The processes of a run, and what they tell each other through a key-value store.

    Args:
        store: the store that all of them reach.
        rank: the number of this process, from 0.
        count: how many there are.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        self._store = store
        self.rank = rank
        self.count = count
        self._beaten = 0.0

    def tell(self, name: str, value: object) -> None:
        """Lets every process know a value of plain data."""
        self._store.set(name, json.dumps(value))

    def told(self, name: str) -> bool:
        """Whether some process has told a value."""
        return self._store.check([name])

    def ask(self, name: str) -> Any:
        """Waits for a value that some process tells."""
        self.wait(lambda: self.told(name))
        return json.loads(self._store.get(name))

    def next(self, name: str) -> int:
        """Counts 0, 1, 2, … over all processes; no two get the same number."""
        return self._store.add(name, 1) - 1

    def beat(self) -> None:
        """Gives a sign of life, now and then."""
        if time.monotonic() - self._beaten > _BEAT:
            self._beaten = time.monotonic()
            self._store.add("alive", 1)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Waits until something has happened elsewhere.

        Args:
            ready: whether it has.

        Raises:
            PeerError: if another process has failed.
            ElmLanczosError: if the others give no sign of life.
        """
        signs, since = -1, time.monotonic()
        while not ready():
            if self.told("failed"):
                raise PeerError
            alive = self._store.add("alive", 0)
            if alive != signs:
                signs, since = alive, time.monotonic()
            if time.monotonic() - since > _PATIENCE.total_seconds():
                raise ElmLanczosError(f"no sign of life for {_PATIENCE}: {_LOST}")
            time.sleep(_POLL)

    def together(self, name: str, work: Callable[[], Result]) -> Result:
        """Does what must succeed in every process; where it fails, one process says why.

        Args:
            name: names the step.
            work: what this process has to do.

        Returns:
            Its result.

        Raises:
            PeerError: if it failed, and another process says why.
        """
        try:
            result = work()
        except Exception:
            self.tell(f"{name}/{self.rank}", False)
            if not all(self.ask(f"{name}/{rank}") for rank in range(self.rank)):
                raise PeerError from None
            raise
        self.tell(f"{name}/{self.rank}", True)
        if not all(self.ask(f"{name}/{rank}") for rank in range(self.count)):
            raise PeerError
        return result

    def leave(self) -> None:
        """Ends this process's part; the first one, which may hold the key-value store, is last."""
        self.tell(f"left/{self.rank}", True)
        if self.rank == 0:
            for rank in range(self.count):
                self.ask(f"left/{rank}")

    def _end(self, error: BaseException) -> BaseException:
        """What this process ends with: one process alone says what has gone wrong."""
        # of another one's failure that one speaks, unless it is gone
        lost = isinstance(error, _LostError | dist.DistError | PeerError)
        try:
            until = time.monotonic() + (_GRACE if lost else 0)
            while not self.told("failed") and time.monotonic() < until:
                time.sleep(_POLL)
            if self.told("failed"):
                return PeerError()
            if isinstance(error, Exception):
                self.tell("failed", self.rank)
        except RuntimeError:  # the key-value store is gone, with the process that held it
            if isinstance(error, PeerError):
                return error  # which has said why it ended
        if lost:
            return ElmLanczosError(_LOST)
        if self.rank > 0 and isinstance(error, ElmLanczosError):
            return ElmLanczosError(f"process {self.rank}: {error}")
        return error


class _LostError(Exception):
    """The connection to another process has broken."""


@contextmanager
def _joined() -> Iterator[Processes]:
    """This process among those that torchrun or accelerate has started."""
    store, rank, world_size = next(rendezvous("env://", timeout=_JOINING))
    processes = Processes(PrefixStore(f"elm_lanczos/{next(_RUNS)}", store), rank, world_size)
    try:
        yield processes
    except BaseException as error:
        end = processes._end(error)
        if end is error:
            raise
        raise end from error
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- whole prompts


class _Reporter(Unshown):
    """Passes on what happens but for results: they are shown in turn, whoever computed them.

    Args:
        observer: told what happens.
        processes: given signs of life.
    """

    def __init__(self, observer: Observer, processes: Processes) -> None:
        super().__init__(observer)
        self._processes = processes

    def passes(self, made: int) -> None:
        """So many passes have been made for this prediction."""
        self._processes.beat()
        super().passes(made)


def _deal_prompts(
    processes: Processes,
    store: ResultStore,
    job: Job,
    left: Sequence[Sequence[int]],
    observer: Observer,
) -> None:
    """Computes whole prompts, whichever is next; the first process shows all, in their order."""
    reporter = _Reporter(observer, processes)
    unseen, open_ = list(range(len(job.prompts))), {number for batch in left for number in batch}

    def known(number: int) -> bool:
        return number not in open_ or processes.told(f"finished/{number}")

    def show() -> None:
        if processes.rank == 0:
            show_known(store, job, unseen, known, observer)

    show()
    hint = processes.rank == 0
    while (place := processes.next("batch")) < len(left):
        solve_batch(store, job, left[place], reporter, hint=hint)
        hint = False
        for number in left[place]:
            processes.tell(f"finished/{number}", True)
        show()
    while processes.rank == 0 and unseen:
        processes.wait(lambda: known(unseen[0]))
        show()


# ------------------------------------------------------------------------ blocks of vectors

_STOP, _SYSTEM, _ROWS, _MATVEC, _RMATVEC = range(5)


class Rounds:
    """Rounds in which every process puts one block of vectors through the operators.

    In each round the first process sends what is to be done: a header, which says what, and how
    many vectors each process takes; and the vectors. What they become is gathered there.

    Args:
        processes: the processes.
        job: the run.
        cuda: whether each process has a CUDA device of its own, to exchange from.
    """

    def __init__(self, processes: Processes, job: Job, *, cuda: bool) -> None:
        self._processes = processes
        self._job = job
        self._wire = job.model.device if cuda else torch.device("cpu")
        self._systems = 0
        processes.tell(f"grouping/{processes.rank}", True)
        for rank in range(processes.count):
            processes.ask(f"grouping/{rank}")
        if cuda:
            torch.cuda.set_device(self._wire)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore("group", processes._store),
            rank=processes.rank,
            world_size=processes.count,
            timeout=_PATIENCE,
        )

    @property
    def width(self) -> int:
        """Blocks in a round."""
        return self._processes.count

    def open(self, lins: Sequence[Linearization], tokens: Sequence[int]) -> None:
        """Lets every process linearise the systems of predictions as the first one did."""
        ids, chain = lins[0].decoder.ids, chain_options(lins[0])
        assert ids is not None
        system = {"ids": ids.tolist(), "chain": chain, "tokens": list(tokens)}
        self._processes.tell(f"system/{self._systems}", system)
        self._systems += 1
        self._header(_SYSTEM, [])

    def stop(self) -> None:
        """Ends `serve` in the other processes."""
        self._header(_STOP, [])

    def multiply(
        self, batch: TokenOperators, kind: int, blocks: Sequence[Tensor], index: Sequence[Tensor]
    ) -> list[Tensor]:
        """One round, seen from the first process.

        Args:
            batch: the operators.
            kind: which product.
            blocks: at most `width` blocks of vectors (b, ·).
            index: for products with one operator a vector, the operators of each block (b,).

        Returns:
            What the blocks become.
        """
        sizes = [len(block) for block in blocks]
        self._header(kind, sizes)
        return self._round(batch, kind, sizes, torch.cat(list(blocks)), [*index])

    def serve(self) -> None:
        """Does what the first process sends, until it stops."""
        batch: TokenOperators | None = None
        while True:
            header = self._header(_STOP, [])
            kind, sizes = header[0], [size for size in header[1:] if size]
            if kind == _STOP:
                return
            if kind == _SYSTEM:
                batch = None  # before the next one takes its memory
                system = self._processes.ask(f"system/{self._systems}")
                self._systems += 1
                ids = torch.tensor(system["ids"])
                lins = self._job.model.linearize_together(list(ids), **system["chain"])
                batch = token_operators(lins, system["tokens"])
                continue
            assert batch is not None
            _, m, d = batch.shape
            X = torch.empty(sum(sizes), d if kind == _MATVEC else m, dtype=batch.dtype)
            self._round(batch, kind, sizes, X, [])

    def _header(self, kind: int, sizes: Sequence[int]) -> list[int]:
        """The header of a round: what the first process gives, in every process."""
        header = torch.zeros(1 + self.width, dtype=torch.int64)
        header[: 1 + len(sizes)] = torch.tensor([kind, *sizes])
        self._finish(dist.broadcast(header, 0, async_op=True))
        return [int(entry) for entry in header]

    def _round(
        self,
        batch: TokenOperators,
        kind: int,
        sizes: Sequence[int],
        X: Tensor,
        index: Sequence[Tensor],
    ) -> list[Tensor]:
        """One round; X and index are overwritten where they are not those of the first process."""
        X = X.to(self._wire)
        self._finish(dist.broadcast(X, 0, async_op=True))
        every = torch.cat(list(index)) if index else torch.zeros(len(X), dtype=torch.int64)
        if kind != _ROWS:
            self._finish(dist.broadcast(every, 0, async_op=True))
        rank, (n, m, d) = self._processes.rank, batch.shape
        shape = {_ROWS: (n, d), _MATVEC: (m,), _RMATVEC: (d,)}[kind]
        mine = torch.zeros(max(sizes), *shape, dtype=batch.dtype, device=self._wire)
        if rank < len(sizes):
            block = X.split(list(sizes))[rank].to(batch.device).clone()
            which = every.split(list(sizes))[rank]
            mine[: len(block)] = _product(batch, kind, block, which).to(self._wire)
        parts = [torch.empty_like(mine) for _ in range(self.width)] if rank == 0 else None
        self._finish(dist.gather(mine, parts, 0, async_op=True))
        some = zip(parts or [], sizes, strict=False)
        return [part[:size].to(batch.device) for part, size in some]

    def _finish(self, work: dist.Work | None) -> None:
        """Waits for an exchange; a signal is answered meanwhile, and a failure elsewhere seen."""
        assert work is not None
        look = time.monotonic() + _LOOK
        while not work.is_completed():
            time.sleep(0.0002)
            if time.monotonic() > look:
                look = time.monotonic() + _LOOK
                if self._processes.told("failed"):
                    raise PeerError
        try:
            work.wait()
        except RuntimeError as error:
            raise _LostError from error


def _product(batch: TokenOperators, kind: int, X: Tensor, index: Tensor) -> Tensor:
    if kind == _ROWS:
        return batch.rows(X)
    return batch.matvec(X, index) if kind == _MATVEC else batch.rmatvec(X, index)


class SplitOperators(OperatorBatch):
    """The Jacobians of some tokens of linearised prompts, their blocks dealt to all processes.

    Args:
        lins: the systems (see `batches.token_operators`).
        tokens: the tokens.
        rounds: the exchange with the other processes.
    """

    def __init__(
        self, lins: Sequence[Linearization], tokens: Sequence[int], rounds: Rounds
    ) -> None:
        self._batch = token_operators(lins, tokens)
        self._rounds = rounds
        self.shape, self.dtype, self.device = (
            self._batch.shape,
            self._batch.dtype,
            self._batch.device,
        )
        self.labels, self.inputs = self._batch.labels, self._batch.inputs
        self.precision, self.vectors = self._batch.precision, self._batch.vectors
        rounds.open(lins, tokens)

    def matvec(self, V: Tensor, index: Tensor) -> Tensor:
        """See `OperatorBatch.matvec`."""
        return self._products(_MATVEC, V, index)

    def rmatvec(self, U: Tensor, index: Tensor) -> Tensor:
        """See `OperatorBatch.rmatvec`."""
        return self._products(_RMATVEC, U, index)

    def rows(self, Y: Tensor) -> Tensor:
        """See `OperatorBatch.rows`."""
        return next(self.rows_of([Y]))

    def rows_of(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `OperatorBatch.rows_of`: reads ahead, so that every process has a block."""
        ahead, given = tee(blocks)
        pieces = (piece for Y in ahead for piece in Y.split(self.vectors))
        rows = self._in_rounds(_ROWS, ((piece, None) for piece in pieces))
        for Y in given:
            yield torch.cat(list(islice(rows, -(-len(Y) // self.vectors))))

    def _products(self, kind: int, X: Tensor, index: Tensor) -> Tensor:
        size = self._batch.together
        pieces = zip(X.split(size), index.cpu().split(size), strict=True)
        return torch.cat(list(self._in_rounds(kind, pieces)))

    def _in_rounds(
        self, kind: int, pieces: Iterable[tuple[Tensor, Tensor | None]]
    ) -> Iterator[Tensor]:
        """What pieces become, in order, a round at a time."""
        remaining = iter(pieces)
        while some := list(islice(remaining, self._rounds.width)):
            index = [which for _, which in some if which is not None]
            yield from self._rounds.multiply(self._batch, kind, [X for X, _ in some], index)
