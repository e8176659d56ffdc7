"""PATNet: FasterNet's partial convolutions, with attention on the channels that they leave alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import DropPath
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.conv_norm import ConvNorm, fold_norms
from attnlab.nn.fused import linear
from attnlab.nn.spatial.partial import PartialChannel, PartialConv, PartialSelf, PartialSpatial

_TINY, _T2, _GELU = (1, 2, 8, 2), (2, 2, 6, 4), {"activation": "gelu"}


def _size(params: int, dim: int, depths: tuple[int, ...], drop_path: float, **more: Any) -> Size:
    return Size(params, {"dim": dim, "depths": depths, "drop_path": drop_path, **more})


# Parameters with 1,000 classes, as the authors' code has, without and with attention over places ("_sp"). Six heads
# but in the smallest, as their class has them; their configuration files ask for four in all: `heads=4` for those.
SIZES = {
    "patnet_t0": _size(3_486_160, 32, _TINY, 0.0, heads=4, **_GELU),
    "patnet_t0_sp": _size(3_558_240, 32, _TINY, 0.0, heads=4, **_GELU, spatial=True),
    "patnet_t1_sp": _size(6_144_876, 48, _TINY, 0.02, **_GELU, spatial=True),
    "patnet_t2": _size(12_270_464, 64, _T2, 0.05),
    "patnet_t2_sp": _size(12_651_072, 64, _T2, 0.05, spatial=True),
    "patnet_s": _size(28_013_952, 96, (2, 2, 9, 4), 0.1),
    "patnet_s_sp": _size(28_976_352, 96, (2, 2, 9, 4), 0.1, spatial=True),
    "patnet_m": _size(59_179_648, 128, (2, 3, 16, 4), 0.2),
    "patnet_m_sp": _size(61_367_424, 128, (2, 3, 16, 4), 0.2, spatial=True),
    "patnet_l": _size(100_641_984, 160, (2, 3, 20, 4), 0.3),
    "patnet_l_sp": _size(104_465_984, 160, (2, 3, 20, 4), 0.3, spatial=True),
}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": partial(nn.ReLU, inplace=True), "gelu": nn.GELU}


class PatchConv(ConvNorm):
    """Patches: a convolution as large as its stride, without bias, and a batch norm."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2) -> None:
        super().__init__(dim, out_dim, stride, stride)
        self.conv.padding = (0, 0)


class PartialBlock(nn.Module):
    """A partial convolution and an MLP of 1×1 convolutions on one residual path, or on two with `separate`.

        x + drop_path(mlp(mixer(x)))              or              x = x + mixer(x);  x + drop_path(mlp(x))
        mlp(x) = scale · spatial(W2 act(bn(W1 x)))                scale and spatial where they are given

    `(B, C, H, W)` to the same.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        hidden: int,
        activation: str = "relu",
        spatial: bool = False,
        separate: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
        self.mixer, self.separate = mixer, separate
        self.fc1 = ConvNorm(dim, hidden, 1, activation=ACTIVATIONS[activation]())
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.spatial = PartialSpatial(dim) if spatial else None
        self.drop_path = DropPath(drop_path)
        self.scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x)
        if self.separate:
            x = y = x + y
        y = linear(self.fc1(y).permute(0, 2, 3, 1), self.fc2).permute(0, 3, 1, 2)
        if self.spatial is not None:
            y = self.spatial(y)
        if self.scale is not None:
            y = y * self.scale[:, None, None]
        return x + self.drop_path(y)


@register(
    Card(
        name="patnet",
        title="Partial Convolution Meets Visual Attention",
        paper="2503.03148",
        system="patnet",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="(N/1024)²",
        sample={"dim": 8, "depths": (1, 1, 1, 1), "head_dim": 16, "spatial": True, "num_classes": 10},
        probe=(64, 96),
        sizes=SIZES,
    )
)
class PATNet(Pyramid):
    """A fast backbone: a quarter of the channels is convolved, the rest is weighed or attends, at hardly any more cost.

        patches of 4 → [x + mlp(pat_ch(x))] × depth, three stages → [x + pat_sf(x), x + mlp(x)] × depth → mean → head

    Images `(B, in_channels, H, W)`, any size from 32² on, to logits `(B, num_classes)`; `forward_features` gives maps
    at strides 4, 8, 16, 32. Stages from the fourth on attend over places, those before over channels. With
    `attention=False, separate=False` it is FasterNet (arXiv 2303.03667). `fuse()` folds batch norms for inference.
    Source: arXiv 2503.03148 (haiduo/PartialNet).

    Args:
        dim: width of the first stage; each later one has twice as many channels. parts: C/parts are convolved.
        activation: "relu" or "gelu". spatial: attention over places behind each MLP (PAT_sp).
        separate: whether the mixers from the fourth stage on have a residual path of their own.
        heads, dropout: of the attention there; the dropout is the authors', whatever else is dropped.
        head_dim: width of the layer before the classifier.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        depths: Sequence[int] = _T2,
        mlp_ratio: float = 2.0,
        parts: int = 4,
        attention: bool = True,
        spatial: bool = False,
        separate: bool = True,
        activation: str = "relu",
        heads: int = 6,
        dropout: float = 0.1,
        layer_scale: float | None = None,
        head_dim: int = 1280,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        dims = [dim * 2**stage for stage in range(len(depths))]

        def block(place: Place) -> nn.Module:
            last, mixer = place.stage > 2, PartialConv(place.dim, parts=parts)
            if attention and last:
                mixer = PartialSelf(place.dim, parts=parts, heads=heads, dropout=dropout)
            elif attention:
                mixer = PartialChannel(place.dim, parts=parts)
            return PartialBlock(
                place.dim,
                mixer,
                hidden=int(place.dim * mlp_ratio),
                activation=activation,
                spatial=spatial,
                separate=separate and last,
                layer_scale=layer_scale,
                drop_path=place.drop_path,
            )

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(dims) - 1)),
            stem=PatchConv(in_channels, dim, 4),
            downsample=PatchConv,
            block=block,
            head_dim=head_dim,
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.neck = nn.Linear(dims[-1], head_dim, bias=False) if num_classes else nn.Identity()
        self.act = ACTIVATIONS[activation]() if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.neck(x.mean((2, 3)))))

    def fuse(self) -> PATNet:
        """Fold the batch norms that stand beside a convolution into it, in place; in evaluation, and for it alone."""
        fold_norms(self)
        for module in self.modules():
            if isinstance(module, PartialSpatial):
                module.fuse()
        return self
