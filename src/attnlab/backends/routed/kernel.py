"""Attention over flat lists of tiles: gather, scores in place, and sums back; the backward recomputes the scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlab.backends.routed.plan import Group, Plan
from attnlab.weightings import SOFTMAX, Elementwise, Weighting

# Scores of one step and core: with what they are made from, they stay in its second-level cache.
STEP_BYTES = 2**20
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# Scores are exponentiated as they are if no product of norms can exceed this: e^±60 and sums of it are far from the
# limits of float32.
SAFE = 60.0


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, weighting: Weighting = SOFTMAX, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Attention of `q (B, H, Nq, D)` over the keys that the plan lists; differentiable in q, k and v.

    Returns out `(B, H, Nq, Dv)`, zeros for a query without keys, and for softmax the differentiable lse `(B, H, Nq)`.
    Half precision is computed in float32. Cost: 2·pairs·(D + Dv) FLOPs, memory O(N) beside the inputs.
    """
    seed = int(torch.randint(2**62, ())) if dropout else 0
    how = _How(scale, weighting, dropout, seed)
    out, lse = _RoutedAttention.apply(q, k, v, plan, how)
    return out, lse if how.normalised else None


@dataclass(frozen=True)
class _How:
    """What is made of a product of a query and a key."""

    scale: float
    weighting: Weighting
    dropout: float
    seed: int

    @property
    def normalised(self) -> bool:
        return self.weighting.normalised


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, how: _How) -> Any:
        out, lse = _Flat(q, k, v, plan, how).forward()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.how = plan, how
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 5
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        flat = _Flat(q, k, v, ctx.plan, ctx.how)
        if grad_lse is None and flat.fused:
            return (*flat.fused_backward(grad_out, out, lse), None, None)
        # The scores' gradient is  w ⊙ (grad_out·v − Σ grad_out ⊙ out + grad_lse).
        shift = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        if grad_lse is not None:
            shift = shift - grad_lse
        return (*flat.backward(grad_out, lse, shift), None, None)


