"""Tile attention in plain tensor operations: any weighting, dropout, trained biases, any device; torch differentiates.

Each step of tiles is checkpointed when gradients are needed, so memory stays that of one step here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnlab.backends.tiles.tiling import Group, Tiling
from attnlab.problem import Problem


@dataclass(frozen=True, eq=False)
class Tile:
    """Some tiles of one shape: their token numbers, and what their pairs score.

    `queries (B|1, Hkv|1, 1, T, bq)`, `keys (B|1, Hkv|1, 1, T, bk)`, `scores (B, Hkv, r, T, bq, bk)` and `seen`, which
    broadcasts to them; `values (B, Hkv, 1, T, bk, Dv)`. Query head h is (h // r, h % r).
    """

    queries: Tensor
    keys: Tensor
    scores: Tensor
    seen: Tensor
    values: Tensor


def steps(problem: Problem, tiling: Tiling) -> Iterator[tuple[Group, slice]]:
    """The tiling in pieces whose scores fit the cache, or one tile for all batches and heads if that is more."""
    # About four matrices as large as the scores live at once.
    size = 16 * problem.batch * problem.heads
    for group in tiling.groups:
        pairs = size * group.queries.length * group.keys.length
        for _, tiles in group.steps(1, pairs):
            yield group, tiles


def score(problem: Problem, q: Tensor, k: Tensor, v: Tensor, group: Group, tiles: slice) -> Tile:
    """The scores of some tiles: scale · q·k + bias, in at least float32. `problem.bias` may be trained."""
    every = slice(0, problem.batch)
    wide = torch.promote_types(problem.dtype, torch.float32)
    queries, keys = (lists.tokens(every, tiles) for lists in (group.queries, group.keys))
    qt = _take(q.unflatten(1, (problem.kv_heads, problem.groups)), queries[:, :, None]).to(wide)
    kt, vt = (_take(x.unsqueeze(2), keys[:, :, None]).to(wide) for x in (k, v))
    scores = problem.scale * qt @ kt.transpose(-1, -2)
    at_q, at_k = queries[:, :, None, :, :, None], keys[:, :, None, :, None, :]
    if problem.bias is not None:
        scores = scores + _bias(problem, at_q, at_k).to(wide)
    seen = group.seen
    if seen is None:
        seen = torch.ones((), dtype=torch.bool, device=q.device).expand(1, 1, 1, 1, 1, 1)
    else:
        seen = (seen if seen.shape[2] == 1 else seen[:, :, tiles])[:, :, None]
    return Tile(queries[:, :, None], keys[:, :, None], scores, seen, vt)


def plain_attention(problem: Problem, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """out `(B, H, Nq, Dv)` and lse `(B, H, Nq)` of any problem (lse is −inf where no key is seen)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, group: Group, tiles: slice) -> tuple[Tensor, Tensor]:
        tile = score(problem, q, k, v, group, tiles)
        weights = problem.weighting.weights(tile.scores, tile.seen, problem.nk)
        if problem.dropout:
            weights = F.dropout(weights, problem.dropout)
        dead = ~tile.seen.any(-1)
        lse = tile.scores.masked_fill(~tile.seen, -math.inf).masked_fill(dead[..., None], 0.0).logsumexp(-1)
        return weights @ tile.values, lse.masked_fill(dead, -math.inf)

    outs, lses, places = [], [], []
    for group, tiles in steps(problem, tiling):
        if problem.needs_grad:
            out, lse = checkpoint(attend, q, k, v, group, tiles, use_reentrant=False)
        else:
            out, lse = attend(q, k, v, group, tiles)
        outs.append(out.flatten(3, 4))
        lses.append(lse.flatten(3, 4))
        places.append(group.queries.tokens(slice(0, 1), tiles).flatten())
    # Queries in no tile see no key: they take the extra row at the end.
    total = sum(map(len, places))
    place = torch.full((problem.nq,), total, device=q.device)
    if places:
        place[torch.cat(places)] = torch.arange(total, device=q.device)
    wide = torch.promote_types(problem.dtype, torch.float32)
    shape = (problem.batch, problem.kv_heads, problem.groups, 1)
    outs.append(torch.zeros(*shape, problem.value_dim, dtype=wide, device=q.device))
    lses.append(torch.full(shape, -math.inf, dtype=wide, device=q.device))
    out = torch.cat(outs, 3).index_select(3, place).flatten(1, 2)
    return out.to(problem.dtype), torch.cat(lses, 3).index_select(3, place).flatten(1, 2)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """The listed tokens `(B|1, Hkv|1, 1, T, n)` of `x (B, Hkv, r, N, D)`: `(B, Hkv, r, T, n, D)`."""
    if tokens.shape[:2] == (1, 1):
        return x.index_select(3, tokens.flatten()).unflatten(3, tokens.shape[3:])
    index = tokens.flatten(3).unsqueeze(-1).expand(*x.shape[:3], -1, x.shape[-1])
    return x.gather(3, index).unflatten(3, tokens.shape[3:])


def _bias(problem: Problem, q: Tensor, k: Tensor) -> Tensor:
    """The bias of pairs: tokens `q (B|1, Hkv|1, 1, T, bq, 1)` and `k (B|1, Hkv|1, 1, T, 1, bk)`."""
    b = torch.arange(problem.batch, device=q.device).view(-1, 1, 1, 1, 1, 1)
    h = torch.arange(problem.heads, device=q.device).view(problem.kv_heads, problem.groups, 1, 1, 1)
    if not isinstance(problem.bias, Tensor):
        return problem.bias(b, h, q, k)  # type: ignore[misc]
    bias = problem.bias.reshape((1,) * (4 - problem.bias.dim()) + problem.bias.shape)
    zero = torch.zeros((), dtype=torch.long, device=q.device)
    return bias[tuple(i if n > 1 else zero for n, i in zip(bias.shape, (b, h, q, k), strict=True))]
