"""Read the authors' released checkpoints into our networks, safely."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attnlab.hub.renaming import load

# Where training scripts keep the weights inside what they save, in the order in which they are looked for.
_INSIDE = ("state_dict", "model", "model_state_dict", "module")


def load_official(model: nn.Module, path: str | Path) -> nn.Module:
    """Put a checkpoint in the authors' layout into `model`, one of our networks; returns `model`.

    Args:
        model: a network (or mechanism) that has an adapter in `attnlab.hub.official`.
        path: a `.safetensors` file, or what `torch.save` wrote; nothing but tensors is ever unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt, holds anything but tensors, or does not fit `model` (the names that are missing
            or left over are listed).
    """
    from attnlab.hub.official import adapter_of

    adapter = adapter_of(type(model))
    params = {name.removeprefix("module."): tensor for name, tensor in read(path).items()}
    load(model, adapter.rename(params))
    return model


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, from safetensors or from torch's format without running its pickled code."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is corrupt, or holds more than tensors and was refused: {error}") from error
    return _tensors(content, path)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    for inside in _INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(inside), Mapping):
            content = content[inside]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path} holds no table of tensors by name, at its top or under {', '.join(_INSIDE)}")
    return dict(content)
