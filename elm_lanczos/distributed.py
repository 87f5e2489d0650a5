"""Several processes, one store: `torchrun --nproc-per-node N -m elm_lanczos run …`.

The processes agree through the key-value store that torchrun gives them. The first one coordinates:
it holds the store's lock, deals the work, writes the summary and shows the results. Prompts are
dealt one at a time, longest first, each with all its positions to one process. Where fewer prompts
are left at the start than there are processes, these are solved in turn by all processes together.
The *blocks* of vectors that go through the model are dealt, one to each process a round. Where a
prompt has several *owners* of rows (every 64 tokens are one in a prompt of more than 128, see
`store`), these are dealt too: a process solves and writes its own, and gets the rows of their
tokens' Jacobians from all processes. With one owner only the blocks are dealt, and one process
solves. Blocks and owners have the borders and the composition that they have in one process, and
every process computes under the options in the store, so the bits of a store do not depend on how
many made it.

Waiting is polling: a signal is answered at once, a failure elsewhere is seen, and nothing waits for
ever for processes that give no sign of life.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import accumulate, chain, count, islice, tee
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
    Alone,
    Job,
    Observer,
    Unshown,
    Work,
    chain_options,
    commit,
    resources,
    show_known,
    solve_all,
    solve_batch,
    unfinished,
)
from elm_lanczos.store import PromptGroup, ResultStore
from elm_lanczos.store.attributes import first_difference, to_json
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.solve import solve

_JOINING = timedelta(minutes=5)
_PATIENCE = timedelta(hours=2)
"""How long the others may give no sign of life."""

_COLLECTIVE = timedelta(days=365)
"""How long an exchange may take: a process that has nothing left waits in one while others solve
for hours, so that only a broken connection may end it."""

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
                found = outcome(store.path)
                processes.tell("outcome", [found.not_converged, found.not_exact])
        else:
            work = processes.ask("work")
            with ResultStore.open(work["path"], "r+") as store:
                store.join(processes.rank, observer.note)
                torch.set_num_threads(resources(store)["threads"])
                _compute(processes, store, job, work["left"], observer, own)
        not_converged, not_exact = processes.ask("outcome")
        processes.leave()
    return Outcome(store.path, not_converged, not_exact)


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
    exchange = Exchange(processes, job.model.device if own is not None else torch.device("cpu"))
    shared = Shared(exchange, processes)
    if processes.rank == 0:
        solve_all(store, job, observer, shared)
        shared.stop()
    else:
        shared.help(store, job, observer)


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


# ---------------------------------------------------------------------- one linear system


class Shared(Alone):
    """Solves linear systems in all processes: each one the operators of some owners.

    Every process linearises the system and solves owners of its own, of which it also writes the
    rows. The rows of the Jacobians that a solver asks for come from all processes (see `Exchange`).

    Args:
        exchange: the exchange of vectors.
        processes: the processes.
    """

    def __init__(self, exchange: Exchange, processes: Processes) -> None:
        self._exchange = exchange
        self._processes = processes
        self._steps = 0

    def linearized(self, lins: Sequence[Linearization]) -> None:
        """Lets the others linearise the same while this process has more to do."""
        ids = lins[0].decoder.ids
        assert ids is not None
        self._tell({"ids": ids.tolist(), "chain": chain_options(lins[0])})

    def solve(
        self,
        groups: Sequence[PromptGroup],
        lins: Sequence[Linearization],
        plan: Plan,
        job: Job,
        observer: Observer,
    ) -> None:
        """See `Alone.solve`; seen from the first process."""
        work = Work.of(groups)
        names = [group.name for group in groups]
        self._tell({"work": asdict(work), "plan": asdict(plan), "groups": names})
        self._part(groups, lins, plan, work, job, _Reporter(observer, self._processes).passes)

    def stop(self) -> None:
        """Ends `help` in the other processes."""
        self._tell({})

    def help(self, store: ResultStore, job: Job, observer: Observer) -> None:
        """Does what the first process tells, until it stops.

        Args:
            store: the store.
            job: the run.
            observer: told of passes.
        """
        lins: list[Linearization] = []
        while step := self._asked():
            if "ids" in step:
                lins.clear()  # before the next ones take their memory
                ids = torch.tensor(step["ids"])
                lins += job.model.linearize_together(list(ids), **step["chain"])
                if lins[0].decoder.keep:
                    like = lins[0].inputs
                    nothing = torch.zeros(1, *lins[0].decoder.outputs.shape, dtype=like.dtype)
                    lins[0].decoder.vjp(nothing.to(like.device))  # linearises the layers
                continue
            groups = [store.group(name) for name in step["groups"]]
            plan, work = Plan(**step["plan"]), Work(**step["work"])
            self._part(groups, lins, plan, work, job, _Reporter(observer, self._processes).passes)

    def _tell(self, step: object) -> None:
        self._processes.tell(f"step/{self._steps}", step)
        self._steps += 1

    def _asked(self) -> Any:
        step = self._processes.ask(f"step/{self._steps}")
        self._steps += 1
        return step

    def _part(
        self,
        groups: Sequence[PromptGroup],
        lins: Sequence[Linearization],
        plan: Plan,
        work: Work,
        job: Job,
        progress: Callable[[int], None],
    ) -> None:
        """This process's part of a linear system."""
        dealt = deal([len(some) for some in work.members], self._processes.count)
        tokens = [[i for n in numbers for i in work.members[n]] for numbers in dealt]
        self._exchange.open(token_operators(lins, work.tokens), tokens)
        mine, own = dealt[self._processes.rank], tokens[self._processes.rank]
        if mine:
            batch = SharedOperators(lins, work.tokens, own, self._exchange)
            sizes = [len(work.members[number]) for number in mine]
            ends = list(accumulate(sizes))
            members = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
            for which, result in solve(batch, plan, members, progress):
                commit(groups, work.owners[mine[which]], result, job)
        self._exchange.close()


def deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Deals pieces of work to processes, about equal sums to each.

    Args:
        sizes: of the pieces.
        count: how many processes; the first one, which has other work too, gets the least.

    Returns:
        The numbers of the pieces of each process, ascending.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        least = held.index(min(held))
        dealt[least].append(number)
        held[least] += sizes[number]
    return [sorted(dealt[rank]) for rank in sorted(range(count), key=lambda rank: held[rank])]


# ------------------------------------------------------------------------ blocks of vectors

_NOTHING, _ROWS, _MATVEC, _RMATVEC = range(4)


class Exchange:
    """Products with the operators of all processes, in rounds of one block for each process.

    A process says which product it wants. That of the first one that wants any is made: it gives
    the vectors; every process puts a block through; and of what blocks become, each process that
    wanted the same (they all stream the same cotangents) gets what belongs to its operators. While
    one round's products travel, those of the next are computed.

    Args:
        processes: the processes.
        wire: the device that vectors are exchanged from.
    """

    def __init__(self, processes: Processes, wire: torch.device) -> None:
        self._processes = processes
        self._wire = wire
        self._batch: TokenOperators | None = None
        self._tokens: list[Tensor] = []
        processes.tell(f"grouping/{processes.rank}", True)
        for rank in range(processes.count):
            processes.ask(f"grouping/{rank}")
        cuda = wire.type == "cuda"
        if cuda:
            torch.cuda.set_device(wire)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore("group", processes._store),
            rank=processes.rank,
            world_size=processes.count,
            timeout=_COLLECTIVE,
        )

    def open(self, batch: TokenOperators, tokens: Sequence[Sequence[int]]) -> None:
        """Begins the products of one linear system, in every process.

        Args:
            batch: all operators.
            tokens: positions of each process's operators in the batch.
        """
        self._batch = batch
        self._tokens = [torch.tensor(some, dtype=torch.int64) for some in tokens]

    @property
    def is_single(self) -> bool:
        """Whether only one process has operators: the others have nothing else to do."""
        return sum(len(tokens) > 0 for tokens in self._tokens) == 1

    def products(
        self, kind: int, pieces: Iterator[tuple[Tensor, Tensor]], mark: int
    ) -> Iterator[Tensor]:
        """What blocks of vectors become, in order.

        Args:
            kind: which product.
            pieces: blocks (b, ·); of products with one operator a vector, the operators (b,) too.
            mark: differs for other vectors.

        Yields:
            What each block becomes, of this process's operators.
        """
        while True:
            made = self._agreed(kind, mark)
            assert made is not None  # as this process wants one
            if self._processes.rank in made.wanted_by:
                yield from self._rounds(made, pieces)
                return
            deque(self._rounds(made, iter(())), maxlen=0)

    def close(self) -> None:
        """Takes part in what other processes still want; then the linear system is solved."""
        while (made := self._agreed(_NOTHING, 0)) is not None:
            deque(self._rounds(made, iter(())), maxlen=0)
        self._batch = None

    def _agreed(self, kind: int, mark: int) -> _Product | None:
        """The product that is made next, if any is wanted; each process says what it wants."""
        wanted = [torch.zeros(2, dtype=torch.int64) for _ in range(self._processes.count)]
        self._finish(dist.all_gather(wanted, torch.tensor([kind, mark]), async_op=True))
        kinds = [(int(wish[0]), int(wish[1])) for wish in wanted]
        first = next((rank for rank, wish in enumerate(kinds) if wish[0]), None)
        if first is None:
            return None
        same = [rank for rank, wish in enumerate(kinds) if wish == kinds[first]]
        return _Product(kinds[first][0], first, same)

    def _rounds(self, made: _Product, pieces: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """All rounds of a product; the pieces are those of the process that gives them."""
        travelling = None
        while True:
            sizes, X, index = self._given(made, list(islice(pieces, self._processes.count)))
            product = self._product(made.kind, sizes, X, index)
            if travelling is not None:
                yield from self._arrived(*travelling)
            if not sizes:
                return
            travelling = self._sent(made, sizes, product)

    def _given(
        self, made: _Product, some: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[list[int], Tensor, Tensor]:
        """The blocks of a round, one for each process: their sizes, vectors and operators."""
        assert self._batch is not None
        header = torch.zeros(self._processes.count, dtype=torch.int64)
        header[: len(some)] = torch.tensor([len(X) for X, _ in some])
        self._finish(dist.broadcast(header, made.given_by, async_op=True))
        sizes = [int(size) for size in header if size]
        _, m, d = self._batch.shape
        wide = d if made.kind == _MATVEC else m
        X = torch.empty(sum(sizes), wide, dtype=self._batch.dtype, device=self._wire)
        index = torch.zeros(sum(sizes), dtype=torch.int64)
        if some:
            X, index = (
                torch.cat([x for x, _ in some]).to(self._wire),
                torch.cat([i for _, i in some]),
            )
        if sizes:
            self._finish(dist.broadcast(X, made.given_by, async_op=True))
        if sizes and made.kind != _ROWS:
            self._finish(dist.broadcast(index, made.given_by, async_op=True))
        return sizes, X, index

    def _product(self, kind: int, sizes: Sequence[int], X: Tensor, index: Tensor) -> Tensor | None:
        """What this process's block of a round becomes, if there is one."""
        rank, batch = self._processes.rank, self._batch
        assert batch is not None
        if rank >= len(sizes):
            return None
        block = X.split(list(sizes))[rank].to(batch.device).clone()
        if kind == _ROWS:
            return batch.rows(block)
        which = index.split(list(sizes))[rank]
        return batch.matvec(block, which) if kind == _MATVEC else batch.rmatvec(block, which)

    def _sent(
        self, made: _Product, sizes: Sequence[int], product: Tensor | None
    ) -> tuple[dist.Work | None, Tensor, list[int], list[int]]:
        """Sends each process what belongs to its operators; what arrives here, and its shape."""
        assert self._batch is not None
        _, m, d = self._batch.shape
        ranks, rank = range(self._processes.count), self._processes.rank
        if made.kind == _ROWS:
            shapes = [[len(tokens), d] for tokens in self._tokens]
        else:
            shapes = [[m if made.kind == _MATVEC else d] for _ in ranks]
        there = [math.prod(shapes[to]) if to in made.wanted_by else 0 for to in ranks]
        every = [*sizes, *[0] * (len(ranks) - len(sizes))]
        parts = []
        for to in made.wanted_by if product is not None else ():
            assert product is not None
            tokens = self._tokens[to].to(product.device)
            part = product.index_select(1, tokens) if made.kind == _ROWS else product
            parts.append(part.flatten().to(self._wire))
        outgoing = torch.cat(parts) if parts else self._room(0)
        arriving = self._room(sum(sizes) * there[rank])
        work = dist.all_to_all_single(
            arriving,
            outgoing,
            [size * there[rank] for size in every],
            [every[rank] * one for one in there],
            async_op=True,
        )
        return work, arriving, [*sizes] if there[rank] else [], shapes[rank]

    def _room(self, length: int) -> Tensor:
        assert self._batch is not None
        return torch.empty(length, dtype=self._batch.dtype, device=self._wire)

    def _arrived(
        self, work: dist.Work | None, arriving: Tensor, sizes: list[int], shape: list[int]
    ) -> Iterator[Tensor]:
        """What the blocks of a round have become, of this process's operators."""
        assert self._batch is not None
        self._finish(work)
        one = math.prod(shape)
        for part in arriving.split([size * one for size in sizes]) if sizes else ():
            yield part.view(-1, *shape).to(self._batch.device)

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


@dataclass(frozen=True)
class _Product:
    """A product that all processes make.

    Attributes:
        kind: which.
        given_by: the process that gives the vectors.
        wanted_by: the processes that get what becomes of them.
    """

    kind: int
    given_by: int
    wanted_by: list[int]


class SharedOperators(OperatorBatch):
    """The Jacobians of one process's tokens; their rows are made by all processes.

    Args:
        lins: the systems (see `batches.token_operators`).
        tokens: all tokens.
        own: the positions of this process's among them.
        exchange: the exchange with the other processes.
    """

    def __init__(
        self,
        lins: Sequence[Linearization],
        tokens: Sequence[int],
        own: Sequence[int],
        exchange: Exchange,
    ) -> None:
        self._batch = batch = token_operators(lins, [tokens[i] for i in own])
        self._exchange = exchange
        self._own = torch.tensor(own)
        self.shape, self.dtype, self.device = batch.shape, batch.dtype, batch.device
        self.labels, self.inputs = batch.labels, batch.inputs
        self.precision, self.vectors = batch.precision, batch.vectors

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
        remaining = iter(blocks)
        first = next(remaining)
        ahead, given = tee(chain([first], remaining))
        none = torch.zeros(0, dtype=torch.int64)
        pieces = ((piece, none) for Y in ahead for piece in Y.split(self.vectors))
        mark = zlib.crc32(first.cpu().numpy().tobytes())
        rows = self._exchange.products(_ROWS, pieces, mark)
        for Y in given:
            yield torch.cat(list(islice(rows, -(-len(Y) // self.vectors))))

    def _products(self, kind: int, X: Tensor, index: Tensor) -> Tensor:
        """Products with one operator a vector: where others have operators too, made here alone."""
        if not self._exchange.is_single:
            batch = self._batch
            return batch.matvec(X, index) if kind == _MATVEC else batch.rmatvec(X, index)
        size = self._batch.together
        which = self._own[index.cpu()]
        pieces = zip(X.split(size), which.split(size), strict=True)
        return torch.cat(list(self._exchange.products(kind, pieces, 0)))
