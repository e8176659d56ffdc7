"""Squeeze-and-excite: each channel scaled by what the means of all channels say."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register


@register(
    Card(
        name="squeeze_excite",
        title="Squeeze-and-Excitation Networks",
        paper="1709.01507",
        family="channel",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
    )
)
class SqueezeExcite(nn.Module):
    """Scales each channel of a map by a gate that has seen the whole of it, through its means alone.

        y = x · σ(W2 act(W1 mean(x)))        mean over the places; W1 (hidden, C), W2 (C, hidden)

    `(B, C, H, W)` to the same, any size. `hidden` is C/4 if None. Cost: 2NC + 2C·hidden. Source: arXiv 1709.01507.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        bias: bool = True,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.dim, hidden = dim, max(dim // 4, 1) if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = activation()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3))))).sigmoid()[:, :, None, None]
