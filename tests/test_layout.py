"""The shape of the package: what imports what, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import elm_lanczos

PACKAGE = Path(elm_lanczos.__file__).parent
ORDER = [
    ["errors", "lazy", "memory", "status"],
    ["freezing"],
    ["masks"],
    ["blockwise"],
    ["attention"],
    ["rules", "storage"],
    ["conventions"],
    ["model"],
    ["chain"],
    ["footprint", "certificate"],
    ["frozen_decoder"],
    ["layer_parts"],
    ["linearization"],
    ["sublayers"],
    ["operators"],
    ["layer_operators"],
    ["svd"],
    ["decode"],
    ["store"],
    ["export"],
    ["analysis"],
    ["architectures"],
    ["shared_layer"],
    ["check"],
    ["prompts", "config"],
    ["batches"],
    ["planning", "recording"],
    ["solving"],
    ["run"],
    ["verify", "distributed", "stored_layers"],
    ["report"],
    ["cli"],
    ["__main__"],
]
"""Modules in the order of the flow of data; each imports only from those before it."""


def _imports(file: Path) -> set[str]:
    """First-level modules that a file imports when it is loaded (not inside functions)."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("elm_lanczos."):
            found.add(node.module.split(".")[1])
    return found


def test_modules_import_only_from_those_before_them() -> None:
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own != "__init__":
            assert own in level, f"{file.name} has no place in the order"
            for name in _imports(file) - {own}:
                assert level[name] < level[own], f"{own} imports {name}"


def test_public_names_exist_whatever_was_imported_before() -> None:
    for first in ("elm_lanczos.svd.plan", "elm_lanczos.run", "elm_lanczos"):
        code = (
            f"import {first}, elm_lanczos as e;"
            "assert all(getattr(e, n) for n in e.__all__);"
            "from elm_lanczos import svd; assert callable(svd)"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
