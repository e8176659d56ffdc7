"""OverLoCK: first an overview of the image, then a closer look at it that the overview guides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import drop_path_rates
from attnlab.models.vision.context_block import ContextBlock, LargeKernelBlock
from attnlab.nn.conv_norm import ConvNorm, fold_norms
from attnlab.nn.reparam import DilatedReparam


def _size(params: int, dims: Sequence[int], depths: Sequence[int], focus: Sequence[int], heads: Sequence[int]) -> Size:
    return Size(params, {"dims": dims, "depths": depths, "focus_depths": focus, "heads": heads})


# Parameters with 1,000 classes and the auxiliary head, before anything is merged, as the authors' code has.
SIZES = {
    "overlock_xt": _size(17_307_272, (56, 112, 256, 336), (2, 2, 3, 2), (6, 2), (4, 6)),
    "overlock_t": _size(34_990_472, (64, 128, 256, 512), (4, 4, 6, 2), (12, 2), (4, 8)),
    "overlock_s": _size(58_309_772, (64, 128, 320, 512), (6, 6, 8, 3), (16, 3), (8, 16)),
    "overlock_b": _size(98_012_968, (80, 160, 384, 576), (8, 8, 10, 4), (20, 4), (6, 9)),
}


class Stem(nn.Sequential):
    """3×3 convolutions of strides 2, 1, 2, 1, the first two of half the width, with GELUs between."""

    def __init__(self, in_channels: int, dim: int) -> None:
        half = dim // 2
        super().__init__(
            ConvNorm(in_channels, half, 3, 2, activation=nn.GELU()),
            ConvNorm(half, half, 3, activation=nn.GELU()),
            ConvNorm(half, dim, 3, 2, activation=nn.GELU()),
            ConvNorm(dim, dim, 3),
        )


@register(
    Card(
        name="overlock",
        title="OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
        paper="2502.20087",
        system="overlock",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N k²",
        sample={
            "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "focus_depths": (2, 2), "heads": (2, 2),
            "kernels": (7, 5, 5, 5), "small": 3, "mlp_ratios": (1, 1, 1, 1), "focus_mlp_ratios": (1, 1),
            "projection": 24, "num_classes": 10,
        },
        probe=(64, 96),
        sizes=SIZES,
    )
)  # fmt: skip
class OverLoCK(nn.Module):
    """A convolutional backbone of three networks: a base, a light overview of all, and a focus that it guides.

        x = base(images) (stride 16);   c = overview(x) (stride 32), a quarter of its channels kept
        x, c ← focus blocks of (x, c enlarged), then, at stride 32, of (x, c), in which c is renewed from block to block

    Images `(B, in_channels, H, W)`, any size from 32² on, to logits `(B, num_classes)`; in training to the pair
    (logits, logits of the overview), for a loss CE + 0.4 CE (label smoothing 0.1). `forward_features` gives the maps of
    the first two stages and of both focus stages, these with the context's channels. `fuse()` merges branches and batch
    norms for inference. Cost O(N k²). Source: arXiv 2502.20087 (LMMMEng/OverLoCK).

    Args:
        dims, depths, kernels, mlp_ratios: of the base's three stages and the overview. projection: width of the head.
        focus_depths, heads, focus_mlp_ratios: of the two focus stages, whose kernels are those of the last two stages.
        layer_scale: by stage, start value of the scale of the residual path; None for none.
        scale_branch: that scale on the branch instead. auxiliary: the overview's own head.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (56, 112, 256, 336),
        depths: Sequence[int] = (2, 2, 3, 2),
        focus_depths: Sequence[int] = (6, 2),
        heads: Sequence[int] = (4, 6),
        kernels: Sequence[int] = (17, 15, 13, 7),
        small: int = 5,
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        focus_mlp_ratios: Sequence[float] = (3, 3),
        layer_scale: Sequence[float | None] = (None, None, 1.0, 1.0),
        scale_branch: bool = False,
        projection: int = 1024,
        auxiliary: bool = True,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(kernels) == len(mlp_ratios) == len(layer_scale) == 4:
            raise ValueError(
                "dims, depths, kernels, mlp_ratios and layer_scale need four entries, got "
                f"{len(dims)}, {len(depths)}, {len(kernels)}, {len(mlp_ratios)} and {len(layer_scale)}"
            )
        if not len(focus_depths) == len(heads) == len(focus_mlp_ratios) == 2:
            raise ValueError(
                "focus_depths, heads and focus_mlp_ratios need two entries, got "
                f"{len(focus_depths)}, {len(heads)} and {len(focus_mlp_ratios)}"
            )
        if dims[3] % 4:
            raise ValueError(f"dims must end with a multiple of 4, got {dims[3]}")
        context = dims[3] // 4
        self.in_channels = in_channels
        self.channels = (dims[0], dims[1], dims[2] + context, dims[3] + context)
        self.reductions = (4, 8, 16, 32)
        rates = iter(drop_path_rates(drop_path, sum(depths) + sum(focus_depths)))

        self.stages = nn.ModuleList()  # base, base, base, overview
        for at, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            shrink = Stem(in_channels, dim) if at == 0 else ConvNorm(dims[at - 1], dim, 3, 2)
            blocks = [
                LargeKernelBlock(
                    dim, kernel=kernels[at], mlp_ratio=mlp_ratios[at], layer_scale=layer_scale[at],
                    scale_branch=scale_branch, drop_path=next(rates),
                )
                for _ in range(depth)
            ]  # fmt: skip
            self.stages.append(nn.Sequential(shrink, *blocks))
        self.keep = nn.Conv2d(dims[3], context, 1)
        self.focus = nn.ModuleList()
        for at, depth in enumerate(focus_depths):
            self.focus.append(
                nn.ModuleList(
                    ContextBlock(
                        dims[2 + at], context_dim=context, kernel=kernels[2 + at], small=small, heads=heads[at],
                        mlp_ratio=focus_mlp_ratios[at], layer_scale=layer_scale[2 + at], scale_branch=scale_branch,
                        drop_path=next(rates),
                    )
                    for _ in range(depth)
                )
            )  # fmt: skip
        self.shrink_image, self.shrink_context = ConvNorm(dims[2], dims[3], 3, 2), ConvNorm(context, context, 3, 2)
        # How the context that a block gave and the overview's add up; the very first block takes the overview's alone.
        renewals = sum(focus_depths) - 1
        self.old = nn.ModuleList(Scale(context) for _ in range(renewals))
        self.new = nn.ModuleList(Scale(context) for _ in range(renewals))

        self.project = ConvNorm(dims[3] + context, projection, 1, activation=nn.SiLU()) if num_classes else None
        self.head = nn.Linear(projection, num_classes) if num_classes else nn.Identity()
        self.second_norm = nn.BatchNorm2d(dims[3]) if num_classes and auxiliary else None
        self.second_head = nn.Linear(dims[3], num_classes) if num_classes and auxiliary else None
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.modules():
            if isinstance(block, ContextBlock):
                for table in block.mixer.tables:
                    nn.init.zeros_(table)

    def look(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The four maps, and the overview's."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be images (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if min(x.shape[-2:]) < 32:
            raise ValueError(f"x must be at least 32 pixels high and wide, got {tuple(x.shape[-2:])}")
        first = self.stages[0](x.contiguous(memory_format=torch.channels_last))
        second = self.stages[1](first)
        x = self.stages[2](second)
        overview = self.stages[3](x)

        kept = self.keep(overview)
        prior = F.interpolate(kept, x.shape[2:], mode="bilinear", align_corners=False)
        context, maps, renewals = prior, [first, second], zip(self.old, self.new, strict=True)
        for at, blocks in enumerate(self.focus):
            if at == 1:
                x, context, prior = self.shrink_image(x), self.shrink_context(context), kept
            for index, block in enumerate(cast(nn.ModuleList, blocks)):
                if at or index:
                    old, new = next(renewals)
                    context = old(context) + new(prior)
                both = block(torch.cat((x, context), 1))
                x, context = both.split((block.dim, block.context_dim), 1)
            maps.append(both)
        return maps, overview

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The maps after two stages and after both focus stages: `channels[i]` channels, 1/`reductions[i]` the size."""
        return self.look(x)[0]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps, overview = self.look(x)
        last = maps[-1] if self.project is None else self.project(maps[-1])
        main = self.head(last.mean((2, 3)))
        if not self.training or self.second_head is None or self.second_norm is None:
            return main
        return main, self.second_head(self.second_norm(overview).mean((2, 3)))

    def fuse(self) -> OverLoCK:
        """Merge the branches of large kernels and fold batch norms, in place; in evaluation, and for it alone."""
        fold_norms(self)
        for module in list(self.modules()):
            if isinstance(module, DilatedReparam):
                module.fuse()
            elif isinstance(module, ContextBlock):
                module.fold_out_norm()
        return self


class Scale(nn.Module):
    """A factor and a summand per channel, from 1 and 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])
