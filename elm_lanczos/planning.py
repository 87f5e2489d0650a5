"""What a run will cost, before anything runs: passes, seconds and bytes of each method.

Prompts that a run solves together (see `batches`) are one system here too. With a model's weights,
one block of passes is timed at the smallest and at the largest system, by their tokens. From a
configuration alone, three of its layers are built with random weights (see `shared_layer`), and
their time is extrapolated to the whole depth and length by the number of floating-point operations
of a pass. Bytes are arithmetic on shapes, so nothing as long as a prompt is made for them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elm_lanczos.architectures import full_config
from elm_lanczos.batches import batches, gains, token_operators
from elm_lanczos.config import PlanConfig, output_positions, select_tokens
from elm_lanczos.errors import ModelError, UnsupportedModelError, UsageError, first_line
from elm_lanczos.footprint import Footprint, spare
from elm_lanczos.linearization import Linearization
from elm_lanczos.memory import ceiling, free_bytes, size
from elm_lanczos.model import (
    DetachedModel,
    auto_class,
    find_decoder,
    find_layers,
    usable_device,
    usable_precision,
)
from elm_lanczos.operators import TokenOperators
from elm_lanczos.prompts import read_prompts
from elm_lanczos.shared_layer import VOCABULARY, shared_layer_model
from elm_lanczos.svd.cost import Cost, Rates, faster_dense, price, time_block
from elm_lanczos.svd.plan import METHODS, Plan, make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Of a model without weights: layers that are timed, and on a CPU positions and rows of a block.
_TIMED_LAYERS, _TIMED_TOKENS, _TIMED_ROWS = 3, 32, 128


@dataclass(frozen=True)
class SystemCost:
    """What one linear system is predicted to cost.

    Attributes:
        prompt: name of the prompt, or how many are solved together.
        length: tokens T of a prompt.
        tokens: tokens whose triplets are computed.
        method: the method that a run would follow.
        reason: why, in one line.
        refusal: why a run would be refused for want of memory, in one line; None if it would not.
        costs: the cost of each method.
        arrays: bytes of each kind of array that a method's state is made of, by method.
        chain: bytes of each kind of array that the linearised layers and a block of vectors are
            made of.
        memory: bytes to work within.
        prompts: names of the prompts that are solved together.
    """

    prompt: str
    length: int
    tokens: int
    method: str
    reason: str
    refusal: str | None
    costs: dict[str, Cost]
    arrays: dict[str, dict[str, int]]
    chain: dict[str, int]
    memory: int
    prompts: tuple[str, ...]

    def cost(self, method: str | None = None) -> Cost:
        """The cost of one method, the chain's bytes among its bytes.

        Args:
            method: by default the one that a run would follow.

        Returns:
            The cost.
        """
        cost = self.costs[method or self.method]
        return replace(cost, bytes=cost.bytes + sum(self.chain.values()))


@dataclass(frozen=True)
class Forecast:
    """What a run is predicted to cost.

    Attributes:
        model: name of the model.
        device: where it would run.
        dtype: what is computed in.
        k: triplets for each token.
        weight_bytes: of the model as it is stored.
        systems: the linear systems.
        basis: what the seconds come from, in one line.
    """

    model: str
    device: str
    dtype: str
    k: int
    weight_bytes: int
    systems: tuple[SystemCost, ...]
    basis: str

    def total(self, method: str | None = None) -> Cost:
        """The cost of all systems: passes and seconds add up, of bytes the largest counts.

        Args:
            method: one method for all; by default each system's own.

        Returns:
            The cost.
        """
        costs = [system.cost(method) for system in self.systems]
        seconds = [cost.seconds for cost in costs if cost.seconds is not None]
        return Cost(
            method or "as chosen",
            sum(cost.passes for cost in costs),
            sum(seconds) if len(seconds) == len(costs) else None,
            max(cost.bytes for cost in costs),
        )

    @property
    def hint(self) -> str | None:
        """One line saying that `dense` would be at least twice as fast, if it would."""
        chosen = {system.method for system in self.systems}
        return None if chosen == {"dense"} else faster_dense(self.total(), self.total("dense"))

    @property
    def refusal(self) -> str | None:
        """Why a run would be refused for want of memory, in one line; None if it would not."""
        return next((system.refusal for system in self.systems if system.refusal), None)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        derived = {"total": asdict(self.total()), "hint": self.hint, "refusal": self.refusal}
        return {**asdict(self), **derived}


def plan_run(config: PlanConfig, model: DetachedModel | None) -> Forecast:
    """Predicts what a run costs.

    Args:
        config: the options of the run, with prompts or lengths.
        model: the model; None if only its configuration is to be used.

    Returns:
        The forecast.

    Raises:
        UsageError: if prompts, lengths or options cannot be used.
        ModelError: if the model cannot be linearised.
    """
    requests = _requests(config, model)
    sizes = sorted({(len(names), length) for names, length in requests}, key=math.prod)
    source = _Shape(config, sizes) if model is None else _Weights(config, model, sizes)
    systems: list[SystemCost] = []
    for names, length in requests:
        for some in _solved_together(config, source, names, length):
            systems.append(_system(config, source, some, length))
    return Forecast(
        model=source.name,
        device=str(source.device),
        dtype=str(source.dtype).removeprefix("torch."),
        k=config.k,
        weight_bytes=source.weight_bytes,
        systems=tuple(systems),
        basis=source.basis,
    )


def _requests(config: PlanConfig, model: DetachedModel | None) -> list[tuple[list[str], int]]:
    """The linear systems, by the names and the length of their prompts."""
    prompts = _prompts(config, model)
    return [
        ([prompts[number][0] for number in batch], position + 1)
        for batch in batches(config, [length for _, length in prompts])
        for position in output_positions(config, prompts[batch[0]][1])
    ]


def _prompts(config: PlanConfig, model: DetachedModel | None) -> list[tuple[str, int]]:
    """Names and lengths of the prompts."""
    if config.length is not None:
        try:
            lengths = [int(part) for part in config.length.split(",")]
        except ValueError:
            lengths = []
        if not lengths or not all(0 < length < 2**31 for length in lengths):
            raise UsageError(f"--length {config.length!r}: give numbers of tokens, as in 128,2048")
        return [(f"{length} tokens", length) for length in lengths]
    if model is None:
        raise UsageError("without weights there is no tokenizer: give --length, such as 128,2048")
    if config.seq_file is not None:
        return [(p.id, len(model.encode(p.text))) for p in read_prompts(config.seq_file)]
    return [("0", len(model.encode(config.text or "")))]


def _planned(
    config: PlanConfig,
    source: _Weights | _Shape,
    prompts: int,
    length: int,
    method: str,
    scratch: str | None,
) -> Plan:
    """The plan for so many prompts of a length by one method."""
    here = source.at(prompts, length)
    return make_plan(
        prompts * len(select_tokens(config.tokens, length)),
        source.m,
        source.d,
        source.dtype,
        config.k,
        method,
        config.tol,
        memory=here.memory,
        vectors=here.block,
        scratch=scratch,
        precision=config.precision,
    )


def _solved_together(
    config: PlanConfig, source: _Weights | _Shape, names: list[str], length: int
) -> list[list[str]]:
    """The prompts of a batch: as it is, or one by one where that gains nothing or is refused."""
    if len(names) == 1:
        return [names]
    if not source.together:
        return [[name] for name in names]
    n = len(names) * len(select_tokens(config.tokens, length))
    plan = _planned(config, source, len(names), length, config.method, config.scratch)
    return [names] if gains(plan, n) else [[name] for name in names]


def _system(
    config: PlanConfig, source: _Weights | _Shape, names: list[str], length: int
) -> SystemCost:
    """The cost of one linear system by each method."""
    many = len(names)
    n, here = many * len(select_tokens(config.tokens, length)), source.at(many, length)
    planned = functools.partial(_planned, config, source, many, length)
    chosen = planned(config.method, config.scratch)
    plans = {name: planned(name, None) for name in METHODS[1:]} | {chosen.method: chosen}
    return SystemCost(
        names[0] if many == 1 else f"{many} prompts of {length} tokens",
        length,
        n,
        chosen.method,
        chosen.reason,
        chosen.refusal,
        price(plans, (n, source.m, source.d), source.device, here.rates),
        {method: plan.arrays[method] for method, plan in plans.items()},
        here.chain,
        source.memory,
        tuple(names),
    )


@dataclass(frozen=True)
class _AtLength:
    """What the linear systems of so many prompts of one length are like.

    Attributes:
        rates: seconds of a pass; None where they are not known.
        chain: bytes of the linearised layers and a block of vectors, by kind of array.
        memory: bytes that the chain leaves for what is done with the products.
        block: vectors pushed through at a time.
    """

    rates: Rates | None
    chain: dict[str, int]
    memory: int
    block: int


# -------------------------------------------------------------------------- from the weights


class _Weights:
    """The linear systems of a model with weights, of which the smallest and largest are timed.

    `together` says whether several prompts can go through the model at once.
    """

    def __init__(
        self, config: PlanConfig, model: DetachedModel, sizes: Sequence[tuple[int, int]]
    ) -> None:
        self.name, self.device, self.dtype = model.name, model.device, model.compute_dtype
        self.weight_bytes = sum(weight.nbytes for weight in model.hf_model.parameters())
        self.batch = config.batch
        self.timed: dict[int, Rates] = {}
        several = [length for many, length in sizes if many > 1]
        self.together = not several or _go_together(config, model, min(several))
        if not self.together:
            sizes = sorted({(1, length) for _, length in sizes})
        vocabulary = model.embedding.weight.shape[0]
        for many, length in dict.fromkeys((sizes[0], sizes[-1])):
            ids = torch.arange(length) % vocabulary
            options: dict[str, Any] = {"block": config.batch, "memory": config.memory}
            lins = model.linearize_together([ids] * many, **options)
            lin, tokens = lins[0], many * length
            self.timed[tokens] = time_block(token_operators(lins, range(tokens)))
        self.memory, (_, self.m, self.d) = lin.memory, lin.shape
        self.footprint = lin.footprint
        self.basis = f"one block of passes, timed at {_lengths(self.timed)}"

    def at(self, prompts: int, length: int) -> _AtLength:
        """The systems of prompts of a length; their rates lie between those that were timed."""
        (low, slow), (high, fast) = min(self.timed.items()), max(self.timed.items())
        share = (prompts * length - low) / (high - low) if high > low else 0.0
        share = min(max(share, 0.0), 1.0)
        row, step = (
            slow.row + share * (fast.row - slow.row),
            slow.step + share * (fast.step - slow.step),
        )
        block = self.batch or self.footprint.block(length, self.memory, prompts)
        keep = self.footprint.is_kept(length, self.memory, prompts)
        arrays = self.footprint.arrays(length, block, prompts, keep=keep)
        return _AtLength(Rates(row, step), arrays, spare(self.memory, arrays), block)


def _go_together(config: PlanConfig, model: DetachedModel, length: int) -> bool:
    """Whether two prompts of a length can go through the model at once."""
    ids = torch.arange(length) % model.embedding.weight.shape[0]
    try:
        lins = model.linearize_together([ids] * 2, block=config.batch, memory=config.memory)
        nothing = torch.zeros(1, *lins[0].decoder.outputs.shape, dtype=lins[0].inputs.dtype)
        lins[0].decoder.vjp(nothing.to(lins[0].inputs.device))  # linearises the layers
    except UnsupportedModelError:
        return False
    return True


def _lengths(timed: Iterable[int]) -> str:
    return " and ".join(f"T = {T}" for T in sorted(timed))


# ------------------------------------------------------------------- from a configuration


class _Shape:
    """The linear systems of a model of which only the configuration is known.

    A few of its layers are built with random weights and timed, on a CPU at a few tokens. That
    prompts can go through them `together` is taken for granted.
    """

    together = True

    def __init__(self, config: PlanConfig, sizes: Sequence[tuple[int, int]]) -> None:
        source = _configuration(config)
        self.name = getattr(source, "_name_or_path", "") or source.model_type
        self.device = usable_device(config.device or "cpu")
        self.dtype = getattr(torch, config.compute_dtype or "float32")
        usable_precision(config.precision, self.device, self.dtype)
        model, stored = _without_weights(source, config), _stored(config)
        parameters = sum(weight.numel() for weight in model.parameters())
        self.weight_bytes = parameters * stored.itemsize
        self.batch, self.memory = config.batch, config.memory or ceiling(self.device)
        decoder = find_decoder(model)
        layers = find_layers(decoder)
        weights = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
        made = sum(weights) * self.dtype.itemsize if stored != self.dtype else 0
        table = model.get_input_embeddings().weight
        self.footprint = Footprint.of(decoder, layers, table, self.dtype, made=made)
        self.m = self.d = self.footprint.hidden
        largest = max(weights, default=parameters) * self.dtype.itemsize
        self.timed: dict[int, _Timed] = {}
        unknown = ""
        for T in dict.fromkeys(self.timed_length(many * length) for many, length in sizes):
            try:
                # Filled with random weights, it would be the system that ends the process.
                if largest > (free := free_bytes(self.device)) // 2:
                    raise MemoryError(f"one takes about {size(largest)}, and {size(free)} are free")
                self.timed[T] = _timed_layers(source, T, self.device, self.dtype, config)
            except UsageError:
                raise
            except Exception as error:  # layers that cannot be shared, or run with so little else
                unknown = f"layers of this shape cannot be timed here ({first_line(error)})"
        few, depth = min(_TIMED_LAYERS, len(layers)), len(layers)
        found = f"{few} of {depth} layers with random weights, timed at {_lengths(self.timed)}"
        self.basis = f"no seconds: {unknown}" if unknown else f"{found}, extrapolated"
        self.basis += f"; {depth} layers, {parameters / 1e9:.3g} billion parameters"

    def timed_length(self, tokens: int) -> int:
        """The length at which the layers are timed for prompts of some tokens together."""
        return tokens if self.device.type == "cuda" else min(tokens, _TIMED_TOKENS)

    def at(self, prompts: int, length: int) -> _AtLength:
        """The systems of prompts of a length; their rates are extrapolated by flops."""
        block = self.batch or self.footprint.block(length, self.memory, prompts)
        keep = self.footprint.is_kept(length, self.memory, prompts)
        arrays = self.footprint.arrays(length, block, prompts, keep=keep)
        tokens = prompts * length
        T = self.timed_length(tokens)
        rates = None
        if (timed := self.timed.get(T)) is not None:
            depth = self.footprint.depth
            attending = depth - timed.narrowed
            attention = self.footprint.attention_flops(T, 1) * attending
            linear = timed.flops + (depth - timed.layers) * timed.flops_of_layer - attention
            wanted = prompts * self.footprint.attention_flops(length, block) * attending
            wanted += linear * tokens / T
            rates = timed.rates.times(wanted / timed.flops)
        return _AtLength(rates, arrays, spare(self.memory, arrays), block)


def _configuration(config: PlanConfig) -> PreTrainedConfig:
    """The configuration that is named, or the defaults of a model type."""
    options = {"revision": config.revision} if config.revision is not None else {}
    source = full_config(config.model or "", trust_remote_code=config.trust_remote_code, **options)
    if not isinstance(source, str):
        return source
    from transformers import AutoConfig

    found: PreTrainedConfig = AutoConfig.for_model(source)
    return found


def _without_weights(source: PreTrainedConfig, config: PlanConfig) -> PreTrainedModel:
    """The model of a configuration, on the meta device."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(source).from_config(source)
    except Exception as error:  # modelling code raises anything where a configuration is wrong
        raise ModelError(
            f"no model can be built from {config.model}: {first_line(error)}"
        ) from error
    return model


