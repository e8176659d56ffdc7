"""Parameter names of the authors' code to ours: a table of patterns per network."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

Rule = tuple[str, "str | Callable[[re.Match[str]], str]"]


def rename(params: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """`params` with each name passed through every rule `(pattern, replacement)`, in order, as `re.sub` does it."""
    renamed = {}
    for name, tensor in params.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"two parameters would both be named {name!r}")
        renamed[name] = tensor
    return renamed


def load(module: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Put `params`, all of them and no fewer, into `module`; only batch norms' counters may be left out."""
    try:
        missing, unexpected = module.load_state_dict(params, strict=False)
    except RuntimeError as error:  # torch's word for a tensor of another shape
        raise ValueError(f"params do not fit {type(module).__name__}: {error}") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"params do not fit {type(module).__name__}: missing {missing}, unexpected {unexpected}")
