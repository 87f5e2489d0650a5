"""What goes in from other tools and out to them: models, arrays, files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from torch import nn

from elm_lanczos import DetachedModel, cli, open_results, svd
from elm_lanczos.analysis import attribute
from elm_lanczos.errors import UsageError
from elm_lanczos.export import to_safetensors
from elm_lanczos.store import Results
from tests.families import PROMPT, detached_model


class Component(nn.Module):
    """Stands around a module as a component of TransformerLens' bridge does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.add_module("_original_component", inner)
        self.calls = 0

    @property
    def original_component(self) -> nn.Module:
        return self._modules["_original_component"]

    def forward(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        return self.original_component(*args, **kwargs)


def _bridge(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        _bridge(child)
        if not isinstance(child, nn.ModuleList):
            setattr(module, name, Component(child))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_model_inside_a_bridge_is_the_model_itself(family: str) -> None:
    plain = attribute(detached_model(family).linearize(PROMPT))
    bridged = detached_model(family).hf_model
    _bridge(bridged)
    components = [module for module in bridged.modules() if isinstance(module, Component)]
    assert len(components) > 10
    model = DetachedModel(bridged)
    found = attribute(model.linearize(PROMPT))
    assert not any(isinstance(module, Component) for module in model.hf_model.modules())
    assert torch.equal(found.shares, plain.shares) and not found.doubts
    assert not any(component.calls for component in components)
    assert [m for m in bridged.modules() if isinstance(m, Component)] == components
    with torch.no_grad():
        logits = bridged(PROMPT[None]).logits[0, -1]
    assert abs(float(logits[found.target]) - found.model_logit) <= 1e-6
    weights = {p.data_ptr() for p in bridged.parameters()}
    assert {p.data_ptr() for p in model.hf_model.parameters()} == weights  # shared, not copied


def test_model_without_a_bridge_is_not_copied() -> None:
    hf_model = detached_model("llama").hf_model
    assert DetachedModel(hf_model).hf_model is hf_model


def test_arrays_of_other_libraries_go_in_and_out(tiny: DetachedModel) -> None:
    A = tiny.linearize(torch.tensor([0, 5, 9])).token(1)
    X = np.random.default_rng(0).standard_normal((32, 3)).astype(np.float32)
    by_torch = A @ torch.from_numpy(X)
    assert torch.equal(A @ X, by_torch)
    assert np.array_equal(np.from_dlpack(A @ X), by_torch.numpy())
    assert np.allclose(A.to_scipy() @ X, by_torch.numpy(), atol=1e-6)
    assert np.from_dlpack(svd(A, k=2).V).shape == (1, 2, 32)
    with pytest.raises(ValueError, match="list"):
        A @ [[1.0]]  # type: ignore[operator]


@pytest.fixture(scope="module")
def store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("export")
    prompts = folder / "prompts.txt"
    prompts.write_text("=SUM(A1) the\npeople of\n", encoding="utf-8")
    path = folder / "run.zarr"
    options = ["--k", "2", "--tokens", "last:2", "--generate", "2", "--quiet"]
    options += ["--model", str(tiny_folder), "--seq-file", str(prompts), "--out", str(path)]
    assert _run(["run", *options]) == 0
    yield path


def _run(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["elm-lanczos", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0)


def test_directions_as_safetensors(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "directions.safetensors"
    assert _run(["export", str(store), str(file)]) == 0
    results = open_results(store)
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
        texts = json.loads(metadata["prompts"])
        assert set(texts) == {
            name.replace("/", ".").removeprefix("prompts.")
            for prompt in results
            for name in (prompt.name, *(p.name for p in prompt.positions.values()))
        }
        assert any("position" in name for name in texts)
        for name, text in texts.items():
            result = results.group("prompts/" + name.replace(".", "/"))
            rows = opened.get_tensor(f"{name}.index")
            assert rows.tolist() == [len(result.tokens) - 2, len(result.tokens) - 1]
            assert text["tokens"] == result.tokens and text["text"] == result.text
            for array in ("U", "S", "V", "token_ids", "stable_rank"):
                assert np.array_equal(
                    opened.get_tensor(f"{name}.{array}"), getattr(result, array)[rows]
                )
            assert np.array_equal(opened.get_tensor(f"{name}.output"), result.output)
        assert json.loads(metadata["config"])["k"] == 2


def test_table_of_triplets(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "triplets.csv"
    assert _run(["export", str(store), str(file), "--prompt", "2"]) == 0
    table = pd.read_csv(file)
    prompt = open_results(store)[1]
    assert len(table) == 2 * 2 * 2  # positions × tokens × triplets
    assert set(table["prompt"].astype(str)) == {prompt.id}
    first = table[table["position"] == prompt.position]
    assert np.allclose(first["singular_value"], prompt.S[-2:].reshape(-1), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["out.bin"], ".safetensors or .csv"),
        (["missing/out.csv"], "no folder"),
        (["out.csv", "--prompt", "3"], "prompts 1 to 2"),
    ],
)
def test_what_cannot_be_exported_is_said(
    store: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, *others = arguments
    assert _run(["export", str(store), str(tmp_path / file), *others]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_done_is_no_file(store: Path, tmp_path: Path) -> None:
    results: Results = open_results(store)
    with pytest.raises(UsageError, match="nothing"):
        to_safetensors(results, tmp_path / "x.safetensors", [])


def test_a_store_is_a_tree(store: Path) -> None:
    results = open_results(store)
    tree = results.to_datatree()
    prompt = results[0]
    (further,) = prompt.positions.values()
    assert np.array_equal(tree[prompt.name]["S"], prompt.S, equal_nan=True)
    assert np.array_equal(
        tree[further.name.replace("/pos", "_pos")]["S"], further.S, equal_nan=True
    )
