"""SOFT: attention by a Gaussian kernel, through a few landmarks, without softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, NONCAUSAL_SELF, OPERATOR, TOKENS, Card, register
from attnlab.nn.mechanism import OnGrid, check_grid, check_heads, join_heads, split_heads

_TITLE = "Softmax-free Linear Transformers"


def gaussian(q: Tensor, k: Tensor) -> Tensor:
    """exp(−‖q_i − k_j‖²/2), `(…, N, M)` of q `(…, N, D)` and k `(…, M, D)`."""
    halves = [t.square().sum(-1) / 2 for t in (q, k)]
    return (q @ k.mT).sub_(halves[0].unsqueeze(-1)).sub_(halves[1].unsqueeze(-2)).exp_()


@register(
    Card(
        name="newton_inverse",
        title=_TITLE,
        paper="2207.03341",
        system="soft",
        family="linear",
        kind=OPERATOR,
        cost="m³",
    )
)
def newton_inverse(matrix: Tensor, *, iterations: int = 20, ridge: float = 0.01) -> Tensor:
    """The inverse of `matrix` + `ridge`·I by Newton's iteration, matrix products alone: `(…, m, m)` to the same.

        P = K + ridge·I;  Z ← 1.8/(largest row sum of K)² · P;  Z ← 2Z − Z P Z, `iterations` times

    For symmetric positive matrices, as kernels are. The gradient is that of an inverse, −Zᵀ G Zᵀ, and does not go
    through the iterations. Cost: 4m³ each. Source: arXiv 2207.03341.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must be square, (…, m, m), got {tuple(matrix.shape)}")
    with torch.no_grad():
        p = matrix + ridge * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        z = 1.8 / matrix.sum(-1).amax(-1)[..., None, None] ** 2 * p
        z = _newton(p, z, iterations)
    return _as_inverse(matrix, z)


