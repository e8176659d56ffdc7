"""The reduced transformer: a plain vision transformer with switches for its parts, and where its parameters are."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from attnlab.cards import BACKBONE, Card, register
from attnlab.models.skeletons.plain import Plain
from attnlab.nn.softmax.reduced import ReducedAttention


@register(
    Card(
        name="minimal_transformer",
        title="Reducing the Transformer Architecture to a Minimum",
        paper="2410.13732",
        system="min_transformer",
        family="softmax",
        kind=BACKBONE,
        cost="N²",
        growth=2.0,
        sample={"dim": 16, "depth": 2, "image": 32, "patch": 8, "num_classes": 10},
    )
)
class MinimalTransformer(Plain):
    """A classifier of images from which parts of the transformer can be left out.

    Images (B, in_channels, H, W) → logits (B, num_classes), over the mean of the tokens; residual paths, norms and
    learned positions stay. By default everything goes that can: no MLP, one similarity matrix, no values' matrices.
    Parameters per layer, of width C: MLP with biases 8C² + 5C; similarity 2C², C² or C(C + 1)/2; values 2C², C² or 0.
    Source: arXiv 2410.13732.

    Args:
        mlp: keep the MLP of 4 · dim.
        similarity, values, heads: of `ReducedAttention`; the transformer as it was is mlp=True, "full", "full".
        plain: everything else is `Plain`'s.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 1,
        mlp: bool = False,
        similarity: str = "collapsed",
        values: str = "none",
        **plain: Any,
    ) -> None:
        mixer = partial(ReducedAttention, dim, heads=heads, similarity=similarity, values=values)
        super().__init__(
            dim=dim,
            depth=depth,
            mixer=lambda layer: mixer(),
            **{"class_token": False, "mlp_ratio": 4.0 if mlp else 0.0, **plain},
        )


def account(model: nn.Module) -> dict[str, int]:
    """Where the parameters are: "similarity", "values", "mlp" and "rest" (embedding, positions, norms, head)."""
    parts = dict.fromkeys(("similarity", "values", "mlp", "rest"), 0)
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        if ".mlp." in name:
            parts["mlp"] += count
        elif ".mixer.wqkv." in name:
            # Rows q | k | v of one width.
            parts["similarity"] += 2 * count // 3
            parts["values"] += count - 2 * count // 3
        elif name.endswith(".mixer.ws"):
            parts["similarity"] += count
        else:
            parts["values" if ".mixer.w" in name else "rest"] += count
    return parts


def overdetermination(examples: int, outputs: int, parameters: int) -> float:
    """Q = K M / P: numbers to be fitted per parameter that fits them; above 1 a model can only fit what is regular."""
    if min(examples, outputs, parameters) < 1:
        raise ValueError(f"examples, outputs and parameters must be positive, got {(examples, outputs, parameters)}")
    return examples * outputs / parameters
