r"""Freezing: what each operation makes of its input is held fixed, and the network becomes affine.

A decoder computes `y = A(x) x + b`, where every `A(x)` is made of norm scales, attention
probabilities and gates. This module runs *unmodified* model code and types every tensor in it:

| kind        | meaning                                                       | example           |
|-------------|---------------------------------------------------------------|-------------------|
| (none)      | does not depend on the input                                  | a weight, a mask  |
| `LINEAR`    | affine in the input once the coefficients are fixed           | residual stream   |
| `NONLINEAR` | another function of the input: may only become a coefficient  | `rsqrt(mean(x²))` |
| `FROZEN`    | a coefficient that has been fixed                             | attention weights |

A rule per torch function says what comes out (`rules.RULES`). A `NONLINEAR` tensor is fixed at the
moment it multiplies a `LINEAR` one; a product of two `LINEAR` tensors is resolved by the activation
mark (`act(g) · u` freezes `act(g)`), or else is `NONLINEAR`. So an exact answer is one whose last
tensor is `LINEAR`, a `NONLINEAR` one is refused with the name of the operation that made it, and a
function without a rule is refused as soon as a `LINEAR` tensor reaches it.

Coefficients can be *recorded* and *replayed*: replaying them on another input `z` evaluates the
affine map `F(z)` itself, which is how the constant `c = F(0)` and the leak are obtained.

The freezing of norms, attention and gates follows Golden, "Equivalent Linear Mappings of Large
Language Models" (TMLR 2025), which replaced modelling files; here a
`torch.overrides.TorchFunctionMode` does it, and nothing global is changed.
"""

from __future__ import annotations

import enum
import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elm_lanczos.errors import UnsupportedModelError


class Kind(enum.IntEnum):
    """How a tensor depends on the input. Constants carry no kind at all."""

    FROZEN = 1
    LINEAR = 2
    NONLINEAR = 3


class Scaled(NamedTuple):
    """The factors of one `LINEAR` tensor `x · a`, elementwise, and what all three were like then.

    A mark may be passed on to what is made of a tensor, which is not that product any more; and
    in-place changes, which count up a tensor's version, make it another one.
    """

    x: Tensor
    coefficient: Tensor
    product: int
    versions: tuple[int, int, int]

    @classmethod
    def of(cls, x: Tensor, coefficient: Tensor, product: Tensor) -> Scaled:
        """Returns the factors of a product as they are now."""
        versions = (x._version, coefficient._version, product._version)
        return cls(x, coefficient, id(product), versions)

    def holds_for(self, tensor: Tensor) -> bool:
        """Whether a tensor is that very product, and it and its factors are what they were."""
        now = (self.x._version, self.coefficient._version, tensor._version)
        return self.product == id(tensor) and self.versions == now


class Mark(NamedTuple):
    """What is known of one tensor: its kind, and where that came from."""

    kind: Kind
    activated: bool = False
    """The output of an activation function: the factor that `act(g) · u` freezes."""
    origin: str = ""
    """For a `NONLINEAR` tensor: the operation (and module) that made it so."""
    root: Tensor | None = None
    """The one `LINEAR` tensor of the same shape that this one is an elementwise function of."""
    source: Tensor | None = None
    """For a `LINEAR` tensor: what it is a projection of, as gate and up of one MLP are."""
    mixed: bool = False
    """For a `LINEAR` tensor: coefficients have mixed tokens in it, as in the output of attention,
    and nothing has been added since."""
    bilinear: bool = False
    """For a `NONLINEAR` tensor: a product of two `LINEAR` ones and nothing else, as `kᵀ v`. To fix
    it where it meets a third would choose, for no reason, which of the three to go through."""
    scaled: Scaled | None = None
    """For a `LINEAR` tensor that is a multiple of another one: its factors."""


def mark_of(value: object) -> Mark | None:
    """Returns the mark of a tensor, or None for constants and anything that is not a tensor."""
    return getattr(value, "_elm_mark", None)


def kind_of(value: object) -> Kind | None:
    """Returns how a tensor depends on the input, None for constants."""
    mark = mark_of(value)
    return None if mark is None else mark.kind


