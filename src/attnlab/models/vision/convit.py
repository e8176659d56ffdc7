"""ConViT: a vision transformer whose first layers begin as convolutions, and learn by a gate to leave them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.models.skeletons.plain import Plain
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.gated_positional import GatedPositionalAttention


def _size(params: int, heads: int) -> Size:
    return Size(params, {"dim": 48 * heads, "heads": heads})


# Parameters at 224² with 1,000 classes, counted on the authors' code.
SIZES = {
    "convit_tiny": _size(5_710_512, 4),
    "convit_small": _size(27_777_322, 9),
    "convit_base": _size(86_540_040, 16),
}


@register(
    Card(
        name="convit",
        title="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
        paper="2103.10697",
        system="convit",
        family="spatial",
        kind=BACKBONE,
        cost="N²",
        growth=2.0,
        sample={"dim": 16, "depth": 3, "heads": 4, "local": 2, "image": 32, "patch": 8, "num_classes": 10},
        probe=(32, 40),
        sizes=SIZES,
    )
)
class ConViT(Plain):
    """A vision transformer that starts as a convolutional network and frees itself as far as the data ask for it.

    `local` blocks of `GatedPositionalAttention` on the patches alone, then a class token joins and plain attention
    follows. Images (B, in_channels, H, W) → logits (B, num_classes); `forward_features` gives maps. What the start as a
    convolution buys is sample efficiency. Trained as DeiT. Cost per block: 12NC² + 2N²C. Source: arXiv 2103.10697.

    Args:
        local: blocks with gated positional attention, fewer than `depth`. locality: α, how sharp their heads begin.
        Everything else is `Plain`'s.
    """

    def __init__(
        self,
        *,
        dim: int = 192,
        depth: int = 12,
        heads: int = 4,
        local: int = 10,
        locality: float = 1.0,
        qkv_bias: bool = False,
        **plain: Any,
    ) -> None:
        if not 0 <= local < depth:
            raise ValueError(f"local must be at least 0 and less than depth = {depth}, got {local}")

        def mixer(layer: int) -> nn.Module:
            if layer < local:
                return GatedPositionalAttention(dim, heads=heads, bias=qkv_bias, locality=locality)
            return MultiHead(dim, heads=heads, bias=qkv_bias, out_bias=True)

        if "class_token" in plain:
            raise TypeError("class_token cannot be chosen: it joins after the local blocks")
        super().__init__(
            dim=dim,
            depth=depth,
            mixer=mixer,
            class_token=False,
            **{"norm": partial(nn.LayerNorm, eps=1e-6), **plain},
        )
        self.local = local
        self.late_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))
        for module in self.modules():  # again, since Plain's own initialisation came last
            if isinstance(module, GatedPositionalAttention):
                module.init_weights(locality)

    def run(self, x: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """The tokens after each block, with the class token in front from the block `local` on, and their grid."""
        tokens, grid = self.embed(x)
        after = []
        for layer, block in enumerate(self.encoder.blocks):
            if layer == self.local:
                tokens = torch.cat((self.late_token.expand(len(x), 1, -1), tokens), dim=1)
            tokens = block(tokens, grid=grid)
            after.append(tokens)
        return after, grid

    def forward_features(self, x: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """The map (B, dim, H/patch, W/patch) after each of the given blocks, through the last norm."""
        depth = len(self.encoder.blocks)
        if any(not -depth <= layer < depth for layer in layers):
            raise ValueError(f"layers must lie in [-{depth}, {depth}), got {tuple(layers)}")
        after, grid = self.run(x)
        places = [self.encoder.norm(after[layer][:, -grid[0] * grid[1] :]) for layer in layers]
        return [tokens.unflatten(1, grid).permute(0, 3, 1, 2) for tokens in places]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder.norm(self.run(x)[0][-1][:, 0]))
