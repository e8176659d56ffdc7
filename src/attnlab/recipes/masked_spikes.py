"""Pre-training of spiking vision transformers: most of an image is hidden, and the rest must say what it was."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Encoder, Positions
from attnlab.models.vision.spikformer import Spikformer

PATCH = 16


class Reconstruction(NamedTuple):
    """The loss, the patches as they were said to be `(B, N, PATCH² · channels)`, and which were hidden `(B, N)`."""

    loss: Tensor
    patches: Tensor
    hidden: Tensor


def patches_of(images: Tensor) -> Tensor:
    """`(B, C, H, W)` to `(B, H·W/256, 256·C)`, each patch normed to mean 0 and standard deviation 1."""
    b, c, h, w = images.shape
    cut = images.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return (cut - cut.mean(-1, keepdim=True)) / (cut.var(-1, keepdim=True) + 1e-6).sqrt()


@register(
    Card(
        name="masked_spikes",
        title="Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN Ticket",
        paper="2401.02020",
        system="spikformer_v2",
        family="spiking",
        kind=RECIPE,
    )
)
class MaskedSpikes(nn.Module):
    """Trains a `Spikformer` on images without labels, by the mean squared error of the 16×16 patches that it missed.

        images → patches hidden at random → network, visible tokens alone → mean over steps → decoder → pixels

    `module(images (B, C, H, W))`, sides multiples of 16, → `Reconstruction`. Minimise its loss over `module`, then
    train `module.network`, whose own `steps` are as they were, with labels. The decoder is a plain transformer of real
    numbers, with a learned token for what is hidden. The paper pre-trains with one step and fine-tunes with one or
    four; ratio, decoder and way of hiding are not in it: they are those of masked autoencoders. Source: arXiv
    2401.02020.

    Args:
        network: what is trained.
        ratio: the share of the patches that is hidden.
        mode: "sparse": hidden places are 0 at the input and after every unit of the stem, and only visible tokens enter
            the blocks; "pixel": 0 at the input alone, and all tokens enter.
        image: size whose positions the decoder learns; interpolated for others.
        dim, depth, heads: of the decoder. steps: T in pre-training.
    """

    def __init__(
        self,
        network: Spikformer,
        *,
        ratio: float = 0.75,
        mode: Literal["sparse", "pixel"] = "sparse",
        image: int | tuple[int, int] = 224,
        dim: int = 256,
        depth: int = 4,
        heads: int = 8,
        steps: int = 1,
    ) -> None:
        super().__init__()
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must be in (0, 1), got {ratio}")
        if mode not in ("sparse", "pixel"):
            raise ValueError(f"mode must be 'sparse' or 'pixel', got {mode!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        size = (image, image) if isinstance(image, int) else image
        if size[0] % PATCH or size[1] % PATCH:
            raise ValueError(f"image must be a multiple of {PATCH} on each side, got {size}")
        self.network, self.ratio, self.mode, self.steps = network, ratio, mode, steps
        self.enter = nn.Linear(network.dim, dim)
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))
        self.positions = Positions((size[0] // PATCH, size[1] // PATCH), dim)
        self.decoder = Encoder(dim=dim, depth=depth, mixer="multihead", mixer_options={"heads": heads, "bias": True})
        self.leave = nn.Linear(dim, PATCH * PATCH * network.in_channels)

    def hide(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Which patches to hide, `(B, N)`: the same number in each image, and at least one seen and one not."""
        tokens = images.shape[2] // PATCH * (images.shape[3] // PATCH)
        if tokens < 2:
            raise ValueError(f"images must have at least two patches, got {tuple(images.shape)}")
        count = min(max(round(self.ratio * tokens), 1), tokens - 1)
        order = torch.rand(len(images), tokens, generator=generator).to(images.device).argsort(1)
        return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True)

    def encode(self, images: Tensor, hidden: Tensor) -> Tensor:
        """What enters the decoder, `(B, N, dim)`: of visible places their mean over steps, of hidden ones the token."""
        grid = (images.shape[2] // PATCH, images.shape[3] // PATCH)
        seen = ~hidden.view(-1, 1, *grid)
        own, self.network.steps = self.network.steps, self.steps
        try:
            if self.mode == "pixel":
                pixels = seen.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
                tokens = self.network.blocks(self.network.embed(images * pixels)[0])
                return torch.where(hidden.unsqueeze(-1), self.token, self.enter(tokens.mean(0)))
            tokens, _ = self.network.embed(images, seen)
        finally:
            self.network.steps = own
        steps, batch, _, width = tokens.shape
        kept = tokens[:, ~hidden].view(steps, batch, -1, width)
        found = self.enter(self.network.blocks(kept).mean(0))
        return self.token.expand(*hidden.shape, -1).masked_scatter(~hidden.unsqueeze(-1), found)

    def forward(
        self, images: Tensor, *, hidden: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Reconstruction:
        if images.ndim != 4 or images.shape[2] % PATCH or images.shape[3] % PATCH or 0 in images.shape:
            raise ValueError(f"images must be (B, C, H, W), H and W multiples of {PATCH}, got {tuple(images.shape)}")
        hidden = self.hide(images, generator) if hidden is None else hidden
        wanted = patches_of(images)
        if hidden.shape != wanted.shape[:2] or len(set(hidden.sum(1).tolist())) > 1 or not hidden.any() or hidden.all():
            raise ValueError(
                f"hidden must be a mask of the {tuple(wanted.shape[:2])} patches, with as many in each image, some and "
                f"not all, got {tuple(hidden.shape)}"
            )
        grid = (images.shape[2] // PATCH, images.shape[3] // PATCH)
        said = self.leave(self.decoder(self.positions(self.encode(images, hidden), grid=grid)))
        return Reconstruction((said - wanted)[hidden].pow(2).mean(), said, hidden)
