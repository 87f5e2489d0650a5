"""The check of an architecture: verdicts, where it points, and that a sweep survives anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from elm_lanczos.architectures import PROMPT, tiny_config, tiny_model
from elm_lanczos.check import (
    BOUNDS,
    FamilyReport,
    Verdict,
    check_all,
    check_architecture,
    check_model,
    families_table,
    first_break,
    versions,
)
from elm_lanczos.errors import ModelError, UsageError
from elm_lanczos.linearization import Linearization
from elm_lanczos.model import DetachedModel
from tests.test_linearization import Sinc

IDS = torch.tensor(PROMPT)


class Drift(nn.Module):
    """Gives another answer whenever it is called: no frozen pass can agree with the model's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Drift.count += 1
        return self.inner(x) * (1 + 0.1 * Drift.count)

    count = 0


def llama() -> Any:
    return tiny_model(tiny_config("llama"))


# -------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "model_type",
    "llama qwen2 qwen3 gemma2 gemma3_text phi3 olmo2 gpt2 mixtral deepseek_v3 mamba falcon".split(),
)
def test_common_families_are_exact(model_type: str) -> None:
    report = check_architecture(model_type)
    assert report.verdict == Verdict.EXACT, report.reason
    assert report.untouched and report.dtype == "float64" and report.reason == ""
    fused = model_type in ("gpt2", "phi3", "falcon")  # queries, keys and values in one module
    assert (report.bypass is None) == fused
    for name, bound in BOUNDS[torch.float64].items():
        assert (getattr(report, name) or 0.0) <= bound


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt_oss"])
def test_float32_with_the_default_experts(model_type: str) -> None:
    report = check_architecture(model_type, dtype=torch.float32)
    assert report.verdict == Verdict.EXACT, report.reason
    assert report.dtype == "float32"


def test_configuration_of_any_size_can_be_checked() -> None:
    from tests.test_architectures import SEVENTY_BILLION

    assert check_architecture(SEVENTY_BILLION).verdict == Verdict.EXACT


def test_biases_are_reported() -> None:
    with_biases, without = check_architecture("gpt2"), check_architecture("llama")
    assert with_biases.bias is not None and with_biases.bias > 0.1
    assert without.bias == 0


def test_unknown_operation_is_refused() -> None:
    hf = llama()
    hf.model.layers[1].mlp.act_fn = Sinc()
    report = check_model(DetachedModel(hf), IDS)
    assert report.verdict == Verdict.REFUSED and report.untouched
    assert "layers.1.mlp.act_fn (Sinc)" in report.reason
    assert report.architecture == "llama"


def test_what_transformers_cannot_build_is_not_built() -> None:
    report = check_architecture("gemma4_assistant")
    assert report.verdict == Verdict.NOT_BUILT and report.reason and report.untouched is None


def test_model_that_does_not_run_in_float64_is_checked_in_float32() -> None:
    assert check_architecture("xglm").dtype == "float32"


def test_other_exception_is_a_crash_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("midway")

    monkeypatch.setattr(Linearization, "certificate", fail)
    report = check_model(DetachedModel(llama()), IDS)
    assert report.verdict == Verdict.CRASH and report.untouched
    assert report.reason.startswith("RuntimeError: midway (test_check.py:")


def test_figure_beyond_its_bound_is_wrong_and_located() -> None:
    hf = llama()
    hf.model.layers[1].mlp = Drift(hf.model.layers[1].mlp)
    report = check_model(DetachedModel(hf), IDS)
    assert report.verdict == Verdict.WRONG
    assert "fidelity" in report.reason and "layers.1.mlp (Drift)" in report.reason
    assert "logits" in report.reason  # its own answer changes as well


def test_break_names_the_module_and_the_figures_around_it() -> None:
    hf = llama()
    hf.model.layers[2].self_attn.o_proj = Drift(hf.model.layers[2].self_attn.o_proj)
    place = first_break(DetachedModel(hf), IDS)
    assert place is not None and place.figure == "fidelity"
    assert place.module == "layers.2.self_attn.o_proj (Drift)"
    assert place.before < 1e-6 < 1e-3 < place.after
    assert "fidelity" in str(place)


