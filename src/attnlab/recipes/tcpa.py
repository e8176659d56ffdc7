"""Token coordinated prompt attention: prompts for a frozen vision transformer of which each token sees its own few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.nn.multihead import MultiHead
from attnlab.recipes.layers import plain_blocks

Pair = int | tuple[int, int]  # the class token's and the patches', or one number for both


class Prompted(NamedTuple):
    """What one pass gives."""

    logits: Tensor  # (B, classes)
    distance: Tensor  # (), how far tokens are from the keys of their prompts, summed over layers
    tokens: Tensor  # (B, 1 + N, C), through the last norm


class PromptPool(nn.Module):
    """S entries per layer, each a key by which it is found and a few prompts: keys (L, S, C), prompts (L, S, l, C)."""

    def __init__(self, layers: int, size: int, length: int, dim: int, keep: int) -> None:
        super().__init__()
        self.size, self.length, self.keep = size, length, keep
        self.keys = nn.Parameter(torch.empty(layers, size, dim).uniform_(-1, 1))
        self.prompts = nn.Parameter(torch.empty(layers, size, length, dim).uniform_(-1, 1))

    def match(
        self, x: Tensor, layer: int, *, random: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Which prompts each token of `x` (B, N, C) sees, (B, N, S·l), and the mean 1 − cosine to the picked keys."""
        if not self.keep:
            return x.new_zeros(*x.shape[:2], 0, dtype=torch.bool), x.new_zeros(())
        cosine = F.normalize(x, dim=-1) @ F.normalize(self.keys[layer], dim=-1).T
        order = torch.rand(cosine.shape, generator=generator).to(x.device) if random else cosine
        picks = order.topk(self.keep, dim=-1).indices
        seen = torch.zeros_like(cosine, dtype=torch.bool).scatter(-1, picks, True)
        return seen.repeat_interleave(self.length, -1), 1 - cosine.gather(-1, picks).mean()


