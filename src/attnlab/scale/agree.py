"""Whether all ranks are about to do the same thing: asked once for each kind of call, before anything large is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnlab.scale.layout import Layout
from attnlab.scale.wire import AGREEMENT, Wire

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def lengths(
    wire: Wire, tensors: Mapping[str, Tensor | None], choices: Sequence[object], layout: Layout | None
) -> dict[str, list[int]]:
    """Of each tensor, how many tokens (axis 2) each rank holds; an error on all ranks if they do not fit together.

    Compared are dtypes, shapes but for the tokens, and `choices`, by what they print: a small all-gather of numbers.
    With a layout, which says what the others hold, the ranks are asked once for each kind of call; without one always.
    """
    named = {name: x for name, x in tensors.items() if x is not None}
    key = (*((n, x.dtype, tuple(x.shape)) for n, x in named.items()), repr((*choices, layout)))
    if layout is not None and key in wire.agreed:
        return wire.agreed[key]
    text = repr((*choices, layout)).encode()
    numbers = [int.from_bytes(hashlib.sha256(text).digest()[:7], "big")]
    for x in tensors.values():
        shape = [] if x is None else list(x.shape)
        code = -1 if x is None else _DTYPES.index(x.dtype) if x.dtype in _DTYPES else len(_DTYPES)
        numbers += [code, len(shape), *(shape + [0] * 5)[:5]]
    device = next(iter(named.values())).device
    rows = [t.tolist() for t in wire.all_gather(torch.tensor(numbers, device=device), AGREEMENT)]
    found = {}
    for i, name in enumerate(tensors):
        at = 1 + 7 * i
        codes = [row[at] for row in rows]
        if len(set(codes)) > 1:
            said = ", ".join(_dtype(code) for code in codes)
            raise TypeError(f"{name} must have one dtype on all ranks, got {said} on ranks 0 to {wire.size - 1}")
        shapes = [tuple(row[at + 2 : at + 2 + row[at + 1]]) for row in rows]
        if len({s[:2] + s[3:] for s in shapes}) > 1:
            raise ValueError(f"{name} must have one shape on all ranks but for the tokens on axis 2, got {shapes}")
        found[name] = [row[at + 4] for row in rows]
    if len({row[0] for row in rows}) > 1:
        raise ValueError(f"all ranks must ask for the same; rank {wire.rank} asks for {', '.join(map(str, choices))}")
    if layout is not None:
        wire.agreed[key] = found
    return found


def groups(rings: Wire, found: dict[str, list[int]], layout: Layout | None) -> dict[str, list[int]]:
    """The lengths of all ranks, group after group, from those of each group."""
    key = ("groups", tuple(map(tuple, found.values())), layout)
    if layout is not None and key in rings.agreed:
        return rings.agreed[key]
    every = rings.all_gather(torch.tensor(list(found.values()), device=rings.device), AGREEMENT)
    whole = dict(zip(found, torch.stack(every).transpose(0, 1).flatten(1).tolist(), strict=True))
    if layout is not None:
        rings.agreed[key] = whole
    return whole


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
