"""SiT-ATConv: the diffusion transformer SiT with attentive convolutions in the place of attention, or of half of it."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.cards import DENOISER, Card, Size, register
from attnlab.models.diffusion.dit import DiT
from attnlab.nn.spatial.attentive_conv import AttentiveConvTokens

MIXERS = ("attention", "convolution", "alternate")


class OnSquare(AttentiveConvTokens):
    """Attentive convolution over the tokens `(B, side², C)` of a square, which it knows."""

    def __init__(self, dim: int, side: int, *, kernel: int = 3, bias: bool = True) -> None:
        super().__init__(dim, kernel=kernel, bias=bias)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, grid=(self.side, self.side))


# Parameters with 1,000 classes, as the authors' code has (fixed positions of the hybrids among them).
_COUNTS = {
    "s": (384, 12, 6, 31_096_664, 32_079_164),
    "b": (768, 12, 12, 123_239_000, 126_974_012),
    "l": (1024, 24, 16, 432_677_008, 445_520_984),
    "xl": (1152, 28, 16, 637_678_328, 656_551_436),
}
SIZES = {
    f"sit_{letter}2_atconv{'_hybrid' * hybrid}": Size(
        counts[hybrid],
        {"dim": dim, "depth": depth, "heads": heads, "mixers": "alternate" if hybrid else "convolution"},
    )
    for letter, (dim, depth, heads, *counts) in _COUNTS.items()
    for hybrid in (False, True)
}


@register(
    Card(
        name="sit",
        title="Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
        paper="2510.20092",
        system="atconv",
        family="spatial",
        kind=DENOISER,
        cost="N",
        sample={"size": 8, "dim": 24, "depth": 2, "heads": 6, "classes": 5, "mlp_ratio": 2.0, "mixers": "alternate"},
        probe=(4, 8, 8),
        sizes=SIZES,
    )
)
class SiT(DiT):
    """Predicts the velocity of a latent image, given the time and the class: `DiT` with another mixer.

    x `(B, channels, size, size)`, t `(B,)`, y `(B,)` class numbers → `(B, channels, size, size)`. With `variance` the
    head has twice the channels, of which the second half is dropped, as the authors have it. Without any attention
    there are no positions: convolutions know where they are. Sources: arXiv 2401.08740 (SiT), 2510.20092.

    Args:
        mixers: "convolution" in all blocks, "attention" in all, or "alternate", beginning with attention.
        kernel: of the attentive convolutions.
    """

    def __init__(
        self,
        *,
        size: int = 32,
        patch: int = 2,
        channels: int = 4,
        dim: int = 1152,
        depth: int = 28,
        heads: int = 16,
        mixers: str = "convolution",
        kernel: int = 3,
        mlp_ratio: float = 4.0,
        classes: int = 1000,
        drop_class: float = 0.1,
        variance: bool = True,
    ) -> None:
        if mixers not in MIXERS:
            raise ValueError(f"mixers must be one of {MIXERS}, got {mixers!r}")
        super().__init__(
            size=size, patch=patch, channels=channels, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio,
            classes=classes, drop_class=drop_class, variance=variance,
        )  # fmt: skip
        if mixers == "attention":
            return
        for block in list(self.blocks)[mixers == "alternate" :: 2 if mixers == "alternate" else 1]:
            block.attention = OnSquare(dim, size // patch, kernel=kernel)
        if mixers == "convolution":
            del self.positions
            self.register_buffer("positions", torch.zeros(1, 1, dim), persistent=False)
        self.reset()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)[:, : self.channels]
