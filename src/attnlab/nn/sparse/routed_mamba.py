"""Mamba for the few tokens that matter: a router picks them, pooled ones stand for the rest (DynamicVis)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d

from attnlab.cards import ANY_LENGTH, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.linear.selective import Mamba
from attnlab.nn.mechanism import Mechanism, check_grid
from attnlab.patterns import Pattern

_PATHS = ("forward", "shuffle", "mean", "gate", "shuffle_mean", "shuffle_gate")
_PLACES = ("none", "head", "middle", "ends")


class FlippedMamba(nn.Module):
    """One Mamba over a sequence in several orders: `(B, N, C)` to the same, with the residual path inside.

        y = x + Σ_o g_o · unorder_o(mamba(order_o(norm x)))        orders: as it is, flipped, shuffled

    Paths: "forward" and "shuffle" have that order alone; "mean" is the first two, g = 1/2; "gate" weighs these by a
    softmax of W [mean₁ ‖ mean₂], the tokens' means; "shuffle_mean" and "shuffle_gate" have all three.
    """

    def __init__(
        self, dim: int, *, states: int = 16, expand: int = 2, conv: int = 4, path: str = "mean", eps: float = 1e-5
    ) -> None:
        super().__init__()
        if path not in _PATHS:
            raise ValueError(f"path must be one of {', '.join(_PATHS)}, got {path!r}")
        self.orders = 1 if path in ("forward", "shuffle") else 3 if "shuffle" in path else 2
        self.shuffled = "shuffle" in path
        self.norm = nn.RMSNorm(dim, eps=eps)
        self.mixer = Mamba(dim, states=states, expand=expand, conv=conv)
        self.gate = nn.Linear(self.orders * dim, self.orders, bias=False) if "gate" in path else None

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        order = torch.randperm(x.shape[1], device=x.device) if self.shuffled else None
        inputs = [] if self.orders == 1 and order is not None else [normed]
        if self.orders > 1:
            inputs.append(normed.flip(1))
        if order is not None:
            inputs.append(normed[:, order])
        found = list(self.mixer(torch.cat(inputs)).split(len(x)))
        if self.orders > 1:
            found[1] = found[1].flip(1)
        if order is not None:
            found[-1] = found[-1][:, order.argsort()]
        if self.gate is None:
            return x + sum(found[1:], found[0]) / len(found)
        weights = self.gate(torch.cat([y.mean(1) for y in found], -1)).softmax(-1)
        for i, y in enumerate(found):
            x = torch.addcmul(x, y, weights[:, i, None, None])
        return x


@register(
    Card(
        name="routed_mamba",
        title="DynamicVis: An Efficient and General Visual Foundation Model for Remote Sensing Image Understanding",
        paper="2503.16426",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH,
        cost="N/r",
        growth=1.0,
        sample=dict(ratio=2, pooled=4, states=8),
    )
)
class RoutedMamba(Mechanism):
    """Runs Mamba both ways on the N/r tokens that a router ranks highest, and on G means of stretches of the sequence.

        w = softmax_N(Wr x),   top = the N/r largest of w, in that order,   g = means of G stretches of x
        s = flipped_mamba([g ‖ x[top]]) without g's rows,   y = w x everywhere, and y[top] = w[top] s

    x `(B, N, C)` → y of the same shape, by which a block changes x. The scan's order is the rank, not the raster. As w
    sums to 1 over all N tokens, y starts small. In training the choice, and it alone, is disturbed by Gumbel noise; the
    router learns through w. Cost O((N/r + G) C (C + S)), and N C for the rest. Source: arXiv 2503.16426
    (KyanChen/DynamicVis, `SpatialSparseMixer`).

    Args:
        ratio: r; 0 for no router at all: the block of all tokens. With 1 all are scanned, by rank.
        pooled: G; the height of the grid, which is to be given then, if None.
        place: of the means among the tokens: "head", "middle", "ends" (twice), or "none" for no means.
        path, states, expand, conv: of `FlippedMamba`.
        weigh_all: False leaves tokens that were not picked as they are. renormalize: w[top] to a sum of 1.
        noise: the scale of the Gumbel noise.
        variant: "release" takes the means out of the "middle" where the authors' code does: not where they are.
    """

    def __init__(
        self,
        dim: int,
        *,
        ratio: int = 1,
        pooled: int | None = None,
        place: str = "head",
        path: str = "mean",
        states: int = 16,
        expand: int = 2,
        conv: int = 4,
        weigh_all: bool = True,
        renormalize: bool = False,
        noise: float = 0.1,
        variant: str = "paper",
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if causal:
            raise ValueError("causal must be False: RoutedMamba picks from all tokens")
        if ratio < 0:
            raise ValueError(f"ratio must be 0 or more, got {ratio}")
        if pooled is not None and pooled < 1:
            raise ValueError(f"pooled must be at least 1, or None, got {pooled}")
        for name, value, known in (("place", place, _PLACES), ("variant", variant, ("paper", "release"))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if noise < 0:
            raise ValueError(f"noise must be 0 or more, got {noise}")
        self.ratio, self.pooled, self.place, self.variant = ratio, pooled, place, variant
        self.weigh_all, self.renormalize, self.noise = weigh_all, renormalize, noise
        self.router = nn.Linear(dim, 1, bias=False) if ratio else None
        self.block = FlippedMamba(dim, states=states, expand=expand, conv=conv, path=path)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of all tokens `(B, N)`, and the picked ones by rank `(B, max(N // r, 1))`."""
        if self.router is None:
            raise ValueError("ratio=0 has no router")
        logits = self.router(x).squeeze(-1)
        weights = chosen_by = logits.softmax(1)
        if self.training and self.noise:
            gumbel = -torch.empty_like(logits).exponential_().log()
            chosen_by = (logits.detach() + self.noise * gumbel).softmax(1)
        return weights, chosen_by.detach().topk(max(x.shape[1] // self.ratio, 1), dim=1).indices

    def _among(self, tokens: Tensor, means: Tensor | None) -> Tensor:
        """The block on the tokens with the means among them: of the tokens alone."""
        if means is None:
            return self.block(tokens)
        n, extra, half = tokens.shape[1], means.shape[1], tokens.shape[1] // 2
        if self.place == "middle":
            y = self.block(torch.cat((tokens[:, :half], means, tokens[:, half:]), 1))
            half = (n + extra) // 2 if self.variant == "release" else half
            return torch.cat((y[:, :half], y[:, half + extra :]), 1)
        if self.place == "ends":
            return self.block(torch.cat((means, tokens, means), 1))[:, extra:-extra]
        return self.block(torch.cat((means, tokens), 1))[:, extra:]

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Tensor:
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        means = None
        if self.place != "none":
            count = check_grid(grid, x.shape[1])[0] if self.pooled is None else self.pooled
            means = adaptive_avg_pool1d(x.mT, count).mT
        if self.router is None:
            return self._among(x, means) - x
        weights, top = self.route(x)
        places = top.unsqueeze(-1).expand(-1, -1, x.shape[2])
        share = weights.gather(1, top)
        if self.renormalize:
            share = share / share.sum(1, keepdim=True)
        picked = self._among(x.gather(1, places), means) * share.unsqueeze(-1)
        y = x * weights.unsqueeze(-1) if self.weigh_all else torch.zeros_like(x)
        return y.scatter(1, places, picked)
