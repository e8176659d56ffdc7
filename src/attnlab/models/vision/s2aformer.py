"""S2AFormer: a light pyramid of strip attention, each with a module for what is near."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import MLP, ChannelNorm, DropPath
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.models.vision.davit import PlaceConv
from attnlab.nn.conv_norm import ConvNorm, fold_norms
from attnlab.nn.spatial.strip import LocalInteraction, StripAttention

LIMS = ("gated", "plain", "none")

# The paper gives no sizes that could be counted: a default of ours, and its own count.
SIZES = {"s2aformer_tiny": Size(4_526_208, {})}


class HybridBlock(nn.Module):
    """x + dwconv(x), then attention, local interaction and an MLP, each behind a norm and added: `(B, C, H, W)`."""

    def __init__(
        self, dim: int, mixer: nn.Module, *, lim: str = "gated", mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.place = PlaceConv(dim)
        self.norm1, self.mixer = norm(dim), mixer
        self.norm2 = None if lim == "none" else norm(dim)
        self.local = None if lim == "none" else LocalInteraction(dim, gate=lim == "gated")
        self.norm3, self.mlp = norm(dim), MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.place(x).permute(0, 2, 3, 1)
        grid = (x.shape[1], x.shape[2])
        x = x + self.drop_path(self.mixer(self.norm1(x).flatten(1, 2), grid=grid).view(x.shape))
        if self.local is not None and self.norm2 is not None:
            near = self.local(self.norm2(x).permute(0, 3, 1, 2))
            x = x + self.drop_path(near.permute(0, 2, 3, 1))
        x = x + self.drop_path(self.mlp(self.norm3(x)))
        return x.permute(0, 3, 1, 2)


class Stem(nn.Sequential):
    """Three 3×3 convolutions at half the size and one to a quarter, with batch norms, and GELU between."""

    def __init__(self, in_channels: int, dim: int) -> None:
        half = dim // 2
        super().__init__(
            ConvNorm(in_channels, half, 3, 2, activation=nn.GELU()),
            ConvNorm(half, half, 3, activation=nn.GELU()),
            ConvNorm(half, half, 3, activation=nn.GELU()),
            ConvNorm(half, dim, 3, 2),
        )


@register(
    Card(
        name="s2aformer",
        title="S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
        paper="2505.22195",
        system="s2aformer",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N²/r²",
        sample={"dims": (16, 24), "depths": (1, 1), "heads": (2, 4), "ratios": (2, 1), "num_classes": 10},
        probe=(40, 24),
        sizes=SIZES,
    )
)
class S2AFormer(Pyramid):
    """An efficient backbone whose attention is thin in channels and coarse in space, mended by convolutions.

        stem → [x + dwconv(x), x + strip attention, x + local interaction, x + mlp] × depth in four stages → norm → mean

    Images `(B, in_channels, H, W)`, any size, to logits `(B, num_classes)`; `forward_features` gives the map of each
    stage. `fuse()` folds the batch norms of stem and patches for inference. Cost O(N²/r²). Source: arXiv 2505.22195;
    there is no public code, and the sizes are ours.

    Args:
        dims, depths, heads, ratios: of each stage; ratios of `StripAttention`.
        qk_dim, reduction, shared: of `StripAttention`. lim: the local interaction, "gated", "plain" or "none".
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (1, 2, 5, 8),
        ratios: Sequence[int] = (8, 4, 2, 1),
        qk_dim: int = 1,
        reduction: str = "dwconv",
        shared: bool = False,
        lim: str = "gated",
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        if not len(dims) == len(heads) == len(ratios):
            raise ValueError(
                f"dims, heads and ratios need one entry per stage, got {len(dims)}, {len(heads)} and {len(ratios)}"
            )
        if lim not in LIMS:
            raise ValueError(f"lim must be one of {', '.join(LIMS)}, got {lim!r}")

        def block(place: Place) -> nn.Module:
            mixer = StripAttention(
                place.dim,
                heads=heads[place.stage],
                ratio=ratios[place.stage],
                qk_dim=qk_dim,
                reduction=reduction,
                shared=shared,
            )
            return HybridBlock(place.dim, mixer, lim=lim, mlp_ratio=mlp_ratio, drop_path=place.drop_path)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(dims) - 1)),
            stem=Stem(in_channels, dims[0]),
            downsample=lambda before, after, stride: ConvNorm(before, after, 3, stride),
            block=block,
            norm=ChannelNorm(dims[-1], eps=1e-6),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()

    def fuse(self) -> S2AFormer:
        """Fold the batch norms into convolutions, in place; in evaluation, and for it alone."""
        fold_norms(self)
        return self
