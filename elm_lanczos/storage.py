r"""Storage: how weights are kept, as against how a layer is computed.

A layer is computed from *plain* weights: dense floating tensors on the device that computes. What a
model keeps may be something else, and is made plain one layer at a time, while the layer runs:

| kept as                          | made plain by                                   |
|----------------------------------|-------------------------------------------------|
| bitsandbytes NF4, FP4, LLM.int8  | dequantizing, as bitsandbytes itself does       |
| torchao and other weight tensors | their own `dequantize()`                        |
| offloaded (accelerate)           | fetching it from CPU memory or disk             |
| bfloat16, float16                | raising it to a higher precision, if asked for  |

So a quantized layer computes `x Wᵀ` with the dequantized `W`, also where the library's own kernel
would round `x` too (LLM.int8): that rounding is neither linear nor a property of the weights. A
linearised layer holds on to the plain weights of its linear path; the model gets its own parameter
objects back as soon as the layer has run, also after an exception.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elm_lanczos.errors import ModelError, UnsupportedModelError
from elm_lanczos.freezing import Freezing, precision

_ROWS = 16_384
"""Rows of the unembedding that are raised to a higher precision at a time."""


class Slot(NamedTuple):
    """Where a parameter or buffer hangs in a model."""

    module: nn.Module
    kind: str
    """Which of the module's tables it is in: `_parameters` or `_buffers`."""
    name: str

    @property
    def table(self) -> dict[str, Tensor]:
        """The table itself, which can be written to."""
        table: dict[str, Tensor] = vars(self.module)[self.kind]
        return table

    @property
    def tensor(self) -> Tensor:
        """What the model keeps there."""
        return self.table[self.name]

    @property
    def shape(self) -> torch.Size:
        """The shape as a plain tensor, however it is packed."""
        state = getattr(self.tensor, "quant_state", None)
        return self.tensor.shape if state is None else torch.Size(state.shape)


class Source(NamedTuple):
    """Where an offloaded tensor is fetched from: accelerate's hook, and the tensor's name there."""

    hook: Any
    name: str


Sources = Mapping[tuple[int, str], Source]


def slots(module: nn.Module, *, recurse: bool = True, buffers: bool = True) -> list[Slot]:
    """Returns where the parameters and buffers of a module hang.

    Args:
        module: the module.
        recurse: those of the modules below it, too.
        buffers: buffers as well as parameters.

    Returns:
        One slot for each.
    """
    return [
        Slot(owner, kind, name)
        for owner in (module.modules() if recurse else (module,))
        for kind in (("_parameters", "_buffers") if buffers else ("_parameters",))
        for name, tensor in vars(owner)[kind].items()
        if tensor is not None
    ]


def is_quantized(tensor: Tensor) -> bool:
    """Returns whether a parameter stands for a plain tensor that has to be computed from it."""
    return _is_bitsandbytes(tensor) or type(tensor).dequantize is not Tensor.dequantize


def dequantize(module: Any, tensor: Any) -> Tensor:
    """Returns a quantized parameter as a plain tensor, any other as it is.

    Args:
        module: the module it belongs to (LLM.int8 may keep the scales there).
        tensor: the parameter.

    Returns:
        The tensor that the quantization's own library makes of it: bitsandbytes 4-bit and torchao
        in the precision the model was loaded in, LLM.int8 in float32.
    """
    if not is_quantized(tensor):
        plain: Tensor = tensor.detach()
        return plain
    if not _is_bitsandbytes(tensor):
        plain = tensor.dequantize()
        return plain
    import bitsandbytes.functional as bnb

    state = getattr(tensor, "quant_state", None)
    if state is None:  # LLM.int8 moves the scales from the weight to the module when first run
        scales = tensor.SCB if tensor.SCB is not None else module.state.SCB
        return bnb.int8_vectorwise_dequant(tensor.data, scales)
    data = tensor.data
    if getattr(state, "packing_format_for_cpu", False):  # rearranged for AVX-512 when first run
        scales, state = state.absmax, copy.copy(state)
        state.original_nested = False  # the scales are plain by now, and in the transposed order
        data, state = bnb._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = scales.T.reshape(-1).float()
    return bnb.dequantize_4bit(data, state)


