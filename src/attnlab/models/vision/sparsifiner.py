"""Sparsifiner: a DeiT whose patches see the few others that a low-rank predictor expects to matter, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.nn.sparse.predicted import PredictedAttention
from attnlab.nn.tokens.reorganize import budget, class_attention, strongest

# DeiT's parameters and, for each block, two tables of patterns and two projections.
SIZES = {
    "sparsifiner_tiny": Size(5_918_632, {"dim": 192, "heads": 3}),
    "sparsifiner_small": Size(22_251_880, {"dim": 384, "heads": 6}),
}


class Outputs(NamedTuple):
    """What training needs of a network."""

    logits: Tensor  # (B, num_classes)
    tokens: Tensor  # (B, N − 1, C): the patches, through the last norm
    approximations: Tensor  # (L, B, H, N − 1, N): the weights that each block's predictor expects
    alive: Tensor | None  # (B, N − 1), bool: the patches that were not dropped


@register(
    Card(
        name="sparsifiner",
        title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        paper="2303.13755",
        system="sparsifiner",
        family="sparse",
        kind=BACKBONE,
        cost="N·K + N²/r",
        sample={
            "dim": 16, "depth": 2, "heads": 2, "image": (32, 24), "patch": 8, "num_classes": 10, "reduce": 2,
            "drop_at": (0,), "keep_tokens": 0.7,
        },
        probe=(32, 24),
        sizes=SIZES,
    )
)  # fmt: skip
class Sparsifiner(Plain):
    """A vision transformer in which each patch, in each head, sees a quarter of the others: those it will need.

        patches, class token + places → [x + predicted attention(norm(x)), x + MLP(norm(x))] × depth → class token

    Images (B, in_channels, H, W) of the size `image` to logits (B, num_classes) in evaluation, and to `Outputs` in
    training; `attnlab.recipes.sparsifiner` has the losses, and begins with a trained DeiT. With `drop_at`, patches at
    which the class token looks least leave too, as in EViT, but their places stay, as zeros that the class token goes
    on to see. Cost: see `PredictedAttention`; dropped patches save nothing here. The authors' code makes a block's
    budget smaller for good once patches have been dropped; here each image's budget is its own.
    Source: arXiv 2303.13755 (lim142857/Sparsifiner).

    Args:
        keep: the share of the keys that each patch sees, or one for each block.
        drop_at: the blocks behind whose attention patches leave, from 0. keep_tokens: the share of the image's patches
            that stays, or one for each of `drop_at`.
        reduce, shared, floor, top, sparse, …: of `PredictedAttention`, in `predicted`. Others as for `Plain`.
    """

    def __init__(
        self,
        *,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        keep: float | Sequence[float] = 0.25,
        drop_at: Sequence[int] = (),
        keep_tokens: float | Sequence[float] = 1.0,
        reduce: float = 6,
        qkv_bias: bool = True,
        image: int | tuple[int, int] = 224,
        patch: int = 16,
        predicted: dict[str, Any] | None = None,
        **plain: Any,
    ) -> None:
        if plain.get("class_token", True) is not True:
            raise ValueError("class_token must be True: its attention is never restricted")
        shares = tuple(keep) if isinstance(keep, Sequence) else (keep,) * depth
        if len(shares) != depth:
            raise ValueError(f"keep must be one share or one for each of the {depth} blocks, got {keep}")
        rates = tuple(keep_tokens) if isinstance(keep_tokens, Sequence) else (keep_tokens,) * len(drop_at)
        if len(rates) != len(drop_at) or any(not 0 <= layer < depth for layer in drop_at):
            raise ValueError(f"keep_tokens must be one share or one for each of drop_at, got {keep_tokens}, {drop_at}")
        side = (image, image) if isinstance(image, int) else tuple(image)
        places = (side[0] // patch) * (side[1] // patch)

        def mixer(layer: int) -> PredictedAttention:
            return PredictedAttention(
                dim, heads=heads, tokens=1 + places, keep=shares[layer], reduce=reduce, bias=qkv_bias,
                **(predicted or {}),
            )  # fmt: skip

        options = {"norm": partial(nn.LayerNorm, eps=1e-6), **plain}
        super().__init__(dim=dim, depth=depth, mixer=mixer, image=image, patch=patch, **options)
        self.left = {layer: budget(places, rate) for layer, rate in zip(drop_at, rates, strict=True)}

    def outputs(self, x: Tensor, *, raw: bool = False) -> Outputs:
        """All that training needs. With `raw`, for learning the approximation: whole attention, nothing dropped."""
        tokens, grid = self.embed(x)
        if grid != self.positions.grid:
            raise ValueError(f"x must make the grid {self.positions.grid}, for which patterns were learned, got {grid}")
        alive: Tensor | None = None  # (B, N), the class token among them
        left: int | None = None
        approximations = []
        for layer, block in enumerate(self.encoder.blocks):
            block = cast(TokenBlock, block)
            mixer = cast(PredictedAttention, block.mixer)
            found = mixer.connect(block.norm1(tokens), alive, left=left, raw=raw)
            approximations.append(found.connectivity.approximation)
            if layer in self.left and not raw:
                score = class_attention(found.q, found.k).detach()
                if alive is not None:
                    score = score.masked_fill(~alive[:, 1:], -torch.inf)
                left = self.left[layer]
                places = 1 + strongest(score, left)
                alive = torch.zeros_like(tokens[..., 0], dtype=torch.bool).scatter(1, places, True)
                alive[:, 0] = True
            tokens = block.feed(block.add(tokens, found.y))
            if alive is not None:
                tokens = tokens.masked_fill(~alive.unsqueeze(-1), 0.0)
        tokens = self.encoder.norm(tokens)
        rest = None if alive is None else alive[:, 1:]
        return Outputs(self.head(tokens[:, 0]), tokens[:, 1:], torch.stack(approximations), rest)

    def forward_features(self, x: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """The last map (B, dim, H/patch, W/patch), through the last norm; zeros where patches were dropped."""
        if tuple(layers) != (-1,):
            raise ValueError(f"layers must be (-1,), got {tuple(layers)}")
        out = self.outputs(x)
        tokens = out.tokens if out.alive is None else out.tokens.masked_fill(~out.alive.unsqueeze(-1), 0.0)
        return [tokens.unflatten(1, self.positions.grid).permute(0, 3, 1, 2)]

    def forward(self, x: Tensor) -> Any:
        out = self.outputs(x)
        return out if self.training else out.logits
