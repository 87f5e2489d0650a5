"""How much memory is free where something is computed."""

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
