"""Linear attention and state-space scans: which of their arguments is the value.

A recurrence `S_t = a_t S_{t-1} + b_t x_t`, `y_t = c_t S_t` is linear in the value path `x` once
decays, steps, keys and queries (`a`, `b`, `c`) are fixed; but nothing in the multiplications tells
`x` from `b`. The functions that compute them do, by the names of their arguments. While a model is
traced, the functions named here fix every argument but the value; in other threads, and outside a
trace, they do what they always do.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from elm_lanczos.freezing import Freezing, Kind, Mark, active_mode, flatten, mark_of, set_mark

VALUE_ARGUMENT = {
    "mamba_selective_scan": "hidden_states",  # Mamba: Gu & Dao 2023
    "mamba2_chunk_scan": "hidden_states",  # Mamba 2: Dao & Gu 2024
    "torch_chunk_gated_delta_rule": "value",  # gated DeltaNet: Yang, Kautz & Hatamizadeh 2024
    "torch_recurrent_gated_delta_rule": "value",
    "chunk_kimi_delta_attention": "value",  # Kimi Linear 2025
    "recurrent_kimi_delta_attention": "value",
    "rwkv_linear_attention": "value",  # RWKV: Peng et al. 2023
    "rwkv_linear_attention_cpu": "value",
}
"""For each function of transformers' modelling files that runs a recurrence, its value argument."""


@contextlib.contextmanager
def frozen_recurrences(model: nn.Module) -> Iterator[None]:
    """Lets a model's recurrences fix everything but their value; restores them afterwards.

    Args:
        model: the model whose modelling files are looked through.

    Yields:
        Nothing.
    """
    spaces = {type(m).__module__: vars(sys.modules[type(m).__module__]) for m in model.modules()}
    before = [
        (space, name, space[name])
        for space in spaces.values()
        for name in VALUE_ARGUMENT
        if name in space
    ]
    try:
        for space, name, function in before:
            space[name] = _with_fixed_arguments(function, VALUE_ARGUMENT[name])
        yield
    finally:
        for space, name, function in before:
            space[name] = function


def _with_fixed_arguments(function: Callable[..., Any], value: str) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mode = active_mode()
        if mode is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        for name, argument in bound.arguments.items():
            if name == value:
                bound.arguments[name] = _plain(argument)
            elif isinstance(argument, Tensor):
                bound.arguments[name] = _fixed(mode, argument)
        return function(*bound.args, **bound.kwargs)

    return run


def _plain(value: Tensor) -> Tensor:
    """The value path, no longer taken for the gate of a gated MLP if an activation made it."""
    mark = mark_of(value)
    if mark is not None and mark.kind == Kind.LINEAR:
        value = value.view_as(value)
        set_mark(value, Mark(Kind.LINEAR))
    return value


def _fixed(mode: Freezing, argument: Tensor) -> Tensor:
    marked = any(mark_of(leaf) is not None for leaf in flatten(argument))
    fixed: Tensor = mode.freeze(argument) if marked else argument
    return fixed
