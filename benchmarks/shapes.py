"""The shapes of published models in `configs/shapes`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from elm_lanczos import DetachedModel
from elm_lanczos.model import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHAPES = Path(__file__).parents[1] / "configs/shapes"


def load_shape(path: Path) -> PreTrainedConfig:
    """Returns the configuration that a file of `configs/shapes` describes.

    Args:
        path: YAML with the fields of a Hugging Face configuration.

    Returns:
        The configuration, named after the file.
    """
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.for_model(**yaml.safe_load(path.read_text()))
    config._name_or_path = path.stem
    return config


def parameters(config: PreTrainedConfig) -> int:
    """Returns how many parameters the model of a configuration has, tied ones once."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: DetachedModel) -> int:
    """Returns the bytes that a model's parameters really take, shared ones once."""
    return sum(parameter.nbytes for parameter in model.hf_model.parameters())
