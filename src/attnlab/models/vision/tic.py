"""TiC: a pyramid of attention inside convolution windows, with two ways to look further than a window."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, register
from attnlab.models.skeletons.parts import ChannelNorm
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.models.vision.nat import Merging
from attnlab.nn.spatial.convolutional import ConvolutionalAttention


@register(
    Card(
        name="tic",
        title="TiC: Exploring Vision Transformer in Convolution",
        paper="2310.04134",
        system="tic",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N k²",
        growth=1.0,
        sample={"dim": 8, "depths": (1, 2), "heads": (2, 4), "kernel": 3, "num_classes": 10},
        probe=(40, 28),
    )
)
class TiC(Pyramid):
    """An image classifier for any resolution: multi-head attention in convolution windows, no positions at all.

        x = x + MSA-Conv(norm(x))        x = x + MLP(norm(x))        four stages, 2×2 places merged between them

    Images `(B, in_channels, H, W)` of any size to logits; `forward_features` gives the map of each stage. Every second
    block looks further: its heads roll the map in four directions (`shift`) and its keys are pooled (`inter_pool`).
    Source: arXiv 2310.04134. The authors published the operator alone (zs670980918/MSA-Conv), no network and no sizes:
    the defaults are Swin-T's, and where shift and pooling stand is chosen here.

    Args:
        kernel: of every window, odd. shift, inter_pool, pool: of `ConvolutionalAttention`, in every second block.
    """

    def __init__(
        self,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        kernel: int = 7,
        shift: str = "qkv",
        inter_pool: str = "kv_avg",
        pool: int = 2,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        if len(heads) != len(depths):
            raise ValueError(f"heads needs one entry per stage ({len(depths)}), got {len(heads)}")

        def block(place: Place) -> nn.Module:
            far = place.index % 2 == 1
            mixer = ConvolutionalAttention(
                place.dim,
                heads=heads[place.stage],
                kernel=kernel,
                shift=shift if far else "none",
                inter_pool=inter_pool if far else "none",
                pool=pool,
            )
            return Block(place.dim, mixer, mlp=mlp_ratio, drop_path=place.drop_path)

        dims = [dim * 2**stage for stage in range(len(depths))]
        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(depths) - 1)),
            downsample=Merging,
            block=block,
            norm=ChannelNorm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()
