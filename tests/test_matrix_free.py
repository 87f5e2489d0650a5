"""By default no m×d Jacobian ever exists: an allocator that fails on one proves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from elm_lanczos.model import DetachedModel
from elm_lanczos.svd import svd

WIDTH = 512


class NoJacobian(TorchDispatchMode):
    """Fails when an operation makes a tensor as large as one m×d Jacobian."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                new = tensor.untyped_storage().data_ptr() not in storages
                if new and tensor.numel() >= WIDTH * WIDTH:
                    raise MemoryError(f"{func} makes {tuple(tensor.shape)}")
                self.largest = max(self.largest, tensor.numel() if new else 0)
        return result


@pytest.fixture(scope="module")
def model() -> DetachedModel:
    """So wide and shallow that everything but a Jacobian is small."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    return DetachedModel(transformers.LlamaForCausalLM(config).eval())


@pytest.mark.parametrize(("method", "chosen"), [("auto", "lanczos"), ("stream", "stream")])
def test_no_jacobian_is_allocated(model: DetachedModel, method: str, chosen: str) -> None:
    with NoJacobian() as watch:
        lin = model.linearize(torch.tensor([3, 9]), block=16)
        result = svd(lin, k=2, method=method)
    assert result.method == chosen and result.converged.all()
    assert watch.largest > 2 * WIDTH  # the watch did see the work


def test_the_watch_would_catch_a_jacobian(model: DetachedModel) -> None:
    with pytest.raises(MemoryError), NoJacobian():
        svd(model.linearize(torch.tensor([3, 9])), k=2, method="dense")
