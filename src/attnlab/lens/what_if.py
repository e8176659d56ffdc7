"""What if another token stood there? Replacing tokens, writing on from there, and how much comes out alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from attnlab.lens.needles import write


@torch.no_grad()
def alternatives(model: nn.Module, ids: Tensor, position: int, count: int = 1) -> list[int]:
    """The `count` likeliest tokens at `position` of a text `(N)` other than the one that is there, best first."""
    if ids.dim() != 1 or not 0 < position < len(ids):
        raise ValueError(f"position must lie in 1 to {len(ids) - 1} of a text (N), got {position}")
    out = model(ids[None, :position])
    logits = (out if isinstance(out, Tensor) else out.logits)[0, -1].clone()
    logits[ids[position]] = -torch.inf
    return logits.topk(count).indices.tolist()


def reroll(
    model: nn.Module, ids: Tensor, position: int, token: int, *, start: int | None = None, new: int | None = None
) -> list[int]:
    """What a model writes, greedily, with another `token` at `position` of a text `(N)`.

    Args:
        start: from where it writes: right after the token, or later, where what lies between is kept.
        new: how many tokens; as many as the text had from there on, if None.
    """
    start = position + 1 if start is None else start
    if ids.dim() != 1 or not 0 <= position < start <= len(ids):
        raise ValueError(f"position < start ≤ {len(ids)} must hold in a text (N), got {position} and {start}")
    changed = ids[:start].clone()
    changed[position] = token
    return write(model, changed, len(ids) - start if new is None else new)


def jaccard(one: Sequence[int], other: Sequence[int], *, skip: Collection[int] = ()) -> float:
    """What share of the different tokens of two texts is in both, but for those to `skip` (function words): 0 to 1.

    Two texts without any are alike. The paper's measure of how much a changed token changes what follows: less is left
    alike where the token had influence. Source: arXiv 2510.13554.
    """
    a, b = set(one) - set(skip), set(other) - set(skip)
    return len(a & b) / len(a | b) if a | b else 1.0
