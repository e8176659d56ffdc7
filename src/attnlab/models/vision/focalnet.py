"""FocalNet: a pyramid whose blocks mix by focal modulation instead of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm, Downsample
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.spatial.focal import FocalModulation


def _size(params: int, dim: int, depths: tuple[int, ...], levels: int, drop_path: float, **arguments: Any) -> Size:
    return Size(params, {"dim": dim, "depths": depths, "levels": levels, "drop_path": drop_path, **arguments})


_T, _S, _ISO = (2, 2, 6, 2), (2, 2, 18, 2), (12,)
_LARGE: dict[str, Any] = {"overlap": True, "post_norm": True, "layer_scale": 1e-4}

# Parameters with 1,000 classes (as the authors' code has), width, depths, levels, drop path (their configurations).
SIZES = {
    "focalnet_tiny_srf": _size(28_427_116, 96, _T, 2, 0.2),
    "focalnet_tiny_lrf": _size(28_647_928, 96, _T, 3, 0.2),
    "focalnet_small_srf": _size(49_891_216, 96, _S, 2, 0.3),
    "focalnet_small_lrf": _size(50_342_440, 96, _S, 3, 0.3),
    "focalnet_base_srf": _size(88_148_144, 128, _S, 2, 0.5),
    "focalnet_base_lrf": _size(88_749_768, 128, _S, 3, 0.5),
    "focalnet_large_fl3": _size(207_100_744, 192, _S, 3, 0.5, window=5, **_LARGE),
    "focalnet_large_fl4": _size(207_281_248, 192, _S, 4, 0.5, normalize=True, **_LARGE),
    "focalnet_xlarge_fl3": _size(366_082_120, 256, _S, 3, 0.5, window=5, **_LARGE),
    "focalnet_xlarge_fl4": _size(366_322_784, 256, _S, 4, 0.5, **_LARGE),
    "focalnet_huge_fl3": _size(686_564_424, 352, _S, 3, 0.5, post_norm_inside=True, **_LARGE),
    "focalnet_huge_fl4": _size(689_277_664, 352, _S, 4, 0.5, post_norm_inside=True, **_LARGE),
    "focalnet_tiny_iso": _size(5_880_280, 192, _ISO, 3, 0.2, patch=16),
    "focalnet_small_iso": _size(22_376_344, 384, _ISO, 3, 0.2, patch=16),
    "focalnet_base_iso": _size(87_237_400, 768, _ISO, 3, 0.2, patch=16, post_norm=True, layer_scale=1e-4),
}


@register(
    Card(
        name="focalnet",
        title="Focal Modulation Networks",
        paper="2203.11926",
        system="focalnet",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={"dim": 16, "depths": (1, 1), "num_classes": 10},
        probe=(32, 24),
        sizes=SIZES,
    )
)
class FocalNet(Pyramid):
    """A Swin-shaped image backbone whose tokens mix by focal modulation: linear in pixels, any image size.

    Images `(B, in_channels, H, W)` to logits `(B, num_classes)`; `forward_features` gives the map of each stage.
    Source: arXiv 2203.11926; sizes as the authors' configurations, `_srf`/`_lrf` (small, large receptive field) have
    2 and 3 focal levels, `_fl3`/`_fl4` 3 and 4; the `_iso` ones keep one resolution like a ViT.

    Args:
        dim: width of the first stage, doubled at each later one. levels, window: one number, or one per stage.
        overlap: overlapping patches (7×7 stem, 3×3 between stages) instead of plain 4×4 and 2×2 ones.
        post_norm: norms behind the mixer and the MLP instead of before them.
        post_norm_inside, normalize: `post_norm` and `normalize` of `FocalModulation`.
    """

    def __init__(
        self,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        levels: int | Sequence[int] = 2,
        window: int | Sequence[int] = 3,
        patch: int = 4,
        mlp_ratio: float = 4.0,
        overlap: bool = False,
        post_norm: bool = False,
        layer_scale: float | None = None,
        post_norm_inside: bool = False,
        normalize: bool = False,
        patch_norm: bool = True,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        stages = len(depths)
        if overlap and patch != 4:
            raise ValueError(f"patch must be 4 with overlap=True (a 7×7 stem of stride 4), got {patch}")
        level, width = _per_stage("levels", levels, stages), _per_stage("window", window, stages)
        dims = [dim * 2**stage for stage in range(stages)]
        norm = ChannelNorm if patch_norm else None

        def block(place: Place) -> nn.Module:
            mixer = FocalModulation(
                place.dim,
                levels=level[place.stage],
                window=width[place.stage],
                normalize=normalize,
                post_norm=post_norm_inside,
            )
            return Block(
                place.dim,
                mixer,
                mlp=mlp_ratio,
                post_norm=post_norm,
                layer_scale=layer_scale,
                drop_path=place.drop_path,
            )

        def downsample(before: int, after: int, stride: int) -> nn.Module:
            return Downsample(before, after, stride, kernel=3 if overlap else 2, padding=int(overlap), norm=norm)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(patch, *(2,) * (stages - 1)),
            stem=Downsample(in_channels, dim, patch, kernel=7 if overlap else patch, padding=2 * overlap, norm=norm),
            downsample=downsample,
            block=block,
            norm=ChannelNorm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()


def _per_stage(name: str, value: int | Sequence[int], stages: int) -> Sequence[int]:
    values = [value] * stages if isinstance(value, int) else value
    if len(values) != stages:
        raise ValueError(f"{name} must be one number or one per stage ({stages}), got {len(values)}")
    return values