def set_mark(value: object, mark: Mark | None) -> None:
    """Marks a tensor, or every tensor of a tuple or list of them."""
    if isinstance(value, Tensor):
        if mark is not None and mark.root is value:  # a cycle would keep its graph alive
            mark = mark._replace(root=None)
        if mark is not None and mark.source is value:
            mark = mark._replace(source=None)
        value._elm_mark = mark  # type: ignore[attr-defined]
    elif isinstance(value, (tuple, list)):
        for item in value:
            set_mark(item, mark)


def linear(x: Tensor) -> Tensor:
    """Returns a copy of `x` marked as the input of the linear system."""
    x = x.clone()
    set_mark(x, Mark(Kind.LINEAR))
    return x


def flatten(values: Any) -> list[Any]:
    """Returns the leaves of nested tuples, lists and dicts of arguments."""
    leaves: list[Any] = []
    _gather((values,), leaves)
    return leaves


def _gather(values: Iterable[Any], leaves: list[Any]) -> None:
    for value in values:
        if not isinstance(value, (tuple, list, dict)):
            leaves.append(value)
        else:
            _gather(value.values() if isinstance(value, dict) else value, leaves)


def rebuild(change: Callable[[Any], Any], values: Any) -> Any:
    """Returns nested arguments with `change` applied to every leaf."""
    if isinstance(values, tuple):
        changed = [rebuild(change, v) for v in values]
        named = hasattr(values, "_fields")
        return type(values)(*changed) if named else type(values)(changed)
    if isinstance(values, list):
        return [rebuild(change, v) for v in values]
    if isinstance(values, dict):
        return {k: rebuild(change, v) for k, v in values.items()}
    return change(values)


def precision(dtype: torch.dtype) -> int:
    """Returns the number of bytes of a floating dtype, 0 for the others."""
    return dtype.itemsize if dtype.is_floating_point else 0


def is_lower(value: Any, floor: torch.dtype) -> bool:
    """Whether a value is a floating tensor or dtype of a lower precision than another dtype."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    return isinstance(dtype, torch.dtype) and 0 < precision(dtype) < precision(floor)


def function_name(func: Callable[..., Any]) -> str:
    """Returns a torch function's plain name: `add` for `torch.add`, `Tensor.add_`, `__iadd__`."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # a property such as Tensor.shape or Tensor.mT
        return str(getattr(func, "__self__").__name__)  # noqa: B009 (absent from the stubs)
    return _plain_name(name)


@functools.cache
def _plain_name(name: str) -> str:
    if name.startswith("__"):
        name = name.strip("_")
        return _OPERATORS.get(name, name)
    return name.removeprefix("_").removesuffix("_")


_OPERATORS = {"iadd": "add", "radd": "add", "isub": "sub", "imul": "mul", "rmul": "mul"}
_OPERATORS |= {"itruediv": "truediv", "rpow": "pow", "ipow": "pow"}


_NAMED_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


def is_in_place(func: Callable[..., Any]) -> bool:
    """Whether a torch function changes its first argument."""
    name = func.__name__
    return name in _IN_PLACE or (name.endswith("_") and not name.startswith("__"))


_VIEWS = frozenset(
    "getitem select narrow view view_as transpose swapaxes permute squeeze unsqueeze flatten "
    "unflatten reshape chunk split unbind expand movedim T mT t diagonal detach".split()
)
"""Functions whose result may share memory with their first argument."""

UNTYPED = frozenset(
    "shape dtype device ndim layout is_cuda is_cpu is_meta is_sparse is_quantized requires_grad "
    "size dim numel stride storage_offset data_ptr is_contiguous is_floating_point is_complex "
    "element_size get_device len hash repr format is_leaf grad_fn grad is_nested names itemsize "
    "nbytes is_inference retain_grad _version output_nr device_mesh is_mps is_xpu".split()
)
"""Questions about a tensor that do not depend on its values."""


