"""EViT: a DeiT that keeps, on its way, the patches at which its class token looks, and fuses the others into one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.plain import Positions, TokenBlock
from attnlab.models.vision.vit import ViT
from attnlab.nn.multihead import MultiHead
from attnlab.nn.tokens.reorganize import budget, class_attention, reorganize

# DeiT's own parameters and no more.
SIZES = {
    "evit_tiny": Size(5_717_416, {"dim": 192, "heads": 3}),
    "evit_small": Size(22_050_664, {"dim": 384, "heads": 6}),
    "evit_base": Size(86_567_656, {"dim": 768, "heads": 12}),
}


def run_block(
    block: TokenBlock, x: Tensor, keep: int | None = None, fuse: bool = True, prefix: int = 1
) -> tuple[Tensor, Tensor | None]:
    """One block, (B, P + N, C) → (B, P + keep [+ 1], C), and the kept places (B, keep), or None if all N are kept.

    Tokens leave between attention and MLP: the scores are those of this block's attention, and its MLP is spared.
    """
    mixer = cast(MultiHead, block.mixer)
    normed = block.norm1(x)
    q, k, v = mixer.project(normed)
    x = block.add(x, mixer.merge(mixer.mix(q, k, v, x=normed)))
    if keep is None or keep == x.shape[1] - prefix:
        return block.feed(x), None
    left = reorganize(x, class_attention(q, k)[:, prefix - 1 :], keep, fuse=fuse)
    return block.feed(left.tokens), left.places


class Encoded(NamedTuple):
    """What comes out of all blocks."""

    tokens: Tensor  # (B, P + M, C)
    kept: tuple[Tensor, ...]  # per reorganisation, which of that block's patches, in order of their scores
    origins: Tensor  # (B, M): which of the image's N patches each token still is; N for a fused one


@register(
    Card(
        name="evit",
        title="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
        paper="2202.07800",
        system="evit",
        family="tokens",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N²",
        sample={
            "dim": 16, "depth": 3, "heads": 2, "image": 32, "patch": 8, "num_classes": 10, "keep": 0.6, "drop_at": (1,)
        },
        probe=(32, 24),
        sizes=SIZES,
    )
)  # fmt: skip
class EViT(ViT):
    """A vision transformer that drops what its class token does not look at, without a parameter more.

        behind the attention of block l in `drop_at`:
        score_j = mean over heads of softmax(q_cls·k / √D)_j            j one of the block's N patches
        x ← [x_cls, the ⌈keep·N⌉ patches of the highest score, Σ_others score_j x_j]

    Images (B, in_channels, H, W), sides multiples of `patch`, to logits (B, num_classes). Checkpoints are those of
    `ViT`, and with keep = 1 so is the result; training goes on from one for 30 epochs, or from scratch, with a rate
    that shrinks (`attnlab.recipes.evit.keep_rate`). The fused token counts as a patch in later blocks. Cost per block
    12NC² + 2N²C with the block's own N: at keep 0.7 in blocks 3, 6 and 9 (from 0), 35% less than DeiT.
    Source: arXiv 2202.07800 (youweiliang/evit).

    Args:
        keep: the share of the patches that stays, at each of `drop_at` or one for each.
        drop_at: the blocks in which patches leave, from 0. fuse: whether the others are fused, or dropped.
        distilled: have DeiT's second token and head, whose logits are averaged with the first's, and come second in
            training. The token stays; the authors' layers take it for a patch, and then cannot find it.
        Others as for `ViT`.
    """

    def __init__(
        self,
        *,
        depth: int = 12,
        keep: float | Sequence[float] = 0.7,
        drop_at: Sequence[int] = (3, 6, 9),
        fuse: bool = True,
        distilled: bool = False,
        **vit: Any,
    ) -> None:
        if vit.get("class_token", True) is not True:
            raise ValueError("class_token must be True: it is what says which patches stay")
        if len(set(drop_at)) != len(drop_at) or any(not 0 <= layer < depth for layer in drop_at):
            raise ValueError(f"drop_at must name blocks from 0 to {depth - 1}, each once, got {tuple(drop_at)}")
        super().__init__(depth=depth, **vit)
        self.drop_at, self.fusing = tuple(sorted(drop_at)), fuse
        self.keep = self._rates(keep)
        self.distillation_token: nn.Parameter | None = None
        if distilled:
            dim = self.channels[0]
            self.distillation_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))
            self.positions = Positions(self.positions.grid, dim, prefix=2)
            self.distillation_head = copy.deepcopy(self.head)

    def first_tokens(self) -> Tensor | None:
        if self.class_token is None or self.distillation_token is None:
            return super().first_tokens()
        return torch.stack((self.class_token, self.distillation_token))

    def _rates(self, keep: float | Sequence[float]) -> tuple[float, ...]:
        rates = tuple(keep) if isinstance(keep, Sequence) else (keep,) * len(self.drop_at)
        if len(rates) != len(self.drop_at) or any(not 0 < rate <= 1 for rate in rates):
            raise ValueError(f"keep must be in (0, 1], once or for each of the blocks {self.drop_at}, got {keep}")
        return rates

    def encode(
        self,
        tokens: Tensor,
        *,
        keep: float | Sequence[float] | None = None,
        counts: Sequence[int] | None = None,
        blocks: int | None = None,
    ) -> Encoded:
        """Tokens `(B, P + N, C)` through the first `blocks` (or all) and the last norm.

        `keep` is instead of the network's own; `counts` says how many patches stay at each of `drop_at` instead.
        """
        rates = self.keep if keep is None else self._rates(keep)
        if counts is not None and len(counts) != len(self.drop_at):
            raise ValueError(f"counts must hold one number for each of the blocks {self.drop_at}, got {counts}")
        prefix = self.positions.prefix
        patches = tokens.shape[1] - prefix
        origins = torch.arange(patches, device=tokens.device).expand(len(tokens), patches)
        kept = []
        for layer, block in enumerate(self.encoder.blocks[:blocks]):
            count = None
            if layer in self.drop_at:
                at, n = self.drop_at.index(layer), tokens.shape[1] - prefix
                count = budget(n, rates[at]) if counts is None else counts[at]
            tokens, places = run_block(cast(TokenBlock, block), tokens, count, self.fusing, prefix)
            if places is not None:
                kept.append(places)
                origins = origins.gather(1, places)
                if self.fusing:
                    origins = torch.cat((origins, origins.new_full((len(origins), 1), patches)), 1)
        return Encoded(self.encoder.norm(tokens), tuple(kept), origins)

    def forward_features(self, x: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """The map (B, dim, H/patch, W/patch) after each of the given blocks, through the last norm; 0 where none is."""
        depth = len(self.encoder.blocks)
        if any(not -depth <= layer < depth for layer in layers):
            raise ValueError(f"layers must lie in [-{depth}, {depth}), got {tuple(layers)}")
        tokens, grid = self.embed(x)
        first = self.positions.prefix
        maps = []
        for layer in layers:
            out = self.encode(tokens, blocks=layer % depth + 1)
            places = out.origins.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
            # Fused tokens have no place: they go to one behind the last, which is cut off.
            full = torch.zeros_like(tokens).scatter(1, places, out.tokens[:, first:])[:, :-first]
            maps.append(full.unflatten(1, grid).permute(0, 3, 1, 2))
        return maps

    def forward(
        self, x: Tensor, *, keep: float | Sequence[float] | None = None, counts: Sequence[int] | None = None
    ) -> Any:
        return self.classify(self.encode(self.embed(x)[0], keep=keep, counts=counts).tokens)

    def classify(self, tokens: Tensor) -> Any:
        """Logits of encoded tokens; with `distilled`, in training, of both heads."""
        logits = self.head(tokens[:, 0])
        if self.distillation_token is None:
            return logits
        second = self.distillation_head(tokens[:, 1])
        return (logits, second) if self.training else (logits + second) / 2
