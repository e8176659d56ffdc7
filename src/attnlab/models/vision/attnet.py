"""AttNet: a convolutional pyramid whose blocks mix by kernels that the image itself writes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.convglu import ConvGLU
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.conv_norm import ConvNorm, fold_norms
from attnlab.nn.spatial.attentive_conv import AttentiveConv


def _size(params: int, dims: tuple[int, ...], depths: tuple[int, ...], drop_path: float, **arguments: Any) -> Size:
    return Size(params, {"dims": dims, "depths": depths, "drop_path": drop_path, **arguments})


_SMALL = (40, 80, 160, 320)
# Parameters with 1,000 classes, as the authors' code has.
SIZES = {
    "attnet_xxs": _size(2_853_556, (32, 64, 128, 240), (2, 2, 4, 2), 0.02, layer_scale=None, glu_norm=False),
    "attnet_xs": _size(5_554_902, _SMALL, (2, 2, 7, 2), 0.02, glu_norm=False),
    "attnet_s": _size(7_681_316, _SMALL, (2, 3, 10, 3), 0.1, layer_scale=None, glu_norm=False),
    "attnet_t1": _size(13_714_900, (48, 96, 224, 384), (2, 3, 12, 3), 0.1),
    "attnet_t2": _size(27_010_782, (64, 128, 288, 512), (3, 3, 16, 3), 0.2),
    "attnet_t3": _size(49_175_682, (72, 144, 320, 576), (4, 4, 26, 4), 0.4),
    "attnet_t4": _size(87_320_214, (96, 192, 384, 768), (5, 5, 28, 5), 0.5),
}


def glu_width(dim: int, ratio: float) -> int:
    """The hidden width of the gated MLP: two thirds of a plain one's, both rounded down."""
    return int(2 * int(dim * ratio) / 3)


@register(
    Card(
        name="attnet",
        title="Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
        paper="2510.20092",
        system="atconv",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        sample={"dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "ratios": (2, 2, 2, 2), "num_classes": 10},
        probe=(64, 96),
        sizes=SIZES,
    )
)
class AttNet(Pyramid):
    """A convolutional backbone of attentive convolutions and gated MLPs: linear in pixels, any image size.

        3×3 convolutions (stride 4) → [norm → AttentiveConv → norm → ConvGLU] × depth → … → mean → norm → head

    Images `(B, in_channels, H, W)`, any size from 32² on, to logits `(B, num_classes)`; `forward_features` gives the
    map of each stage. `fuse()` folds batch norms for inference. Source: arXiv 2510.20092
    (price112/Attentive-Convolution).

    Args:
        ratios: by stage, of a plain MLP's hidden width; the gated one has two thirds of it. kernels: by stage.
        layer_scale: start value of the learned scale per channel; None for none. glu_norm: an RMS norm in the MLP.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 288, 512),
        depths: Sequence[int] = (3, 3, 16, 3),
        ratios: Sequence[float] = (8, 8, 4, 4),
        kernels: Sequence[int] = (3, 3, 3, 3),
        layer_scale: float | None = 1e-6,
        glu_conv: bool | Sequence[bool] = True,
        glu_norm: bool | Sequence[bool] = True,
        bias: bool = True,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        stages = len(dims)
        conv, norm = ([g] * stages if isinstance(g, bool) else list(g) for g in (glu_conv, glu_norm))
        if not len(ratios) == len(kernels) == len(conv) == len(norm) == stages:
            raise ValueError(
                f"ratios, kernels, glu_conv and glu_norm need one entry per stage ({stages}), got {len(ratios)}, "
                f"{len(kernels)}, {len(conv)} and {len(norm)}"
            )

        def block(place: Place) -> nn.Module:
            at = place.stage
            return Block(
                place.dim,
                AttentiveConv(place.dim, kernel=kernels[at], bias=bias),
                mlp=ConvGLU(place.dim, glu_width(place.dim, ratios[at]), conv=conv[at], norm=norm[at]),
                norm=partial(nn.LayerNorm, eps=1e-6),
                layer_scale=layer_scale,
                drop_path=place.drop_path,
            )

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (stages - 1)),
            stem=nn.Sequential(
                ConvNorm(in_channels, dims[0] // 2, 3, 2, activation=nn.GELU()), ConvNorm(dims[0] // 2, dims[0], 3, 2)
            ),
            downsample=lambda before, after, stride: ConvNorm(before, after, 3, stride),
            block=block,
            norm=nn.LayerNorm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_head(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))  # the norm comes after the mean
        return self.head(self.dropout(x if self.norm is None else self.norm(x)))

    def fuse(self) -> AttNet:
        """Fold batch norms into the convolutions before them, in place; in evaluation, and for it alone."""
        fold_norms(self)
        return self
