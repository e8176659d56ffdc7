"""Dual cross-attention learning: two companions that teach a vision transformer small differences (DCAL)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.nn.multihead import MultiHead
from attnlab.recipes.layers import plain_blocks

Fusion = Literal["mean", "max", "min"]
Heads = tuple[Tensor, Tensor, Tensor]  # q, k and v of one block, (B, H, N, D) each


class Branch(NamedTuple):
    """What one branch says of each image."""

    logits: Tensor  # (B, num_classes)
    feature: Tensor  # (B, C), its class token


class Branches(NamedTuple):
    """The network's own, that of the tokens looked at most, and that of the disturbed images (in training alone)."""

    own: Branch
    closer: Branch
    pairwise: Branch | None


@torch.no_grad()
def rollout(layers: Sequence[tuple[Tensor, Tensor]], fusion: Fusion = "mean", row: int = 0) -> Tensor:
    """How much token `row` of the last layer depends on each token of the first: `(B, N)`, summing to 1 for "mean".

        Ŝ = S̄_L ⋯ S̄_1,  S̄ = ½ S + ½ I        S a layer's weights, its heads fused

    `layers` holds q and k `(B, H, N, D)` of each, the first layer first. One row is carried through from the last layer
    on, so that no product of whole matrices is needed: cost O(L N² D). Source: arXiv 2205.02151 (rollout 2005.00928).
    """
    if not layers:
        raise ValueError("layers must hold q and k of at least one layer")
    fuse: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda s: s.mean(1),
        "max": lambda s: s.amax(1),
        "min": lambda s: s.amin(1),
    }
    if fusion not in fuse:
        raise ValueError(f"fusion must be one of {tuple(fuse)}, got {fusion!r}")
    q = layers[-1][0]
    at = q.new_zeros(len(q), 1, q.shape[2])
    at[:, :, row] = 1
    for q, k in reversed(layers):
        weights = fuse[fusion](((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1))
        at = 0.5 * (at + at @ weights)
    return at.squeeze(1)


def partners(batch: int, pairing: str = "derangement", generator: torch.Generator | None = None) -> Tensor:
    """Which image each image of the batch meets: `(batch,)`. A derangement lets none meet itself."""
    if pairing not in ("derangement", "permutation", "flip"):
        raise ValueError(f"pairing must be 'derangement', 'permutation' or 'flip', got {pairing!r}")
    if pairing == "flip":
        return torch.arange(batch).flip(0)
    order = torch.randperm(batch, generator=generator)
    if pairing == "permutation":
        return order
    if batch < 2:
        raise ValueError(f"a derangement needs a batch of at least 2 images, got {batch}")
    return torch.empty_like(order).scatter(0, order, order.roll(1))


class UncertaintyWeights(nn.Module):
    """Several losses as one, at learned weights: ½ Σ (e^{−w} L + w). Source: arXiv 1705.07115, as FairMOT has it."""

    def __init__(self, losses: int, start: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((losses,), start))

    def forward(self, losses: Sequence[Tensor]) -> Tensor:
        if len(losses) != len(self.weights):
            raise ValueError(f"losses must be {len(self.weights)}, got {len(losses)}")
        return 0.5 * ((-self.weights).exp() * torch.stack(list(losses)) + self.weights).sum()


def triplet_loss(features: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    """Pulls the farthest image of the same label closer than the nearest of another: features `(B, C)`, labels `(B,)`.

    mean_i relu(d⁺ − d⁻ + margin), or softplus(d⁺ − d⁻) without a margin, over images that have both. For
    re-identification, beside the cross-entropy of each branch.
    """
    apart = torch.cdist(features, features)
    same = labels[:, None] == labels
    self_ = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    far = apart.masked_fill(~same | self_, -math.inf).amax(1)
    near = apart.masked_fill(same, math.inf).amin(1)
    both = far.isfinite() & near.isfinite()
    if not both.any():
        raise ValueError("labels must hold two images of one label and one of another")
    gap = far[both] - near[both]
    return (F.softplus(gap) if margin is None else F.relu(gap + margin)).mean()


@register(
    Card(
        name="dcal",
        title="Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
        paper="2205.02151",
        family="fine-grained",
        kind=RECIPE,
        cost="N² per block, twice in training",
    )
)
class DCAL(nn.Module):
    """A vision transformer taught by two companions to tell things apart that differ in a small part.

        closer look:   one more block in which the class token and the share R of the patches that rollout ranks highest
                       ask all tokens:  softmax(Q_sel Kᵀ/√D) V, with a classifier of its own
        in pairs:      softmax(Q₁ [K₁; K₂]ᵀ/√D) [V₁; V₂] in every block of the network itself, where image 2 only
                       disturbs image 1; dropped after training
        loss = ½ Σ_b (e^{−w_b} L_b + w_b) over the three branches b, w learned

        dcal = DCAL(attnlab.build("deit_tiny_patch16_224", num_classes=200))
        loss = dcal.loss(dcal.branches(images), labels)          # training
        probabilities = dcal.eval()(images)                      # of both classifiers, summed
        features = dcal.features(images)                         # of both, for re-identification

    Costs one block in inference. The ranking carries no gradient. Classes are read from the closer look's class token,
    which no chosen patch's output reaches in its one block: the choice shows where the network looked, and changes
    nothing in the logits (`benchmarks/dcal_parts.py` finds gains from pairs alone). Source: arXiv 2205.02151; no code
    was released, and what the paper leaves open is an argument here.

    Args:
        backbone: a `Plain` network with a class token and `MultiHead` mixers; it becomes a part of this module.
        ratio: R; the paper has 0.1 for fine-grained classes and 0.3 for re-identification.
        fusion: of the heads in rollout. rounding: of R·N, at least one patch.
        source: the closer look's input, "last" for the last block's output or "penultimate" for its input.
        pairing: see `partners`. partner: image 2's tokens in pairs, "pairwise" (those of its own disturbed run) or
            "own" (of its undisturbed run). share_head: one classifier for the network and its disturbed runs.
        start: the loss weights at first.
    """

    def __init__(
        self,
        backbone: Plain,
        *,
        ratio: float = 0.1,
        fusion: Fusion = "mean",
        rounding: Literal["floor", "ceil"] = "floor",
        source: Literal["last", "penultimate"] = "last",
        pairing: Literal["derangement", "permutation", "flip"] = "derangement",
        partner: Literal["pairwise", "own"] = "pairwise",
        share_head: bool = True,
        start: float = 0.0,
    ) -> None:
        super().__init__()
        choices = {
            "fusion": (fusion, ("mean", "max", "min")),
            "rounding": (rounding, ("floor", "ceil")),
            "source": (source, ("last", "penultimate")),
            "pairing": (pairing, ("derangement", "permutation", "flip")),
            "partner": (partner, ("pairwise", "own")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {ratio}")
        plain_blocks(backbone)
        self.backbone = backbone
        self.ratio, self.fusion, self.rounding, self.source = ratio, fusion, rounding, source
        self.pairing, self.partner = pairing, partner
        # The closer look starts from the last block's weights, and is not tied to them.
        self.block = copy.deepcopy(cast(TokenBlock, backbone.encoder.blocks[-1]))
        self.norm, self.head = copy.deepcopy(backbone.encoder.norm), copy.deepcopy(backbone.head)
        self.pair_head = None if share_head else copy.deepcopy(backbone.head)
        self.weigh = UncertaintyWeights(3, start)

    def run(
        self, x: Tensor, pairs: Tensor | None = None, others: Sequence[Heads] | None = None
    ) -> tuple[list[Tensor], list[Heads]]:
        """Tokens `(B, N, C)` through all blocks: those before each and after the last, and each block's heads.

        With `pairs` (B,), keys and values are those of both images; image 2's from `others`, if given.
        """
        tokens, kept = [x], []
        for layer, block in enumerate(self.backbone.encoder.blocks):
            block = cast(TokenBlock, block)
            mixer = cast(MultiHead, block.mixer)
            normed = block.norm1(x)
            q, k, v = mixer.project(normed)
            kept.append((q, k, v))
            if pairs is not None:
                k2, v2 = (k, v) if others is None else others[layer][1:]
                k, v = torch.cat((k, k2[pairs]), 2), torch.cat((v, v2[pairs]), 2)
            heads = attend(q, k, v, dropout=mixer.dropout if self.training else 0.0)
            x = block.after(x, mixer.merge(mixer.after(heads, normed)))
            tokens.append(x)
        return tokens, kept

    def select(self, layers: Sequence[Heads]) -> Tensor:
        """The class token and the patches that it depends on most, `(B, 1 + K)`, ties by place."""
        rank = rollout([(q, k) for q, k, _ in layers], self.fusion)[:, 1:]
        share = self.ratio * rank.shape[1]
        # 0.29 · 100 is a little less than 29.
        share = round(share) if abs(share - round(share)) < 1e-6 else share
        count = max(1, math.floor(share) if self.rounding == "floor" else math.ceil(share))
        best = rank.sort(stable=True, dim=1, descending=True).indices[:, :count] + 1
        return torch.cat((torch.zeros_like(best[:, :1]), best), 1)

    def look_closer(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The chosen tokens `(B, 1 + K, C)` after they asked all of `x` (B, N, C)."""
        normed = self.block.norm1(x)
        places = chosen.unsqueeze(-1).expand(-1, -1, x.shape[2])
        y = self.block.mixer(normed.gather(1, places), normed)
        return self.block.after(x.gather(1, places), y)

    def branches(self, images: Tensor, *, generator: torch.Generator | None = None) -> Branches:
        """All branches; the one in pairs in training alone."""
        x, _ = self.backbone.embed(images)
        tokens, layers = self.run(x)
        own = self.backbone.encoder.norm(tokens[-1][:, 0])
        seen = tokens[-1] if self.source == "last" else tokens[-2]
        closer = self.norm(self.look_closer(seen, self.select(layers))[:, 0])
        pairwise = None
        if self.training:
            pairs = partners(len(x), self.pairing, generator).to(x.device)
            disturbed, _ = self.run(x, pairs, layers if self.partner == "own" else None)
            feature = self.backbone.encoder.norm(disturbed[-1][:, 0])
            head = self.backbone.head if self.pair_head is None else self.pair_head
            pairwise = Branch(head(feature), feature)
        return Branches(Branch(self.backbone.head(own), own), Branch(self.head(closer), closer), pairwise)

    def loss(
        self, branches: Branches, labels: Tensor, task: Callable[[Branch, Tensor], Tensor] | None = None
    ) -> Tensor:
        """The weighted sum over the branches; `task` is cross-entropy if None (with `triplet_loss` in Re-ID)."""
        if branches.pairwise is None:
            raise ValueError("branches must come from training mode: there is no branch in pairs")
        one: Any = task or (lambda branch, y: F.cross_entropy(branch.logits, y))
        return self.weigh([one(branch, labels) for branch in branches if branch is not None])

    def features(self, images: Tensor) -> Tensor:
        """`(B, 2C)` of length one: both class tokens, to compare by cosine."""
        branches = self.branches(images)
        return F.normalize(torch.cat((branches.own.feature, branches.closer.feature), 1), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Class probabilities of the network and of its closer look, summed: `(B, num_classes)`."""
        branches = self.branches(images)
        return branches.own.logits.softmax(-1) + branches.closer.logits.softmax(-1)
