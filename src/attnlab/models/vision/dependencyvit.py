"""DependencyViT: a plain vision transformer whose tokens send to parents, and whose silent tokens are pruned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.models.vision.dependency_tree import dependency_tree
from attnlab.nn.softmax.reversed import ReversedAttention

_TINY, _SMALL = {"dim": 192, "heads": 12}, {"dim": 384, "heads": 12}
_LITE: dict[str, Any] = {"prune": 0.16}

# No code was released: counted from the paper's equations.
SIZES = {
    "dependencyvit_tiny": Size(5_964_712, _TINY),
    "dependencyvit_small": Size(22_987_624, _SMALL),
    "dependencyvit_lite_tiny": Size(5_964_712, {**_TINY, **_LITE}),
    "dependencyvit_lite_small": Size(22_987_624, {**_SMALL, **_LITE}),
}


def kept(tokens: int, ratio: float, time: int) -> int:
    """How many of so many tokens the `time`-th pruning (from 1) keeps: 1 − time · ratio of those at first, in all."""
    return max(1, math.floor(tokens * (1 - time * ratio) / (1 - (time - 1) * ratio)))


def prune(x: Tensor, gates: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `keep` tokens of the highest `score` (B, N), in their order: x (B, keep, C), gates and places (B, keep)."""
    if not 1 <= keep <= x.shape[1]:
        raise ValueError(f"keep must lie in 1 to the number of tokens {x.shape[1]}, got {keep}")
    places = score.topk(keep, 1).indices.sort(1).values
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[2])), gates.gather(1, places), places


class Encoded(NamedTuple):
    """What comes out of all blocks."""

    tokens: Tensor  # (B, M, C), M ≤ N
    gates: Tensor  # (B, M)
    places: Tensor  # (B, M): which of the N places are left
    dependencies: Tensor | None  # (B, N, N), summed over layers


@register(
    Card(
        name="dependencyvit",
        title="Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
        paper="2304.03282",
        system="dependencyvit",
        family="softmax",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N²",
        sample={"dim": 16, "depth": 3, "heads": 2, "patch": 8, "image": 32, "num_classes": 10, "prune": 0.2},
        probe=(32, 24),
        sizes=SIZES,
    )
)
class DependencyViT(Plain):
    """An image classifier in whose attention a tree of parts and wholes emerges, without labels for it.

        patches + places → [x + s₁·reversed attention(norm(x)), x + s₂·MLP(norm(x))] × depth
        logits = linear(mean_i(M_i · norm(x_i)))                    M the last gates of `ReversedAttention`

    Images `(B, in_channels, H, W)`, sides multiples of `patch`, to logits `(B, num_classes)`. With `prune` ρ (the Lite
    models: 0.16) the least speaking tokens leave after blocks 2, 5, 8 and 11, so that 1 − ρ, 1 − 2ρ, … of them remain.
    `tree(images)` gives each image's dependency tree; cut off a subtree with `dependency_tree.subtree`. Cost O(N²).
    Source: arXiv 2304.03282; no code was released, so details follow an independent reimplementation of the paper.

    Args:
        prune: ρ; 0 for none. prune_after: the blocks behind which tokens leave, from 1.
        score: which leave: those of the smallest gates ("sent", the paper's leaves that rarely send), or those which
            received the least in that block ("received", as in that reimplementation).
        hidden, temperature: of `ReversedAttention`. Others as for `Plain`.
    """

    def __init__(
        self,
        *,
        dim: int = 192,
        depth: int = 12,
        heads: int = 12,
        prune: float = 0.0,
        prune_after: Sequence[int] = (2, 5, 8, 11),
        score: Literal["sent", "received"] = "sent",
        hidden: int | None = None,
        temperature: float = 0.1,
        layer_scale: float | None = 1e-6,
        **keywords: Any,
    ) -> None:
        if prune < 0 or prune * len(prune_after) >= 1:
            raise ValueError(f"prune must be in [0, 1 / {len(prune_after)}) for so many prunings, got {prune}")
        if score not in ("sent", "received"):
            raise ValueError(f"score must be 'sent' or 'received', got {score!r}")

        def mixer(layer: int) -> ReversedAttention:
            return ReversedAttention(dim, heads=heads, hidden=hidden, temperature=temperature)

        super().__init__(dim=dim, depth=depth, mixer=mixer, class_token=False, layer_scale=layer_scale, **keywords)
        self.score, self.prune = score, prune
        self.prune_after = tuple(prune_after) if prune else ()

    def encode(self, tokens: Tensor, *, dependencies: bool = False) -> Encoded:
        """Tokens `(B, N, C)` through all blocks and the last norm."""
        batch, n = tokens.shape[:2]
        gates: Tensor | None = None
        places = torch.arange(n, device=tokens.device).expand(batch, n)
        total = tokens.new_zeros(batch, n, n) if dependencies else None
        for number, block in enumerate(self.encoder.blocks, start=1):
            cut = number in self.prune_after
            received = cut and self.score == "received"
            block = cast(TokenBlock, block)
            mixer = cast(ReversedAttention, block.mixer)
            sent = mixer.send(block.norm1(tokens), gates, dependencies=dependencies or received)
            gates = sent.gates
            tokens = block.after(tokens, sent.y)
            if total is not None and sent.dependencies is not None:
                rows = total.gather(1, places.unsqueeze(-1).expand(-1, -1, n))
                rows = rows.scatter_add(2, places.unsqueeze(1).expand(-1, len(places[0]), -1), sent.dependencies)
                total = total.scatter(1, places.unsqueeze(-1).expand(-1, -1, n), rows)
            if cut:
                score = gates if sent.dependencies is None or not received else sent.dependencies.sum(-1)
                keep = kept(tokens.shape[1], self.prune, self.prune_after.index(number) + 1)
                tokens, gates, left = prune(tokens, gates, score, keep)
                places = places.gather(1, left)
        return Encoded(self.encoder.norm(tokens), cast(Tensor, gates), places, total)

    def forward_features(self, x: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """The last map (B, dim, H/patch, W/patch), through the last norm; zeros where tokens were pruned."""
        if tuple(layers) != (-1,):
            raise ValueError(f"layers must be (-1,): tokens leave on the way, got {tuple(layers)}")
        tokens, grid = self.embed(x)
        out = self.encode(tokens)
        places = out.places.unsqueeze(-1).expand_as(out.tokens)
        return [torch.zeros_like(tokens).scatter(1, places, out.tokens).unflatten(1, grid).permute(0, 3, 1, 2)]

    def forward(self, x: Tensor) -> Tensor:
        out = self.encode(self.embed(x)[0])
        return self.head((out.tokens * out.gates.unsqueeze(-1)).mean(1))

    @torch.no_grad()
    def tree(self, x: Tensor) -> Tensor:
        """The parent of each token, `(B, N)`, in the tree of what was sent over all layers; the root is its own."""
        dependencies = self.encode(self.embed(x)[0], dependencies=True).dependencies
        return torch.stack([dependency_tree(d) for d in cast(Tensor, dependencies)])
