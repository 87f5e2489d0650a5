"""The precision of float32 products: asked for, never inherited, always put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from elm_lanczos.certificate import Certificate
from elm_lanczos.errors import UsageError
from elm_lanczos.model import DetachedModel
from tests.families import PROMPT, detached_model, hf_model


@pytest.fixture(autouse=True)
def users_own() -> Iterator[None]:
    """The user has asked torch for fast products everywhere."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def settings() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_arithmetic_is_the_models_own_and_is_put_back() -> None:
    model = detached_model("llama", torch.float32)
    with model.arithmetic():
        assert settings() == ("highest", False)
        with model.arithmetic():
            assert settings() == ("highest", False)
        assert settings() == ("highest", False)
    assert settings() == ("high", True)
    with pytest.raises(RuntimeError, match="halfway"), model.arithmetic():
        raise RuntimeError("halfway")
    assert settings() == ("high", True)
    model.precision = "tf32"  # as it would be on CUDA
    torch.set_float32_matmul_precision("highest")
    with model.arithmetic():
        assert settings() == ("high", True)
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")


def test_forward_and_passes_run_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = hf_model("llama", torch.float32)
    seen: dict[str, list[tuple[str, bool]]] = {"forward": [], "product": []}
    for layer in hf.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen["forward"].append(settings()))
    model = DetachedModel(hf)
    lin = model.linearize(PROMPT)
    vmap = torch.func.vmap

    def watched(function):  # type: ignore[no-untyped-def]
        seen["product"].append(settings())
        return vmap(function)

    monkeypatch.setattr(torch.func, "vmap", watched)
    actions = {
        "linearize": lambda: model.linearize(PROMPT),
        "predict": lambda: model.predict(PROMPT),
        "generate": lambda: model.generate(PROMPT, 1),
        "vjp": lambda: lin.vjp(torch.ones(2, 32)),
        "jvp": lambda: lin.jvp(torch.ones(2, *lin.inputs.shape)),
        "replay": lambda: lin(lin.inputs),
        "readout": lambda: lin.readout(3),
        "certificate": lambda: lin.certificate(),
    }
    for name, action in actions.items():
        for made in seen.values():
            made.clear()
        action()
        made = seen["forward"] + seen["product"]
        assert made or name == "readout", name  # which needs no layer
        assert set(made) <= {("highest", False)}, name
        assert settings() == ("high", True), name


def test_settings_are_put_back_after_an_exception_in_a_pass() -> None:
    hf = hf_model("llama", torch.float32)
    model = DetachedModel(hf)
    lin = model.linearize(PROMPT)

    def fail(*_: object) -> None:
        assert settings() == ("highest", False)
        raise KeyError("inside a layer")

    handle = hf.model.layers[1].mlp.register_forward_pre_hook(fail)
    for action in (lambda: lin.vjp(torch.ones(32)), lambda: model.predict(PROMPT)):
        with pytest.raises(KeyError, match="inside a layer"):
            action()
        assert settings() == ("high", True)
    handle.remove()
    assert lin.certificate().exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tf32_is_refused_on_a_cpu(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match="CUDA device") as refused:
        detached_model("llama", dtype, precision="tf32")
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="'bf16'"):
        detached_model("llama", dtype, precision="bf16")


def test_certificates_have_bounds_for_products_in_tf32() -> None:
    figures = (1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-6)
    by_dtype = {d: Certificate(*figures, dtype=d) for d in ("float64", "float32", "tf32")}
    assert by_dtype["tf32"].exact and not by_dtype["float32"].exact
    names = {name: set(c.bounds) for name, c in by_dtype.items()}
    assert names["tf32"] == names["float32"] == names["float64"]
    for name, bound in by_dtype["tf32"].bounds.items():
        assert by_dtype["float64"].bounds[name] <= by_dtype["float32"].bounds[name] <= bound
    # Triplets are made orthogonal in full precision whatever the passes are made in.
    assert by_dtype["tf32"].bounds["orthogonality"] == 1e-5
    bad = Certificate(0.1, *figures[1:], dtype="tf32")
    assert bad.failures == ["fidelity"] and bad.refuted == []
    assert Certificate(10.0, *figures[1:], dtype="tf32").refuted == ["fidelity"]
