"""NiNformer: a plain vision network whose attention is a gate, computed by a small network in each block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.nn.tokens.mixer_gate import FeedForward, MixerGate

# Parameters with 10 classes, as the authors' script for CIFAR-10 has.
SIZES = {"ninformer": Size(2_652_170, {"dropout": 0.5})}


class GateBlock(nn.Module):
    """x = x + gate(norm(x)), then x = x + mlp(norm(x)), with one norm for both: (B, N, C) to the same."""

    def __init__(self, dim: int, *, tokens: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mixer = MixerGate(dim, tokens=tokens, hidden=hidden, dropout=dropout)
        self.mlp = FeedForward(dim, hidden, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(self.norm(x))


@register(
    Card(
        name="ninformer",
        title="NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
        paper="2403.02411",
        system="ninformer",
        family="tokens",
        kind=BACKBONE,
        cost="N",
        sample={"image": 16, "dim": 12, "hidden": 20, "depth": 2},
        probe=(16, 16),
        sizes=SIZES,
    )
)
class NiNformer(nn.Module):
    """A small image network without attention, positions or class token, for images of the one size it was built for.

        patches → [x + (W norm(x)) ⊙ mixer(norm(x)),  x + mlp(norm(x))] × depth → mean → head

    Images `(B, in_channels, image, image)` to logits `(B, num_classes)`; `forward_features` gives the last map. The two
    norms of a block are one and the same. Source: arXiv 2403.02411 (Abdullah-88/NiNformer).

    Args:
        image: size of the images, int or (H, W). hidden: of every MLP, over tokens too.
        num_classes: 0 for no head: `forward` then returns the mean of the tokens.
    """

    def __init__(
        self,
        *,
        image: int | tuple[int, int] = 32,
        patch: int = 4,
        dim: int = 256,
        hidden: int = 512,
        depth: int = 4,
        in_channels: int = 3,
        num_classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        size = (image, image) if isinstance(image, int) else image
        if min(size) < patch or size[0] % patch or size[1] % patch:
            raise ValueError(f"image must be a multiple of patch={patch} on each side, got {size}")
        self.image, self.in_channels = size, in_channels
        self.channels, self.reductions = (dim,), (patch,)
        tokens = (size[0] // patch) * (size[1] // patch)
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.blocks = nn.Sequential(
            *(GateBlock(dim, tokens=tokens, hidden=hidden, dropout=dropout) for _ in range(depth))
        )
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The map after the last block, (B, dim, H/patch, W/patch)."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or tuple(x.shape[2:]) != self.image:
            wanted = ", ".join(map(str, (self.in_channels, *self.image)))
            raise ValueError(f"x must be images (B, {wanted}): the weights are for one size, got {tuple(x.shape)}")
        maps = self.patches(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        return [self.blocks(maps.flatten(1, 2)).reshape(maps.shape).permute(0, 3, 1, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)[0].mean((2, 3)))
