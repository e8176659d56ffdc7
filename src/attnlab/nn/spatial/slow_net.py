"""Slow nets (HyperZ·Z·W): networks of coordinates that write kernels as large as a map, or small ones on demand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Gamma


def _linears(count: int, dim: int, out_dim: int) -> Sequence[nn.Linear]:
    return nn.ModuleList(nn.Linear(dim, out_dim) for _ in range(count))  # type: ignore[return-value]


def start(layer: nn.Linear, bias: float) -> None:
    """Uniform weights that keep the variance, and the same bias for all."""
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    nn.init.constant_(layer.bias, bias)


class SlowNet(nn.Module):
    """Writes a kernel `(C, *size)` from coordinates alone: the same for every input, and fixed after training.

        h = sin(F₀ c);  h = sin(Fᵢ c) ⊙ (Aᵢ h) + p, i = 1 … layers;  kernel = O h            c in [-1, 1]^axes

    `p` is a learned number per place. Frequencies Fᵢ begin at 2π·omega·gamma times the default, gamma drawn from
    Gamma(alpha / (i+1), 1); O begins smaller by the root of the number of places, for which the authors' code rescales
    it at the first call of all. Cost: O(places · hidden · (layers·hidden + C)). Source: arXiv 2401.17948 (MAGNet).
    """

    grid: Tensor

    def __init__(
        self,
        size: tuple[int, ...],
        channels: int,
        *,
        hidden: int = 64,
        layers: int = 2,
        omega: float = 2000.0,
        alpha: float = 6.0,
    ) -> None:
        super().__init__()
        for name, value in (("size", min(size)), ("channels", channels), ("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.size, places = size, math.prod(size)
        axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
        self.register_buffer("grid", torch.stack(axes, -1).flatten(0, -2), persistent=False)
        self.filters = _linears(layers + 1, len(size), hidden)
        self.linears = _linears(layers, hidden, hidden)
        self.out = nn.Linear(hidden, channels)
        self.bias = nn.Parameter(torch.zeros(places, 1))
        for i, layer in enumerate(self.filters):
            with torch.device("cpu"):
                gamma = Gamma(alpha / (i + 1), 1.0).sample((hidden, len(size)))
            layer.weight.data.mul_(2 * math.pi * omega * gamma.to(layer.weight.device))
            nn.init.zeros_(layer.bias)
        for layer in self.linears:
            start(layer, 1.0)
        start(self.out, 0.0)
        self.out.weight.data.mul_(places**-0.5)

    def forward(self, at: Tensor | None = None) -> Tensor:
        """The kernel on the grid, or at other coordinates `(places, axes)` of as many places."""
        at = self.grid if at is None else at
        h = torch.sin(self.filters[0](at))
        for i, linear in enumerate(self.linears):
            h = torch.sin(self.filters[i + 1](at)) * linear(h) + self.bias
        return self.out(h).mT.unflatten(1, self.size)


class LocalSlowNet(SlowNet):
    """Writes a small depthwise kernel `(C, 1, K, K)` from coordinates and from what a batch of maps looks like.

        g = gelu(W mean_batch(R pool_K(x)))                                           (K·K, hidden)
        h = (stop(h') + 0.1 h'/|h'|) ⊙ (Xᵢ g)      h' = sin(Fᵢ c) ⊙ (Aᵢ h) + p, |·| over a channel's places

    The mean over the batch makes one picture's output depend on the others'. With `running=True` evaluation has the
    mean of the batches trained on in its place; with False, as in the authors' code, the batch's own.
    """

    seen: Tensor

    def __init__(
        self,
        kernel: int,
        channels: int,
        *,
        hidden: int = 32,
        layers: int = 2,
        omega: float = 2000.0,
        alpha: float = 6.0,
        running: bool = True,
    ) -> None:
        super().__init__((kernel, kernel), channels, hidden=hidden, layers=layers, omega=omega, alpha=alpha)
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, to keep the map's size, got {kernel}")
        self.kernel, self.running = kernel, running
        self.reduce, self.fc = nn.Linear(channels, hidden), nn.Linear(hidden, hidden)
        self.context = _linears(layers, hidden, hidden)
        for layer in self.context:
            start(layer, 1.0)
        if running:
            self.register_buffer("seen", torch.zeros(kernel * kernel, hidden))

    def look(self, x: Tensor) -> Tensor:
        """g, from maps `(B, C, H, W)`."""
        if self.running and not self.training:
            mean = self.seen
        else:
            mean = self.reduce(F.adaptive_avg_pool2d(x, self.kernel).mean(0).flatten(1).mT)
            if self.running:
                self.seen.lerp_(mean.detach().to(self.seen.dtype), 0.1)
        return F.gelu(self.fc(mean))

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:  # type: ignore[override]
        at, g = self.grid if at is None else at, self.look(x)
        h = torch.sin(self.filters[0](at))
        for i, linear in enumerate(self.linears):
            h = torch.sin(self.filters[i + 1](at)) * linear(h) + self.bias
            h = (h.detach() + 0.1 * F.normalize(h, dim=0)) * self.context[i](g)
        return self.out(h).mT.unflatten(1, (1, *self.size))
