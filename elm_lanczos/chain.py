"""The decoder as a chain of segments, each a function of the residual stream alone.

    embeddings → [prelude] → layer 1 → … → layer L → final norm at position p

One frozen forward pass records what every layer was called with. Where layers share more than the
residual stream (keys and values of earlier layers, cross connections), or something between them
changes it, the decoder is not a chain; then it is one segment, the whole of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elm_lanczos.attention import at_position
from elm_lanczos.errors import (
    ElmLanczosError,
    ModelError,
    UnsupportedModelError,
    UsageError,
    first_line,
)
from elm_lanczos.freezing import Freezing, Kind, flatten, linear, mark_of, rebuild
from elm_lanczos.masks import Mask
from elm_lanczos.model import DetachedModel


@dataclass(frozen=True)
class Segment:
    """One link of the chain: a piece of the frozen decoder and the input it was recorded at.

    Attributes:
        name: the module's name in the decoder.
        function: maps the residual stream (B, T, d) before the segment to that after it.
        input: (B, T, d), its value for these prompts.
        modules: the modules it runs.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    input: Tensor
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Trace:
    """What one frozen forward pass showed.

    Attributes:
        segments: the chain, from the input embeddings to the output at one position.
        output: (B, T, m), the hidden states at the end of the chain.
        at_position: the last layer and the final norm once more, of which the layer is run for the
            output position alone behind its attention; empty where that is no gain. It is the same
            map only for layers that mix tokens nowhere else, which is to be tested.
        not_a_chain: why the decoder had to be taken as a whole; empty if it is a chain.
    """

    segments: tuple[Segment, ...]
    output: Tensor
    at_position: tuple[Segment, ...] = ()
    not_a_chain: str = ""


@dataclass(frozen=True)
class _Call:
    """One call of a module in the traced forward pass.

    Attributes:
        module: the module.
        args: what it was given.
        kwargs: what it was given by name.
        output: what it returned.
        entered: how often each tensor it was given had been changed in place by then, by id.
        left: how often each tensor it returned had been.
    """

    module: nn.Module
    args: Any
    kwargs: Any
    output: Any
    entered: dict[int, int]
    left: dict[int, int]


class _NotAChain(Exception):
    """The decoder is not a chain of layers; the message says why."""


class _FirstLayer(Exception):
    """Stops a forward pass where the first layer is called; holds what it is given."""


