"""Gaussian adaptive attention: features weighed by learned bells over their own z-scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register

_EPS = 1e-8  # on variances and on the sum of weights


class GaussianAdaptive(nn.Module):
    """Weigh each element by how likely its z-score along an axis is under a product of G learned Gaussians.

        y_g = (x − (μ + δ_g)) / √(σ² + ε)                μ, σ² along the axis, in each head's own stretch of it; n − 1
        w = Π_g exp(−y_g² / 2c_g²) / √(2π c_g²),  then  w / max(Σ w, ε) over the stretch
        out = x · w                                      δ zero and c = exp(N(0, 1)) at first; only c² counts

    Any shape to the same. No queries or keys: 2·G·H parameters, and one exponential per element
    however large G is. δ is in raw units, not in
    multiples of σ. Source: arXiv 2401.11143.

    Args:
        axis: along which weights are normalised; counts the batch axis, and may be negative.
        heads: the axis is cut into as many stretches of ⌊n/heads⌋, the last with the remainder; each at least 2 long.
        gaussians: G per head.
        padding: elements of exactly this value are returned as they are, and count as zero in μ and σ².
    """

    def __init__(self, axis: int, *, heads: int = 1, gaussians: int = 2, padding: float | None = None) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("gaussians", gaussians)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(axis, int):
            raise TypeError(f"axis must be an integer, got {type(axis).__name__}")
        self.axis, self.heads, self.gaussians, self.padding = axis, heads, gaussians, padding
        self.offset = nn.Parameter(torch.zeros(heads, gaussians))
        self.width = nn.Parameter(torch.randn(heads, gaussians).exp())

    def weights(self, x: Tensor) -> Tensor:
        """The weights, of x's shape: not negative, and summing to 1 in each head's stretch of the axis."""
        if not x.is_floating_point():
            raise TypeError(f"x must be floating-point, got {x.dtype}")
        if not -x.dim() <= self.axis < x.dim() or x.dim() < 2:
            raise ValueError(f"axis {self.axis} must be one of x's at least 2 axes, got x {tuple(x.shape)}")
        size = x.shape[self.axis]
        if size < 2 * self.heads or 0 in x.shape:
            raise ValueError(f"x must have at least 2·heads = {2 * self.heads} entries on axis {self.axis}, got {size}")
        axis = self.axis % x.dim()
        each, rest = divmod(size, self.heads)
        even = self.heads if rest == 0 else self.heads - 1  # heads of `each` entries go together
        parts = []
        if even:
            stretches = x.narrow(axis, 0, even * each).unflatten(axis, (even, each))
            parts.append(self._weights(stretches, axis, slice(0, even)).flatten(axis, axis + 1))
        if rest:
            last = x.narrow(axis, even * each, each + rest).unsqueeze(axis)
            parts.append(self._weights(last, axis, slice(even, None)).squeeze(axis))
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def _weights(self, x: Tensor, axis: int, heads: slice) -> Tensor:
        """`x` with the heads on `axis` and their stretches on the next; float32 at least."""
        x, along = x.to(torch.promote_types(x.dtype, torch.float32)), axis + 1
        counted = x if self.padding is None else x.masked_fill(x == self.padding, 0.0)
        variance, mean = torch.var_mean(counted, along, keepdim=True)
        variance = variance + _EPS
        # A product of Gaussians is one Gaussian, so that elements meet one exponential however many there are:
        # Σ_g p_g (t − δ_g)² = P (t − m)² + Σ_g p_g (δ_g − m)²  with t = x − μ, P = Σ p_g and m = Σ p_g δ_g / P.
        precision, offset = self.width[heads].to(x.dtype).pow(-2), self.offset[heads].to(x.dtype)
        total = precision.sum(-1)
        middle = (precision * offset).sum(-1) / total
        spread = (precision * (offset - middle[:, None]).square()).sum(-1)
        height = 0.5 * (precision / (2 * torch.pi)).log().sum(-1)
        shape = (-1,) + (1,) * (x.dim() - axis - 1)
        total, middle, spread, height = (p.view(shape) for p in (total, middle, spread, height))
        steep = (total / (2 * variance)).sqrt()
        bell = torch.addcmul(-(mean + middle) * steep, x, steep).square().neg().exp()
        height = (height - spread / (2 * variance)).exp()  # of the bell, the same all along a stretch
        return bell * (height / (height * bell.sum(along, keepdim=True)).clamp_min(_EPS))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weights(x).to(x.dtype)
        return y if self.padding is None else torch.where(x == self.padding, x, y)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, heads={self.heads}, gaussians={self.gaussians}"


@register(
    Card(
        name="gaam",
        title="Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple "
        "Modalities",
        paper="2401.11143",
        system="gaam",
        family="channel",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        sample=dict(layers=2, heads=4, gaussians=2),
    )
)
class GaussianBlock(nn.Module):
    """Layers of `GaussianAdaptive`, each beside a residual: x ← x + x · w(x).

    `(B, C, *spatial)` to the same with the default axis 1, the channels; any shape for other axes without `dim`. Cost
    O(elements), and 2·G·H parameters, per layer. Source: arXiv 2401.11143 (gioannides/Gaussian-Adaptive-Attention).

    Args:
        dim: entries on the axis, to be checked; None for any.
        layers: how many; `axes`, `heads` and `gaussians` are one number for all layers, or one for each.
        padding: as for `GaussianAdaptive`.
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        layers: int = 1,
        axes: int | Sequence[int] = 1,
        heads: int | Sequence[int] = 4,
        gaussians: int | Sequence[int] = 5,
        padding: float | None = None,
    ) -> None:
        super().__init__()
        given = {"axes": axes, "heads": heads, "gaussians": gaussians}
        each = {n: [v] * layers if isinstance(v, int) else list(v) for n, v in given.items()}
        for name, values in each.items():
            if layers < 1 or len(values) != layers:
                raise ValueError(f"{name} must be one number or one for each of {layers} layers, got {values}")
        self.dim = dim
        self.layers = nn.ModuleList(
            GaussianAdaptive(a, heads=h, gaussians=g, padding=padding) for a, h, g in zip(*each.values(), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.dim is not None and (x.dim() < 3 or 0 in x.shape or x.shape[1] != self.dim):
            raise ValueError(f"x must be (B, {self.dim}, *spatial) and not empty, got {tuple(x.shape)}")
        for layer in self.layers:
            x = x + layer(x)
        return x


class GaussianAdaptiveClassifier(nn.Module):
    """The paper's head on a frozen encoder: features of its layers → attention over them → a small classifier.

        features (B, L, N, F) → x · w over `axis` → mean over L and N → Linear → ReLU → dropout → Linear → logits

    L are the encoder's layers, N its tokens (frames), F its features. The paper gives no more of the classifier than
    that it is small and fully connected; weights are multiplied by the axis' length here, which keeps their mean at 1.
    `importance` ranks the encoder's layers or features. Source: 2401.11143.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        axis: int = 1,
        heads: int = 1,
        gaussians: int = 2,
        hidden: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not 1 <= axis <= 3:
            raise ValueError(f"axis must be 1 (layers), 2 (tokens) or 3 (features), got {axis}")
        self.features = features
        self.attention = GaussianAdaptive(axis, heads=heads, gaussians=gaussians)
        self.classifier = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.features:
            raise ValueError(f"x must be (B, L, N, {self.features}), got {tuple(x.shape)}")
        return self.classifier((self.attention(x) * x.shape[self.attention.axis]).mean((1, 2)))


@torch.no_grad()
def importance(attention: GaussianAdaptive, data: Iterable[Tensor]) -> Tensor:
    """The importance factor of each entry of the attention's axis, in [0, 1]: which layers or features matter.

        IF = (w̄ − min w̄) / (max w̄ − min w̄)        w̄ = mean of the weights over the data and all other axes

    `data` yields what the attention is called with. All zeros where every w̄ is the same. Source: arXiv 2401.11143.
    """
    total, count = None, 0
    for x in data:
        w = attention.weights(x).movedim(attention.axis, -1).flatten(0, -2).double()
        total, count = w.sum(0) if total is None else total + w.sum(0), count + len(w)
    if total is None:
        raise ValueError("data must yield at least one tensor, got none")
    mean = total / count
    return (mean - mean.min()) / (mean.max() - mean.min()).clamp_min(torch.finfo(mean.dtype).tiny)