class _Flat:
    """Scaled q, k and v as flat tokens, and the two passes over the tiles."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, how: _How) -> None:
        self.plan, self.how = plan, how
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.dtype, self.device = q.dtype, q.device
        self.q_shape, self.kv_shape = (q.shape[0], q.shape[1]), (k.shape[0], k.shape[1])
        self.q, self.k, self.v = self._queries(q.to(self.wide) * how.scale), plan.keys.pad(k), plan.keys.pad(v)
        self.buffers: dict[str, Tensor] = {}
        # Both passes drop the same weights: they visit the tiles in the same order.
        self.random = torch.Generator(self.device).manual_seed(how.seed) if how.dropout else None

    def _queries(self, x: Tensor) -> Tensor:
        """The queries' tokens, and one more that nobody is, with which tiles of single queries are filled up."""
        flat = self.plan.queries.pad(x)
        return flat if self.plan.queries.size > 1 else torch.cat([flat, flat.new_zeros(1, flat.shape[1])])

    def _results(self, flat: Tensor) -> Tensor:
        """Back from `_queries`."""
        count = math.prod(self.q_shape) * self.plan.queries.count * self.plan.queries.size
        return self.plan.queries.unpad(flat[:count], self.q_shape)

    def _zeros(self, like: Tensor, dim: int | None = None) -> Tensor:
        return torch.zeros(len(like), like.shape[1] if dim is None else dim, dtype=self.wide, device=self.device)

    def _steps(self) -> Iterator[Group]:
        """The groups, a few tiles at a time: a multiple of the threads if a tile is small."""
        threads = torch.get_num_threads()
        for group in self.plan.groups:
            rows, columns = group.shape
            step = max(1, STEP_BYTES // (rows * columns * self.wide.itemsize)) * threads
            for at in range(0, len(group.keys), step):
                hidden = group.hidden
                hidden = hidden if hidden is None or len(hidden) == 1 else hidden[at : at + step]
                listed = group.queries[at : at + step], group.keys[at : at + step]
                yield Group(*listed, group.rows, group.columns, hidden)

    def _space(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Working memory that all steps share: fresh memory for each would cost as much as computing in it."""
        size, dtype = math.prod(shape), dtype or self.wide
        found = self.buffers.get(name)
        if found is None or len(found) < size:
            found = self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return found[:size].view(shape)

    def _take(self, name: str, tokens: Tensor, listed: Tensor, unit: int) -> Tensor:
        """The tokens of the listed units, `(T, tokens, D)`, in the precision of the computation."""
        units = tokens.view(-1, unit * tokens.shape[1])
        space = self._space(name, listed.numel(), units.shape[1], dtype=units.dtype)
        taken = torch.index_select(units, 0, listed.flatten(), out=space)
        return taken.view(len(listed), -1, tokens.shape[1]).to(self.wide)

    @staticmethod
    def _add(tokens: Tensor, listed: Tensor, unit: int, part: Tensor) -> None:
        """Add `part (T, tokens, D)` to the listed units."""
        part = part.reshape(listed.numel(), -1)
        tokens.view(-1, part.shape[1]).index_add_(0, listed.flatten(), part)

    def _product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self._space(name, len(a), a.shape[1], b.shape[2]))

    def _scores(self, tiles: Group) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, keys, and the scores of some tiles."""
        q = self._take("q", self.q, tiles.queries, tiles.rows)
        k = self._take("k", self.k, tiles.keys, tiles.columns)
        return q, k, self._product("scores", q, k.transpose(1, 2))

    def _weights(self, tiles: Group, scores: Tensor, shift: Tensor | None) -> Tensor:
        """exp(scores − shift of the query) in place, or what another weighting makes of the scores."""
        weighting = self.how.weighting
        if isinstance(weighting, Elementwise):
            weights = weighting.apply(scores, self.plan.keys.blocks.length)
        else:
            if shift is not None:
                scores -= self._take("shift", shift, tiles.queries, tiles.rows)
            weights = scores.exp_()
        # Only now, since exp(−inf) takes ten times as long as exp of a number.
        return weights if tiles.hidden is None else weights.masked_fill_(tiles.hidden, 0.0)

    def _slope(self, tiles: Group, scores: Tensor, weights: Tensor, grad: Tensor, shift: Tensor) -> Tensor:
        """The gradient of the scores in place of that of the weights."""
        weighting = self.how.weighting
        if isinstance(weighting, Elementwise):
            grad *= weighting.derivative(scores, weights, self.plan.keys.blocks.length)
            return grad if tiles.hidden is None else grad.masked_fill_(tiles.hidden, 0.0)
        grad -= self._take("shift", shift, tiles.queries, tiles.rows)
        return grad.mul_(weights)

    def _kept(self, like: Tensor) -> Tensor | None:
        """What dropout multiplies the next tiles' weights by."""
        if self.random is None:
            return None
        keep = 1 - self.how.dropout
        return torch.empty_like(like).bernoulli_(keep, generator=self.random).div_(keep)

    def _highest(self) -> Tensor | None:
        """The highest score of each query; None where no score can be so large that it had to be subtracted."""
        if not self.how.normalised:
            return None
        longest = [torch.linalg.vector_norm(x, dim=-1).amax().item() for x in (self.q, self.k)]
        if longest[0] * longest[1] <= SAFE:
            return None
        highest = self._zeros(self.q, 1).fill_(-math.inf)
        for tiles in self._steps():
            scores = self._scores(tiles)[2]
            if tiles.hidden is not None:
                scores.masked_fill_(tiles.hidden, -math.inf)
            top = scores.amax(-1).flatten()
            rows = tiles.queries[..., None] * tiles.rows + torch.arange(tiles.rows, device=self.device)
            highest.view(-1).scatter_reduce_(0, rows.flatten(), top, "amax")
        return highest.masked_fill_(highest == -math.inf, 0.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        highest = self._highest()
        out, total = self._zeros(self.q, self.v.shape[1]), self._zeros(self.q, 1)
        for tiles in self._steps():
            weights = self._weights(tiles, self._scores(tiles)[2], highest)
            if self.how.normalised:
                self._add(total, tiles.queries, tiles.rows, weights.sum(-1))
            kept = self._kept(weights)
            weights = weights if kept is None else weights * kept
            v = self._take("v", self.v, tiles.keys, tiles.columns)
            self._add(out, tiles.queries, tiles.rows, self._product("out", weights, v))
        lse = total.log() if highest is None else total.log() + highest
        out.div_(total.masked_fill_(total == 0, 1.0))
        return self._results(out).to(self.dtype).contiguous(), self._results(lse).squeeze(-1).contiguous()

    def backward(self, grad_out: Tensor, lse: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A query without keys has weight zero everywhere: any finite number does for its log-sum-exp.
        lse = lse.masked_fill(lse == -math.inf, 0.0)
        grads = self._queries(grad_out)
        lse, shift = (self._queries(x.unsqueeze(-1)) for x in (lse, shift))
        grad_q, grad_k, grad_v = (self._zeros(x) for x in (self.q, self.k, self.v))
        for tiles in self._steps():
            q, k, scores = self._scores(tiles)
            v = self._take("v", self.v, tiles.keys, tiles.columns)
            grad = self._take("grad", grads, tiles.queries, tiles.rows)
            weights = self._weights(tiles, scores, lse)
            kept = self._kept(weights)
            used = weights if kept is None else weights * kept
            self._add(grad_v, tiles.keys, tiles.columns, self._product("out", used.transpose(1, 2), grad))
            slope = self._product("slope", grad, v.transpose(1, 2))
            slope = slope if kept is None else slope.mul_(kept)
            slope = self._slope(tiles, scores, weights, slope, shift)
            self._add(grad_q, tiles.queries, tiles.rows, self._product("out", slope, k))
            self._add(grad_k, tiles.keys, tiles.columns, self._product("out", slope.transpose(1, 2), q))
        return self._gradients(grad_q, grad_k, grad_v)

    @property
    def fused(self) -> bool:
        """Whether torch's fused backward takes the problem."""
        return self.how.normalised and self.random is None and self.q.shape[1] == self.v.shape[1]

    def fused_backward(self, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`backward` by torch's kernel: with the log-sum-exp over all keys it gives each tile's share."""
        lse = self._queries(lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
        grads, outs = self._queries(grad_out), self._queries(out)
        grad_q, grad_k, grad_v = (self._zeros(x) for x in (self.q, self.k, self.v))
        for tiles in self._steps():
            rows, columns = (tiles.queries, tiles.rows), (tiles.keys, tiles.columns)
            mask = None
            if tiles.hidden is not None:
                mask = torch.zeros(tiles.hidden.shape, dtype=self.wide, device=self.device)
                mask = mask.masked_fill_(tiles.hidden, -math.inf).unsqueeze(1)
            inputs = [self._take("grad", grads, *rows), self._take("q", self.q, *rows)]
            inputs += [self._take("k", self.k, *columns), self._take("v", self.v, *columns)]
            inputs += [self._take("out", outs, *rows), self._take("lse", lse, *rows).squeeze(-1)]
            parts = _fused(*(x.unsqueeze(1) for x in inputs), 0.0, False, attn_mask=mask, scale=1.0)
            self._add(grad_q, *rows, parts[0])
            self._add(grad_k, *columns, parts[1])
            self._add(grad_v, *columns, parts[2])
        return self._gradients(grad_q, grad_k, grad_v)

    def _gradients(self, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        back_k, back_v = (self.plan.keys.unpad(x, self.kv_shape).to(self.dtype) for x in (grad_k, grad_v))
        return (self._results(grad_q) * self.how.scale).to(self.dtype), back_k, back_v
