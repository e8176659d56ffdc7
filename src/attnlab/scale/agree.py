"""Whether all ranks are about to do the same thing: asked once for each kind of call, before anything large is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnlab.scale.layout import Layout
from attnlab.scale.wire import AGREEMENT, Wire

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def lengths(wire: Wire, tensors: Mapping[str, Tensor | None], choices: Sequence[object], axis: int = 2) -> list[int]:
    """How many tokens each rank holds; ValueError or TypeError, the same on all ranks, if they do not fit together.

    Compared are the dtypes and shapes of `tensors` (all but the sequence, `axis`) and `choices`, by what they print.
    The ranks of one kind of call are asked once: a small all-gather of numbers.
    """
    named = {name: x for name, x in tensors.items() if x is not None}
    key = (*((n, x.dtype, tuple(x.shape)) for n, x in named.items()), repr(choices))
    known = next((a for a in wire.agreed if isinstance(a, _Agreed) and a.key == key), None)
    if known is not None:
        return known.lengths
    numbers = [int.from_bytes(hashlib.sha256(repr(choices).encode()).digest()[:7], "big")]
    for x in tensors.values():
        shape = [] if x is None else list(x.shape)
        code = -1 if x is None else _DTYPES.index(x.dtype) if x.dtype in _DTYPES else len(_DTYPES)
        numbers += [code, len(shape), *(shape + [0] * 5)[:5]]
    device = next(iter(named.values())).device
    rows = [t.tolist() for t in wire.all_gather(torch.tensor(numbers, device=device), AGREEMENT)]
    for i, name in enumerate(tensors):
        at = 1 + 7 * i
        codes = [row[at] for row in rows]
        if len(set(codes)) > 1:
            said = [_dtype(c) for c in codes]
            raise TypeError(
                f"{name} must have one dtype on all ranks, got {', '.join(said)} on ranks 0 to {len(rows) - 1}"
            )
        shapes = [tuple(row[at + 2 : at + 2 + row[at + 1]]) for row in rows]
        others = {s[:axis] + s[axis + 1 :] for s in shapes}
        if len(others) > 1:
            raise ValueError(f"{name} must have one shape on all ranks but for the tokens on axis {axis}, got {shapes}")
    if len({row[0] for row in rows}) > 1:
        raise ValueError(f"all ranks must ask for the same; rank {wire.rank} asks for {', '.join(map(str, choices))}")
    found = [row[3 + axis] for row in rows]
    wire.agreed.add(_Agreed(key, found))
    return found


class _Agreed:
    def __init__(self, key: tuple[object, ...], lengths: list[int]) -> None:
        self.key, self.lengths = key, lengths


def _dtype(code: int) -> str:
    return "nothing" if code < 0 else str(_DTYPES[code]) if code < len(_DTYPES) else "another dtype"


def fitting(layout: Layout | None, held: Sequence[int], ranks: int, name: str = "layout") -> Layout:
    """The layout that was given, if it fits the lengths held; contiguous blocks of equal length if none was."""
    if layout is None:
        if len(set(held)) > 1:
            raise ValueError(f"all ranks must hold equally many tokens, got {list(held)} (or give {name}=)")
        return Layout.of_lengths(held)
    if layout.ranks != ranks:
        raise ValueError(f"{name} is for {layout.ranks} ranks, but the mesh has {ranks}")
    if tuple(held) != layout.lengths:
        raise ValueError(f"{name} wants shards of {list(layout.lengths)} tokens, but the ranks hold {list(held)}")
    return layout