def _stored(config: PlanConfig) -> torch.dtype:
    """What the weights are stored in: as most checkpoints, if nothing else is asked for."""
    stored: torch.dtype = getattr(torch, "bfloat16" if config.dtype == "auto" else config.dtype)
    return stored


@dataclass(frozen=True)
class _Timed:
    """What a few layers take.

    Attributes:
        rates: seconds of a pass through them.
        layers: how many they are.
        flops: floating-point operations of a pass.
        flops_of_layer: of these, those of one layer more.
        narrowed: whether the last one is run for the output position alone.
    """

    rates: Rates
    layers: int
    flops: int
    flops_of_layer: int
    narrowed: bool


def _timed_layers(
    source: PreTrainedConfig,
    T: int,
    device: torch.device,
    dtype: torch.dtype,
    config: PlanConfig,
) -> _Timed:
    """Times a few layers of random weights at T tokens."""
    few = min(source.get_text_config(decoder=True).num_hidden_layers, _TIMED_LAYERS)
    block = config.batch or (None if device.type == "cuda" else max(1, _TIMED_ROWS // T))
    model = shared_layer_model(source, few, device, dtype)

    def linearized() -> Linearization:
        shape = DetachedModel(model.hf_model, gate=config.gate, precision=config.precision)
        return shape.linearize(torch.arange(T) % VOCABULARY, block=block, memory=config.memory)

    lin = linearized()
    rates, flops = time_block(TokenOperators(lin, range(T))), _flops(lin)
    shorter = 0
    if few > 1:
        lists = (m for m in model.decoder.modules() if isinstance(m, nn.ModuleList))
        (last,) = (layers for layers in lists if list(layers) == model.layers)
        del last[-1]
        shorter = _flops(linearized())
    return _Timed(rates, few, flops, flops - shorter, lin.narrowed)


def _flops(lin: Linearization) -> int:
    """Floating-point operations of one VJP."""
    from torch.utils.flop_counter import FlopCounterMode

    cotangent = torch.ones(1, lin.shape[1], dtype=lin.output.dtype, device=lin.output.device)
    lin.vjp(cotangent)  # linearises
    with FlopCounterMode(display=False) as counter:
        lin.vjp(cotangent)
    return int(counter.get_total_flops())
