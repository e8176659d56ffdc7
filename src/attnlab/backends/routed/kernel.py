"""Attention over flat lists of tiles: gather, scores in place, and sums back; the backward recomputes the scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnlab.backends.routed.plan import Group, Plan

# Scores of one step: what the caches of the cores hold together, with what they are made from.
STEP_BYTES = 4 * 2**20
# Scores are exponentiated as they are if no product of norms can exceed this: e^±60 and sums of it are far from the
# limits of float32.
SAFE = 60.0


def routed_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of `q (B, H, Nq, D)` over the keys that the plan lists; differentiable in q, k and v.

    Returns out `(B, H, Nq, Dv)` and lse `(B, H, Nq)`, both differentiable; zeros and −inf for a query without keys.
    Half precision is computed in float32. Cost: 2·pairs·(D + Dv) FLOPs, memory O(N) beside the inputs.
    """
    out, lse = _RoutedAttention.apply(q, k, v, plan, scale)
    return out, lse


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Any:
        flat = _Flat(q, k, v, plan, scale)
        out, lse = flat.forward()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 5
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        # The scores' gradient is  w ⊙ (grad_out·v − Σ grad_out ⊙ out + grad_lse).
        shift = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        if grad_lse is not None:
            shift = shift - grad_lse
        return (*_Flat(q, k, v, ctx.plan, ctx.scale).backward(grad_out, lse, shift), None, None)


