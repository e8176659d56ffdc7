"""Prompts of both towers of CLIP, learned together: those of the image are made of those of the text (MaPLe)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.prompts import freeze
from attnlab.models.vision.clip import CLIP


@register(
    Card(
        name="maple",
        title="MaPLe: Multi-modal Prompt Learning",
        paper="2210.03117",
        family="prompting",
        kind=RECIPE,
        cost="N²",
    )
)
class MaPLe(nn.Module):
    """A frozen CLIP with learned prompts in the first layers of both towers.

        text prompts  p_l (P, text_dim),  image prompts  W_l p_l + b_l (P, dim)        l = 0 … layers − 1

    `text()` → (K, out_dim), what the K classes' texts say; `image(images)` → (B, out_dim). Of each text the P words
    behind the first are replaced by p_0; the image's prompts stand behind its patches. Only p, W and b are trained:
    3.56 M for ViT-B/16 with two prompts in nine layers. Source: arXiv 2210.03117; multimodal-prompt-learning.

    Args:
        clip: becomes a part of this module and is frozen.
        ids: token ids (K, N) of the classes' texts, such as "a photo of a cat.".
        fixed: token ids (R, N) of texts that keep their own words in layer 0; their features come after the classes'.
        layers: of each tower that have prompts.
        start: the words that p_0 starts as, ids (P,); None for random ones, `prompts` of them.
    """

    ids: Tensor
    fixed: Tensor

    def __init__(
        self,
        clip: CLIP,
        ids: Tensor,
        *,
        fixed: Tensor | None = None,
        layers: int = 9,
        prompts: int = 2,
        start: Tensor | None = None,
    ) -> None:
        super().__init__()
        most = min(len(clip.image.encoder.blocks), len(clip.text.encoder.blocks))
        if not 1 <= layers <= most:
            raise ValueError(f"layers must be from 1 to {most}, the shallower tower's, got {layers}")
        if ids.ndim != 2 or (fixed is not None and fixed.shape[1:] != ids.shape[1:]):
            raise ValueError(f"ids and fixed must be token ids (K, N), got {tuple(ids.shape)}")
        prompts = prompts if start is None else len(start)
        if not 1 <= prompts < ids.shape[1] - 1:
            raise ValueError(f"prompts must be from 1 to {ids.shape[1] - 2}, the words between the ends, got {prompts}")
        self.clip = clip
        freeze(clip)
        text_dim, dim = clip.text.positions.shape[1], clip.image.channels[0]
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("fixed", ids[:0] if fixed is None else fixed, persistent=False)
        first = 0.02 * torch.randn(prompts, text_dim) if start is None else clip.text.words(start).detach().clone()
        deeper = [0.02 * torch.randn(prompts, text_dim) for _ in range(layers - 1)]
        self.prompts = nn.ParameterList([first, *deeper])
        self.to_image = nn.ModuleList(nn.Linear(text_dim, dim) for _ in range(layers))

    def train(self, mode: bool = True) -> MaPLe:
        super().train(mode)
        self.clip.eval()
        return self

    @property
    def logit_scale(self) -> Tensor:
        return self.clip.logit_scale

    def text(self) -> Tensor:
        """What the texts say, the classes' first, then the fixed ones': (K + R, out_dim)."""
        first, *deeper = self.prompts
        words = first.expand(len(self.ids), -1, -1)
        own = self.clip.text.words(self.fixed[:, 1 : 1 + len(first)])
        return self.clip.text(torch.cat((self.ids, self.fixed)), [torch.cat((words, own)), *deeper])

    def image(self, images: Tensor) -> Tensor:
        """What the images show: (B, out_dim)."""
        return self.clip.image(images, [to(p) for to, p in zip(self.to_image, self.prompts, strict=True)])