def _newton(p: Tensor, z: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        z = 2 * z - z @ p @ z
    return z


def _as_inverse(matrix: Tensor, z: Tensor) -> Tensor:
    """`z`, with the gradient that it has as the inverse of `matrix`."""
    return z + z @ (matrix.detach() - matrix) @ z if matrix.requires_grad and torch.is_grad_enabled() else z


def normalised_inverse(matrix: Tensor, *, iterations: int = 20, variant: str = "paper") -> Tensor:
    """D^-½ K⁻¹ D^-½, D the row sums of K: what SOFT++ puts between the two halves; `(…, m, m)` to the same.

    Newton's iteration begins with αK, α = 2/(largest row sum)², halved while ‖I − αK²‖₁ > 1.01, at most ten times.
    With variant="release" α is one number for the whole batch, and the gradient goes through all iterations, as in the
    authors' code; with "paper" each matrix has its own, and the gradient is that of an inverse.
    """
    each = variant == "paper"
    with torch.set_grad_enabled(torch.is_grad_enabled() and not each):
        sums, square = matrix.sum(-1), matrix @ matrix
        alpha = 2 / (sums.amax(-1) if each else sums.amax())[..., None, None] ** 2
        unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        for _ in range(10):
            norm = (unit - alpha * square).abs().sum(-2).amax(-1)
            alpha = torch.where((norm if each else norm.amax())[..., None, None] > 1.01, alpha / 2, alpha)
        z = _newton(matrix, alpha * matrix, iterations)
    z = _as_inverse(matrix, z) if each else z
    scale = matrix.sum(-1).rsqrt()
    return scale[..., None] * z * scale[..., None, :]


@register(
    Card(
        name="soft_attention",
        title=_TITLE,
        paper="2207.03341",
        system="soft",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N m + m³",
        sample={"heads": 4, "ratio": 2},
    )
)
class SoftAttention(OnGrid):
    """Attention by a Gaussian kernel of tokens with themselves, factored through a coarse map of landmarks.

        q = Wq x / D^¼;  l = gelu(norm(conv_{ratio×ratio}(q)))             m = N/ratio² landmarks for each head
        y = Wo [K(q, l) (K(l, l) + 0.01 I)⁻¹ K(l, q) v + conv(v)]          K(a, b) = exp(−‖a − b‖²/2)

    x (B, H·W, C) with grid=(H, W) → the same shape. The matrix that it stands for is symmetric and positive, as keys
    are queries; no weight is normalised over a row. The convolution over v has one kernel per head. Cost:
    3NC² + 4NmC + 80m³ per head: linear in N where `ratio` grows with the map's side. Source: arXiv 2207.03341
    (fudan-zvg/SOFT).

    Args:
        ratio: how much coarser the map of landmarks is. A last part of the map that is smaller has no landmark.
        kernel: side of the convolution over the values; 0 for none.
        normalize: the SOFT++ form, K(l, l)⁻¹ scaled on both sides by its row sums^-½, for other image sizes than
            those of training. variant: of `normalised_inverse`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        ratio: int = 2,
        kernel: int = 3,
        iterations: int = 20,
        normalize: bool = False,
        variant: str = "paper",
        causal: bool = False,
    ) -> None:
        if causal:
            raise ValueError("causal must be False: landmarks are made of the whole map")
        if ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {ratio}")
        if kernel < 0 or (kernel and kernel % 2 == 0):
            raise ValueError(f"kernel must be odd, or 0 for none, got {kernel}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        super().__init__(dim)
        self.heads, self.head_dim = heads, check_heads(dim, heads)[1]
        self.ratio, self.iterations, self.normalize, self.variant = ratio, iterations, normalize, variant
        self.wqv = nn.Linear(dim, 2 * dim)
        self.landmarks = nn.Conv2d(self.head_dim, self.head_dim, ratio, ratio, bias=False)
        self.norm = nn.LayerNorm(self.head_dim)
        self.conv = nn.Conv2d(heads, heads, kernel, padding=kernel // 2, groups=heads, bias=False) if kernel else None
        self.wo = nn.Linear(dim, dim)

    def factors(self, q: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """K(q, l) `(B, h, N, m)` and the middle `(B, h, m, m)`, of scaled q `(B, h, N, D)`."""
        maps = q.flatten(0, 1).unflatten(1, grid).permute(0, 3, 1, 2)
        below, right = (max(self.ratio - side, 0) for side in grid)
        if below or right:  # smaller than a single landmark's part
            maps = F.pad(maps, (0, right, 0, below))
        marks = self.landmarks(maps).flatten(2).mT.unflatten(0, q.shape[:2])
        marks = F.gelu(self.norm(marks))
        among = gaussian(marks, marks)
        if self.normalize:
            middle = normalised_inverse(among, iterations=self.iterations, variant=self.variant)
        else:
            middle = newton_inverse(among, iterations=self.iterations)
        return gaussian(q, marks), middle

    def weights(self, x: Tensor, *, grid: tuple[int, ...] | None = None) -> Tensor:
        """The matrix `(B, h, N, N)` with which values are mixed, without the convolution: to look at, small N."""
        self.check(x)
        height, width = check_grid(grid, x.shape[1], axes=2)
        q = split_heads(self.wqv(x)[..., : self.dim], self.heads) / self.head_dim**0.25
        outer, middle = self.factors(q, (height, width))
        return outer @ middle @ outer.mT

    def over_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        height, width = grid
        flat_q, flat_v = self.wqv(x).chunk(2, -1)
        q, v = split_heads(flat_q / self.head_dim**0.25, self.heads), split_heads(flat_v, self.heads)
        outer, middle = self.factors(q, (height, width))
        y = join_heads(outer @ (middle @ (outer.mT @ v)))
        if self.conv is not None:
            # One kernel per head, for each of its channels: the map of values needs no other layout.
            kernels = self.conv.weight.repeat_interleave(self.head_dim, 0)
            maps = flat_v.unflatten(1, (height, width)).permute(0, 3, 1, 2)
            near = F.conv2d(maps, kernels, padding=self.conv.padding, groups=self.dim)
            y = y + near.permute(0, 2, 3, 1).flatten(1, 2)
        return self.wo(y)
