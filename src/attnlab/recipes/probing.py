"""How good are a frozen encoder's features? Probes over any pooling, nearest neighbours, and how they are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain
from attnlab.recipes.poolings import pooling


@register(
    Card(
        name="probe",
        title="Attention, Please! Revisiting Attentive Probing for Masked Image Modeling",
        paper="2506.10178",
        system="ep",
        family="probing",
        kind=RECIPE,
        cost="N M",
    )
)
class Probe(nn.Module):
    """What is trained on frozen tokens: a pooling, a batch norm without an affine map, a linear classifier.

        logits (B, classes) = W norm(pooling(x)) + b          x (B, N, C), the tokens of a frozen encoder

        tokens = encode(vit, images)                          # no gradient
        loss = F.cross_entropy(Probe(tokens.shape[-1], 10, queries=16)(tokens), labels)

    Args:
        pooled: a name of `recipes.poolings.POOLINGS` ("ep", "mean" for a linear probe, "siglip", …), built with
            `options`, or a module of your own with an `out_dim`.

    Source: arXiv 2506.10178, which trains for 90 epochs by `LARS` at 0.1 · batch/256 and a `warm_cosine`.
    """

    def __init__(self, dim: int, classes: int, pooled: str | nn.Module = "ep", **options: Any) -> None:
        super().__init__()
        if isinstance(pooled, nn.Module) and options:
            raise ValueError("options go with the name of a pooling; a module is built already")
        self.pooling = pooling(pooled, dim, **options) if isinstance(pooled, str) else pooled
        width: Any = self.pooling.out_dim
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.pooling(x)))


@torch.no_grad()
def encode(encoder: Plain, images: Tensor, *, layer: int = -1, class_token: bool = False) -> Tensor:
    """Tokens (B, N, C) behind block `layer` of a plain ViT, through its last norm; with its class token before them."""
    depth = len(encoder.encoder.blocks)
    if not -depth <= layer < depth:
        raise ValueError(f"layer must lie in [-{depth}, {depth}), got {layer}")
    if class_token and encoder.class_token is None:
        raise ValueError("class_token=True wants an encoder that has one")
    tokens, grid = encoder.embed(images)
    for block in encoder.encoder.blocks[: layer % depth + 1]:
        tokens = block(tokens, grid=grid)
    tokens = encoder.encoder.norm(tokens)
    return tokens if class_token else tokens[:, encoder.positions.prefix :]


def nearest(
    known: Tensor, labels: Tensor, asked: Tensor, *, k: int = 20, temperature: float = 0.07, classes: int | None = None
) -> Tensor:
    """Class scores (Q, classes) of `asked` (Q, C) by a vote of the k nearest of `known` (M, C): no training at all.

    Each neighbour votes exp(cosine / temperature) for its label. Source: arXiv 1805.01978.
    """
    if len(known) != len(labels) or known.shape[1] != asked.shape[1]:
        raise ValueError(f"known {tuple(known.shape)}, labels {tuple(labels.shape)}, asked {tuple(asked.shape)} differ")
    if not 0 < k <= len(known):
        raise ValueError(f"k must be from 1 to {len(known)}, the known samples, got {k}")
    cosine, at = (F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T).topk(k, dim=1)
    votes = asked.new_zeros(len(asked), int(labels.max()) + 1 if classes is None else classes)
    return votes.scatter_add_(1, labels[at], (cosine / temperature).exp())


def few_per_class(labels: Tensor, shots: int, generator: torch.Generator | None = None) -> Tensor:
    """Indices of `shots` random samples of each class, for low-shot probing."""
    if shots < 1 or (fewest := int(labels.unique(return_counts=True)[1].min())) < shots:
        raise ValueError(f"shots must be from 1 to the rarest class's {fewest if shots >= 1 else 'size'}, got {shots}")
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:shots] for label in labels.unique()])


class LARS(torch.optim.Optimizer):
    """Momentum whose step for each matrix is scaled to the matrix (arXiv 1708.03888), as probes are trained.

    g ← (g + decay · p) · trust · |p| / |g + decay · p|       (vectors: g as it is)
    m ← momentum · m + g,    p ← p − lr · m
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        if lr < 0 or trust <= 0:
            raise ValueError(f"lr must not be negative and trust must be above 0, got {lr} and {trust}")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                change = p.grad
                if p.ndim > 1:
                    change = change.add(p, alpha=group["weight_decay"])
                    own, length = p.norm(), change.norm()
                    scaled = group["trust"] * own / length
                    change = change * torch.where((own > 0) & (length > 0), scaled, torch.ones_like(own))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(change)
                p.sub_(state["momentum"], alpha=group["lr"])
        return loss


def warm_cosine(epoch: float, *, epochs: float = 90, warm: float = 10) -> float:
    """The factor of the learning rate: linear from 0 over `warm` epochs, then a half cosine to 0."""
    if epoch < warm:
        return epoch / warm
    return 0.5 * (1 + math.cos(math.pi * (epoch - warm) / (epochs - warm)))