def test_linear_path_through_the_queries_is_wrong_and_located() -> None:
    """All figures of the certificate are fine for it: only moving the queries tells."""

    class StateFrozen(nn.Module):
        """Linear attention whose squashed state (keyᵀ value) is the coefficient of the query."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = torch.tanh(self.key(x).mT @ self.value(x))
            return self.query(x) @ state

    hf = llama()
    torch.manual_seed(0)
    hf.model.layers[1].mlp = StateFrozen(hf.config.hidden_size).double()
    model = DetachedModel(hf)
    assert model.linearize(IDS).certificate().exact
    report = check_model(model, IDS)
    assert report.verdict == Verdict.WRONG and report.bypass is not None and report.bypass > 1e-3
    assert "bypass beyond the bound; first at layers.1.mlp.query (Linear)" in report.reason


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, True), (torch.bfloat16, False)])
def test_rounding_of_the_model_is_excused_within_that_of_float32(
    dtype: torch.dtype, exact: bool
) -> None:
    class Rounded(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(100):  # 1e-7, amplified to more than the bound of 1e-5
                x = (x * 1.0001).to(dtype).to(torch.float64)
            return self.inner(x)

    hf = llama()
    for layer in hf.model.layers:
        layer.mlp = Rounded(layer.mlp)
    report = check_model(DetachedModel(hf), IDS)
    assert report.raised is not None and report.raised <= 1e-12
    assert (report.verdict == Verdict.EXACT) == exact, report.reason
    if not exact:
        assert report.verdict == Verdict.WRONG and "fidelity beyond" in report.reason


def test_search_that_fails_does_not_hide_a_wrong_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("midway")

    monkeypatch.setattr("elm_lanczos.check.first_break", fail)
    monkeypatch.setattr("elm_lanczos.check._first_bend", fail)
    hf = llama()
    hf.model.layers[1].mlp = Drift(hf.model.layers[1].mlp)
    assert check_model(DetachedModel(hf), IDS).verdict == Verdict.WRONG
    hf = llama()
    hf.model.layers[1].mlp = Sinc()
    assert check_model(DetachedModel(hf), IDS).verdict == Verdict.REFUSED


def test_prompt_the_model_cannot_run_and_device_that_is_not_there_are_errors() -> None:
    with pytest.raises(ModelError, match="itself does not run on this prompt"):
        check_model(DetachedModel(llama()), torch.tensor([5, 100_000]))
    with pytest.raises(UsageError, match="cannot be used"):
        check_all(architectures=["llama"], device="nowhere")


def test_exact_model_breaks_nowhere() -> None:
    assert first_break(DetachedModel(llama()), IDS) is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda hf: hf.model.norm.weight.data.add_(1e-15), "weights"),
        (lambda hf: hf.model.norm.train(), "training flags"),
        (lambda hf: hf.model.norm.register_forward_hook(lambda *_: None), "hooks"),
        (lambda hf: setattr(hf.config, "_attn_implementation_internal", "eager"), "configurations"),
        (lambda hf: setattr(hf.model.norm, "forward", lambda x: x), "attributes"),
        (lambda hf: hf.model.norm.weight.requires_grad_(False), "gradients"),
    ],
)
def test_model_that_was_changed_is_wrong(
    change: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = llama()
    linearize = DetachedModel.linearize

    def meddle(self: DetachedModel, *args: Any, **kwargs: Any) -> Linearization:
        result = linearize(self, *args, **kwargs)
        change(hf)
        return result

    monkeypatch.setattr(DetachedModel, "linearize", meddle)
    report = check_model(DetachedModel(hf), IDS)
    assert report.verdict == Verdict.WRONG and report.untouched is False
    assert what in report.reason


# --------------------------------------------------------------------------------- sweeps


def test_sweep_reports_in_order_and_as_it_goes() -> None:
    seen: list[str] = []
    names = ["llama", "gemma4_assistant"]
    reports = check_all(lambda r: seen.append(r.architecture), architectures=names, jobs=2)
    assert [r.architecture for r in reports] == names and sorted(seen) == sorted(names)
    assert [r.verdict for r in reports] == [Verdict.EXACT, Verdict.NOT_BUILT]


def test_sweep_survives_what_never_ends() -> None:
    (report,) = check_all(architectures=["llama"], timeout=0.01)
    assert report.verdict == Verdict.CRASH and "no answer" in report.reason


def test_sweep_survives_the_death_of_a_process() -> None:
    (report,) = check_all(architectures=["no such model type"])
    assert report.verdict == Verdict.CRASH and "exit code 1" in report.reason


def test_table_has_counts_figures_and_reasons() -> None:
    figures = {"fidelity": 1e-7, "reconstruction": 0.0, "leak": 0.0, "adjoint": 2e-16}
    figures |= {
        "affinity": float("nan"),
        "mixture": 0.0,
        "bypass": 0.0,
        "raised": 1e-15,
        "bias": 0.5,
    }
    reports = [
        FamilyReport("b", Verdict.REFUSED, "a|b() is not affine"),
        FamilyReport("a", Verdict.EXACT, dtype="float64", **figures, segments=4),
        FamilyReport("c", Verdict.NOT_BUILT, "needs timm"),
    ]
    table = families_table(reports)
    assert table.startswith("1 exact (50.0 % of the 2 built), 1 refused, 1 not built, 0 WRONG")
    assert (
        "| `a` | exact | 0 | 0 | 2e-16 | NaN | 0 | 0 | 1e-15 | 1e-07 | 0.50 | 4 | float64 |"
        in table
    )
    assert r"| `b` | refused | a\|b() is not affine |" in table


def test_versions_name_what_a_result_depends_on() -> None:
    assert {"transformers", "torch"} <= versions().keys()
