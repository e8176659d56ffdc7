"""Layers that take each row alone, in inference some rows at a time, so that what lies between stays cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from attnlab.nn.untouched import recorded, untouched

_WORTH = 1 << 22  # numbers of the widest map from which on fresh memory costs more than smaller products
_CACHED = 3 << 17  # numbers of it for each thread at a time
_WIDER = 8  # times as wide as the maps that are given; modules of small ones are not even looked at
_ROWS = 512  # and at least so many rows, for the products' sake
_LAYERS = {nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.SiLU, nn.ReLU, nn.Identity, nn.Dropout}


def by_rows(call: Callable[..., Tensor], *maps: Tensor, through: Sequence[nn.Module], axes: int = 1) -> Tensor:
    """`call(*maps)` of maps `(…, C)` that share all but the last axis, where `call` computes each row alone.

    Large maps cost a CPU more in fresh memory than in products. In inference they go some rows at a time, which give
    their memory to the next, unless somebody would notice that the modules are called more than once (see `untouched`).

    Args:
        through: the modules that `call` uses; those of other classes than torch's count as row by row if they say so,
            by a class attribute `rowwise = True`.
        axes: how many of the last axes make a row; two if groups of rows are computed each alone, as in windows.
    """
    if torch.compiler.is_compiling() or maps[0].numel() * _WIDER < _WORTH:
        return call(*maps)
    parts = [part for module in through for part in module.modules()]
    width = max((part.out_features for part in parts if isinstance(part, nn.Linear)), default=maps[0].shape[-1])
    lead, group = maps[0].shape[:-axes], maps[0].shape[-axes:-1].numel()
    rows = lead.numel()
    if rows * group * width < _WORTH or not _hidden(maps, parts):
        return call(*maps)
    flat, out = [m.reshape(rows, *m.shape[-axes:]) for m in maps], None
    step = -(-max(_ROWS, torch.get_num_threads() * _CACHED // width) // max(group, 1))
    for start in range(0, rows, step):
        part = call(*(m[start : start + step] for m in flat))
        out = part.new_empty(rows, *part.shape[1:]) if out is None else out
        out[start : start + step] = part
    return call(*maps) if out is None else out.view(*lead, *out.shape[1:])


def _hidden(maps: Sequence[Tensor], parts: Sequence[nn.Module]) -> bool:
    if any(part.training or not (type(part) in _LAYERS or vars(type(part)).get("rowwise")) for part in parts):
        return False
    parameters = chain.from_iterable(part.parameters(False) for part in parts)
    return not recorded(*maps, *parameters) and untouched(maps[0], *parts)
