"""Attention tile by tile: gather each tile's keys, one small dense attention under a residual mask, put the rows back.

Softmax with a fixed bias goes through torch's fused CPU kernel, which returns the log-sum-exp; only that is saved, and
the backward recomputes the rest. Working memory is one step of tiles (`tiling.STEP_BYTES`), never Nq·Nk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.backends.tiles.tiling import Group, Tiling
from attnlab.backends.tiles.tokens import Sums, Tokens
from attnlab.problem import Bias

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, *, scale: float | None = None, bias: Bias | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys that its tile lists; on the CPU, differentiable in q, k and v.

        lse_i = log Σ_j exp(scale·q_i·k_j + bias_ij)        out_i = Σ_j exp(scale·q_i·k_j + bias_ij − lse_i) v_j
        j in the tile's key list and seen by i

    Args:
        q, k, v: `(B, H, Nq, D)`, `(B, Hkv, Nk, D)`, `(B, Hkv, Nk, Dv)`.
        tiling: which queries share which keys. Its key lists may differ per batch and key head (then they hold
            units of adjacent tokens: `Lists(index (B, Hkv, T, n), unit)`), so a route chosen from content is a
            tiling too: `Group(queries, keys, seen)` with `seen` broadcastable to `(B, Hkv, T, bq, n·unit)`.
        scale: D^-½ if None.
        bias: added to the scores: a tensor broadcastable to `(B, H, Nq, Nk)` or a function `f(b, h, q, k)` of index
            tensors; gets no gradient here.

    Returns:
        out `(B, H, Nq, Dv)` and lse `(B, H, Nq)`, both differentiable; zeros and −inf for a query without keys.

    Cost: 2·pairs·(D + Dv) FLOPs per head, pairs = `tiling.pairs`; memory O(N) beside the inputs.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _TileAttention.apply(q, k, v, tiling, scale, bias)
    return out, lse


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, scale: float, bias: Bias | None) -> Any:
        out, lse = _run(q, k, v, tiling, scale, bias)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiling, ctx.scale, ctx.bias = tiling, scale, bias
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = _run_backward(grad_out, grad_lse, q, k, v, out, lse, ctx.tiling, ctx.scale, ctx.bias)
        return (*grads, None, None, None)


def _run(
    q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, scale: float, bias: Bias | None
) -> tuple[Tensor, Tensor]:
    value_dim = v.shape[-1]
    q, k, v = _same_width(q, k, v)
    repeat = q.shape[1] // k.shape[1]
    source, keys, values = Tokens(q, repeat), Tokens(k), Tokens(v)
    out = Sums(source, v.shape[-1], q.dtype, zero=not tiling.covers)
    lse = Sums(source, 1, _wide(q.dtype), zero=not tiling.covers)
    if not tiling.covers:
        lse.fill(-math.inf)
    for group in tiling.groups:
        for batch, tiles in group.steps(len(q), _tile_bytes(group, keys, repeat)):
            where = (batch, tiles)
            mask = _mask(group, *where, repeat, keys.heads, q.dtype, bias)
            part, part_lse = _forward(
                source.take(group.queries, *where),
                keys.take(group.keys, *where),
                values.take(group.keys, *where),
                0.0, False, attn_mask=mask, scale=scale,
            )  # fmt: skip
            part_lse = _mark_dead(part_lse, group, mask, bias)
            out.put(group.queries, *where, part)
            lse.put(group.queries, *where, part_lse.unsqueeze(-1))
    return out.total()[..., :value_dim], lse.total()[..., 0]


def _run_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tiling: Tiling, scale: float, bias: Bias | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dim, value_dim = q.shape[-1], v.shape[-1]
    # A query without keys has weight zero everywhere: any finite number does for its log-sum-exp.
    dead = lse == -math.inf
    lse = lse.masked_fill(dead, 0.0)
    if grad_lse is not None:
        # The scores' gradient is  w ⊙ (grad_out·v − Σ grad_out ⊙ out + grad_lse): the last term comes in as one more
        # column of the sum, 1 in out and −grad_lse in grad_out (and 0 in v).
        grad_lse = grad_lse.masked_fill(dead, 0.0)
        v = F.pad(v, (0, 1))
        out = F.pad(out, (0, 1), value=1.0)
        grad_out = torch.cat([grad_out, -grad_lse.unsqueeze(-1).to(grad_out.dtype)], -1)
    q, k, v, out, grad_out = _same_width(q, k, v, out, grad_out)
    repeat = q.shape[1] // k.shape[1]
    source, keys, values = Tokens(q, repeat), Tokens(k), Tokens(v)
    outs, grads, logs = Tokens(out, repeat), Tokens(grad_out, repeat), Tokens(lse.unsqueeze(-1), repeat)
    grad_q = Sums(source, q.shape[-1], q.dtype, zero=not tiling.covers)
    grad_k, grad_v = (Sums(x, q.shape[-1], _wide(q.dtype)) for x in (keys, values))
    for group in tiling.groups:
        for batch, tiles in group.steps(len(q), 2 * _tile_bytes(group, keys, repeat)):
            where = (batch, tiles)
            mask = _mask(group, *where, repeat, keys.heads, q.dtype, bias)
            part_q, part_k, part_v = _backward(
                grads.take(group.queries, *where),
                source.take(group.queries, *where),
                keys.take(group.keys, *where),
                values.take(group.keys, *where),
                outs.take(group.queries, *where),
                logs.take(group.queries, *where).squeeze(-1),
                0.0, False, attn_mask=mask, scale=scale,
            )  # fmt: skip
            grad_q.put(group.queries, *where, part_q)
            grad_k.add(group.keys, *where, part_k)
            grad_v.add(group.keys, *where, part_v)
    return (
        grad_q.total()[..., :dim],
        grad_k.total()[..., :dim].to(k.dtype),
        grad_v.total()[..., :value_dim].to(v.dtype),
    )


def _same_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with their last axis padded to the widest: the fused kernel wants one head dimension."""
    width = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _tile_bytes(group: Group, keys: Tokens, repeat: int) -> int:
    """What one tile needs in a step: its keys and values, its queries, and its mask if it has one of its own."""
    size = keys.x.element_size()
    tokens = 2 * group.keys.length + 2 * group.queries.length * repeat
    needed = tokens * keys.heads * keys.dim * size
    if group.seen is not None and group.seen.shape[2] > 1:
        needed += 4 * group.keys.length * group.queries.length * repeat * group.seen.shape[1]
    return needed


