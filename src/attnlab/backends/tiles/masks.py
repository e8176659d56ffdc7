"""What a step of tiles adds to its scores: −inf where a key is not seen, and the bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnlab.backends.tiles.tiling import Group
from attnlab.problem import Bias


def additive_mask(
    group: Group, batch: slice, tiles: slice, repeat: int, heads: int, dtype: torch.dtype, bias: Bias | None
) -> Tensor | None:
    """`(B'·T' or 1, Hkv or 1, bq·r, bk)`, `heads` key heads of `repeat` query heads each; None if nothing is added."""
    mask = group.seen if group.additive is None else group.additive
    if mask is not None:
        mask = mask if mask.shape[0] == 1 else mask[batch]
        mask = mask if mask.shape[2] == 1 else mask[:, :, tiles]
        if mask.dtype is torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)
        mask = mask.to(dtype).transpose(1, 2).unsqueeze(-2)  # (B', T', Hkv, bq, 1, bk)
    if bias is not None:
        added = _tile_bias(group, batch, tiles, repeat, heads, bias).to(dtype)
        mask = added if mask is None else mask + added
    if mask is None:
        return None
    mask = mask.expand(*mask.shape[:3], group.queries.length, repeat, group.keys.length).flatten(3, 4)
    if mask.shape[:2] == (1, 1):
        return mask[0]
    return mask.expand(batch.stop - batch.start, tiles.stop - tiles.start, *mask.shape[2:]).flatten(0, 1)


def _tile_bias(group: Group, batch: slice, tiles: slice, repeat: int, heads: int, bias: Bias) -> Tensor:
    """The bias of the tiles' pairs, broadcastable to `(B', T', Hkv, bq, r, bk)`."""
    at = group.keys.index.device
    q = group.queries.tokens(batch, tiles).transpose(1, 2)[..., :, None, None]
    k = group.keys.tokens(batch, tiles).transpose(1, 2)[..., None, None, :]
    b = torch.arange(batch.start, batch.stop, device=at).view(-1, 1, 1, 1, 1, 1)
    h = torch.arange(heads * repeat, device=at).view(heads, 1, repeat, 1)
    if isinstance(bias, Tensor):
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
        zero = torch.zeros((), dtype=torch.long, device=at)
        added = bias[tuple(i if n > 1 else zero for n, i in zip(bias.shape, (b, h, q, k), strict=True))]
    else:
        added = bias(b, h, q, k)
    return added.reshape((1,) * (6 - added.dim()) + added.shape)
