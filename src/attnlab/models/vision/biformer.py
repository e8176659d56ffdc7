"""BiFormer: a convolutional pyramid whose blocks attend by bi-level routing, and fully in the last stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.local_mlp import LocalMLP
from attnlab.models.skeletons.parts import MLP, ConvStem, Downsample, Norm, NormFirst
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.bilevel_routing import BilevelRouting

FULL_WITH_LOCAL, FULL, CONVOLUTION = -2, -1, 0  # what topk means when it counts no regions
_SMALL, _WIDE = (64, 128, 256, 512), (96, 192, 384, 768)

# Parameters with 1,000 classes and arguments, as in the authors' code and published configurations.
SIZES = {
    "biformer_tiny": Size(13_142_760, {"dims": _SMALL, "depths": (2, 2, 8, 2)}),
    "biformer_small": Size(25_536_232, {"dims": _SMALL, "depths": (4, 4, 18, 4)}),
    "biformer_base": Size(56_804_968, {"dims": _WIDE, "depths": (4, 4, 18, 4)}),
    "biformer_stl": Size(28_372_552, {"dims": _WIDE, "depths": (2, 2, 6, 2), "mlp_ratio": 4.0, "swin_layout": True}),
}


class FullAttention(MultiHead):
    """Multi-head attention plus a depth-wise convolution: what the last stage, of 7×7 tokens, has instead of routing.

        y = Wo (attend(q, k, v) + dwconv(x))

    It is not `BilevelRouting` with every region chosen: 8 heads whatever the width, no biases in Wqkv, scaled by the
    width of one head, and the convolution acts on x, not on v.
    """

    def __init__(self, dim: int, *, heads: int = 8, local: int = 5) -> None:
        super().__init__(dim, heads=heads, out_bias=True)
        self.lepe = DepthwiseConv(dim, local) if local else None

    def forward(self, x: Tensor, context: Tensor | None = None, *, grid: Any = None, **keywords: Any) -> Tensor:
        self.refuse(context=context, **keywords)
        self.check(x)
        heads = self.mix(*self.qkv(x), x=x).transpose(1, 2).flatten(2)
        if self.lepe is not None:
            heads = heads + self.lepe(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return self.wo(heads)


class Residual(Block):
    """A block normed after each residual sum, x = norm1(x + mixer(x)), instead of before the mixer."""

    def forward(self, x: Tensor) -> Tensor:
        if self.local is not None:
            x = x + self.local(x)
        x = x.permute(0, 2, 3, 1)
        y = self.mix(x)
        x = self.norm1(x + self.drop_path(y if self.scale1 is None else y * self.scale1))
        y = self.mlp(x)
        x = self.norm2(x + self.drop_path(y if self.scale2 is None else y * self.scale2))
        return x.permute(0, 3, 1, 2)


@register(
    Card(
        name="biformer",
        title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        paper="2303.08810",
        system="biformer",
        family="sparse",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N² topk / regions²",
        sample={"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "head_dim": 8, "regions": 2, "topk": (1, 2, 3, -2),
                "num_classes": 10},
        sizes=SIZES,
    )
)  # fmt: skip
class BiFormer(Pyramid):
    """An image backbone whose tokens see only the regions that suit their own.

    Images `(B, in_channels, H, W)` to logits `(B, num_classes)`; `forward_features` gives the map of each stage. Any
    image size: maps that the regions do not divide are padded inside the attention.
    Source: arXiv 2303.08810 (rayleizhu/BiFormer); `biformer_stl` is its ablation in the layout of Swin-T.

    Args:
        dims, depths: width and number of blocks of each stage.
        head_dim: width of a head where attention is routed.
        regions: per side of the map; one number, or one per stage.
        topk: per stage, regions that each region sees; `FULL_WITH_LOCAL`, `FULL` or `CONVOLUTION` put full attention
            with or without a convolution, or a convolution alone, in place of routing.
        local: kernel of the convolution beside the attention; position: of the one before each block (0 for none).
        swin_layout: 4×4 patches, norms before downsampling, no position convolution.
        pre_norm: norms before mixer and MLP; if not, after each residual sum.
        local_mlp: a depth-wise convolution in the MLP.
        norm: of stem, downsampling and head, on maps.
        routing: further keywords of `BilevelRouting`; a list has one dictionary per stage.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = _SMALL,
        depths: Sequence[int] = (2, 2, 8, 2),
        head_dim: int = 32,
        qk_dims: Sequence[int | None] | None = None,
        regions: int | Sequence[int] = 7,
        topk: Sequence[int] = (1, 4, 16, FULL_WITH_LOCAL),
        local: int = 5,
        position: int = 3,
        mlp_ratio: float | Sequence[float] = 3.0,
        swin_layout: bool = False,
        pre_norm: bool = True,
        local_mlp: bool = False,
        layer_scale: float | None = None,
        norm: Norm = nn.BatchNorm2d,
        routing: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        stages = len(depths)
        if len(topk) != stages:
            raise ValueError(f"topk must have one number per stage ({stages}), got {len(topk)}")
        per_region = [regions] * stages if isinstance(regions, int) else regions
        ratios = [mlp_ratio] * stages if isinstance(mlp_ratio, (int, float)) else mlp_ratio
        extra = [routing or {}] * stages if routing is None or isinstance(routing, dict) else routing
        widths = qk_dims or (None,) * stages

        def mixer(place: Place) -> tuple[nn.Module, Any]:
            """The mixer of a block and the layout that it wants."""
            dim, count = place.dim, topk[place.stage]
            if count == CONVOLUTION:
                names = (nn.Conv2d(dim, dim, 1), DepthwiseConv(dim, 5), nn.Conv2d(dim, dim, 1))
                return nn.Sequential(*names), "NCHW"
            if count in (FULL, FULL_WITH_LOCAL):
                return FullAttention(dim, local=local if count == FULL_WITH_LOCAL else 0), "tokens"
            qk_dim = widths[place.stage] or dim
            mechanism = BilevelRouting(
                dim, heads=qk_dim // head_dim, regions=per_region[place.stage], topk=count, qk_dim=qk_dim, local=local,
                **extra[place.stage],
            )  # fmt: skip
            return mechanism, "tokens"

        def block(place: Place) -> nn.Module:
            module, layout = mixer(place)
            hidden = int(place.dim * ratios[place.stage])
            make = Block if pre_norm else Residual
            before = position and not swin_layout
            return make(
                place.dim,
                module,
                layout=layout,
                mlp=(LocalMLP if local_mlp else MLP)(place.dim, hidden),
                norm=partial(nn.LayerNorm, eps=1e-6),
                layer_scale=layer_scale,
                drop_path=place.drop_path,
                local=nn.Conv2d(place.dim, place.dim, position, padding=1, groups=place.dim) if before else None,
            )

        stem: nn.Module
        downsample: Callable[[int, int, int], nn.Module]
        if swin_layout:
            stem, downsample = Downsample(in_channels, dims[0], 4, norm=norm), partial(NormFirst, norm=norm)
        else:
            stem = ConvStem((in_channels, dims[0] // 2, dims[0]), norm=norm, activation=nn.GELU, last_norm=norm)
            downsample = partial(Downsample, kernel=3, padding=1, norm=norm)
        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (stages - 1)),
            stem=stem,
            downsample=downsample,
            block=block,
            norm=norm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()
