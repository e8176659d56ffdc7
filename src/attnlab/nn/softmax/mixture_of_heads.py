"""Mixture of heads: each token picks some of the heads, and weighs them before the output projection."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from attnlab.cards import (
    ALL_FOUR,
    ANY_LENGTH,
    EXACT,
    PERMUTATION_EQUIVARIANT,
    STREAMING,
    TOKENS,
    Card,
    register,
)
from attnlab.nn.multihead import MultiHead


class HeadRouter(nn.Module):
    """How much each head counts for each token: `(B, N, C)` → `(B, N, H)`, shared heads first, then the routed.

        g = softmax(Wg x) over the H − s others, zero but for the `routed` largest, which are scaled to sum to `routed`
        a = softmax(W1 x) · s over the s shared (1 for s = 1)
        w = softmax(W0 x) · 2;  gates = concat(w₀ a, w₁ g)        (a alone without routed heads, g alone without shared)

    The factors make all gates 1 where the scores are equal and every head is picked: there it is plain attention.
    `weight` holds the rows of W1, Wg and W0, in this order, as far as they exist. Source: arXiv 2410.11842.
    """

    def __init__(self, dim: int, heads: int, shared: int, routed: int) -> None:
        super().__init__()
        if not 0 <= shared <= heads:
            raise ValueError(f"shared must lie in 0 to heads = {heads}, got {shared}")
        if not (1 <= routed <= heads - shared or (routed == 0 and shared == heads)):
            raise ValueError(
                f"routed must lie in 1 to heads − shared = {heads - shared}, or be 0 where all are shared, got {routed}"
            )
        self.heads, self.shared, self.routed = heads, shared, routed
        self.rows = [shared if shared > 1 else 0, heads - shared, 2 if shared and routed else 0]
        self.weight = nn.Parameter(torch.empty(sum(self.rows), dim).uniform_(-(dim**-0.5), dim**-0.5))

    def pick(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over the last axis, and a mask of 0 and 1 of its `routed` largest."""
        gates = scores.softmax(-1)
        return gates, torch.zeros_like(gates).scatter(-1, gates.topk(self.routed, -1).indices, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        shared, routed, split = linear(x, self.weight).split(self.rows, -1)
        a = shared.softmax(-1) * self.shared if self.shared > 1 else x.new_ones(*x.shape[:-1], self.shared)
        if not self.routed:
            return a
        gates, mask = self.pick(routed)
        picked = gates * mask
        total = picked.sum(-1, keepdim=True).clamp_min(torch.finfo(picked.dtype).eps)
        g = picked * (self.routed / total)
        if not self.shared:
            return g
        w = split.softmax(-1) * 2
        return torch.cat((w[..., :1] * a, w[..., 1:] * g), -1)

    def balance(self, x: Tensor) -> Tensor:
        """The load-balance loss over all tokens `(…, C)`: a scalar, `routed` where all heads are used alike.

        E² · mean_e(mean_tokens softmax_e · mean_tokens mask_e),  E = H − s;  0 without routed heads
        """
        if not self.routed:
            return x.new_zeros(())
        begin = self.rows[0]
        gates, mask = self.pick(linear(x.flatten(0, -2), self.weight[begin : begin + self.rows[1]]))
        return (gates.mean(0) * mask.mean(0)).mean() * self.rows[1] ** 2


def _all_heads(dim: int, grid: tuple[int, ...]) -> MixtureOfHeads:
    module = MixtureOfHeads(dim, heads=4, shared=2, routed=2)
    if module.router is not None:
        nn.init.zeros_(module.router.weight)
    return module


@register(
    Card(
        name="mixture_of_heads",
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        paper="2410.11842",
        system="moh",
        family="softmax",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT | EXACT,
        cost="N²",
        growth=2.0,
        state="2 * kv_heads * head_dim * N",
        sample=dict(heads=8),
        limit=_all_heads,
    )
)
class MixtureOfHeads(MultiHead):
    """Softmax attention of which each token takes `shared` heads always, and the `routed` best of the others.

        y = Wo concat_h(gate_h(x) · attend_h(q, k, v))        gates: see `HeadRouter`

    x (B, N, C) → (B, N, C). Cost O(N²), for C·(H + 2) more weights; a head that a token did not pick gets no gradient
    from it. All heads are computed, as in the authors' code. Train with `attnlab.recipes.moh.balanced`, or a few heads
    win; `attnlab.recipes.moh.convert` turns a trained model into one. Source: arXiv 2410.11842 (SkyworkAI/MoH).

    Args:
        shared: the first so many heads are taken always: half of the heads if None.
        routed: how many of the others each token takes: a quarter of the heads, at least one, if None.
        select: "learned", or "query_norm" as in MoH-LLaMA3: a head counts by the length of its query, without weights
            of its own, and a gate is 1 or 0 (no norm of q and k then: it would make all lengths alike).
        straight_through: with "query_norm", gates have the gradient of the softmax of the lengths, over their
            deviation: for continued training.
        Others as for `MultiHead`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        shared: int | None = None,
        routed: int | None = None,
        select: Literal["learned", "query_norm"] = "learned",
        straight_through: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(dim, heads=heads, **keywords)
        if select not in ("learned", "query_norm"):
            raise ValueError(f"select must be 'learned' or 'query_norm', got {select!r}")
        if select == "query_norm" and not isinstance(self.q_norm, nn.Identity):
            raise ValueError("qk_norm must be None with select='query_norm': it makes all queries equally long")
        shared = (heads + 1) // 2 if shared is None else shared
        routed = min(max(1, heads // 4), heads - shared) if routed is None else routed
        router = HeadRouter(dim, heads, shared, routed)
        self.shared, self.routed, self.select, self.straight_through = shared, routed, select, straight_through
        self.router = router if select == "learned" else None

    def gates(self, x: Tensor, q: Tensor) -> Tensor:
        """`(B, H, N, 1)` for tokens `(B, N, C)` and their queries `(B, H, N, D)`, which may be turned."""
        if self.router is not None:
            return self.router(x).mT.unsqueeze(-1)
        # Turning a query leaves its length, so this may look at it after its place was put in.
        length = q[:, self.shared :].norm(dim=-1, keepdim=True)
        shared = torch.ones_like(q[:, : self.shared, :, :1])
        if not self.routed:
            return shared
        mask = torch.zeros_like(length).scatter(1, length.topk(self.routed, 1).indices, 1.0)
        if self.straight_through:
            soft = (length / length.std(1, keepdim=True)).softmax(1)
            mask = mask + soft - soft.detach()
        return torch.cat((shared, mask), 1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, **keywords: Any) -> Tensor:
        return super().mix(q, k, v, x=x, **keywords) * self.gates(x, q)
