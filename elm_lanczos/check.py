"""Is an architecture exact? The certificate of a tiny random instance, for every model type.

A report says one of five things: *exact* (every figure is within its bound and the model was left
as it was), *refused* (by `UnsupportedModelError`, naming the module), *not built* (transformers
cannot construct it, or run it on plain input ids on this machine), and the two that must never
happen: *WRONG* and *CRASH*.

Beside the certificate, the frozen map `F` is tested for being affine without any Jacobian:
`F(αz₁ + (1−α)z₂) = αF(z₁) + (1−α)F(z₂)` for random `z₁, z₂`. None of these figures tells which
factor of a product was frozen, so queries, keys, gates and routers are also moved under replay:
they are coefficients, and `F` must not notice. Where something is wrong, `first_break` names the
module where the figures change.
"""

from __future__ import annotations

import enum
import functools
import math
import multiprocessing
import re
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elm_lanczos.architectures import (
    PROMPT,
    causal_architectures,
    logits_of,
    tiny_config,
    tiny_model,
)
from elm_lanczos.errors import ModelError, UnsupportedModelError
from elm_lanczos.freezing import (
    Freezing,
    Kind,
    Tape,
    active_mode,
    flatten,
    kind_of,
    linear,
    rebuild,
)
from elm_lanczos.model import DetachedModel, usable_device
from elm_lanczos.rules import RULES, coefficient
from elm_lanczos.storage import Storage, checksum

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from elm_lanczos.linearization import Linearization

BOUNDS: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {
        "reconstruction": 1e-12,
        "leak": 1e-12,
        "adjoint": 1e-10,
        "affinity": 1e-10,
        "mixture": 1e-10,
        "bypass": 1e-12,
        "raised": 1e-12,
        "fidelity": 1e-5,  # many models compute norms or softmax in float32 whatever their dtype
    },
    torch.float32: dict.fromkeys(
        "reconstruction leak adjoint affinity mixture bypass raised fidelity".split(), 1e-5
    ),
}
"""The largest value of each figure that counts as exact, by the dtype computed in."""

_OWN_ROUNDING = 1e-4  # what computing some operations in float32 can amount to
_MIX = 0.3  # α of the test that F is affine
_COEFFICIENTS = re.compile(
    r"^(?!.*(value|kv|_v_|feed_forward\.key|residual))"  # nor what holds the values too
    r".*((^|[._])(q|k|query|key)([._]|$)|(^|[._])(q|k|query|key)_\w*(proj|lin)$"
    r"|(gate|gate_proj|gate_preact|router|receptance)$"
    r"|(^|\.)([abg]_proj|[fg]_[ab]_proj|x_proj|dt_proj)$)"
)
"""Names of modules that compute what is frozen: queries, keys, gates, routers, decays, steps."""


class Verdict(enum.StrEnum):
    """What a check came to."""

    EXACT = "exact"
    REFUSED = "refused"
    NOT_BUILT = "not built"
    WRONG = "WRONG"
    CRASH = "CRASH"


@dataclass(frozen=True)
class FamilyReport:
    """What the check of one model came to. Figures are None where it did not get so far.

    Attributes:
        architecture: the model type.
        verdict: one of five.
        reason: why, in one line; empty for an exact model.
        dtype: what everything was computed in.
        fidelity: frozen forward pass against the untouched model (see `Certificate`).
        reconstruction: ‖y − (Jx + c)‖ / ‖y‖.
        leak: ‖F(0)‖ / ‖y‖ with every additive constant removed.
        adjoint: disagreement of Jv and Jᵀu.
        affinity: ‖F(z) − F(0) − Jz‖ / ‖F(z)‖.
        mixture: ‖F(αz₁ + (1−α)z₂) − αF(z₁) − (1−α)F(z₂)‖ / ‖F(αz₁ + (1−α)z₂)‖.
        bypass: relative change of F when queries, keys, gates and routers are moved under replay;
            None if no module is known by its name to compute such (see `_COEFFICIENTS`).
        raised: frozen forward pass against the model's own code with its casts to a lower precision
            left out; where only the fidelity is beyond its bound, that is the model's own rounding.
        bias: ‖c‖ / ‖y‖, the share of the output that comes from constants.
        untouched: whether the model was left as it was, bit for bit.
        segments: links of the chain; 1 if the decoder was taken as a whole.
        not_a_chain: why it was; empty for a chain of layers.
        seconds: time the check took.
    """

    architecture: str
    verdict: Verdict
    reason: str = ""
    dtype: str = ""
    fidelity: float | None = None
    reconstruction: float | None = None
    leak: float | None = None
    adjoint: float | None = None
    affinity: float | None = None
    mixture: float | None = None
    bypass: float | None = None
    raised: float | None = None
    bias: float | None = None
    untouched: bool | None = None
    segments: int | None = None
    not_a_chain: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        return asdict(self)