class _Flat:
    """q, k and v as flat units, and the two passes over the tiles."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> None:
        self.plan, self.scale = plan, scale
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.dtype = q.dtype
        self.q_shape, self.kv_shape = (q.shape[0], q.shape[1]), (k.shape[0], k.shape[1])
        self.dim, self.value_dim = q.shape[-1], v.shape[-1]
        self.q, self.k, self.v = self._queries(q), plan.keys.pad(k), plan.keys.pad(v)
        self.buffers: dict[str, Tensor] = {}

    def _queries(self, x: Tensor) -> Tensor:
        """Flat units of the queries, and one more that nobody is, where tiles are padded with it."""
        flat = self.plan.queries.pad(x)
        return flat if self.plan.once else torch.cat([flat, flat.new_zeros(1, flat.shape[1])])

    def _steps(self, group: Group) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Queries, keys and mask of some tiles at a time."""
        tiles, n = group.keys.shape
        rows = group.queries.numel() // tiles * self.plan.queries.size
        each = rows * n * self.plan.keys.size * self.wide.itemsize
        step = max(torch.get_num_threads() if each < STEP_BYTES else 1, STEP_BYTES // each)
        for at in range(0, tiles, step):
            mask = group.mask
            if mask is not None and len(mask) > 1:
                mask = mask[at : at + step]
            yield group.queries[at : at + step], group.keys[at : at + step], mask

    def _space(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Working memory that all steps share: fresh memory for each would cost as much as computing in it."""
        size, dtype = math.prod(shape), dtype or self.wide
        found = self.buffers.get(name)
        if found is None or len(found) < size:
            found = self.buffers[name] = torch.empty(size, dtype=dtype, device=self.q.device)
        return found[:size].view(shape)

    def _take(self, name: str, units: Tensor, listed: Tensor, dim: int) -> Tensor:
        """The tokens of the listed units, `(T, tokens, dim)`, in the precision of the computation."""
        space = self._space(name, listed.numel(), units.shape[1], dtype=units.dtype)
        taken = torch.index_select(units, 0, listed.flatten(), out=space)
        return taken.view(len(listed), -1, dim).to(self.wide)

    def _product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self._space(name, len(a), a.shape[1], b.shape[2]))

    def _scores(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, keys, and the scores of some tiles."""
        q = self._take("q", self.q, queries, self.dim).mul_(self.scale)
        k = self._take("k", self.k, keys, self.dim)
        scores = self._product("scores", q, k.transpose(1, 2))
        if mask is not None:
            scores[..., -mask.shape[-1] :] += mask
        return q, k, scores

    def _highest(self) -> Tensor | None:
        """A number per query that its scores do not exceed by much: None (zero) where no score can be large."""
        lengths = [
            torch.linalg.vector_norm(x.view(-1, self.dim), dim=-1).amax().to(self.wide) for x in (self.q, self.k)
        ]
        if bool(abs(self.scale) * lengths[0] * lengths[1] <= SAFE):
            return None
        highest = torch.full((len(self.q), self.plan.queries.size), -math.inf, dtype=self.wide, device=self.q.device)
        for group in self.plan.groups:
            for queries, keys, mask in self._steps(group):
                top = self._scores(queries, keys, mask)[2].amax(-1).view(-1, self.plan.queries.size)
                if self.plan.once:
                    highest.index_copy_(0, queries, top)
                else:
                    highest.view(-1).scatter_reduce_(0, queries.flatten(), top.view(-1), "amax")
        return highest.masked_fill_(highest == -math.inf, 0.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        size = self.plan.queries.size
        highest = self._highest()
        out = torch.zeros(len(self.q), size * self.value_dim, dtype=self.wide, device=self.q.device)
        total = torch.zeros(len(self.q), size, dtype=self.wide, device=self.q.device)
        for group in self.plan.groups:
            for queries, keys, mask in self._steps(group):
                scores = self._scores(queries, keys, mask)[2]
                if highest is not None:
                    scores -= self._take("highest", highest, queries, 1)
                weights = scores.exp_()
                self._put(total, queries, weights.sum(-1))
                v = self._take("v", self.v, keys, self.value_dim)
                self._put(out, queries, self._product("out", weights, v))
        dead = total == 0
        lse = total.log() if highest is None else total.log() + highest
        out = out.view(-1, self.value_dim).div_(total.masked_fill_(dead, 1.0).view(-1, 1))
        used = self.plan.queries
        rows = math.prod(self.q_shape) * used.count
        out = used.unpad(out.view(len(self.q), -1)[:rows], self.q_shape, self.value_dim)
        lse = used.unpad(lse[:rows], self.q_shape, 1).squeeze(-1)
        return out.to(self.dtype).contiguous(), lse.contiguous()

    def _put(self, units: Tensor, listed: Tensor, part: Tensor) -> None:
        part = part.reshape(listed.numel(), -1)
        if self.plan.once:
            units.index_copy_(0, listed.flatten(), part)
        else:
            units.index_add_(0, listed.flatten(), part)

    def backward(self, grad_out: Tensor, lse: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A query without keys has weight zero everywhere: any finite number does for its log-sum-exp.
        lse = lse.masked_fill(lse == -math.inf, 0.0)
        grads = self._queries(grad_out)
        lse, shift = (self._queries(x.unsqueeze(-1)) for x in (lse, shift))
        grad_q = torch.zeros(self.q.shape, dtype=self.wide, device=self.q.device)
        grad_k = torch.zeros(self.k.shape, dtype=self.wide, device=self.q.device)
        grad_v = torch.zeros(self.v.shape, dtype=self.wide, device=self.q.device)
        for group in self.plan.groups:
            for queries, keys, mask in self._steps(group):
                q, k, scores = self._scores(queries, keys, mask)
                v = self._take("v", self.v, keys, self.value_dim)
                grad = self._take("grad", grads, queries, self.value_dim)
                scores -= self._take("lse", lse, queries, 1)
                weights = scores.exp_()
                self._add(grad_v, keys, self._product("out", weights.transpose(1, 2), grad))
                slope = self._product("slope", grad, v.transpose(1, 2))
                slope -= self._take("shift", shift, queries, 1)
                slope *= weights
                self._put(grad_q, queries, self._product("out", slope, k))
                self._add(grad_k, keys, self._product("out", slope.transpose(1, 2), q))
        rows = math.prod(self.q_shape) * self.plan.queries.count
        grad_q = self.plan.queries.unpad(grad_q[:rows], self.q_shape, self.dim) * self.scale
        grad_k = self._back(grad_k, self.dim)
        return grad_q.to(self.dtype), grad_k, self._back(grad_v, self.value_dim)

    @staticmethod
    def _add(units: Tensor, listed: Tensor, part: Tensor) -> None:
        units.index_add_(0, listed.flatten(), part.view(listed.numel(), -1))

    def _back(self, units: Tensor, dim: int) -> Tensor:
        return self.plan.keys.unpad(units, self.kv_shape, dim).to(self.dtype)
