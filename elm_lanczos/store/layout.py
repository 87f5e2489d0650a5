"""What a prompt's group holds: every array with its dimensions, type, chunks, shards and codecs.

All arrays have their final shape from the start. Along the token axis they are cut where the
*owners* are: one owner is a range of tokens computed and committed as a whole, the entire prompt up
to 128 tokens and 64 tokens beyond. No two owners ever share a file, so no two processes ever write
the same one.

The long rows of `U` and `V` are chunks of their own inside the owner's shard, so that one token can
be read alone; the short rows of the other arrays make one chunk per owner. Every chunk is
compressed by Blosc (lz4, bitshuffle) and carries a crc32c, without which a flipped bit goes
unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec

from elm_lanczos.status import Status

FORMAT = "elm-lanczos results"
SCHEMA_VERSION = 1
WHOLE_PROMPT_TOKENS = 128
OWNER_TOKENS = 64

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PromptHeader:
    """What is known of a prompt when its group is created.

    Attributes:
        id: The name of the prompt in its file, or its number.
        text: The prompt.
        token_ids: Its T token ids.
        token_strings: The T tokens as text.
        m: Features of the output.
        d: Features of one token's embedding.
        k: Triplets per token.
        top: Decoded words per singular vector.
        dtype: "float32" or "float64", the type of every real array.
        requested: Indices of the tokens to compute; None stands for all.
        position: Output position whose prediction is explained; None stands for the last.
        plan: Everything that decides the bits of the result: method, block sizes, precision,
            thread count, seed. Resolved once and reused by a resumed run.
        attrs: Further attributes (predicted token, certificate, …).
    """

    id: str
    text: str
    token_ids: Sequence[int]
    token_strings: Sequence[str]
    m: int
    d: int
    k: int
    top: int
    dtype: str = "float32"
    requested: Sequence[int] | None = None
    position: int | None = None
    plan: Mapping[str, object] = field(default_factory=dict)
    attrs: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the shapes agree.

        Raises:
            ValueError: They do not; the message names the field.
        """
        tokens = len(self.token_ids)
        if tokens == 0 or len(self.token_strings) != tokens:
            raise ValueError(f"{tokens} token_ids and {len(self.token_strings)} token_strings")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, not {self.dtype}")
        if not 1 <= self.k <= min(self.m, self.d) or self.top < 1:
            raise ValueError(f"k = {self.k} and top = {self.top} with m = {self.m}, d = {self.d}")
        if any(not 0 <= index < tokens for index in self.requested or ()):
            raise ValueError(f"requested tokens must lie in 0 … {tokens - 1}")
        if self.position is not None and not 0 <= self.position < tokens:
            raise ValueError(f"position must lie in 0 … {tokens - 1}")

    @property
    def output_position(self) -> int:
        """The output position whose prediction is explained."""
        return len(self.token_ids) - 1 if self.position is None else self.position

    @property
    def sizes(self) -> dict[str, int]:
        """The length of every dimension."""
        return {
            "token": len(self.token_ids),
            "component": self.k,
            "out_feature": self.m,
            "in_feature": self.d,
            "rank_order": self.top,
        }


@dataclass(frozen=True)
class ArraySpec:
    """One array of the layout.

    Attributes:
        name: Its name.
        dims: Its dimensions.
        dtype: "real" (the header's type), "int32", "uint8", "bool" or "str".
        cut: "row": one chunk per token in one shard per owner; "owner": one chunk per owner;
            "whole": a single chunk.
        attrs: Its attributes.
    """

    name: str
    dims: tuple[str, ...]
    dtype: Literal["real", "int32", "uint8", "bool", "str"]
    cut: Literal["row", "owner", "whole"]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fill(self) -> float | int | bool | str:
        """The value of what was never written."""
        fills: dict[str, float | int | bool | str]
        fills = {"real": float("nan"), "int32": -1, "uint8": 0, "bool": False, "str": ""}
        return fills[self.dtype]

    def numpy_dtype(self, real: str) -> np.dtype[Any]:
        """The NumPy type, `real` being that of the real arrays."""
        named = {"real": real, "str": "O"}
        return np.dtype(named.get(self.dtype, self.dtype))


_TRIPLET = ("token", "component")
_DECODED = ("token", "component", "rank_order")
STATUS_ATTRS: Mapping[str, Any] = {
    "long_name": "state of the token's triplets",
    "flag_values": [int(status) for status in Status],
    "flag_meanings": " ".join(status.name.lower() for status in Status),
}