# ------------------------------------------------------------------------------ one model


def check_model(
    model: DetachedModel, ids: Tensor, *, architecture: str | None = None, seed: int = 0
) -> FamilyReport:
    """Checks that a model's linear system is exact and that the model is left as it was.

    Args:
        model: the model, with any weights.
        ids: (T,), the prompt.
        architecture: what to call it; its model type if not given.
        seed: of the random vectors.

    Returns:
        The report; nothing is raised for what the linear system is.

    Raises:
        ModelError: if the model itself does not run on the prompt.
    """
    name = architecture or model.hf_model.config.model_type
    return _examined(model.hf_model, ids, lambda: model, name, model.compute_dtype, seed)


def check_architecture(
    architecture: str | PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float64,
    gate: str = "frozen",
    device: str = "cpu",
    seed: int = 0,
) -> FamilyReport:
    """Checks a tiny random instance of an architecture.

    Args:
        architecture: a model type, or a configuration of any size.
        dtype: of the weights and the computation. A model whose own code does not run in float64
            is checked in float32.
        gate: which factor of a gated MLP is held fixed (see `DetachedModel`).
        device: where to check it.
        seed: of weights and random vectors.

    Returns:
        The report; nothing is raised for what transformers or the model does.

    Raises:
        UsageError: if there is no such device.
    """
    started = time.perf_counter()
    name = architecture if isinstance(architecture, str) else architecture.model_type
    try:
        hf_model = _random_instance(architecture, dtype, seed)
    except ModelError as error:
        seconds = time.perf_counter() - started
        return FamilyReport(name, Verdict.NOT_BUILT, str(error), seconds=seconds)
    hf_model = hf_model.to(usable_device(device))
    ids = torch.tensor(PROMPT, device=device)
    detached = functools.partial(DetachedModel, hf_model, gate=gate)
    report = _examined(hf_model, ids, detached, name, hf_model.dtype, seed)
    return replace(report, seconds=time.perf_counter() - started)


