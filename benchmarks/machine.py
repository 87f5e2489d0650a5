"""What a benchmark ran on: written beside every figure."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Returns processor, memory, accelerator, threads and versions as plain data."""
    from elm_lanczos.store.provenance import package_versions

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": package_versions(),
    }


def write_results(name: str, figures: dict[str, Any]) -> Path:
    """Writes figures with the machine's description to `benchmarks/results/<name>.json`.

    Args:
        name: the benchmark.
        figures: plain data.

    Returns:
        The file written.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
    return path
