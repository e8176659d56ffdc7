"""A mixture of experts: each token passes through the few feed-forward networks that its router picks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


class Router(nn.Module):
    """Pick `active` of `experts` per token and weigh them: x `(T, C)` → weights and indices `(T, active)`.

    Scores are σ(W x) in float32. A bias per expert, moved from outside to balance the load, enters the choice alone;
    the weights are the chosen experts' scores, normalised to sum 1, times `scaling`. With `groups`, only experts of the
    `active_groups` groups whose two best biased scores sum highest can be chosen. Source: arXiv 2412.19437.
    """

    bias: Tensor

    def __init__(
        self,
        dim: int,
        experts: int,
        active: int,
        *,
        scaling: float = 1.0,
        normalise: bool = True,
        groups: int = 1,
        active_groups: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= active <= experts:
            raise ValueError(f"active must be between 1 and experts = {experts}, got {active}")
        if experts % groups or not 1 <= active_groups <= groups or active > experts // groups * active_groups:
            raise ValueError(
                f"groups = {groups} must divide experts = {experts}, and active_groups = {active_groups} of them hold "
                f"the {active} active ones"
            )
        self.active, self.scaling, self.normalise = active, scaling, normalise
        self.groups, self.active_groups = groups, active_groups
        self.weight = nn.Parameter(torch.empty(experts, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = linear(x.to(wide), self.weight.to(wide)).sigmoid()
        choice = scores + self.bias
        if self.active_groups < self.groups:
            grouped = choice.unflatten(-1, (self.groups, -1))
            strength = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
            out = torch.ones_like(strength, dtype=torch.bool)
            out.scatter_(-1, strength.topk(self.active_groups, -1).indices, False)
            choice = grouped.masked_fill(out.unsqueeze(-1), -torch.inf).flatten(-2)
        picked = choice.topk(self.active, -1).indices
        weights = scores.gather(-1, picked)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scaling, picked


class SwiGLUExperts(nn.Module):
    """`experts` SwiGLU networks in two tensors: w13 (E, 2·hidden, C), the gates' rows first, and w2 (E, C, hidden)."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(experts, 2 * hidden, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden).uniform_(-(hidden**-0.5), hidden**-0.5))

    def forward(self, x: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        """Σ weights · expert(x) over each token's picked experts: `(T, C)`. Tokens are sorted by expert first."""
        order = picked.flatten().argsort(stable=True)
        token = order // picked.shape[1]
        loads = torch.bincount(picked.flatten(), minlength=len(self.w13)).tolist()
        pieces = x[token].split(loads)
        done = [linear(_swiglu(linear(p, self.w13[e])), self.w2[e]) for e, p in enumerate(pieces) if len(p)]
        y = torch.cat(done) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x, dtype=y.dtype).index_add(0, token, y).to(x.dtype)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


class MoE(nn.Module):
    """Σ over the picked experts of weight · expert(x), plus a shared expert that every token passes: `(…, C)`.

    Each expert is w2(silu(w1 x) ⊙ w3 x) with `hidden` channels, the shared one with `shared · hidden`. Cost: `active`
    + `shared` experts per token, whatever their number. Sources: arXiv 2412.19437 (the router), 2510.26692.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        experts: int,
        active: int,
        shared: int = 1,
        scaling: float = 1.0,
        normalise: bool = True,
        groups: int = 1,
        active_groups: int = 1,
    ) -> None:
        super().__init__()
        self.router = Router(
            dim, experts, active, scaling=scaling, normalise=normalise, groups=groups, active_groups=active_groups
        )
        self.experts = SwiGLUExperts(dim, hidden, experts)
        self.shared = SwiGLUExperts(dim, shared * hidden, 1) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        y = self.experts(tokens, *self.router(tokens))
        if self.shared is not None:
            y = y + linear(_swiglu(linear(tokens, self.shared.w13[0])), self.shared.w2[0])
        return y.view_as(x)
