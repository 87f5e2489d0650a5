"""Shared fixtures: tiny models in folders, as a user would have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from elm_lanczos.model import BUNDLED_MODEL, DetachedModel

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of width 32 with the bundled tokenizer, saved as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> DetachedModel:
    """The tiny model, loaded."""
    return DetachedModel.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def bundled() -> DetachedModel:
    """The trained model that comes with the package."""
    return DetachedModel.from_pretrained()
