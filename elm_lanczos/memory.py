"""How much memory is free where something is computed, and amounts in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that are free on a device, or on the machine if it is no CUDA device."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def ceiling(device: torch.device) -> int:
    """Returns the bytes to work within where nothing else is said: 70 % of what is free."""
    return free_bytes(device) * 7 // 10


def size(bytes_: float) -> str:
    """Returns a number of bytes with the unit that suits it: `512 MiB`, `3.2 GiB`."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while round(bytes_) >= 1000 and len(units) > 1:
        bytes_, units = bytes_ / 1024, units[1:]
    return f"{_figures(bytes_, whole=units[0] == 'bytes')} {units[0]}"


def duration(seconds: float) -> str:
    """Returns a time with the unit that suits it: `0.24 s`, `42 min`, `5.1 h`, `2.0 years`."""
    if seconds < 0.995:
        short = "below 1 ms" if seconds else "0 s"
        return short if seconds < 0.001 else f"{seconds:.2g} s"
    time, units = seconds, [("s", 60), ("min", 60), ("h", 24), ("d", 365), ("years", 1)]
    while len(units) > 1 and round(time) >= units[0][1]:
        time, units = time / units[0][1], units[1:]
    return f"{_figures(time)} {units[0][0]}"


def _figures(number: float, *, whole: bool = False) -> str:
    """A number with two figures or all of its whole part."""
    return f"{number:.0f}" if whole or number >= 9.95 else f"{number:.1f}"