def trace(
    model: DetachedModel,
    inputs: Tensor,
    position: int,
    mode: Freezing,
    ids: Tensor | None = None,
) -> Trace:
    """Runs the frozen decoder once and takes it apart.

    Args:
        model: the model.
        inputs: (B, T, d) input embeddings of prompts of one length.
        position: the output position p.
        mode: the freezing to run it under.
        ids: (B, T), the tokens the embeddings stand for, for models that use them otherwise too.

    Returns:
        The segments and the final hidden states.

    Raises:
        UnsupportedModelError: if the output is not affine in the input once frozen; the message
            names the module.
        ModelError: if the model itself does not run on this input.
    """
    decoder = model.decoder
    names = {module: name for name, module in decoder.named_modules()}
    inside = {child for layer in model.layers for child in layer.modules()}
    layers, others, pending = [], [], []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        # what a layer is given, before it can add to shared dictionaries
        given = rebuild(lambda v: v, args), rebuild(lambda v: v, kwargs)
        pending.append((given, _versions(given), mode.module))
        mode.module = f"{names[module] or 'decoder'} ({type(module).__name__})"

    def leave(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        (args, kwargs), entered, mode.module = pending.pop()
        call = _Call(module, args, kwargs, output, entered, _versions(output))
        if any(module is layer for layer in model.layers):
            layers.append(call)
        elif module not in inside:
            others.append(call)

    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with torch.no_grad(), model.frozen(), mode:
            x = linear(inputs)
            output = model.hidden_states(x, ids)
    except Exception as error:  # a model's code raises anything at all
        if isinstance(error, ElmLanczosError) or is_out_of_memory(error):
            raise
        try:
            for prompt in inputs if ids is None else ids:
                model.predict(prompt)
        except Exception as own:  # the model itself fails: that is the error to show
            reason = f"{type(own).__name__}: {first_line(own) or 'no message'}"
            raise ModelError(f"{model.name} itself does not run on this input ({reason})") from own
        raise UnsupportedModelError(f"{mode.module}: {not_frozen(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    _require_linear(output, "the decoder's output")
    start = Segment("prelude", _prelude(model, ids), inputs, (decoder,))
    try:
        segments = _chain(model, start, x, layers, others, output, position, names)
    except _NotAChain as reason:
        whole = _whole(model, inputs, position, ids)
        return Trace((whole,), output, not_a_chain=str(reason))
    return Trace(segments, output, _at_position(segments, layers[-1], position))


def behind_layer(model: DetachedModel, found: Trace, layer: int, position: int) -> Trace:
    """Cuts a chain behind a layer, without the final norm.

    Args:
        model: the model.
        found: its whole chain.
        layer: the last layer to be run, counted from 1.
        position: the output position p.

    Returns:
        The beginning of the chain; its outputs are the residual stream behind the layer.

    Raises:
        UsageError: if there is no such layer.
        UnsupportedModelError: if the decoder is not a chain of layers that are run once each.
    """
    count, name = len(model.layers), type(model.decoder).__name__
    if found.not_a_chain:
        raise UnsupportedModelError(f"{name} is no chain of layers: {found.not_a_chain}")
    if not 1 <= layer <= count:
        raise UsageError(f"there is no layer {layer}: layers are 1 … {count}")
    run = [segment.modules for segment in found.segments[-count - 1 : -1]]
    stream = found.segments[layer - count - 1].input
    if run != [(module,) for module in model.layers] or stream.shape[:2] != found.output.shape[:2]:
        raise UnsupportedModelError(f"{name}: its layers are not run once each, in their order")
    end = Segment("output", lambda h: h[:, position : position + 1], stream, (nn.Identity(),))
    return Trace((*found.segments[: layer - count - 1], end), stream)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up: MemoryError, or one of torch's."""
    said = re.search(r"out of memory|can't allocate memory", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said is not None)


def not_frozen(error: Exception) -> str:
    """Returns in one line that a model's code cannot be run frozen, and what it says."""
    return f"cannot be run frozen ({type(error).__name__}: {first_line(error) or 'no message'})"


def _chain(
    model: DetachedModel,
    start: Segment,
    x: Tensor,
    layers: list[_Call],
    others: list[_Call],
    output: Tensor,
    position: int,
    names: dict[nn.Module, str],
) -> tuple[Segment, ...]:
    if not layers:
        raise _NotAChain("it has no list of layers")
    segments: list[Segment] = []
    stream = x
    for call in layers:
        name = f"{names[call.module]} ({type(call.module).__name__})"
        streams = _streams(call)
        if len(streams) != 1:
            raise _NotAChain(f"{name} takes more than the residual stream from earlier layers")
        (before,) = streams
        if not segments and (before is not x or not torch.equal(x, start.input)):
            segments.append(start)
        elif before is not stream and not _same_values(before, stream):
            raise _NotAChain(f"{name} is not given what the layer before it returns")
        stream = _first_tensor(call.output)
        _require_linear(stream, name)
        versions = {id(before): call.entered[id(before)], id(stream): call.left[id(stream)]}
        if versions != _versions((before, stream)):
            raise _NotAChain(f"the residual stream is changed in place in or after {name}")
        function = _of_stream(call, before)
        segments.append(Segment(names[call.module], function, before.detach(), (call.module,)))
    return (*segments, _final(stream, others, output, position, names))


def _final(
    stream: Tensor,
    others: list[_Call],
    output: Tensor,
    p: int,
    names: dict[nn.Module, str],
) -> Segment:
    """The final norm at one position, or nothing if the last layer's output is the decoder's."""
    norms = [
        call.module
        for call in others
        if any(arg is stream for arg in call.args[:1])
        and isinstance(call.output, Tensor)
        and _same_values(call.output, output)
    ]
    if not norms and not _same_values(stream, output):
        raise _NotAChain("its output is not the final norm of the last layer's output")
    if stream.shape[:2] != output.shape[:2]:
        raise _NotAChain("its residual stream has another layout than its output")
    norm = norms[-1] if norms else nn.Identity()
    return Segment(
        names.get(norm, "output"), lambda h: norm(h[:, p : p + 1]), stream.detach(), (norm,)
    )


def _at_position(segments: tuple[Segment, ...], call: _Call, p: int) -> tuple[Segment, ...]:
    """The last layer and the final norm for one position."""
    layer, norm = segments[-2:]
    B, T = layer.input.shape[:2]
    if T == 1:
        return ()
    (stream,) = _streams(call)

    def row(value: Any) -> Any:
        """Of a tensor that has an axis of positions (its first one of length T) the one at p."""
        if isinstance(value, Mask):
            return value.row(p)
        if not isinstance(value, Tensor):
            return value
        prompts = 1 if B > 1 and value.ndim > 1 and value.shape[0] == B else 0
        axes = [axis for axis in range(prompts, value.ndim) if value.shape[axis] == T]
        return value.narrow(axes[0], p, 1) if axes else value

    def run(h: Tensor) -> Tensor:
        def there() -> Tensor:
            def put(value: Any) -> Any:
                return row(h if value is stream else value)

            output = call.module(*rebuild(put, call.args), **rebuild(put, call.kwargs))
            return _first_tensor(output)

        return at_position(lambda: layer.function(h), there, p, T)

    (module,) = norm.modules
    narrow = Segment(norm.name, module, norm.input[:, p : p + 1], norm.modules)
    return Segment(layer.name, run, layer.input, layer.modules), narrow


def _prelude(model: DetachedModel, ids: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What the decoder does to the embeddings before its first layer."""

    def run(z: Tensor) -> Tensor:
        def stop(_module: nn.Module, args: Any, kwargs: Any) -> None:
            raise _FirstLayer(next(v for v in flatten((args, kwargs)) if is_linear(v)))

        hook = model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model.hidden_states(z, ids)
        except _FirstLayer as reached:
            stream: Tensor = reached.args[0]
            return stream
        finally:
            hook.remove()
        raise AssertionError("the first layer was not reached")

    return run


def _whole(model: DetachedModel, inputs: Tensor, p: int, ids: Tensor | None) -> Segment:
    def run(z: Tensor) -> Tensor:
        return model.hidden_states(z, ids)[:, p : p + 1]

    return Segment("decoder", run, inputs, (model.decoder,))


def _streams(call: _Call) -> list[Tensor]:
    """The tensors a module was given that are linear in the input, each once."""
    leaves = flatten((call.args, call.kwargs))
    return list({id(leaf): leaf for leaf in leaves if is_linear(leaf)}.values())


def _of_stream(call: _Call, stream: Tensor) -> Callable[[Tensor], Tensor]:
    """A layer as a function of the residual stream, all other arguments as recorded."""

    def run(h: Tensor) -> Tensor:
        def put(value: Any) -> Any:
            return h if value is stream else value

        return _first_tensor(call.module(*rebuild(put, call.args), **rebuild(put, call.kwargs)))

    return run


def _require_linear(value: Tensor, where: str) -> None:
    if not is_linear(value):
        mark = mark_of(value)
        because = f": {mark.origin} makes it nonlinear" if mark and mark.origin else ""
        raise UnsupportedModelError(f"{where} is not affine in its input{because}")


def is_linear(value: Any) -> bool:
    """Whether a tensor is affine in the input of the system."""
    mark = mark_of(value)
    return mark is not None and mark.kind == Kind.LINEAR


def _same_values(left: Tensor, right: Tensor) -> bool:
    return left.numel() == right.numel() and torch.equal(left.reshape(right.shape), right)


def _versions(values: Any) -> dict[int, int]:
    """How often each tensor among these has been changed in place."""
    return {id(leaf): leaf._version for leaf in flatten(values) if isinstance(leaf, Tensor)}


def _first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
