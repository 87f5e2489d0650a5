"""What a run will cost, before anything runs: passes, seconds and bytes of each method.

With a model's weights, one block of passes is timed at the shortest and at the longest prompt. From
a configuration alone, three of its layers are built with random weights (see `shared_layer`), and
their time is extrapolated to the whole depth and length by the number of floating-point operations
of a pass.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from elm_lanczos.architectures import full_config
from elm_lanczos.config import PlanConfig, select_tokens
from elm_lanczos.errors import ModelError, UsageError, first_line
from elm_lanczos.linearization import Linearization
from elm_lanczos.memory import free_bytes, size
from elm_lanczos.model import DetachedModel, auto_class, usable_device, usable_precision
from elm_lanczos.operators import TokenOperators
from elm_lanczos.prompts import read_prompts
from elm_lanczos.shared_layer import VOCABULARY, shared_layer_model
from elm_lanczos.svd.cost import Cost, Rates, faster_dense, price, time_block
from elm_lanczos.svd.plan import METHODS, Plan, make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Of a model without weights: layers that are timed, and on a CPU positions and rows of a block.
_TIMED_LAYERS, _TIMED_TOKENS, _TIMED_ROWS = 3, 32, 128


@dataclass(frozen=True)
class SystemCost:
    """What one linear system is predicted to cost.

    Attributes:
        prompt: name of the prompt.
        length: tokens T.
        tokens: tokens whose triplets are computed.
        method: the method that a run would follow.
        reason: why, in one line.
        costs: the cost of each method.
        chain_bytes: what the linearised layers and a block of vectors take.
    """

    prompt: str
    length: int
    tokens: int
    method: str
    reason: str
    costs: dict[str, Cost]
    chain_bytes: int


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
        costs = [system.costs[method or system.method] for system in self.systems]
        seconds = [cost.seconds for cost in costs if cost.seconds is not None]
        chains = [system.chain_bytes for system in self.systems]
        return Cost(
            method or "as chosen",
            sum(cost.passes for cost in costs),
            sum(seconds) if len(seconds) == len(costs) else None,
            max(cost.bytes + chain for cost, chain in zip(costs, chains, strict=True)),
        )

    @property
    def hint(self) -> str | None:
        """One line saying that `dense` would be at least twice as fast, if it would."""
        chosen = {system.method for system in self.systems}
        return None if chosen == {"dense"} else faster_dense(self.total(), self.total("dense"))

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        return {**asdict(self), "total": asdict(self.total()), "hint": self.hint}


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
    if model is None:
        return _of_shape(config)
    requests = [
        (name, length + step)
        for name, length in _requests(config, model)
        for step in range(max(1, config.generate))
    ]
    vocabulary = model.embedding.weight.shape[0]
    measured = {}
    for length in sorted({min(r[1] for r in requests), max(r[1] for r in requests)}):
        ids = torch.arange(length) % vocabulary
        lin = model.linearize(ids, block=config.batch, memory=config.memory)
        rates = time_block(TokenOperators(lin, range(length)))
        measured[length] = rates, lin.held_bytes, lin
    (low, (slow, low_bytes, _)), (high, (fast, high_bytes, lin)) = (
        min(measured.items()),
        max(measured.items()),
    )

    systems = []
    for name, length in requests:
        share = (length - low) / (high - low) if high > low else 0.0
        rates = Rates(
            slow.row + share * (fast.row - slow.row), slow.step + share * (fast.step - slow.step)
        )
        held = round(low_bytes + share * (high_bytes - low_bytes))
        systems.append(_system(config, lin, name, length, rates, held))
    return Forecast(
        model=model.name,
        device=str(model.device),
        dtype=str(model.compute_dtype).removeprefix("torch."),
        k=config.k,
        weight_bytes=sum(w.nbytes for w in model.hf_model.parameters()),
        systems=tuple(systems),
        basis=f"one block of passes, timed at {' and '.join(f'T = {T}' for T in measured)}",
    )


def _requests(config: PlanConfig, model: DetachedModel | None) -> list[tuple[str, int]]:
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


def _plans_of(
    config: PlanConfig, n: int, m: int, d: int, dtype: torch.dtype, memory: int, block: int
) -> dict[str, Plan]:
    """The plan of each method, and under 'chosen' the one that a run would follow."""
    found = {}
    for method in (*METHODS[1:], config.method):
        scratch = config.scratch if method == "dense" else None
        plan = make_plan(
            n,
            m,
            d,
            dtype,
            config.k,
            method,
            config.tol,
            0,
            memory,
            vectors=block,
            scratch=scratch,
            precision=config.precision,
        )
        found["chosen" if method == config.method and method in found else method] = plan
    found["chosen"] = found.pop("auto", found.get("chosen", plan))
    return found


def _system(
    config: PlanConfig, lin: Linearization, name: str, length: int, rates: Rates, held: int
) -> SystemCost:
    n = len(select_tokens(config.tokens, length))
    _, m, d = lin.shape
    plans = _plans_of(config, n, m, d, lin.output.dtype, lin.memory, lin.block)
    chosen = plans.pop("chosen")
    costs = price(plans, (n, m, d), lin.inputs.device, rates)
    return SystemCost(name, length, n, chosen.method, chosen.reason, costs, held)


# ------------------------------------------------------------------- from a configuration


def _of_shape(config: PlanConfig) -> Forecast:
    """The forecast for a model of which only the configuration is known."""
    requests = _requests(config, None)
    options = {"revision": config.revision} if config.revision is not None else {}
    source = full_config(config.model or "", trust_remote_code=config.trust_remote_code, **options)
    if isinstance(source, str):
        from transformers import AutoConfig

        source = AutoConfig.for_model(source)
    device = usable_device(config.device or "cpu")
    dtype = getattr(torch, config.compute_dtype or "float32")
    usable_precision(config.precision, device, dtype)
    try:
        with torch.device("meta"):
            shape = auto_class(source).from_config(source)
        parameters = sum(weight.numel() for weight in shape.parameters())
    except Exception as error:  # modelling code raises anything where a configuration is wrong
        raise ModelError(
            f"no model can be built from {config.model}: {first_line(error)}"
        ) from error
    text = source.get_text_config(decoder=True)
    depth, width = text.num_hidden_layers, text.hidden_size
    memory = config.memory or free_bytes(device) // 2
    stored = torch.bfloat16 if config.dtype in (None, "auto") else getattr(torch, config.dtype)
    systems, basis = [], ""
    for name, length in requests:
        n = len(select_tokens(config.tokens, length))
        try:
            # Filled with random weights, it would be the system that ends the process.
            if (layer := parameters // depth * dtype.itemsize) > (free := free_bytes(device)) // 2:
                raise MemoryError(f"one takes about {size(layer)}, and {size(free)} are free")
            timed = _timed_layers(source, length, device, dtype, config)
        except UsageError:
            raise
        except Exception as error:  # layers that cannot be shared, or run with so little else
            timed = None
            basis = f"no seconds: layers of this shape cannot be timed here ({first_line(error)})"
        block = timed.block if timed else 64
        plans = _plans_of(config, n, width, width, dtype, memory, block)
        chosen = plans.pop("chosen")
        if timed is None:
            costs = {k: Cost(k, p.passes[k], None, p.bytes[k]) for k, p in plans.items()}
        else:
            costs = price(plans, (n, width, width), device, timed.rates)
            basis = timed.basis
        held = timed.bytes if timed else 0
        systems.append(SystemCost(name, length, n, chosen.method, chosen.reason, costs, held))
    return Forecast(
        model=getattr(source, "_name_or_path", "") or source.model_type,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        k=config.k,
        weight_bytes=parameters * stored.itemsize,
        systems=tuple(systems),
        basis=f"{basis}; {depth} layers, {parameters / 1e9:.3g} billion parameters",
    )


@dataclass(frozen=True)
class _Timed:
    rates: Rates
    bytes: int
    block: int
    basis: str


def _timed_layers(
    source: PreTrainedConfig,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    config: PlanConfig,
) -> _Timed:
    """Times a few layers of random weights and extrapolates to the whole depth and length."""
    text = source.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    few = min(depth, _TIMED_LAYERS)
    T = length if device.type == "cuda" else min(length, _TIMED_TOKENS)
    block = config.batch or (None if device.type == "cuda" else max(1, _TIMED_ROWS // T))
    model = shared_layer_model(source, few, device, dtype)
    ids = torch.arange(T) % VOCABULARY
    decoder: Any = model.decoder
    layers, flops = decoder.layers, {}
    for depth_run in range(max(1, few - 1), few + 1):
        decoder.layers = layers[:depth_run]
        shorter = DetachedModel(model.hf_model, gate=config.gate, precision=config.precision)
        lin = shorter.linearize(ids, block=block, memory=config.memory)
        flops[depth_run] = _flops(lin)
    rates = time_block(TokenOperators(lin, range(T)))
    per_layer = flops[few] - flops.get(few - 1, 0)
    whole = flops[few] + (depth - few) * per_layer
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * T**2 * text.num_attention_heads * head_dim * (depth - lin.narrowed)
    growth = length / T
    wanted = (whole - attention) * growth + attention * growth**2
    return _Timed(
        rates=rates.times(wanted / flops[few]),
        bytes=round(lin.held_bytes * depth / few * growth),
        block=Linearization.default_block(length, lin.width, dtype.itemsize, lin.memory)
        if config.batch is None
        else config.batch,
        basis=f"{few} of {depth} layers with random weights, timed at T = {T}, extrapolated",
    )


def _flops(lin: Linearization) -> int:
    """Floating-point operations of one VJP."""
    from torch.utils.flop_counter import FlopCounterMode

    cotangent = torch.ones(1, lin.shape[1], dtype=lin.output.dtype, device=lin.output.device)
    lin.vjp(cotangent)  # linearises
    with FlopCounterMode(display=False) as counter:
        lin.vjp(cotangent)
    return int(counter.get_total_flops())
