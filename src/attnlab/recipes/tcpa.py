"""Each token picks its own prompts: token-coordinated prompt attention on a frozen ViT (TCPA)."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.models.skeletons.prompts import freeze
from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead


class Picks(NamedTuple):
    """Which entries of a pool each token picked, and how far their keys are from it."""

    chosen: Tensor  # (B, N, S), true or false
    distance: Tensor  # a scalar


class PromptPool(nn.Module):
    """S entries per layer, each a key and `length` prompts: a token picks the entries whose keys are most like it."""

    def __init__(self, dim: int, layers: int, *, size: int, length: int = 1, picks: int) -> None:
        super().__init__()
        if size < 1 or length < 1 or not 1 <= picks <= size:
            raise ValueError(f"picks must be from 1 to size, and length at least 1, got {picks}, {size} and {length}")
        self.picks, self.length = picks, length
        self.keys = nn.Parameter(torch.empty(layers, size, dim).uniform_(-1, 1))
        self.prompts = nn.Parameter(torch.empty(layers, size, length, dim).uniform_(-1, 1))

    def pick(self, layer: int, x: Tensor, *, random: bool = False) -> Picks:
        """For tokens (B, N, C): the most alike entries by cosine, or any, with `random`. Only keys get a gradient."""
        likeness = F.normalize(x, dim=-1) @ F.normalize(self.keys[layer], dim=-1).T
        rank = torch.rand_like(likeness) if random else likeness
        at = rank.topk(self.picks, dim=-1).indices
        chosen = torch.zeros_like(likeness, dtype=torch.bool).scatter_(-1, at, True)
        return Picks(chosen, (1 - likeness.gather(-1, at)).mean())


def fourier(prompts: Tensor) -> Tensor:
    """Re(FFT over tokens(FFT over channels)) of prompts (…, P, C), unnormalised (VFPT, arXiv 2411.01327)."""
    return torch.fft.fft(torch.fft.fft(prompts, dim=-1), dim=-2).real


def coordinated_attention(
    mixer: MultiHead, x: Tensor, prompts: Tensor, hidden: Tensor, affine: Tensor | None = None
) -> Tensor:
    """Attention of tokens x (B, N, C) to themselves and to prompts, of which each token's `hidden` ones weigh nothing.

        out_i = Wo Σ_j M_ij a_ij v_j        a = softmax over the N tokens and all P prompts, M = 0 where hidden

    Both normed before; prompts (1 or B, P, C), hidden (B, N, P). Hidden prompts keep their part of the denominator, so
    that rows sum to less than 1. Computed as plain attention to everything, less what the hidden ones gave:
    O(N (N + P)), with no matrix of N² weights. `affine` (2, P, C) scales and shifts the prompts' values.
    """
    q, k, v = mixer.project(x)
    _, own_k, own_v = mixer.project(prompts)
    if affine is not None:
        scale, shift = (split_heads(t[None], mixer.heads) for t in affine)
        own_v = own_v * scale + shift
    own_k, own_v = (t.expand(len(x), -1, -1, -1) for t in (own_k, own_v))
    out, lse = attend(q, torch.cat((k, own_k), 2), torch.cat((v, own_v), 2), return_lse=True)
    weights = (q @ own_k.mT * q.shape[-1] ** -0.5 - lse.unsqueeze(-1)).exp()
    return mixer.merge(out - (weights * hidden[:, None]) @ own_v)


@register(
    Card(
        name="tcpa",
        title="Token Coordinated Prompt Attention is Needed for Visual Prompting",
        paper="2505.02406",
        system="tcpa",
        family="prompting",
        kind=RECIPE,
        cost="N (N + P)",
    )
)
class TCPA(nn.Module):
    """A frozen ViT with two pools of prompts per layer: the class token sees some of one, each patch some of the other.

        logits, distance = tcpa(images)
        loss = cross_entropy(logits, labels) + 0.1 · distance

    A layer: each token picks entries by the cosine of its stream and their keys, then attends, `coordinated_attention`,
    to all tokens and to what it picked; prompts are gone behind each layer. `distance` pulls keys to the tokens that
    picked them, summed over layers and pools; picks are hard, so it alone trains the keys.
    Trained: 2·layers·(S + S·length)·C numbers per pool pair, and the head. Source: arXiv 2505.02406;
    zhoujiahuan1991/ICML2025-TCPA: AdamW at 5e-3, decay 0.1, 100 epochs with mixup, of which the first few with
    `random` picks, distance at 0.01.

    Args:
        backbone: a `Plain` network with a class token, `MultiHead` mixers and a classifier; becomes a part, frozen.
        sizes, picks, lengths: S, how many are picked, and prompts per entry, for the class token's and the patches'
            pool.
        with_fourier: prompts pass through `fourier` (TCPA on VFPT); without, on VPT.
        matched: False lets every token see all prompts of its kind, without picking.
        affine: learn a scale and shift of the prompts' values. dropout: of the prompts, in training.
    """

    def __init__(
        self,
        backbone: Plain,
        *,
        sizes: tuple[int, int] = (18, 18),
        picks: tuple[int, int] = (10, 10),
        lengths: tuple[int, int] = (1, 1),
        with_fourier: bool = True,
        matched: bool = True,
        affine: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        mixers = [cast(TokenBlock, block).mixer for block in backbone.encoder.blocks]
        if backbone.class_token is None or not all(isinstance(m, MultiHead) for m in mixers):
            raise TypeError("backbone must be a Plain network with a class token and MultiHead mixers")
        self.backbone, self.with_fourier, self.matched = backbone, with_fourier, matched
        freeze(backbone)
        backbone.head.requires_grad_()
        dim, layers = backbone.channels[0], len(mixers)
        self.class_pool, self.patch_pool = (
            PromptPool(dim, layers, size=size, length=length, picks=count)
            for size, count, length in zip(sizes, picks, lengths, strict=True)
        )
        self.dropout = nn.Dropout(dropout)
        self.affine = None
        if affine:
            count = sum(size * length for size, length in zip(sizes, lengths, strict=True))
            start = 0.1 * (2 / (count * dim)) ** 0.5 * torch.randn(2, count, dim)
            start[0] += 1
            self.affine = nn.Parameter(start)

    def train(self, mode: bool = True) -> TCPA:
        super().train(mode)
        self.backbone.eval()
        return self

    def prompts(self, layer: int, batch: int = 1) -> Tensor:
        """The layer's prompts (1 or B, P, C), the class token's first; of each image its own where dropout differs."""
        both = torch.cat([p.prompts[layer].flatten(0, 1) for p in (self.class_pool, self.patch_pool)])
        both = self.dropout(both.expand(batch if self.training and self.dropout.p else 1, -1, -1))
        return fourier(both) if self.with_fourier else both

    def hidden(self, layer: int, x: Tensor, *, random: bool = False) -> Picks:
        """Which prompts each token does not see (B, N, P), and the distance, for the layer's input before its norm."""
        one, other = x[:, :1], x[:, 1:]
        seen, total = [], x.new_zeros(())
        for pool, tokens in ((self.class_pool, one), (self.patch_pool, other)):
            if self.matched:
                picked = pool.pick(layer, tokens, random=random)
                chosen, total = picked.chosen, total + picked.distance
            else:
                chosen = torch.ones(*tokens.shape[:2], pool.keys.shape[1], dtype=torch.bool, device=x.device)
            seen.append(chosen.repeat_interleave(pool.length, -1))
        first, rest = seen
        hidden = torch.ones(*x.shape[:2], first.shape[-1] + rest.shape[-1], dtype=torch.bool, device=x.device)
        hidden[:, :1, : first.shape[-1]] = ~first
        hidden[:, 1:, first.shape[-1] :] = ~rest
        return Picks(hidden, total)

    def tokens(self, images: Tensor, *, random: bool = False) -> tuple[Tensor, Tensor]:
        """The class token and the patches (B, 1 + N, C) behind the last norm, and the distance."""
        x, _ = self.backbone.embed(images)
        distance = x.new_zeros(())
        for layer, block in enumerate(self.backbone.encoder.blocks):
            block = cast(TokenBlock, block)
            hidden, step = self.hidden(layer, x, random=random)
            distance = distance + step
            prompts = block.norm1(self.prompts(layer, len(x)))
            mixer = cast(MultiHead, block.mixer)
            x = block.after(x, coordinated_attention(mixer, block.norm1(x), prompts, hidden, self.affine))
        return self.backbone.encoder.norm(x), distance

    def forward(self, images: Tensor, *, random: bool = False) -> tuple[Tensor, Tensor]:
        """Logits (B, num_classes) and the distance; with `random`, for the first epochs, any entries are picked."""
        x, distance = self.tokens(images, random=random)
        return self.backbone.head(x[:, 0]), distance


class ImagePrompter(nn.Sequential):
    """An option of the release: a picture to be added to the picture, from two 11×11 convolutions. (B, 3, H, W)."""

    def __init__(self, hidden: int = 9, kernel: int = 11) -> None:
        convs = [nn.Conv2d(a, b, kernel, padding=kernel // 2) for a, b in ((3, hidden), (hidden, 3))]
        super().__init__(convs[0], nn.PReLU(), convs[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def simam(x: Tensor, smoothing: float = 1e-3) -> Tensor:
    """Another: pixels gated by how far they are from their channel's mean, without parameters (SimAM, ICML 2021)."""
    far = (x - x.mean((2, 3), keepdim=True)).square()
    spread = far.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * (far / (4 * (spread + smoothing)) + 0.5).sigmoid()