class Tape:
    """Coefficients of one evaluation in the order in which they were fixed."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._next = 0

    def rewind(self) -> Tape:
        """Starts the next replay at the first coefficient."""
        self._next = 0
        return self

    def read(self, like: Any) -> Any:
        """Returns the next recorded coefficient.

        Args:
            like: the value it stands for, which must have its shape.

        Returns:
            The coefficient.

        Raises:
            UnsupportedModelError: if the replay took another course than the recording.
        """
        value = self.values[self._next] if self._next < len(self.values) else None
        self._next += 1
        if type(value) is not type(like) or getattr(value, "shape", 0) != getattr(like, "shape", 0):
            raise UnsupportedModelError(
                "the model takes another course for another input (a decision no rule records), so "
                "it cannot be linearised exactly"
            )
        return value

    @property
    def finished(self) -> bool:
        """Whether a replay has used every coefficient."""
        return self._next == len(self.values)


class Freezing(TorchFunctionMode):
    """Runs model code with every coefficient held fixed, so that it is affine in its input.

    Nothing that depends on the input is ever computed below `compute_dtype`: weights stored in a
    lower precision are raised where they are used, one operation at a time, and casts that would
    lower a tensor (`.to(float32)` inside a norm of a float64 model) leave it as it is; the same
    holds for what is made of weights alone (`1 + weight.float()`). Other constants (rotary tables,
    masks) are computed as the model writes them, but never below float32.

    Args:
        compute_dtype: working precision of the linear path.
        record: a tape to which every coefficient is appended.
        replay: a tape whose coefficients are used instead of the ones this input would give.
        without_constants: drop additive constants (biases, learned positions, `+ 1`), so that
            `F(0)` shows only what reaches the output in no accounted way: the leak.
        rules: for each torch function by name, the rule that freezes it.
        gate: which factor of a gated MLP `act(g) · u` is held fixed: "frozen" fixes `act(g)`, "up"
            fixes `u` and goes through `g` with `act(g)/g` fixed.
        module: name of the module being run, for messages.
        default: the rule of functions that the table does not name; they are refused without one.
    """

    def __init__(
        self,
        compute_dtype: torch.dtype,
        rules: Mapping[str, Rule],
        *,
        gate: str = "frozen",
        record: Tape | None = None,
        replay: Tape | None = None,
        without_constants: bool = False,
        module: str = "the model",
        default: Rule | None = None,
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.record = record
        self.replay = replay.rewind() if replay is not None else None
        self.without_constants = without_constants
        self.rules = rules
        self.default = default
        self.gate = gate
        self.module = module
        self.value_part: tuple[int, int] | None = None
        """Set while a method of `conventions.VALUE_PART` runs: (parts of a split, the value's)."""

    def __enter__(self) -> Freezing:
        """Activates the rules for the torch functions that this thread calls."""
        _active_modes().append(self)
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        """Deactivates the rules."""
        super().__exit__(*exc)
        _active_modes().pop()

    def freeze(self, value: Any) -> Any:
        """Fixes a coefficient: a tensor, or a decision such as a Python number or a list."""
        if self.replay is not None:
            fixed = self.replay.read(value)
        else:
            fixed = value.detach() if isinstance(value, Tensor) else value
            if self.record is not None:
                self.record.values.append(fixed)
        if isinstance(fixed, Tensor):
            fixed = fixed.view_as(fixed)
            set_mark(fixed, Mark(Kind.FROZEN))
        return fixed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Applies the rule of `func`, or calls it plainly when no argument depends on the input."""
        kwargs = kwargs or {}
        name = function_name(func)
        if name in UNTYPED:
            return func(*args, **kwargs)
        if name == "set_grad_enabled":  # a model's own no_grad() must not cut the linear path
            return None
        args, kwargs = _positional(args, kwargs)
        result = self._apply(name, func, args, kwargs)
        if name in _VIEWS:
            _remember_base(result, args[0])
        elif is_in_place(func):
            _mark_bases(args[0])
        return result

    def _apply(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        marks = marks_of(args, kwargs)
        if not marks:
            of_weights = any(isinstance(leaf, nn.Parameter) for leaf in flatten((args, kwargs)))
            floor = self.compute_dtype if of_weights else torch.float32
            return self.call(func, args, kwargs, floor)
        rule = self.rules.get(name, self.default)
        if rule is not None:
            return rule(self, func, args, kwargs)
        if any(m.kind == Kind.LINEAR for m in marks):
            raise UnsupportedModelError(
                f"{self.module}: no freezing rule for {name}(), so this model cannot be linearised "
                "exactly (rules are rows of elm_lanczos.rules.RULES)"
            )
        result = self.call(func, args, kwargs)
        if not all(isinstance(leaf, Tensor) for leaf in flatten(result)):
            return self.freeze(result)  # a decision
        set_mark(result, max(marks, key=lambda m: m.kind)._replace(root=None))
        return result

    def call(self, func: Any, args: Any, kwargs: Any, floor: torch.dtype | None = None) -> Any:
        """Calls `func` with floating arguments and dtypes below `floor` raised to `compute_dtype`.

        Args:
            func: a torch function.
            args: its positional arguments; the target of an in-place operation is left as it is.
            kwargs: its keyword arguments.
            floor: the lowest dtype left alone; the working precision itself if not given.

        Returns:
            What `func` returns.
        """
        floor = floor or self.compute_dtype

        def change(value: Any) -> Any:
            return self.raise_precision(value, floor)

        def changed(values: Any) -> Any:
            some = values and any(is_lower(value, floor) for value in flatten(values))
            return rebuild(change, values) if some else values

        if function_name(func) == "embedding":  # raise the rows looked up, not the whole table
            return change(func(*args, **kwargs))
        if func.__name__ in _NAMED_CASTS:
            func, args = torch.Tensor.to, (args[0], _NAMED_CASTS[func.__name__])
        if is_in_place(func):
            return func(args[0], *changed(args[1:]), **changed(kwargs))
        return func(*changed(args), **changed(kwargs))

    def raise_precision(self, value: Any, floor: torch.dtype | None = None) -> Any:
        """Returns a floating tensor or dtype below `floor` raised, anything else unchanged."""
        if not is_lower(value, floor or self.compute_dtype):
            return value
        if isinstance(value, torch.dtype):
            return self.compute_dtype
        raised = value.to(self.compute_dtype)
        set_mark(raised, mark_of(value))
        return raised

    def nonlinear(self, func: Any, marks: list[Mark]) -> Mark:
        """Returns the mark of a nonlinear result, keeping the origin of an earlier one."""
        earlier = next((m for m in marks if m.kind == Kind.NONLINEAR), None)
        made_here = Mark(Kind.NONLINEAR, origin=f"{function_name(func)}() in {self.module}")
        return earlier._replace(root=None) if earlier else made_here


Rule = Callable[[Freezing, Any, tuple[Any, ...], dict[str, Any]], Any]


def marks_of(*values: Any) -> list[Mark]:
    """Returns the marks of all tensors in nested arguments."""
    return [m for leaf in flatten(values) if (m := getattr(leaf, "_elm_mark", None)) is not None]


def root_of(value: Any) -> Tensor | None:
    """Returns the `LINEAR` tensor that a tensor is an elementwise function of, if there is one."""
    mark = mark_of(value)
    if mark is None or mark.root is not None:
        return mark.root if mark else None
    return value if mark.kind == Kind.LINEAR else None


def _positional(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Moves the tensors that rules tell apart by position out of the keyword arguments."""
    for place, names in enumerate((("input", "self"), ("other", "mat2", "vec"))):
        name = next((n for n in names if n in kwargs), None)
        if name is not None and len(args) == place:
            args = (*args, kwargs[name])
            kwargs = {k: v for k, v in kwargs.items() if k != name}
    return args, kwargs


_local = threading.local()


def _active_modes() -> list[Freezing]:
    if not hasattr(_local, "modes"):
        _local.modes = []
    modes: list[Freezing] = _local.modes
    return modes


def active_mode() -> Freezing | None:
    """Returns the innermost freezing that is active in this thread."""
    modes = _active_modes()
    return modes[-1] if modes else None


def _remember_base(view: Any, base: Tensor) -> None:
    for leaf in flatten(view):
        if isinstance(leaf, Tensor) and leaf is not base:
            leaf._elm_base = base  # type: ignore[attr-defined]


def _mark_bases(changed: Any) -> None:
    """What was written into a view is in the tensors it is a view of, too."""
    mark, base = mark_of(changed), getattr(changed, "_elm_base", None)
    while mark is not None and base is not None:
        before = mark_of(base) or mark
        upper = before if before.kind > mark.kind else mark
        bilinear = before.bilinear or mark.bilinear
        set_mark(base, Mark(upper.kind, origin=upper.origin, bilinear=bilinear))
        base = getattr(base, "_elm_base", None)
