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


def size(bytes_: float) -> str:
    """Returns a number of bytes with the unit that suits it: `512 MiB`, `3.2 GiB`."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while bytes_ >= 1000 and len(units) > 1:
        bytes_, units = bytes_ / 1024, units[1:]
    whole = bytes_ >= 10 or units[0] == "bytes"
    return f"{bytes_:.0f} {units[0]}" if whole else f"{bytes_:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """Returns a time with the unit that suits it: `0.24 s`, `12 s`, `42 min`, `5.1 h`, `19 d`."""
    time, units = seconds, [("s", 60), ("min", 60), ("h", 24), ("d", 1)]
    while len(units) > 1 and time >= 1.5 * units[0][1]:
        time, units = time / units[0][1], units[1:]
    return f"{time:.0f} {units[0][0]}" if time >= 10 else f"{time:.2g} {units[0][0]}"