def _mask(
    group: Group, batch: slice, tiles: slice, repeat: int, heads: int, dtype: torch.dtype, bias: Bias | None
) -> Tensor | None:
    """What is added to the scores, `(B'·T' or 1, Hkv or 1, bq·r, bk)`: −inf where a key is not seen, and the bias."""
    seen = group.seen
    if seen is None:
        mask = None
    else:
        mask = seen if group.additive is None else group.additive
        mask = mask if mask.shape[0] == 1 else mask[batch]
        mask = mask if mask.shape[2] == 1 else mask[:, :, tiles]
        if mask.dtype is torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)
        mask = mask.to(dtype).transpose(1, 2)  # (B', T', Hkv, bq, bk)
    if bias is not None:
        # (B', T', Hkv, bq, r, bk)
        added = _take_bias(group, batch, tiles, repeat, heads, bias).to(dtype)
        mask = added if mask is None else mask.unsqueeze(-2) + added
        mask = mask.flatten(-3, -2)
    elif mask is not None and repeat > 1:
        mask = mask.unsqueeze(-2).expand(*mask.shape[:-1], repeat, mask.shape[-1]).flatten(-3, -2)
    if mask is None:
        return None
    if mask.shape[:2] == (1, 1):
        return mask[0]
    b, t = batch.stop - batch.start, tiles.stop - tiles.start
    return mask.expand(b, t, *mask.shape[2:]).flatten(0, 1)


def _take_bias(group: Group, batch: slice, tiles: slice, repeat: int, heads: int, bias: Bias) -> Tensor:
    """The bias of the tiles' pairs, `(B', T', Hkv, bq, r, bk)`."""
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
    added = added.reshape((1,) * (6 - added.dim()) + added.shape)
    return added.expand(*added.shape[-6:-3], group.queries.length, repeat, group.keys.length)


def _mark_dead(lse: Tensor, group: Group, mask: Tensor | None, bias: Bias | None) -> Tensor:
    """−inf in place of the number that the fused kernel gives a query without keys."""
    if mask is None or (group.dead is None and bias is None):
        return lse
    return lse.masked_fill((mask == -math.inf).all(-1), -math.inf)