def checksum(tensor: Tensor) -> int:
    """Returns the crc32 of a plain tensor's bytes."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(data.data)


class Storage:
    """The weights that one model keeps.

    Args:
        model: the model.
        layers: its decoder layers; all weights of one are made plain together.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module]) -> None:
        self.model = model
        self.layers = layers

    def device(self, module: nn.Module) -> torch.device:
        """Returns the device that a module with weights of its own computes on."""
        slot = slots(module, recurse=False)[0]
        source = self._sources().get((id(module), slot.name))
        return torch.device(source.hook.execution_device) if source else slot.tensor.device

    def weight(self, module: nn.Module, name: str = "weight") -> Tensor:
        """Returns one parameter as a plain tensor, in the precision it is stored in.

        Args:
            module: the module it hangs in.
            name: its name there.

        Returns:
            The tensor, on the device that computes with it.
        """
        return _plain(Slot(module, "_parameters", name), self._sources())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and the plain tensor of every parameter, tied ones once."""
        sources = self._sources()
        names = [name for name, _ in self.model.named_parameters()]
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name in names:
            if tied.get(name) not in names:
                owner, _, leaf = name.rpartition(".")
                slot = Slot(self.model.get_submodule(owner), "_parameters", leaf)
                yield name, _plain(slot, sources)

    def bytes_made(self, dtype: torch.dtype) -> int:
        """Returns the bytes that all layers take when computed in `dtype`, beside what is stored.

        Args:
            dtype: the precision in which they are computed.

        Returns:
            The bytes of the weights that have to be made: 0 for plain ones of that precision.
        """
        return sum(
            slot.shape.numel() * dtype.itemsize
            for layer in self.layers
            for slot in slots(layer, buffers=False)
            if slot.tensor.is_meta or is_quantized(slot.tensor) or slot.tensor.dtype != dtype
        )

    @contextlib.contextmanager
    def plain(self, raised_to: torch.dtype | None = None) -> Iterator[None]:
        """Runs every layer, and every other module with weights, on plain weights.

        Args:
            raised_to: raise floating tensors of lower precision to this one; embeddings and the
                unembedding by the row.

        Yields:
            Nothing.
        """
        sources = self._sources()
        inside = {id(m) for layer in self.layers for m in layer.modules()}
        outside = [m for m in self.model.modules() if id(m) not in inside]
        units = [(layer, slots(layer)) for layer in self.layers]
        units += [(module, slots(module, recurse=False)) for module in outside]
        with contextlib.ExitStack() as changes:
            for hook in {id(source.hook): source.hook for source in sources.values()}.values():
                changes.enter_context(_set(vars(hook), "offload", False))  # fetched here instead
            for unit, held in units:
                kept = [slot for slot in held if not _is_plain(slot.tensor, raised_to)]
                for module in {slot.module for slot in kept if _is_bitsandbytes(slot.tensor)}:
                    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
                    forward = functools.partial(_torch_class(module).forward, module)
                    changes.enter_context(_set(vars(module), name, forward))
                if kept:
                    run = _on_plain_weights(unit, kept, sources, raised_to, id(unit) not in inside)
                    changes.enter_context(_set(vars(unit), "forward", run))
            yield

    def _sources(self) -> Sources:
        """Finds the tensors that accelerate's hooks keep away from the model's modules."""
        from accelerate.hooks import AlignDevicesHook
        from accelerate.utils import named_module_tensors

        sources = {}
        for module in self.model.modules():
            hook = getattr(module, "_hf_hook", None)
            for part in getattr(hook, "hooks", (hook,)):  # one, or several in sequence
                if not isinstance(part, AlignDevicesHook) or not part.offload:
                    continue
                given = named_module_tensors(
                    module, part.offload_buffers, part.place_submodules, remove_non_persistent=True
                )
                for name, _ in given:
                    owner, _, leaf = name.rpartition(".")
                    sources[id(module.get_submodule(owner)), leaf] = Source(part, name)
        return sources


def _on_plain_weights(
    unit: nn.Module,
    kept: list[Slot],
    sources: Sources,
    raised_to: torch.dtype | None,
    outside: bool,
) -> Callable[..., Any]:
    """Returns a module's forward in which the slots `kept` hold plain tensors."""
    forward = unit.forward
    by_rows = outside and raised_to is not None and isinstance(unit, (nn.Embedding, nn.Linear))
    dtype = None if by_rows else raised_to

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as changes:
            with torch._C.DisableTorchFunction(), torch.no_grad():  # none of this is frozen
                for slot in kept:
                    value = _plain(slot, sources)
                    if dtype is not None and precision(value.dtype):
                        value = value.to(dtype)
                    if slot.kind == "_parameters":
                        value = nn.Parameter(value, requires_grad=False)
                    changes.enter_context(_set(slot.table, slot.name, value))
            if raised_to is not None and by_rows and isinstance(unit, nn.Linear):
                return _linear_by_rows(args[0], unit, raised_to)
            if raised_to is not None and by_rows:
                changes.enter_context(Freezing(raised_to, {}))  # raises the rows looked up
            return forward(*args, **kwargs)

    return run


def _linear_by_rows(x: Tensor, linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    x = x.to(linear.weight.device, dtype)
    blocks = [x @ rows.to(dtype).T for rows in linear.weight.split(_ROWS)]
    result = torch.cat(blocks, dim=-1)
    return result if linear.bias is None else result + linear.bias.to(dtype)


def _plain(slot: Slot, sources: Sources) -> Tensor:
    tensor, source = slot.tensor, sources.get((id(slot.module), slot.name))
    if tensor.is_meta and (source is None or is_quantized(tensor)):
        what = f"{slot.name} of {type(slot.module).__name__}"
        if source is None:
            raise ModelError(f"{what} has no values: it is on the meta device")
        raise UnsupportedModelError(f"{what} is both quantized and offloaded")
    if source is not None:
        fetched: Tensor = source.hook.weights_map[source.name]
        return fetched.to(torch.device(source.hook.execution_device), tensor.dtype)
    return dequantize(slot.module, tensor)


def _is_plain(tensor: Tensor, raised_to: torch.dtype | None) -> bool:
    low = raised_to is not None and 0 < precision(tensor.dtype) < precision(raised_to)
    return not (low or tensor.is_meta or is_quantized(tensor))


def _is_bitsandbytes(tensor: Tensor) -> bool:
    return type(tensor).__name__ in ("Params4bit", "Int8Params")


def _torch_class(module: nn.Module) -> Any:
    """The class of torch.nn that a quantized module derives from: `nn.Linear`, mostly."""
    return next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))


_ABSENT = object()


@contextlib.contextmanager
def _set(table: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Sets an entry of a table for the time being."""
    before = table.get(name, _ABSENT)
    table[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            table.pop(name, None)
        else:
            table[name] = before
