"""SpectFormer: spectral gating in the first layers, attention in the later ones; a pyramid, and a plain network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.local_mlp import LocalMLP
from attnlab.models.skeletons.parts import ChannelNorm, Downsample, drop_path_rates
from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.models.vision.volo import ClassBlock
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.spectral_gating import SpectralGating
from attnlab.recipes.token_labelling import Box, random_box, swap_box

_TITLE = "SpectFormer: Frequency and Attention is what you need in a Vision Transformer"
_FINE = partial(nn.LayerNorm, eps=1e-6)

# Parameters at 224² with 1,000 classes, counted on the authors' code. Without the dense head: 21.8, 32.5 and 54.2 M.
SIZES = {
    "spectformer_s": Size(22_226_928, {}),
    "spectformer_b": Size(
        33_052_880, {"dims": (64, 128, 320, 512), "depths": (3, 4, 12, 3), "heads": (2, 4, 10, 16), "stem": 64}
    ),
    "spectformer_l": Size(
        54_675_792, {"dims": (96, 192, 384, 512), "depths": (3, 6, 18, 3), "heads": (3, 6, 12, 16), "stem": 64}
    ),
}
VANILLA_SIZES = {
    "spectformer_vanilla_xs": Size(20_028_520, {"dim": 384, "depth": 12}),
    "spectformer_vanilla_s": Size(32_449_768, {"dim": 384, "depth": 19}),
}


class Stem(nn.Module):
    """Three convolutions at half the size, then one to a quarter, and a norm: (B, 3, H, W) → (B, dim, ⌈H/4⌉, ⌈W/4⌉)."""

    def __init__(self, in_channels: int, hidden: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, kernel, stride in ((in_channels, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            layers.append(nn.Conv2d(inputs, hidden, kernel, stride, kernel // 2, bias=False))
            layers += [nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, dim, 3, 2, 1)
        self.norm = ChannelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(x)))


@register(
    Card(
        name="spectformer",
        title=_TITLE,
        paper="2304.06446",
        system="spectformer",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N log N + (N/16)²",
        sample={
            "dims": (16, 16, 16, 24), "depths": (1, 1, 1, 1), "heads": (2, 2, 2, 2), "mlp_ratios": (2, 2, 2, 2),
            "stem": 8, "image": 64, "num_classes": 10,
        },
        probe=(64, 96),
        sizes=SIZES,
    )
)  # fmt: skip
class SpectFormer(Pyramid):
    """A pyramid that filters frequencies where maps are large, and attends where they are small.

        stem → [x + gate(norm(x)), x + mlp(norm(x))] in two stages → the same with attention in two → class attention

    Images (B, in_channels, H, W), any size, → logits (B, num_classes): of a class token that is the mean of the places
    and reads them once, plus, with `dense=True`, half of each class's largest over the places. In training,
    `dense=True` gives what `token_label_loss` takes: class logits, place logits (B, N, num_classes) and the box in
    which `mix_token=True` swapped the maps behind the stem with those of the batch in reverse order (the place logits
    are swapped back already). `forward_features` gives each stage's map, all but the last normed. Cost: N log N in the
    first stages. Source: arXiv 2304.06446 (badripatro/SpectFormers).

    Args:
        spectral: how many stages, from the first, have spectral gating. image: the size that its filters are for.
        stem: hidden channels of the stem.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        spectral: int = 2,
        stem: int = 32,
        image: int = 224,
        dense: bool = True,
        mix_token: bool = True,
        eps: float = 1e-6,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        stages = len(dims)
        if not stages == len(heads) == len(mlp_ratios):
            raise ValueError(
                f"dims, heads and mlp_ratios need one entry per stage, got {stages}, {len(heads)} and {len(mlp_ratios)}"
            )
        if mix_token and not dense:
            mix_token = False
        norm = partial(nn.LayerNorm, eps=eps)

        def block(place: Place) -> nn.Module:
            mixer: nn.Module
            if place.stage < spectral:
                side = max(image // (4 * 2**place.stage), 1)
                mixer = SpectralGating(place.dim, spectrum=(side, side // 2 + 1))
            else:
                mixer = MultiHead(place.dim, heads=heads[place.stage], bias=True)
            mlp = LocalMLP(place.dim, int(place.dim * mlp_ratios[place.stage]))
            return Block(place.dim, mixer, layout="tokens", mlp=mlp, norm=norm, drop_path=place.drop_path)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (stages - 1)),
            stem=Stem(in_channels, stem, dims[0]),
            downsample=partial(Downsample, kernel=3, padding=1),
            block=block,
            stage_norm=partial(ChannelNorm, eps=eps),
            norm=norm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.stages[-1].norm = None  # type: ignore[assignment]  # the norm behind class attention is its own
        self.mix_token = mix_token
        self.class_block = ClassBlock(dims[-1], heads=heads[-1], mlp_ratio=mlp_ratios[-1], qkv_bias=True)
        self.class_block.norm1.eps = self.class_block.norm2.eps = eps
        self.dense_head = nn.Linear(dims[-1], num_classes) if dense and num_classes else None
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers as in all vision transformers; convolutions N(0, 2 / (outputs that read an input))."""
        super().init_weights()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=math.sqrt(2 * m.groups / (m.weight[0, 0].numel() * m.out_channels)))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Any:
        x = self.embed(x)
        box: Box = (0, 0, 0, 0)
        mixed = self.training and self.mix_token
        if mixed:
            scale = 2 ** (len(self.stages) - 1)
            box = random_box((x.shape[2] // scale, x.shape[3] // scale), generator=generator)
            top, left, bottom, right = (scale * edge for edge in box)
            x = swap_box(x.permute(0, 2, 3, 1), (top, left, bottom, right)).permute(0, 3, 1, 2)
        for stage in self.stages:
            x = stage(x)
        places = x.permute(0, 2, 3, 1).flatten(1, 2)
        summary = self.class_block(places.mean(1, keepdim=True), places)
        norm = self.norm if self.norm is not None else nn.Identity()
        logits = self.head(norm(summary)[:, 0])
        if self.dense_head is None:
            return logits
        dense = self.dense_head(norm(places))
        if not self.training:
            return logits + 0.5 * dense.amax(1)
        if mixed:
            dense = swap_box(dense.unflatten(1, x.shape[2:]), box).flatten(1, 2)
        return logits, dense, box


class SpectralBlock(TokenBlock):
    """A block whose gate has no path around it: x + drop_path(mlp(norm2(mixer(norm1(x)))))."""

    def forward(self, x: Tensor, *, grid: tuple[int, ...] | None = None) -> Tensor:
        y = self.mixer(self.norm1(x), grid=grid)
        return x + self.drop_path(self.mlp(self.norm2(y)))  # type: ignore[misc]


@register(
    Card(
        name="spectformer_vanilla",
        title=_TITLE,
        paper="2304.06446",
        system="spectformer",
        family="spatial",
        kind=BACKBONE,
        cost="N²",
        sample={
            "dim": 12, "depth": 3, "heads": 2, "spectral": 2, "image": 32, "patch": 8, "num_classes": 10,
        },
        sizes=VANILLA_SIZES,
    )
)  # fmt: skip
class VanillaSpectFormer(Plain):
    """A plain vision transformer whose first layers filter frequencies instead of attending.

    Images (B, in_channels, H, W) → logits (B, num_classes) of the mean of all places. Other sizes than `image` are
    taken: positions and filters are interpolated. Source: arXiv 2304.06446 (badripatro/SpectFormers), whose code has
    six heads whatever the width.

    Args:
        spectral: how many layers, from the first, have spectral gating (the paper's alpha).
        head_dropout: before the last linear layer. plain: everything else is `Plain`'s.
    """

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        spectral: int = 4,
        mlp_ratio: float = 4.0,
        image: int = 224,
        patch: int = 16,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        head_dropout: float = 0.0,
        **plain: Any,
    ) -> None:
        if not 0 <= spectral <= depth:
            raise ValueError(f"spectral must be in [0, depth = {depth}], got {spectral}")

        def attention(layer: int) -> nn.Module:
            return nn.Identity() if layer < spectral else MultiHead(dim, heads=heads, bias=True, dropout=dropout)

        options: dict[str, Any] = {"norm": _FINE, "class_token": False, **plain}
        super().__init__(
            dim=dim,
            depth=depth,
            mixer=attention,
            mlp_ratio=mlp_ratio,
            image=image,
            patch=patch,
            drop_path=drop_path,
            dropout=dropout,
            **options,
        )
        side = image // patch
        for layer, rate in enumerate(drop_path_rates(drop_path, depth)[:spectral]):
            gate = SpectralGating(dim, spectrum=(side, side // 2 + 1))
            known = self.encoder.blocks[layer]
            block = SpectralBlock(
                dim, gate, mlp_ratio=mlp_ratio, norm=options["norm"], drop_path=rate, dropout=dropout
            )  # fmt: skip
            block.mlp = known.mlp  # type: ignore[assignment]  # as `Plain` has begun it
            self.encoder.blocks[layer] = block
        self.head_dropout = nn.Dropout(head_dropout)

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.embed(x)
        return self.head(self.head_dropout(self.encoder(tokens, grid=grid).mean(1)))
