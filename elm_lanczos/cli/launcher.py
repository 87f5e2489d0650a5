"""What the launcher of several processes says, such as torchrun, by the environment."""

from __future__ import annotations

import os

from elm_lanczos.errors import UsageError


def is_first() -> bool:
    """Whether this is the only process of a run, or the one that speaks for all of them."""
    count, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    return not (count.isdecimal() and rank.isdecimal() and 0 < int(rank) < int(count))


def processes() -> int:
    """How many processes this run has.

    Returns:
        What the launcher says, 1 if there is none.

    Raises:
        UsageError: if what it says about them cannot be used.
    """
    count = os.environ.get("WORLD_SIZE") or "1"
    if count in ("0", "1"):
        return 1
    advice = "start several processes by torchrun or accelerate launch, or unset WORLD_SIZE"
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name)
        if not value:
            raise UsageError(f"WORLD_SIZE is {count!r} but {name} is not set: {advice}")
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise UsageError(f"{name} is {value!r}, which is no number: {advice}")
    if int(os.environ["RANK"]) >= int(count):
        raise UsageError(f"RANK is {os.environ['RANK']} of WORLD_SIZE {count} processes: {advice}")
    return int(count)
