"""Fewer tokens: those that the class token attends to are kept, the others become one (EViT)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Reorganized(NamedTuple):
    """What is left of a sequence, and of which places it was."""

    tokens: Tensor  # (B, P + keep [+ 1], C)
    places: Tensor  # (B, keep): which of the N patches, in order of their scores


def budget(tokens: int, rate: float) -> int:
    """How many of so many tokens a keep rate keeps: ⌈rate · tokens⌉."""
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], got {rate}")
    return math.ceil(rate * tokens)


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """How much the class token, the first, attends to each patch, over all heads: (B, H, 1 + N, D) twice to (B, N).

    mean_h softmax(q_0·k / √D), without the class token's own share. Only this row of the weights is computed: O(N·C).
    """
    scores = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT
    return scores.softmax(-1).mean(1)[:, 0, 1:]


def strongest(score: Tensor, keep: int) -> Tensor:
    """The places of the `keep` largest of `score` (B, N), the largest first: (B, keep)."""
    if not 1 <= keep <= score.shape[1]:
        raise ValueError(f"keep must lie in 1 to the number of tokens {score.shape[1]}, got {keep}")
    return score.topk(keep, 1).indices


def take(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of `x` (B, N, C) at `places` (B, K): (B, K, C)."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def reorganize(x: Tensor, score: Tensor, keep: int, *, fuse: bool = True) -> Reorganized:
    """The first P tokens, the `keep` patches of the highest score, and the others as one: (B, P + N, C), (B, N).

        x ← [x_first, x_top, Σ_{j not in top} score_j x_j]

    P is what the scores leave over, 1 for a class token. The last token is there with `fuse`. Its weights are the
    scores as they are: they do not sum to 1, so that little is left of what hardly anybody looked at. It is one
    product, without gathering the others. Cost O(N·C).
    Source: arXiv 2202.07800.
    """
    if x.dim() != 3 or score.dim() != 2 or len(score) != len(x) or score.shape[1] >= x.shape[1]:
        raise ValueError(f"score must be (B, N) for x (B, P + N, C), got {tuple(score.shape)} and {tuple(x.shape)}")
    first, patches = x.split([x.shape[1] - score.shape[1], score.shape[1]], 1)
    places = strongest(score, keep)
    parts = [first, take(patches, places)]
    if fuse:
        parts.append(score.scatter(1, places, 0.0).unsqueeze(1) @ patches)
    return Reorganized(torch.cat(parts, 1), places)
