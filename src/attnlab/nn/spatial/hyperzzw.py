"""HyperZ·Z·W: kernels as large as the map, multiplied into features that then act on features again (Terminator)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.depthwise import depthwise
from attnlab.nn.spatial.slow_net import LocalSlowNet, SlowNet


def standardize(x: Tensor) -> Tensor:
    """Each map of each sample to mean 0 and variance 1 over its places."""
    return F.instance_norm(x, eps=1e-5)


def conv1x1(dim: int, out_dim: int) -> nn.Conv2d:
    """With normal weights and no bias at first."""
    conv = nn.Conv2d(dim, out_dim, 1)
    nn.init.kaiming_normal_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class RecursiveGate(nn.Module):
    """RGU: y = Wy (gelu(std(Wk x ⊙ Wq Wv x)) + p), `(B, C, size, size)` to the same; p (size, size)."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.wk, self.wv, self.wq, self.wy = (nn.Conv2d(dim, dim, 1) for _ in range(4))
        for conv in (self.wk, self.wv, self.wq, self.wy):
            nn.init.kaiming_uniform_(conv.weight, nonlinearity="linear")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.wy(F.gelu(standardize(self.wk(x) * self.wq(self.wv(x)))) + self.bias)


@register(
    Card(
        name="hyper_channel",
        title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
        paper="2401.17948",
        system="terminator",
        family="channel",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        sample={"hidden": 8, "omega": 1.0},
    )
)
class HyperChannel(nn.Module):
    """Gates each channel by the square of its own mean, times a number that a network of channel indices writes.

        y = x · σ(k ⊙ z²)        z = mean(x) over the places; k (C) from a `SlowNet`, the same for every input

    `(B, C, H, W)` to the same, any size. Cost: 2NC. Source: arXiv 2401.17948 (hyper-channel interaction).
    """

    def __init__(self, dim: int, *, hidden: int = 32, layers: int = 2, omega: float = 2000.0) -> None:
        super().__init__()
        self.dim = dim
        self.slow = SlowNet((dim,), 1, hidden=hidden, layers=layers, omega=omega)

    def score(self, x: Tensor) -> Tensor:
        """k ⊙ z², `(B, C)`."""
        return self.slow()[0] * x.mean((2, 3)).square()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        return x * self.score(x).sigmoid()[:, :, None, None]


class HyperInteraction(HyperChannel):
    """x · σ(s ⊙ c): c the channel score of y, s = k ⊙ (mean over channels of y)², k (size, size) from a slow net."""

    def __init__(
        self, dim: int, size: int, *, hidden: int = 16, layers: int = 2, places_hidden: int = 64, omega: float = 2000.0
    ) -> None:
        super().__init__(dim, hidden=hidden, layers=layers, omega=omega)
        self.places = SlowNet((size, size), 1, hidden=places_hidden, layers=layers, omega=omega)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        over_places = self.places() * y.mean(1, keepdim=True).square()
        return x * (over_places * self.score(y)[:, :, None, None]).sigmoid()


class LocalBranch(nn.Module):
    """gelu(batch_std(W dwconv(x, kernel(context)))) + b: convolution by a kernel that `context` has a say in."""

    def __init__(self, dim: int, kernel: int, *, hidden: int, layers: int, omega: float, running: bool) -> None:
        super().__init__()
        self.slow = LocalSlowNet(kernel, dim, hidden=hidden, layers=layers, omega=omega, running=running)
        self.mixer = conv1x1(dim, dim)
        self.norm = nn.BatchNorm2d(dim, affine=False, track_running_stats=running)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = depthwise(x, self.slow(context))
        return F.gelu(self.norm(self.mixer(y))) + self.bias


class SlowFast(nn.Module):
    """Slow and fast networks connected: four global branches, four local ones, and interaction, in one bottleneck.

        Z = x ⊙ W                                              W (C, size, size) from a slow net: a context for weights
        fast = std(RGU₂(Z) + RGU₁(x)),  m = std(M x),  c = std(hyper_channel(x))
        o, o_m, o_c = Z @ fast, Z @ m, Z @ c                   products of matrices over the places, hence square maps
        y = B [o, l₂, (x₁), fast, o_m, l₁, o σ(o), l₃, o_c, l₄, (x₂), interaction(o, x)]
        l₁ … l₄ = LocalBranch(c; x), (x; c), (x; m), (m; x)    map; context

    `(B, C, size, size)` to `(B, factor·C, size, size)`; x₁, x₂ are `before` earlier maps, tiled along their channels to
    C. Cost: O(N·C²(25 + 12·factor) + 6N^1.5·C). Source: arXiv 2401.17948 (hyperevolnet/Terminator).
    """

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        factor: int = 2,
        before: int = 0,
        kernels: Sequence[int] = (3, 9, 5, 7),
        slow: tuple[int, int] = (64, 2),
        local: tuple[int, int] = (32, 2),
        channel: tuple[int, int] = (32, 2),
        interaction: tuple[int, int, int] = (16, 64, 2),
        omega: float = 2000.0,
        running: bool = True,
    ) -> None:
        super().__init__()
        if len(kernels) != 4:
            raise ValueError(f"kernels must be four, one per local branch, got {tuple(kernels)}")
        if before not in (0, 1, 2):
            raise ValueError(f"before must be 0, 1 or 2, got {before}")
        self.dim, self.size, self.before = dim, size, before
        self.slow = SlowNet((size, size), dim, hidden=slow[0], layers=slow[1], omega=omega)
        self.rgu1, self.rgu2 = RecursiveGate(dim, size), RecursiveGate(dim, size)
        self.mlp = conv1x1(dim, dim)
        self.channel = HyperChannel(dim, hidden=channel[0], layers=channel[1], omega=omega)
        self.interaction = HyperInteraction(
            dim, size, hidden=interaction[0], places_hidden=interaction[1], layers=interaction[2], omega=omega
        )
        self.branches = nn.ModuleList(
            LocalBranch(dim, kernel, hidden=local[0], layers=local[1], omega=omega, running=running)
            for kernel in kernels
        )
        self.bottleneck = conv1x1(dim * (10 + before), dim * factor)

    def forward(self, x: Tensor, *earlier: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1:] != (self.dim, self.size, self.size):
            raise ValueError(f"x must be (B, {self.dim}, {self.size}, {self.size}), got {tuple(x.shape)}")
        if len(earlier) != self.before or any(self.dim % e.shape[1] for e in earlier):
            raise ValueError(
                f"{self.before} earlier maps must be given, of channels that divide {self.dim}, "
                f"got {[tuple(e.shape) for e in earlier]}"
            )
        tiled = [e.repeat(1, self.dim // e.shape[1], 1, 1) for e in earlier]
        z = x * self.slow()
        fast = standardize(self.rgu2(z) + self.rgu1(x))
        mixed, channels = standardize(self.mlp(x)), standardize(self.channel(x))
        out, out_mixed, out_channels = z @ fast, z @ mixed, z @ channels
        l1, l2, l3, l4 = (
            branch(of, context)
            for branch, of, context in zip(self.branches, (channels, x, x, mixed), (x, channels, mixed, x), strict=True)
        )
        first = [out, l2, *tiled[:1], fast, out_mixed, l1, out * out.sigmoid(), l3, out_channels, l4, *tiled[1:]]
        return self.bottleneck(torch.cat([*first, self.interaction(out, x)], 1))