def _random_instance(
    architecture: str | PreTrainedConfig, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    config = tiny_config(architecture)
    try:
        return tiny_model(config, dtype, seed)
    except ModelError:
        if dtype != torch.float64:
            raise
        return tiny_model(config, torch.float32, seed)


def _examined(
    hf_model: PreTrainedModel,
    ids: Tensor,
    detached: Callable[[], DetachedModel],
    name: str,
    dtype: torch.dtype,
    seed: int,
) -> FamilyReport:
    started = time.perf_counter()
    before = _state(hf_model, ids)
    model: DetachedModel | None = None
    figures: dict[str, Any] = {}
    try:
        model = detached()
        lin = model.linearize(ids)
        figures = _figures(lin, seed)
        found = {k: v for k, v in figures.items() if v is not None}
        misses = [k for k, bound in BOUNDS[dtype].items() if not found.get(k, 0.0) <= bound]
        verdict, reason = Verdict.EXACT, ""
        own = figures["fidelity"] <= _OWN_ROUNDING and dtype == torch.float64
        if misses == ["fidelity"] and own:
            reason = f"the model's own rounding is {figures['fidelity']:.0e} (see raised)"
        elif misses:
            verdict, reason = Verdict.WRONG, f"{', '.join(misses)} beyond the bound"
    except UnsupportedModelError as error:
        verdict, reason = Verdict.REFUSED, str(error)
    except Exception as error:  # anything else is a defect, whatever it is
        verdict, reason = Verdict.CRASH, _innermost(error)
    if model is not None and verdict in (Verdict.WRONG, Verdict.REFUSED):
        reason += _where(model, ids, verdict, seed)
    touched = [k for k, same in _same(before, _state(hf_model, ids)) if not same]
    if touched:
        verdict = Verdict.WRONG
        reason = f"the model was changed: {', '.join(touched)}" + (f"; {reason}" if reason else "")
    return FamilyReport(
        name,
        verdict,
        " ".join(reason.split()),
        str(dtype).removeprefix("torch."),
        **figures,
        untouched=not touched,
        seconds=time.perf_counter() - started,
    )


def _figures(lin: Linearization, seed: int) -> dict[str, Any]:
    certificate = lin.certificate(seed)
    z1, z2 = _random_pair(lin.inputs, seed)
    mixed = lin(_MIX * z1 + (1 - _MIX) * z2)
    expected = _MIX * lin(z1) + (1 - _MIX) * lin(z2)
    return {
        "fidelity": certificate.fidelity,
        "reconstruction": certificate.reconstruction,
        "leak": certificate.leak,
        "adjoint": certificate.adjoint,
        "affinity": certificate.affinity,
        "mixture": _distance(mixed, expected),
        "bypass": _bypass(lin, dict(lin.model.decoder.named_modules())),
        "raised": certificate.raised,
        "bias": float(lin.constant.norm() / lin.output.norm()),
        "segments": len(lin.segments),
        "not_a_chain": lin.not_a_chain,
    }


def _random_pair(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two random inputs (T, d) of the size of the prompt's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64)
    z1, z2 = z.to(x) * x.square().mean().sqrt()
    return z1, z2


def _bypass(lin: Linearization, modules: dict[str, nn.Module]) -> float | None:
    """Returns the change of F when those of `modules` that compute coefficients are moved."""
    moves = 0

    def move(value: Any) -> Any:
        nonlocal moves
        amounts = isinstance(value, Tensor) and value.is_floating_point()
        if not amounts or kind_of(value) not in (Kind.LINEAR, Kind.NONLINEAR):
            return value
        moves += 1
        change = torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype, device=value.device)
        return value + change

    def move_under_replay(_module: nn.Module, _args: Any, output: Any) -> Any:
        mode = active_mode()
        return rebuild(move, output) if mode is not None and mode.replay is not None else output

    up = lin.model.gate == "up"  # then gated MLPs go through their gates
    coefficients = [
        module
        for name, module in modules.items()
        if _COEFFICIENTS.search(name) and not (up and "gate" in name.rpartition(".")[2])
    ]
    handles = [module.register_forward_hook(move_under_replay) for module in coefficients]
    try:
        moved = lin(lin.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return _distance(moved, lin.output) if moves else None


def _distance(value: Tensor, expected: Tensor) -> float:
    scale = float(value.double().norm())
    difference = float((value.double() - expected.double().to(value.device)).norm())
    return difference / scale if scale else difference


def _innermost(error: Exception) -> str:
    """Returns an error in one line, with where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file = frame.filename.rsplit("/", 1)[-1]
    return f"{type(error).__name__}: {str(error)[:200]} ({file}:{frame.lineno}: {frame.line})"


# ------------------------------------------------------------------- left as it was


def _state(hf_model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Everything about a model that must be the same afterwards."""
    try:
        logits = logits_of(hf_model, ids)
    except Exception as error:  # a model's own code raises anything at all
        name = hf_model.config.model_type
        raise ModelError(f"{name} itself does not run on this prompt: {error!r:.200}") from error
    modules = dict(hf_model.named_modules())
    configs = {id(c): c for m in modules.values() if (c := getattr(m, "config", None)) is not None}
    buffers = [(name, b) for name, b in hf_model.named_buffers() if not b.is_meta]
    kept = [*Storage(hf_model, []).weights(), *buffers]
    return {
        "classes": {name: type(module) for name, module in modules.items()},
        "training flags": {name: module.training for name, module in modules.items()},
        "hooks": {name: _hooks(module) for name, module in modules.items()},
        "attributes": {name: set(vars(module)) for name, module in modules.items()},
        "configurations": {i: repr(vars(config)) for i, config in configs.items()},
        "gradients": [(p.requires_grad, p.grad is None) for p in hf_model.parameters()],
        "weights": {name: (tensor.dtype, checksum(tensor)) for name, tensor in kept},
        "states": {
            (name, key): (value.dtype, checksum(value), value.requires_grad)
            for name, module in modules.items()
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_meta
        },
        "logits": logits,
    }


def _hooks(module: nn.Module) -> list[int]:
    return [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]


def _same(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    for name, value in before.items():
        if isinstance(value, Tensor):
            other = after[name]
            same = value.dtype == other.dtype and torch.equal(value, other)
        else:
            same = value == after[name]
        yield name, same


# -------------------------------------------------------------------------- where it breaks


@dataclass(frozen=True)
class Break:
    """The first place in a forward pass where a figure leaves its bound.

    Attributes:
        figure: `fidelity`, `leak`, `mixture` or `bypass`.
        module: the module, and whether its input or its output is meant.
        before: the largest figure up to there.
        after: the figure there.
    """

    figure: str
    module: str
    before: float
    after: float

    def __str__(self) -> str:
        """Returns it in one line."""
        return f"{self.module} ({self.figure} {self.before:.1e} before, {self.after:.1e} after)"


_Events = list[tuple[str, Tensor]]
"""What went into and came out of modules, in order: (module and side, value)."""


def first_break(model: DetachedModel, ids: Tensor, *, seed: int = 0) -> Break | None:
    """Finds the module where the frozen model departs from the model, leaks, or stops being affine.

    The frozen forward pass is compared with the untouched one module by module. If they agree, the
    map is replayed without its constants at zero, where everything must be zero, at two random
    inputs and at their mixture, and with one coefficient after the other moved.

    Args:
        model: the model.
        ids: (T,), the prompt.
        seed: of the random inputs.

    Returns:
        The first break, or None if there is none at the modules' borders.
    """
    with _recorded(model, kinds=(None,)) as own:
        model.predict(ids)
    with _recorded(model, kinds=(Kind.LINEAR,)) as frozen:
        lin = model.linearize(ids)
    z1, z2 = _random_pair(lin.inputs, seed)

    def replayed(z: Tensor, **options: Any) -> _Events:
        with _recorded(model, kinds=(Kind.LINEAR,)) as events:
            lin(z, **options)
        return events

    def departures() -> Iterator[tuple[str, float]]:
        for name, value, other in _matched(frozen, own):
            yield name, _distance(value, other)

    def leaks() -> Iterator[tuple[str, float]]:
        at_zero = replayed(torch.zeros_like(z1), without_constants=True)
        for (name, zero), (_, value) in zip(
            at_zero, replayed(z1, without_constants=True), strict=False
        ):
            if not torch.equal(zero, value):  # equal ones are of the recording at the prompt
                yield name, float(zero.norm() / value.norm())

    def bends() -> Iterator[tuple[str, float]]:
        runs = (replayed(z) for z in (z1, z2, _MIX * z1 + (1 - _MIX) * z2))
        for (name, first), (_, second), (_, mixed) in zip(*runs, strict=False):
            if first.shape == second.shape == mixed.shape:
                yield name, _distance(mixed, _MIX * first + (1 - _MIX) * second)

    def detours() -> Iterator[tuple[str, float]]:
        for path, module in model.decoder.named_modules():
            if _COEFFICIENTS.search(path):
                change = _bypass(lin, {path: module})
                yield f"{path} ({type(module).__name__})", change or 0.0

    searches = {"fidelity": departures, "leak": leaks, "mixture": bends, "bypass": detours}
    bounds = BOUNDS[model.compute_dtype]
    places = (
        _first_beyond(figure, search(), bounds[figure]) for figure, search in searches.items()
    )
    return next((place for place in places if place is not None), None)


def _first_bend(model: DetachedModel, ids: Tensor, seed: int) -> Break | None:
    """Finds where a refused model stops being affine: its first layer that is not, once frozen."""
    # operations without a rule count as coefficients here, so that the rest can be run
    tape, x = Tape(), model.embed(ids)
    z1, z2 = _random_pair(x, seed)

    def run(z: Tensor, **options: Any) -> _Events:
        options |= {"gate": model.gate, "default": coefficient}
        mode = Freezing(model.compute_dtype, RULES, **options)
        recorded = _recorded(model, kinds=(Kind.LINEAR, Kind.NONLINEAR))
        with recorded as events, model.frozen(), torch.no_grad(), mode:
            model.hidden_states(linear(z[None]), ids[None])
        return events

    run(x, record=tape)
    runs = [run(z, replay=tape) for z in (z1, z2, _MIX * z1 + (1 - _MIX) * z2)]
    layers = {id(layer) for layer in model.layers}
    stream = {
        f"{path} ({type(module).__name__})"
        for path, module in model.decoder.named_modules()
        if id(module) in layers or not path
    }
    figures = (
        (name, _distance(mixed, _MIX * first + (1 - _MIX) * second))
        for (name, first), (_, second), (_, mixed) in zip(*runs, strict=False)
        if name in stream and first.shape == second.shape == mixed.shape
    )
    return _first_beyond("mixture", figures, BOUNDS[model.compute_dtype]["mixture"])


def _where(model: DetachedModel, ids: Tensor, verdict: Verdict, seed: int) -> str:
    """Where a model that is not exact breaks, in words, if that can be found."""
    try:
        if verdict == Verdict.REFUSED:
            place, words = _first_bend(model, ids, seed), "first not affine:"
        else:
            place, words = first_break(model, ids, seed=seed), "first at"
    except Exception:  # a hint only: what breaks a model may break the search too
        return ""
    return "" if place is None else f"; {words} {place}"


@contextmanager
def _recorded(model: DetachedModel, *, kinds: Container[Kind | None]) -> Iterator[_Events]:
    """Records the first tensor of these kinds into and out of every module of the decoder."""
    events: _Events = []

    def note(name: str, values: Any) -> None:
        tensor = next((v for v in flatten(values) if isinstance(v, Tensor)), None)
        if tensor is None or not tensor.is_floating_point():
            return
        if kind_of(tensor) in kinds:
            events.append((name, tensor.detach().clone()))

    handles = []
    for path, module in model.decoder.named_modules():
        name = f"{path or 'the decoder'} ({type(module).__name__})"
        handles += [
            module.register_forward_pre_hook(
                lambda _m, args, kwargs, n=name: note(f"the input of {n}", (args, kwargs)),
                with_kwargs=True,
            ),
            module.register_forward_hook(lambda _m, _a, out, n=name: note(n, out)),
        ]
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


def _matched(frozen: _Events, own: _Events) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs the n-th event of a name in one run with the n-th of that name in the other."""
    theirs: dict[tuple[str, int], Tensor] = {}
    counts: Counter[str] = Counter()
    for name, tensor in own:
        theirs[name, counts[name]] = tensor
        counts[name] += 1
    counts.clear()
    for name, tensor in frozen:
        other = theirs.get((name, counts[name]))
        counts[name] += 1
        if other is not None and other.shape == tensor.shape:
            yield name, tensor, other


def _first_beyond(figure: str, found: Iterable[tuple[str, float]], bound: float) -> Break | None:
    largest = 0.0
    for name, value in found:
        if not value <= bound:
            return Break(figure, name, largest, value)
        largest = max(largest, value)
    return None


# ------------------------------------------------------------------------- all of them


def check_all(
    progress: Callable[[FamilyReport], None] | None = None,
    *,
    architectures: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float64,
    gate: str = "frozen",
    device: str = "cpu",
    seed: int = 0,
    jobs: int = 1,
    timeout: float = 600.0,
    memory: int | None = 16 * 2**30,
) -> list[FamilyReport]:
    """Checks every architecture, each in a process of its own.

    Args:
        progress: called with each report as it is there.
        architectures: model types; all causal ones if not given.
        dtype: see `check_architecture`.
        gate: see `check_architecture`.
        device: see `check_architecture`.
        seed: see `check_architecture`.
        jobs: how many are checked at once.
        timeout: seconds after which one is given up as a CRASH.
        memory: bytes of address space one may use (CPU only); None for no limit.

    Returns:
        The reports in the order of `architectures`.

    Raises:
        UsageError: if there is no such device.
    """
    usable_device(device)
    names = causal_architectures() if architectures is None else list(architectures)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.modeling_utils", "elm_lanczos.linearization"])
    threads = max(1, torch.get_num_threads() // jobs)

    def check(name: str) -> FamilyReport:
        started = time.perf_counter()
        receiver, sender = context.Pipe(duplex=False)
        what = {"dtype": dtype, "gate": gate, "device": device, "seed": seed}
        arguments = (sender, name, what, threads, memory if device == "cpu" else None)
        process = context.Process(target=_check_in_child, args=arguments, daemon=True)
        process.start()
        sender.close()
        try:
            if receiver.poll(timeout):
                report: FamilyReport = receiver.recv()
            else:
                report = FamilyReport(name, Verdict.CRASH, f"no answer in {timeout:.0f} s")
        except EOFError:
            process.join()
            reason = f"its process ended with exit code {process.exitcode}"
            report = FamilyReport(name, Verdict.CRASH, reason)
        process.kill()
        process.join()
        if progress is not None:
            progress(report)
        return replace(report, seconds=time.perf_counter() - started)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(check, names))


def _check_in_child(
    sender: Connection,
    name: str,
    what: dict[str, Any],
    threads: int,
    memory: int | None,
) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sender.send(check_architecture(name, **what))


# --------------------------------------------------------------------------- the table


def versions() -> dict[str, str]:
    """Returns the versions that a sweep's result depends on."""
    import transformers

    import elm_lanczos

    return {
        "elm_lanczos": elm_lanczos.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def families_table(reports: Iterable[FamilyReport]) -> str:
    """Renders reports as Markdown: counts, the figures of what was computed, and the reasons.

    Args:
        reports: of one sweep.

    Returns:
        Markdown without a heading.
    """
    reports = sorted(
        reports, key=lambda report: (_ORDER.index(report.verdict), report.architecture)
    )
    counts = Counter(report.verdict for report in reports)
    built = len(reports) - counts[Verdict.NOT_BUILT]
    share = f" ({100 * counts[Verdict.EXACT] / built:.1f} % of the {built} built)" if built else ""
    summary = ", ".join(f"{counts[v]} {v}" + share * (v == Verdict.EXACT) for v in _ORDER)
    lines = [f"{summary}.", ""]
    computed = [r for r in reports if r.reconstruction is not None]
    if computed:
        lines += [
            "| architecture | verdict | reconstruction | leak | adjoint | affinity | mixture "
            "| bypass | raised | fidelity | bias | segments | dtype |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
        ]
        for r in computed:
            figures = [r.reconstruction, r.leak, r.adjoint, r.affinity, r.mixture]
            figures += [r.bypass, r.raised, r.fidelity]
            cells = [f"`{r.architecture}`", str(r.verdict), *map(_figure, figures)]
            cells += [f"{r.bias:.2f}" if r.bias else "0", str(r.segments), r.dtype]
            lines.append(f"| {' | '.join(cells)} |")
    explained = [r for r in reports if r.reason]
    if explained:
        lines += ["", "| architecture | verdict | reason |", "|---|---|---|"]
        lines += [
            f"| `{r.architecture}` | {r.verdict} | {r.reason.replace('|', chr(92) + '|')} |"
            for r in explained
        ]
    return "\n".join(lines) + "\n"


_ORDER = (Verdict.EXACT, Verdict.REFUSED, Verdict.NOT_BUILT, Verdict.WRONG, Verdict.CRASH)


def _figure(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–" if value is None else "NaN"
    return f"{value:.0e}" if value else "0"
