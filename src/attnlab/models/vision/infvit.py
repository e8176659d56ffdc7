"""InfViT: a plain vision transformer, few layers deep, with infinite self-attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import trunc_normal_linear
from attnlab.models.skeletons.plain import Plain
from attnlab.nn.linear.infinite import InfiniteAttention, LinearInfiniteAttention

# The paper says 53.5 million parameters, not the width. From it and the authors' 57.7 and 330.6 million for 4 and 24
# layers of other attention follow 1024 channels and a dense layer before the head: then it is 53.5. (Their other two
# counts hold one 1024² more in each layer, which the attention that they released does not have.)
SIZES = {
    "infvit_4": Size(53_451_756, {"linear": False}),
    "linear_infvit_4": Size(53_451_756, {"linear": True}),
}


@register(
    Card(
        name="infvit",
        title="Self-Attention And Beyond the Infinite: Towards Linear Transformers with Infinite Self-Attention",
        paper="2603.00175",
        system="infsa",
        family="linear",
        kind=BACKBONE,
        cost="N",
        sample={"dim": 16, "depth": 2, "heads": 2, "image": 32, "patch": 8, "num_classes": 10},
        sizes=SIZES,
    )
)
class InfViT(Plain):
    """A wide and shallow vision transformer without softmax: four layers that sum walks of up to four steps.

    Images (B, in_channels, H, W) → logits (B, num_classes). With `linear` (the default, and the paper's best) each
    layer is linear in the patches. Source: arXiv 2603.00175, which says how deep it is and not how wide.

    Args:
        dense: a layer of the same width and a tanh before the head, as the first ViT has (arXiv 2010.11929).
        linear: `LinearInfiniteAttention` instead of `InfiniteAttention`. rho, train_rho: of the mechanism.
        plain: everything else is `Plain`'s.
    """

    def __init__(
        self,
        *,
        dim: int = 1024,
        depth: int = 4,
        heads: int = 16,
        dense: bool = True,
        linear: bool = True,
        rho: float = 0.95,
        train_rho: bool = True,
        **plain: Any,
    ) -> None:
        kind = LinearInfiniteAttention if linear else InfiniteAttention
        super().__init__(
            dim=dim,
            depth=depth,
            mixer=lambda layer: kind(dim, heads=heads, rho=rho, train_rho=train_rho),
            **{"norm": partial(nn.LayerNorm, eps=1e-6), **plain},
        )
        if dense and isinstance(self.head, nn.Linear):
            before = nn.Linear(dim, dim)
            trunc_normal_linear(before)
            self.head = nn.Sequential(before, nn.Tanh(), self.head)  # type: ignore[assignment]
