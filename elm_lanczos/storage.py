r"""Storage: how weights are kept, as against how a layer is computed.

A layer is computed from *plain* weights: dense tensors on the device that computes. What a model
holds may be something else, and is made plain one layer at a time, for as long as the layer runs:

| kept as                          | made plain by                                  |
|----------------------------------|------------------------------------------------|
| bitsandbytes NF4, FP4, LLM.int8  | dequantizing, as bitsandbytes itself does      |
| torchao and other weight tensors | their own `dequantize()`                       |
| offloaded (accelerate, on meta)  | fetching from CPU memory or disk               |
| bfloat16, float16, …             | raising to a higher precision, where asked for |

A quantized layer so computes `x Wᵀ` with the dequantized `W`, also where the library's own kernel
would round `x` as well (LLM.int8 does): that rounding is neither linear nor part of the weights.
A linearised layer holds on to the plain weights of its linear path; the model gets its own parameter
objects back as soon as the layer has run, also after an exception.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import named_module_tensors
from torch import Tensor, nn

from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.freezing import Freezing, precision

_ROWS = 16_384
"""Rows of the unembedding raised to a higher precision at a time."""


class Slot(NamedTuple):
    """The place of a parameter or buffer: its module, the module's table it is in, its name there."""

    module: nn.Module
    table: dict[str, Tensor | None]
    name: str

    @property
    def tensor(self) -> Tensor:
        """What the model keeps there."""
        tensor = self.table[self.name]
        assert tensor is not None  # empty places are no slots
        return tensor

    @property
    def key(self) -> tuple[int, str]:
        """Identifies the place within its model."""
        return id(self.module), self.name


class Source(NamedTuple):
    """Where an offloaded tensor is fetched from: accelerate's hook, and the tensor's name in it."""

    hook: Any
    name: str


def slots(module: nn.Module, *, recurse: bool = True) -> list[Slot]:
    """Returns the places of a module's parameters and buffers."""
    return [
        Slot(owner, table, name)
        for owner in (module.modules() if recurse else [module])
        for table in (owner._parameters, owner._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]


def weight_shapes(module: nn.Module) -> list[torch.Size]:
    """Returns the shapes of a module's parameters as matrices, however they are packed."""
    shapes = []
    for slot in slots(module):
        if slot.name in slot.module._parameters:
            state = getattr(slot.tensor, "quant_state", None)
            shapes.append(slot.tensor.shape if state is None else torch.Size(state.shape))
    return shapes


class Storage:
    """The stored weights of one model.

    Args:
        model: the model.
        layers: its decoder layers; the weights of one are made plain together.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module]) -> None:
        self.model = model
        self.layers = layers

    def device(self, module: nn.Module) -> torch.device:
        """Returns the device a module with weights of its own computes on."""
        slot = slots(module, recurse=False)[0]
        source = self._sources().get(slot.key)
        return slot.tensor.device if source is None else torch.device(source.hook.execution_device)

    def weight(self, module: nn.Module, name: str = "weight") -> Tensor:
        """Returns one parameter as a plain tensor in the precision it is stored in.

        Args:
            module: the module that holds it.
            name: its name there.

        Returns:
            The tensor, on the device the module computes on.
        """
        return self._plain(Slot(module, module._parameters, name), self._sources())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every parameter's name and plain tensor, one at a time, tied ones once."""
        sources = self._sources()
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name, _ in self.model.named_parameters():
            if name not in tied:
                owner, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(owner)
                yield name, self._plain(Slot(module, module._parameters, leaf), sources)

    def held_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes of plain weights, computed in `dtype`, that all layers hold beside the model.

        Args:
            dtype: the precision the layers are computed in.

        Returns:
            The bytes: 0 where layers are computed from the very weights that the model keeps.
        """
        total = 0
        for layer in self.layers:
            stored = [slot.tensor for slot in slots(layer) if slot.name in slot.module._parameters]
            for tensor, shape in zip(stored, weight_shapes(layer), strict=True):
                if tensor.is_meta or _is_quantized(tensor) or tensor.dtype != dtype:
                    total += shape.numel() * dtype.itemsize
        return total

    @contextlib.contextmanager
    def plain(self, raised_to: torch.dtype | None = None) -> Iterator[None]:
        """Lets every layer, and every other module with weights, run on plain weights.

        Args:
            raised_to: raise floating weights and buffers of a lower precision to this one. The
                tables of the vocabulary are raised row by row.

        Yields:
            Nothing.
        """
        sources = self._sources()
        inside = {id(m) for layer in self.layers for m in layer.modules()}
        units = [(layer, slots(layer)) for layer in self.layers]
        units += [
            (m, slots(m, recurse=False)) for m in self.model.modules() if id(m) not in inside
        ]
        with contextlib.ExitStack() as changes:
            for hook in {id(source.hook): source.hook for source in sources.values()}.values():
                changes.enter_context(_attribute(hook, "offload", False))  # we fetch instead
            for unit, all_slots in units:
                kept = [s for s in all_slots if self._is_kept_otherwise(s, raised_to)]
                if kept:
                    forward = self._on_plain_weights(unit, kept, sources, raised_to)
                    changes.enter_context(_attribute(unit, "forward", forward))
            yield

    # ------------------------------------------------------------------ one layer at a time

    def _on_plain_weights(
        self,
        unit: nn.Module,
        kept: list[Slot],
        sources: dict[tuple[int, str], Source],
        raised_to: torch.dtype | None,
    ) -> Callable[..., Any]:
        """Returns a module's forward with the slots named made plain while it runs."""
        forward = unit.forward
        inside = any(unit is layer for layer in self.layers)
        by_rows = not inside and isinstance(unit, (nn.Embedding, nn.Linear))

        def run(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as changes:
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    for slot in kept:
                        value = self._plain(slot, sources)
                        if raised_to is not None and not by_rows:
                            value = _raised(value, raised_to)
                        if slot.table is slot.module._parameters:
                            value = nn.Parameter(value, requires_grad=False)
                        changes.enter_context(_item(slot.table, slot.name, value))
                        if _is_bitsandbytes(slot.tensor_before(changes)):
                            pass
                return forward(*args, **kwargs)

        return run
