"""Attention tile by tile: gather each tile's keys, one small dense attention under a residual mask, put the rows back.

Softmax goes through torch's fused CPU kernel, which returns the log-sum-exp; only that is saved, and the backward
recomputes the rest. Working memory is one step of tiles (`tiling.STEP_BYTES`), never Nq·Nk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.backends.tiles.lookups import TileLookups
from attnlab.backends.tiles.masks import additive_mask
from attnlab.backends.tiles.tiling import Group, Tiling
from attnlab.backends.tiles.tokens import Keys, Queries, Sums, by_head, by_token
from attnlab.problem import Bias, Lookup

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
            tensors; of these, only a `Lookup` gets its gradient here.

    Returns:
        out `(B, H, Nq, Dv)` and lse `(B, H, Nq)`, both differentiable; zeros and −inf for a query without keys.

    Cost: 2·pairs·(D + Dv) FLOPs per head, pairs = `tiling.pairs`; memory O(N) beside the inputs. Differentiable once.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    table = bias.table if isinstance(bias, Lookup) else None
    out, lse = _TileAttention.apply(q, k, v, table, tiling, scale, bias)
    return out, lse


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, tiling: Tiling, scale: float, bias: Bias | None
    ) -> Any:
        call = Call(q, k, v, tiling, scale, bias)
        arranged = call.arrange(q)
        k, v = call.gatherable(k), call.gatherable(v)
        call.look_up()
        out, lse = call.forward(arranged, k, v)
        call.looked = None
        ctx.save_for_backward(arranged, k, v, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return call.restore(out)[..., : call.value_dim], call.restore(lse)[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        call = ctx.call
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        q, k, v, out, lse = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad_out is None else call.arrange(grad_out)
        if grad_lse is not None:
            grad_lse = call.arrange(grad_lse.unsqueeze(-1), 1)
        table = ctx.needs_input_grad[3]
        call.look_up()
        grads = call.backward(grad, grad_lse, q, k, v, out, lse, table=table)
        grad_table = call.looked.gradient().to(call.dtype) if table and call.looked is not None else None
        call.looked = None
        return (*grads, grad_table, None, None, None)


class Call:
    """One call of the kernel: everything but the values. Inside, queries are in the tiling's order."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, scale: float, bias: Bias | None) -> None:
        self.tiling, self.scale, self.bias = tiling, scale, bias
        self.batch, self.kv_heads, self.repeat, self.dtype = len(k), k.shape[1], q.shape[1] // k.shape[1], q.dtype
        self.dim, self.value_dim = q.shape[-1], v.shape[-1]
        self.looked: TileLookups | None = None
        # The fused kernel wants one head dimension for all.
        self.width = max(self.dim, self.value_dim)

    def look_up(self) -> None:
        """Make ready the table of the bias, if it has one."""
        self.looked = TileLookups(self.bias, self.kv_heads, self.dtype) if isinstance(self.bias, Lookup) else None

    def arrange(self, x: Tensor, width: int | None = None) -> Tensor:
        """`x (B, H, Nq, D)` as `(B, Nq, r, Hkv, width)` in the tiling's order."""
        x = by_token(_widen(x, self.width if width is None else width), self.repeat)
        return x if self.tiling.order is None else x.index_select(1, self.tiling.order)

    def gatherable(self, x: Tensor) -> Tensor:
        """`x (B, Hkv, N, D)`, with each token's heads next to each other in memory if tiles gather tokens."""
        gathered = any(g.keys.shared and g.keys.run is None for g in self.tiling.groups)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if gathered else x

    def restore(self, x: Tensor) -> Tensor:
        """Undo `arrange`, except for the width."""
        return by_head(x if self.tiling.inverse is None else x.index_select(1, self.tiling.inverse))

    def steps(self, keys: Keys, *, backward: bool) -> Iterator[tuple[Group, tuple[int, slice, slice], Tensor | None]]:
        """Group, place of some of its tiles, and the rows of their keys."""
        for group, first in zip(self.tiling.groups, self.tiling.firsts, strict=True):
            for batch, tiles in group.steps(self.batch, self._bytes(group, backward=backward)):
                yield group, (first, batch, tiles), keys.rows(group.keys, batch, tiles)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out `(B, Nq, r, Hkv, width)` and lse `(B, Nq, r, Hkv, 1)` from arranged queries."""
        queries, keys, values = Queries(q), Keys(_widen(k, self.width)), Keys(_widen(v, self.width))
        out = Queries(torch.empty(q.shape, dtype=q.dtype, device=q.device))
        lse = Queries(torch.empty((*q.shape[:-1], 1), dtype=_wide(q.dtype), device=q.device))
        out.x[:, self.tiling.listed :] = 0.0
        lse.x[:, self.tiling.listed :] = -math.inf
        for group, place, rows in self.steps(keys, backward=False):
            mask = self._mask(group, *place[1:])
            part, part_lse = _forward(
                queries.take(group, *place), keys.take(group.keys, *place[1:], rows),
                values.take(group.keys, *place[1:], rows), 0.0, group.causal, attn_mask=mask, scale=self.scale,
            )  # fmt: skip
            if mask is not None and (group.dead or self._bias_hides()):
                # The fused kernel gives a query without keys zeros, but some finite lse.
                part_lse = part_lse.masked_fill((mask == -math.inf).all(-1), -math.inf)
            out.put(group, *place, part)
            lse.put(group, *place, part_lse.unsqueeze(-1))
        return out.x, lse.x

    def backward(
        self, grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, table: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v from those of the output and the lse; all but k and v arranged.

        With `table`, the gradient of the looked-up table is summed up too.
        """
        # A query without keys has weight zero everywhere: any finite number does for its log-sum-exp.
        dead = lse == -math.inf
        lse, width = lse.masked_fill(dead, 0.0), self.width
        if grad_lse is not None:
            # The scores' gradient is  w ⊙ (grad·v − Σ grad ⊙ out + grad_lse): the last term comes in as one more
            # column of the sum, 1 in out and −grad_lse in grad (and 0 in v).
            width += 1
            out, column = F.pad(out, (0, 1), value=1.0), -grad_lse.masked_fill(dead, 0.0)
            grad = torch.cat([grad, column.to(grad.dtype)], -1)
        q = _widen(q, width)
        queries, outs, grads, logs = (Queries(x) for x in (q, out, grad, lse))
        keys, values = Keys(_widen(k, width)), Keys(_widen(v, width))
        grad_q = Queries(torch.empty(q.shape, dtype=q.dtype, device=q.device))
        grad_q.x[:, self.tiling.listed :] = 0.0
        grad_k, grad_v = Sums(keys, _wide(q.dtype)), Sums(values, _wide(q.dtype))
        for group, place, rows in self.steps(keys, backward=True):
            given = (
                grads.take(group, *place), queries.take(group, *place), keys.take(group.keys, *place[1:], rows),
                values.take(group.keys, *place[1:], rows), outs.take(group, *place),
                logs.take(group, *place).squeeze(-1),
            )  # fmt: skip
            mask = self._mask(group, *place[1:])
            if table and self.looked is not None and mask is not None:
                part_q, part_k, part_v, grad_mask = _backward_with_mask(*given, mask, self.scale)
                self.looked.add(group, _count(place[1]), place[2], grad_mask)
            else:
                part_q, part_k, part_v = _backward(*given, 0.0, group.causal, attn_mask=mask, scale=self.scale)
            grad_q.put(group, *place, part_q)
            grad_k.add(group.keys, *place[1:], rows, part_k)
            grad_v.add(group.keys, *place[1:], rows, part_v)
        return (
            self.restore(grad_q.x)[..., : self.dim],
            grad_k.total()[..., : self.dim].to(self.dtype),
            grad_v.total()[..., : self.value_dim].to(self.dtype),
        )

    def _bias_hides(self) -> bool:
        """Whether the bias may be −inf for all keys of a query."""
        return self.bias is not None if self.looked is None else self.looked.hides

    def _mask(self, group: Group, batch: slice, tiles: slice) -> Tensor | None:
        if self.looked is not None:
            return self.looked.mask(group, _count(batch), tiles)
        return additive_mask(group, batch, tiles, self.repeat, self.kv_heads, self.dtype, self.bias)

    def _bytes(self, group: Group, *, backward: bool) -> int:
        """What a step writes for each tile: gathered keys, results, and its mask if it has one of its own."""
        rows = group.queries.length * self.repeat
        copied = (group.keys.run is None) + backward
        needed = (2 * copied * group.keys.length + rows) * self.kv_heads * self.width
        if self.bias is not None or (group.seen is not None and group.seen.shape[2] > 1):
            needed += group.keys.length * rows * (1 if self.bias is None else self.kv_heads)
        return needed * self.dtype.itemsize


def _backward_with_mask(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the fused backward computes, and the gradient of the mask, which it keeps to itself."""
    wide = _wide(q.dtype)
    grad, q, k, v = (x.to(wide) for x in (grad, q, k, v))
    weights = (q @ k.mT).mul_(scale).add_(mask).sub_(lse.unsqueeze(-1)).exp_()
    grad_mask = (grad @ v.mT).sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
    return (grad_mask @ k) * scale, (grad_mask.mT @ q) * scale, weights.mT @ grad, grad_mask


def _count(part: slice) -> int:
    return part.stop - part.start


def _widen(x: Tensor, width: int) -> Tensor:
    """`x` with its last axis padded by zeros: the fused kernel wants one head dimension."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
