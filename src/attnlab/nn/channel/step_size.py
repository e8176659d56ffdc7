"""Channel attention as a step size: how far each channel of a residual network goes, by how stiff it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab.cards import OPERATOR, Card, register

_FEATURES = ("x", "f", "s")


@register(
    Card(
        name="step_size",
        title="Understanding Self-attention Mechanism via Dynamical System Perspective",
        paper="2308.09939",
        family="channel",
        kind=OPERATOR,
        cost="N",
        sample={"dim": 32},
    )
)
class StepSize(nn.Module):
    """The step that each channel takes along a residual branch: x' = x + F ∘ f, as an adaptive ODE solver would.

        F = σ(W2 relu(norm(W1 [mean(x); mean(f); s])))        s = mean|f| / (mean|x| + eps), how stiff it is here
        refine:  F0 = σ(W2 relu(W1 mean(f))),  F = F0 ∘ (1 + tanh(W3 s')),  s' = mean|F0 ∘ f| / (mean|x| + eps)

    x and its branch's output f, both (B, C, *spatial) → F (B, C, 1, …, 1); means over the places. W2 and W3 are 0 at
    first, so every step is then ½ (1 with `gate="2sigmoid"`). Cost: O(N C) reads and 4C²/reduction.
    After the idea of arXiv 2308.09939, whose formulas were not at hand: this is not claimed to be its module.

    Args:
        features: what F is made of; ("f",) alone is squeeze-and-excite (without a norm).
        gate: "sigmoid", steps in (0, 1), or "2sigmoid", in (0, 2).
        refine: take a first step by f alone, look how stiff it is, and correct it.
        eps: what s adds to mean|x|. Where x has few places and so comes near 0, take some share of its usual size: s
            has no bound otherwise, and one channel drowns all others in the norm.
    """

    def __init__(
        self,
        dim: int,
        *,
        reduction: int = 16,
        features: Sequence[str] = _FEATURES,
        gate: Literal["sigmoid", "2sigmoid"] = "sigmoid",
        refine: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        features = ("f",) if refine else tuple(features)
        if not features or any(name not in _FEATURES for name in features) or len(set(features)) < len(features):
            raise ValueError(f"features must be some of {_FEATURES}, each once, got {features}")
        if gate not in ("sigmoid", "2sigmoid"):
            raise ValueError(f"gate must be 'sigmoid' or '2sigmoid', got {gate!r}")
        if dim < 1 or reduction < 1:
            raise ValueError(f"dim and reduction must be at least 1, got {dim} and {reduction}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.dim, self.features, self.eps, self.range = dim, features, eps, 2.0 if gate == "2sigmoid" else 1.0
        hidden = max(dim // reduction, 4)
        self.fc1, self.fc2 = nn.Linear(len(features) * dim, hidden), nn.Linear(hidden, dim)
        self.norm = nn.Identity() if features == ("f",) else nn.LayerNorm(hidden)
        self.fc3 = nn.Linear(dim, dim) if refine else None
        for layer in (self.fc2, self.fc3):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        if x.shape != f.shape or x.ndim < 3 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x and f must both be (B, {self.dim}, *spatial), got {tuple(x.shape)}, {tuple(f.shape)}")
        places = tuple(range(2, x.ndim))
        said: dict[str, Callable[[], Tensor]] = {
            "x": lambda: x.mean(places),
            "f": lambda: f.mean(places),
            "s": lambda: f.abs().mean(places) / (x.abs().mean(places) + self.eps),
        }
        hidden = self.norm(self.fc1(torch.cat([said[name]() for name in self.features], 1)))
        step = self.range * self.fc2(hidden.relu()).sigmoid()
        if self.fc3 is not None:
            step = step * (1 + (self.fc3(step * said["s"]())).tanh())
        return step.view(*step.shape, *(1 for _ in places))


class StepBlock(nn.Module):
    """x + F ∘ branch(x) for any branch: maps (B, C, *spatial), or, with `tokens`, (B, N, C) to the same.

    Around the attention of a transformer: `StepBlock(nn.Sequential(norm, attention), StepSize(dim), tokens=True)`.
    """

    def __init__(self, branch: nn.Module, step: StepSize, *, tokens: bool = False) -> None:
        super().__init__()
        self.branch, self.step, self.tokens = branch, step, tokens

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        f = self.branch(x, **keywords)
        return x + (self.step(x.mT, f.mT).mT if self.tokens else self.step(x, f)) * f
