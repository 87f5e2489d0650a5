"""What must hold of the repository itself."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_kernels_folder_is_not_taken_for_the_package_of_that_name() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    program = "from transformers.utils import is_kernels_available as f; print(f())"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    installed = any(name.lower() == "kernels" for name in metadata.packages_distributions())
    assert answer.stdout.strip() == str(installed and util.find_spec("kernels") is not None)


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == citation["version"] == metadata.version("elm-lanczos")


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line
    )
    pinned = {name.lower().replace("_", "-") for name in pins}
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["object-store"]]
    assert {re.split(r"[\[>]", name)[0] for name in wanted} <= pinned
    assert pins["torch"] == "2.13.0"


def test_bundled_model_is_complete() -> None:
    names = {path.name for path in (ROOT / "elm_lanczos/bundled/speeches-llama").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