ROW_ARRAYS = (
    ArraySpec(
        "U",
        ("token", "component", "out_feature"),
        "real",
        "row",
        {"long_name": "left singular vectors u: J_i ≈ Σ_j S·u·vᵀ"},
    ),
    ArraySpec(
        "V",
        ("token", "component", "in_feature"),
        "real",
        "row",
        {"long_name": "right singular vectors v: J_i ≈ Σ_j S·u·vᵀ"},
    ),
    ArraySpec("S", _TRIPLET, "real", "owner", {"long_name": "singular values, descending"}),
    ArraySpec(
        "residual",
        _TRIPLET,
        "real",
        "owner",
        {"long_name": "max(‖J_i v − σu‖, ‖J_iᵀu − σv‖)"},
    ),
    ArraySpec("error_bound", _TRIPLET, "real", "owner", {"long_name": "bound on the error of S"}),
    ArraySpec("stable_rank", ("token",), "real", "owner", {"long_name": "‖J_i‖_F² / σ₁²"}),
    ArraySpec(
        "stable_rank_error",
        ("token",),
        "real",
        "owner",
        {"long_name": "standard error of the stable rank"},
    ),
    ArraySpec("contribution_norm", ("token",), "real", "owner", {"long_name": "‖J_i x_i‖"}),
    ArraySpec("n_iter", ("token",), "int32", "owner", {"long_name": "iterations of the method"}),
    ArraySpec("status", ("token",), "uint8", "owner", STATUS_ATTRS),
    ArraySpec("u_token", _DECODED, "int32", "owner", {"long_name": "token ids decoded from u"}),
    ArraySpec("u_score", _DECODED, "real", "owner", {"long_name": "their scores"}),
    ArraySpec("v_token", _DECODED, "int32", "owner", {"long_name": "token ids decoded from v"}),
    ArraySpec("v_score", _DECODED, "real", "owner", {"long_name": "their cosines with v"}),
)
TOKEN_ARRAYS = (
    ArraySpec("token_id", ("token",), "int32", "whole"),
    ArraySpec("token_str", ("token",), "str", "whole"),
)
OUTPUT_ARRAYS = (
    ArraySpec(
        "output", ("out_feature",), "real", "whole", {"long_name": "y, after the final norm"}
    ),
    ArraySpec(
        "constant", ("out_feature",), "real", "whole", {"long_name": "c in y = Σ J_i x_i + c"}
    ),
    ArraySpec(
        "attribution",
        ("token",),
        "real",
        "whole",
        {"long_name": "part of the predicted token's logit that comes through this token"},
    ),
)
DONE = ArraySpec("done", ("token",), "bool", "owner", {"long_name": "rows are committed"})
LAYOUT = (*ROW_ARRAYS, *TOKEN_ARRAYS, *OUTPUT_ARRAYS, DONE)


def owner_ranges(tokens: int) -> list[range]:
    """Cut a prompt into the token ranges that are computed and committed as a whole.

    Args:
        tokens: Length T of the prompt.

    Returns:
        One range for T ≤ 128, else ranges of 64 tokens, the last one shorter.
    """
    step = tokens if tokens <= WHOLE_PROMPT_TOKENS else OWNER_TOKENS
    return [range(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def create_array(
    store: Store, group: str, spec: ArraySpec, sizes: Mapping[str, int], real: str
) -> zarr.Array[Any]:
    """Create one array of the layout, filled with its fill value.

    The files of an array lie side by side in its folder (`c.0.0.0`, not `c/0/0/0`): each folder is
    one more thing to sync.

    Args:
        store: The Zarr store.
        group: Path of the group.
        spec: The array.
        sizes: Length of every dimension.
        real: NumPy name of the real type.

    Returns:
        The array, open for writing.
    """
    shape = tuple(sizes[dim] for dim in spec.dims)
    owner = (len(owner_ranges(shape[0])[0]), *shape[1:])
    return zarr.create_array(
        store,
        name=f"{group}/{spec.name}",
        shape=shape,
        dtype=str if spec.dtype == "str" else spec.numpy_dtype(real),
        chunks={"row": (1, *shape[1:]), "owner": owner, "whole": shape}[spec.cut],
        shards=owner if spec.cut == "row" else None,
        compressors=[BloscCodec(cname="lz4", shuffle="bitshuffle"), Crc32cCodec()],
        fill_value=spec.fill,
        dimension_names=spec.dims,
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes=dict(spec.attrs),
    )
