"""Raise a decoder's logits toward the image tokens that its vision encoder found informative (Fixing Imbalanced
Attention)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnlab.cards import LENS, Card, register
from attnlab.lens.edits.decoder import DecoderEdit
from attnlab.lens.event import Event
from attnlab.lens.subscriber import Handle
from attnlab.lens.where import Choice


class Patches(NamedTuple):
    """Which of an image's n patches the vision encoder looks at."""

    top: Tensor  # bool (n): informative
    bottom: Tensor  # bool (n): outliers, which attract the encoder late and say little
    outliers: float  # the share of patches whose attention is an outlier


def informative_patches(first: Tensor, late: Tensor, *, local: float = 0.25, spatial: float = 0.0) -> Patches:
    """Informative and outlying patches from the attention `(H, 1 + n, 1 + n)` of a vision encoder, class token first.

    `first` of its first layer, `late` of its last but one: `lens.watch(model, layers="*vision_tower*")` records them.

        top     the ⌊n · local⌋ patches that the class token looks at most in the first layer, heads summed,
                and the ⌊n · spatial⌋ that the other patches look at most; less the bottom ones
        bottom  the ⌊n r⌋ that the class token looks at most in the last layer but one,
                r the share there above Q3 + 1.5 (Q3 − Q1)

    The authors' spatial score sums each patch's own row, which is 1 whatever the image; here it is the column.
    """
    for name, maps in (("first", first), ("late", late)):
        if maps.dim() != 3 or maps.shape[1] != maps.shape[2] or maps.shape[1] < 2:
            raise ValueError(f"{name} must be (H, 1 + n, 1 + n), got {tuple(maps.shape)}")
    if first.shape[1] != late.shape[1]:
        raise ValueError(f"first and late must have one size, got {first.shape[1]} and {late.shape[1]} tokens")
    for name, share in (("local", local), ("spatial", spatial)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in 0 to 1, got {share}")
    n = first.shape[1] - 1
    looked, later = first[:, 0, 1:].sum(0), late[:, 0, 1:].sum(0)
    quarter, three = torch.quantile(
        later.double(), torch.tensor([0.25, 0.75], dtype=torch.float64, device=later.device)
    )
    outliers = (later > three + 1.5 * (three - quarter)).sum().item() / n
    bottom = _largest(later, int(n * outliers))
    received = first[:, 1:, 1:].mean(0).sum(0)
    top = _largest(looked, int(n * local)) | _largest(received, int(n * spatial))
    return Patches(top & ~bottom, bottom, outliers)


def emphasise(
    scores: Tensor,
    top: Tensor,
    bottom: Tensor | None = None,
    *,
    alpha: float | Tensor = 0.7,
    beta: float | Tensor = 0.3,
) -> Tensor:
    """`scores (B, H, Nq, Nk)`, scaled and masked, in which the last query's grow toward the tokens of the image.

        e_j ← e_j + alpha |e_j| for j in top,  e_j ← e_j + beta |e_j| for j in bottom;  masked ones stay masked

    Positive logits grow by 1 + alpha, negative ones shrink toward 0. `top` and `bottom` are bool `(Nk)` or `(B, Nk)`;
    `alpha` and `beta` numbers, or `(H)`, one for each head. With all image tokens as `top` and no `bottom` this is PAI
    (arXiv 2407.21771).
    """
    row = scores[:, :, -1]
    factor = torch.zeros_like(row)
    for keys, strength in ((top, alpha), (bottom, beta)):
        if keys is not None:
            keys = _keys(keys, scores)
            strength = torch.as_tensor(strength, dtype=scores.dtype, device=scores.device)
            if strength.dim() > 1 or strength.numel() not in (1, scores.shape[1]):
                wanted = f"a number or ({scores.shape[1]}), one for each head"
                raise ValueError(f"alpha and beta must be {wanted}, got {tuple(strength.shape)}")
            factor = factor + strength.reshape(1, -1, 1) * keys
    # What is masked stands at −inf or at the smallest number, and no strength may lift it.
    seen = row > torch.finfo(row.dtype).min / 4
    row = torch.where(seen, row + factor * row.masked_fill(~seen, 0.0).abs(), row)
    return torch.cat((scores[:, :, :-1], row[:, :, None]), 2)


def modulation(sensitivity: Tensor) -> Tensor:
    """Strengths `(…, H)` of mean 1 over a layer's heads, larger for those that look at the image more: s_h / mean(s).

    The paper varies the strength by head and does not print its formula; this one is assumed.
    """
    if bool((sensitivity < 0).any()):
        raise ValueError("sensitivity must not be negative: it is the attention that heads give to the image")
    return sensitivity / sensitivity.mean(-1, keepdim=True).clamp_min(torch.finfo(sensitivity.dtype).tiny)


def guided(conditional: Tensor, unconditional: Tensor, *, guidance: float = 1.1, cutoff: float = 0.1) -> Tensor:
    """Logits `(…, V)` moved away from those without the image, among the tokens that are likely with it.

        s = log softmax(conditional), u = log softmax(unconditional)
        guidance (s − u) + u,  and −∞ where s < ln(cutoff) + max s

    Classifier-free guidance as PAI has it (arXiv 2407.21771).
    """
    if not 0 < cutoff <= 1:
        raise ValueError(f"cutoff must lie in 0 to 1, without 0, got {cutoff}")
    s, u = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    likely = s >= math.log(cutoff) + s.amax(-1, keepdim=True)
    return (guidance * (s - u) + u).masked_fill(~likely, -torch.inf)


def placed(patches: Tensor, image: Tensor) -> Tensor:
    """Marks of an image's n patches, bool `(n)`, as marks of the tokens of a prompt whose `image (T)` they are."""
    if image.dim() != 1 or int(image.sum()) != len(patches):
        raise ValueError(f"image must be bool (T) with {len(patches)} tokens of the image, got {tuple(image.shape)}")
    tokens = torch.zeros_like(image)
    tokens[image] = patches.to(image.device)
    return tokens


class ImageAttention(DecoderEdit):
    """Changes nothing: measures how much of the last query's attention each head of a decoder gives to the image.

    `sensitivity()` is `(L, H)`, the mean over the passes and samples seen: what `EmphasiseTokens` varies its strengths
    by.
    """

    def __init__(self, image: Tensor | None = None, *, layers: Choice = None, heads: Choice = None) -> None:
        super().__init__(image, layers=layers, heads=heads)
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def after(self, event: Event, out: Tensor) -> None:
        depth, row = self.depth(event), event.weights()[:, :, -1]
        mass = (row * self.image_keys(row.shape[-1], row.device).reshape(-1, 1, row.shape[-1])).sum(-1)
        self.sums[depth] = self.sums.get(depth, torch.zeros_like(mass[0])) + mass.detach().sum(0)
        self.counts[depth] = self.counts.get(depth, 0) + len(mass)

    def sensitivity(self) -> Tensor:
        if not self.sums:
            raise ValueError("nothing has been measured yet")
        return torch.stack([self.sums[i] / self.counts[i] for i in sorted(self.sums)])


@register(
    Card(
        name="emphasise_tokens",
        title="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
        paper="2501.12206",
        system="fixattn",
        family="edit",
        kind=LENS,
        cost="N² scores by hand in the edited layers",
    )
)
class EmphasiseTokens(DecoderEdit):
    """The token being written looks harder at the informative patches of the image: for `lens.steer`.

        e_j ← e_j + alpha |e_j| for j in top,  e_j ← e_j + beta |e_j| for j in bottom         (`emphasise`)

    In each pass the last query alone changes: of a prompt its last token, of a decoding step the new one. No
    parameters, no extra pass; the scores `(B, H, Nq, Nk)` of the edited layers are computed by hand. `ImageGuidance`
    adds the classifier-free logits. Source: arXiv 2501.12206.

    Args:
        top, bottom: tokens of the prompt, bool `(T)` or `(B, T)`: `informative_patches` finds the image's, `placed`
            puts them into the prompt. With `top=image` and no bottom this is PAI.
        alpha, beta: strengths; 0 changes nothing.
        sensitivity: `(L, H)`, how much each head of each decoder layer looks at the image (`ImageAttention`): then
            strengths differ by head, alpha · s_h / mean(s).
        layers, heads: of the decoder; all layers but the first two if None.
    """

    def __init__(
        self, top: Tensor, bottom: Tensor | None = None, *, alpha: float = 0.7, beta: float = 0.3,
        sensitivity: Tensor | None = None, layers: Choice = None, heads: Choice = None,
    ) -> None:  # fmt: skip
        super().__init__(top, layers=slice(2, None) if layers is None else layers, heads=heads)
        if bottom is not None and bottom.shape != top.shape:
            raise ValueError(f"top and bottom must have one shape, got {tuple(top.shape)} and {tuple(bottom.shape)}")
        if bottom is not None and bool((top & bottom).any()):
            raise ValueError("top and bottom must not share a token")
        self.top, self.bottom, self.alpha, self.beta = top, bottom, alpha, beta
        self.strengths = None if sensitivity is None else modulation(sensitivity)

    def open(self, model: nn.Module) -> Iterable[Handle]:
        handles = super().open(model)
        if self.strengths is not None and len(self.strengths) != len(self.layers):
            there = tuple(self.strengths.shape)
            raise ValueError(f"sensitivity must be (L, H) for {len(self.layers)} layers of the decoder, got {there}")
        return handles

    def scores(self, event: Event, scores: Tensor) -> Tensor:
        keys, device = scores.shape[-1], scores.device
        factor: float | Tensor = 1.0 if self.strengths is None else self.strengths[self.depth(event)].to(scores)
        top = self.image_keys(keys, device, self.top)
        bottom = None if self.bottom is None else self.image_keys(keys, device, self.bottom)
        new = emphasise(scores, top, bottom, alpha=self.alpha * factor, beta=self.beta * factor)
        return self.put(event, new, scores)


def _largest(x: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[x.topk(count).indices] = True
    return mask


def _keys(mask: Tensor, scores: Tensor) -> Tensor:
    batch, keys = scores.shape[0], scores.shape[-1]
    if mask.dtype != torch.bool or mask.shape[-1] != keys or mask.dim() > 2 or mask.numel() not in (keys, batch * keys):
        wanted = f"bool ({keys}) or ({batch}, {keys})"
        raise ValueError(f"top and bottom must be {wanted}, got {mask.dtype} {tuple(mask.shape)}")
    return mask.reshape(-1, 1, keys)
