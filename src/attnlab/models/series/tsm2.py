"""TSM2: forecasts many series at once, by Mamba along time and along the variates (MambaMixer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.cards import OPERATOR, Card, register
from attnlab.models.skeletons.averaging import AveragedStack
from attnlab.nn.linear.scans import BidirectionalMamba
from attnlab.nn.linear.selective import Mamba


class SeriesMixing(nn.Module):
    """x + dropout(mixer(norm x)) on `(B, M, P, D)`: the mixer runs over the P patches, or over the M variates.

    `norm` "step": over the features of each patch; "grid": over patches and features (TSMixer's two-dimensional norm).
    """

    def __init__(
        self, dim: int, patches: int, mixer: nn.Module, *, over: str, norm: str = "step", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim if norm == "step" else (patches, dim))
        self.mixer, self.over, self.dropout = mixer, over, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.over == "variates":
            y = y.transpose(1, 2)
        y = self.mixer(y.flatten(0, 1)).unflatten(0, y.shape[:2])
        return x + self.dropout(y.transpose(1, 2) if self.over == "variates" else y)


class Covariates(nn.Module):
    """Known series `(B, K, T)` mixed by scans over the K of them, and of these one per variate: `(B, M, T)`."""

    def __init__(self, count: int, variates: int, length: int, *, states: int) -> None:
        super().__init__()
        self.mixer = BidirectionalMamba(length, states=states, expand=1)
        self.project = nn.Linear(count, variates)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.mixer(x).mT).mT


@register(
    Card(
        name="tsm2",
        title="MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
        paper="2403.19888",
        family="linear",
        kind=OPERATOR,
        cost="M T",
        sample=dict(variates=3, length=32, horizon=8, patch=8, stride=4, dim=8, states=4),
    )
)
class TSM2(nn.Module):
    """Forecasts M series that tell of each other, linear in their length and number, without attention or MLPs.

        x ← (x − mean) / (std + 1e-5) of each variate;   patches of each variate → D features, plus learned positions
        layer l:   y_T = x + mamba over the patches (causal),   y_C = x + mamba over the variates (both ways)
        what each reads: learned averages of all y_T and y_C so far;   norms → flatten → linear → horizon, scaled back

    x `(B, M, T)` to `(B, M, horizon)`. Patches of 16 with a stride of 8 from 512 steps, dim 32 and 2 layers are what
    a replication came within a few per cent of the paper's errors with. Source: arXiv 2403.19888, version 1.

    Args:
        patch, stride: (T − patch) must be a multiple of stride, so that the last patch ends now.
        averaging: of `AveragedStack`, "softmax" or "paper".
        norm: "step", with which the time mixers stay causal, or "grid" (see `SeriesMixing`), as the paper has it.
        mix_variates: False leaves the variate mixers out: the same model on each series alone.
        static, covariates: numbers of features of each variate, and of further series, that `forward` is given too;
            each makes the input longer by another T. scale: whether to norm each variate.
    """

    def __init__(
        self,
        *,
        variates: int,
        length: int,
        horizon: int,
        patch: int = 16,
        stride: int = 8,
        dim: int = 32,
        depth: int = 2,
        states: int = 16,
        conv: int = 4,
        expand: int = 2,
        averaging: str = "softmax",
        norm: str = "step",
        mix_variates: bool = True,
        static: int = 0,
        covariates: int = 0,
        scale: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.variates, self.length, self.scale = variates, length, scale
        self.patch, self.stride = patch, stride
        whole = length * (1 + bool(static) + bool(covariates))
        if min(patch, stride) < 1 or patch > length or (whole - patch) % stride:
            raise ValueError(
                f"patch and stride must tile the {whole} steps, (steps − patch) a multiple of stride, "
                f"got patch {patch} and stride {stride}"
            )
        if norm not in ("step", "grid"):
            raise ValueError(f"norm must be 'step' or 'grid', got {norm!r}")
        patches = (whole - patch) // stride + 1
        self.static = nn.Linear(static, length) if static else None
        self.covariates = Covariates(covariates, variates, length, states=states) if covariates else None
        self.embed = nn.Linear(patch, dim)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(patches, dim), std=0.02))

        def time() -> nn.Module:
            mixer = Mamba(dim, states=states, conv=conv, expand=expand)
            return SeriesMixing(dim, patches, mixer, over="time", norm=norm, dropout=dropout)

        def variate() -> nn.Module:
            if not mix_variates:
                return nn.Identity()
            mixer = BidirectionalMamba(dim, states=states, conv=conv, expand=expand)
            return SeriesMixing(dim, patches, mixer, over="variates", norm=norm, dropout=dropout)

        self.stack = AveragedStack([time() for _ in range(depth)], [variate() for _ in range(depth)], kind=averaging)
        self.feature_norm, self.patch_norm = nn.LayerNorm(dim), nn.LayerNorm(patches)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(patches * dim, horizon)

    def _check(self, x: Tensor, static: Tensor | None, covariates: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[1:] != (self.variates, self.length):
            raise ValueError(f"x must have shape (B, {self.variates}, {self.length}), got {tuple(x.shape)}")
        wanted = {
            "static": (static, self.static and (self.variates, self.static.in_features)),
            "covariates": (covariates, self.covariates and (self.covariates.project.in_features, self.length)),
        }
        for name, (given, shape) in wanted.items():
            if (given is None) != (shape is None):
                raise ValueError(f"{name} must {'be given' if shape else 'not be given'}: the network was made so")
            if given is not None and given.shape != (len(x), *shape):  # type: ignore[misc]
                raise ValueError(f"{name} must have shape {(len(x), *shape)}, got {tuple(given.shape)}")  # type: ignore[misc]

    def features(self, x: Tensor, static: Tensor | None = None, covariates: Tensor | None = None) -> Tensor:
        """What the layers make of each patch of each variate, `(B, M, P, D)`, of a scaled x."""
        self._check(x, static, covariates)
        parts = [x]
        if self.covariates is not None:
            parts.append(self.covariates(covariates))
        if self.static is not None:
            parts.append(self.static(static))
        patches = torch.cat(parts, -1).unfold(2, self.patch, self.stride)
        return self.stack(self.embed(patches) + self.positions)

    def forward(self, x: Tensor, static: Tensor | None = None, covariates: Tensor | None = None) -> Tensor:
        """`static` (B, M, features) and `covariates` (B, K, T), if the network was made for them."""
        if self.scale and x.ndim == 3:
            mean, deviation = x.mean(2, keepdim=True), x.std(2, correction=0, keepdim=True) + 1e-5
            x = (x - mean) / deviation
        y = self.feature_norm(self.features(x, static, covariates))
        y = self.head(self.dropout(self.patch_norm(y.mT).mT.flatten(2)))
        return y * deviation + mean if self.scale else y