def attend_prompts(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attention to tokens and prompts where a prompt that is not seen keeps its share of the softmax and says nothing.

        out_i = Σ_j a_ij v_j + Σ_m seen_im a_im pv_m        a_i = softmax over tokens j and prompts m, together

    q, k, v (B, H, N, D), prompts pk, pv (B or 1, H, M, D), seen (B, N, M), all if None. The two parts are computed
    apart, tokens by the fused kernel, and joined by the log-sum-exp.
    """
    if seen is None:
        pk, pv = (p.expand(len(q), -1, -1, -1) for p in (pk, pv))
        return attend(q, torch.cat((pk, k), 2), torch.cat((pv, v), 2))
    own, lse = attend(q, k, v, return_lse=True)
    scores = (q * q.shape[-1] ** -0.5) @ pk.mT
    share = (scores.logsumexp(-1) - lse.to(scores.dtype)).sigmoid().unsqueeze(-1)
    return torch.lerp(own, (scores.softmax(-1) * seen.unsqueeze(1)) @ pv, share)


def simam(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Images (B, C, H, W), each pixel weighed by how far it is from its channel's mean (SimAM, without parameters).

    x σ(d / (4 (Σ d / (HW − 1) + eps)) + ½),  d = (x − mean)²
    """
    apart = (x - x.mean((2, 3), keepdim=True)).square()
    spread = apart.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * (apart / (4 * (spread + eps)) + 0.5).sigmoid()


@register(
    Card(
        name="tcpa",
        title="Token Coordinated Prompt Attention is Needed for Visual Prompting",
        paper="2505.02406",
        family="prompts",
        kind=RECIPE,
        cost="N (N + p)",
    )
)
class TCPA(nn.Module):
    """Tunes a frozen vision transformer by prompts in each layer, of which each token sees a few of its own.

        pool of S entries (key_s, l prompts), one for the class token and one for the patches, per layer
        token i picks the `keep` entries of the largest cos(x_i, key_s)          x the residual stream
        y_i = Wo Σ_j a_ij M_ij v_j        a = softmax over N + 1 tokens and p prompts, M = 0 at prompts not picked

        tcpa = TCPA(attnlab.build("vit_base_patch16_224", num_classes=10))     # after its weights were loaded
        optimizer = torch.optim.AdamW(p for p in tcpa.parameters() if p.requires_grad)
        loss = tcpa.loss(tcpa.run(images, random=epoch < 5), labels)
        logits = tcpa.eval()(images)

    M comes after the softmax, without renormalising, so hidden prompts still take their share (what the authors' code
    does; a mask before it is another model). Prompts ask nothing and are forgotten after each layer. The backbone is
    frozen and stays in evaluation mode but for its classifier; trained are both pools, 2·L·S·(1 + l)·C numbers at
    equal sizes, and the head. Picks are hard, so a layer's cross-entropy trains its prompts and its distance its keys.
    Source: arXiv 2505.02406 (zhoujiahuan1991/ICML2025-TCPA), which picks at random for the first 5 to 10 epochs.

    Args:
        backbone: a `Plain` network with a class token, a classifier and `MultiHead` mixers.
        size, length, keep: S, l and the number of entries picked; a number, or (the class token's, the patches').
        select: "token" as above; "role" hides only the other role's prompts; "all" hides none: VPT (VFPT if `fourier`).
        fourier: prompts go through a Fourier transform over channels and prompts, whose real part is used (VFPT).
        dropout: of the prompts in training.
        value_affine: a learned scale and shift of the prompts' values. image_prompt: two 11×11 convolutions whose
            output is added to the image. sharpen: `simam` over the image, before all else. The authors' runs have none.
    """

    def __init__(
        self,
        backbone: Plain,
        *,
        size: Pair = 18,
        length: Pair = 1,
        keep: Pair = 10,
        select: Literal["token", "role", "all"] = "token",
        fourier: bool = True,
        dropout: float = 0.1,
        value_affine: bool = False,
        image_prompt: bool = False,
        sharpen: bool = False,
    ) -> None:
        super().__init__()
        sizes, lengths, keeps = (n if isinstance(n, tuple) else (n, n) for n in (size, length, keep))
        if min(sizes) < 0 or min(lengths) < 1:
            raise ValueError(f"size must be at least 0 and length at least 1, got {size} and {length}")
        if any(not min(1, s) <= k <= s for k, s in zip(keeps, sizes, strict=True)):
            raise ValueError(f"keep must be from 1 to size = {size}, got {keep}")
        if select not in ("token", "role", "all"):
            raise ValueError(f"select must be 'token', 'role' or 'all', got {select!r}")
        layers = len(plain_blocks(backbone))
        self.backbone, self.select, self.fourier, self.sharpen = backbone, select, fourier, sharpen
        dim = backbone.channels[0]
        self.class_pool, self.patch_pool = (
            PromptPool(layers, size, length, dim, keep)
            for size, length, keep in zip(sizes, lengths, keeps, strict=True)
        )
        self.count = sum(s * n for s, n in zip(sizes, lengths, strict=True))
        self.dropout = nn.Dropout(dropout)
        self.value_scale = self.value_shift = None
        if value_affine:
            spread = (2 / dim) ** 0.5  # the authors draw a tenth of He's normal around 1 and 0
            self.value_scale = nn.Parameter(1 + 0.1 * spread * torch.randn(self.count, dim))
            self.value_shift = nn.Parameter(0.1 * spread * torch.randn(self.count, dim))
        colours = backbone.in_channels
        self.prompter = (
            nn.Sequential(
                nn.Conv2d(colours, 3 * colours, 11, padding=5),
                nn.PReLU(),
                nn.Conv2d(3 * colours, colours, 11, padding=5),
            )
            if image_prompt
            else None
        )
        backbone.requires_grad_(False)
        backbone.head.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> TCPA:
        super().train(mode)
        self.backbone.eval()
        return self

    def prompts(self, layer: int, batch: int) -> Tensor:
        """A layer's prompts, the class token's and then the patches', (1, p, C); (B, p, C) where dropout hits them."""
        prompts = torch.cat([pool.prompts[layer].flatten(0, 1) for pool in (self.class_pool, self.patch_pool)])[None]
        if self.training and self.dropout.p:
            prompts = self.dropout(prompts.expand(batch, -1, -1))
        return torch.fft.fft2(prompts).real if self.fourier and self.count else prompts

    def match(
        self, x: Tensor, layer: int, *, random: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Which prompts each token of the residual stream `x` (B, 1 + N, C) sees, (B, 1 + N, p), and the distance."""
        own, other = self.class_pool, self.patch_pool
        if self.select == "all":
            return None, x.new_zeros(())
        if self.select == "role":
            seen = torch.zeros(x.shape[1], self.count, dtype=torch.bool, device=x.device)
            cut = own.size * own.length
            seen[0, :cut] = seen[1:, cut:] = True
            return seen.expand(len(x), -1, -1), x.new_zeros(())
        first, near = own.match(x[:, :1], layer, random=random, generator=generator)
        rest, nearby = other.match(x[:, 1:], layer, random=random, generator=generator)
        first, rest = F.pad(first, (0, rest.shape[-1])), F.pad(rest, (first.shape[-1], 0))
        return torch.cat((first, rest), 1), near + nearby

    def attention(self, x: Tensor, layer: int, seen: Tensor | None) -> Tensor:
        """What the layer's attention says of `x` (B, 1 + N, C), the residual stream, with its prompts beside it."""
        block = cast(TokenBlock, self.backbone.encoder.blocks[layer])
        mixer = cast(MultiHead, block.mixer)
        q, k, v = mixer.project(block.norm1(x))
        _, pk, pv = mixer.project(block.norm1(self.prompts(layer, len(x))))
        if self.value_scale is not None and self.value_shift is not None:
            scale, shift = (
                p.unflatten(1, (mixer.kv_heads, -1)).transpose(0, 1) for p in (self.value_scale, self.value_shift)
            )
            pv = pv * scale + shift
        return mixer.merge(attend_prompts(q, k, v, pk, pv, seen) if self.count else attend(q, k, v))

    def run(self, images: Tensor, *, random: bool = False, generator: torch.Generator | None = None) -> Prompted:
        """Logits, distance and tokens; with `random`, prompts are picked at random, to warm up."""
        images = simam(images) if self.sharpen else images
        images = images if self.prompter is None else images + self.prompter(images)
        x, _ = self.backbone.embed(images)
        distance = x.new_zeros(())
        for layer, block in enumerate(self.backbone.encoder.blocks):
            seen, apart = self.match(x, layer, random=random, generator=generator)
            distance = distance + apart
            x = cast(TokenBlock, block).after(x, self.attention(x, layer, seen))
        tokens = self.backbone.encoder.norm(x)
        return Prompted(self.backbone.head(tokens[:, 0]), distance, tokens)

    def loss(
        self,
        out: Prompted,
        labels: Tensor,
        weight: float = 0.1,
        task: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> Tensor:
        """`task` of the logits, plus the distance by its weight (0.1 in the paper, 0.01 in the authors' scripts)."""
        return task(out.logits, labels) + weight * out.distance

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images).logits
