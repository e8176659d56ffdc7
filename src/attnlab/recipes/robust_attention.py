"""Attention that does not hang on few tokens: the diversification loss, and token-aware pooling put into a ViT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.token_pooling import TokenPooling


@register(
    Card(
        name="adl",
        title="Robustifying Token Attention for Vision Transformers",
        paper="2303.11126",
        family="loss",
        kind=RECIPE,
        cost="N²",
    )
)
def diversity_loss(maps: Sequence[Tensor], threshold: float = 2.0) -> Tensor:
    """How much all queries look at the same tokens: a scalar in [0, 1], to be added to the training loss.

        M = mean over heads,  c = mean over queries of M  (B, 1, N);  entries up to τ = threshold / N count as 0
        loss = Σ_l mean over images and queries of cos(c, M[query]) / (L + 1e-6)

    `maps`: the softmax weights (B, H, N, N) of each layer, from `recorded`. The authors' total is
    cross-entropy + 1.0 · this. Source: arXiv 2303.11126; the release fails for a batch of one, this does not.
    """
    if not maps:
        raise ValueError("maps must hold the weights of at least one layer")
    total = maps[0].new_zeros(())
    for weights in maps:
        if weights.ndim != 4 or weights.shape[2] != weights.shape[3]:
            raise ValueError(f"maps must be (B, H, N, N), got {tuple(weights.shape)}")
        rows = weights.mean(1)
        shared = rows.mean(1, keepdim=True)
        tau = threshold / weights.shape[-1]
        rows, shared = (F.threshold(t, tau, 0.0) for t in (rows, shared))
        total = total + F.cosine_similarity(shared, rows, dim=-1).mean()
    return total / (len(maps) + 1e-6)


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """While it is open, each `MultiHead` of `model` leaves its weights (B, H, N, N), with their gradients, in a list.

        with recorded(model) as maps:
            loss = F.cross_entropy(model(images), labels)
        loss = loss + diversity_loss(maps)

    The weights that are recorded are those that mix the values, so that nothing is computed twice.
    """
    mixers = [m for m in model.modules() if isinstance(m, MultiHead)]
    odd = [type(m).__name__ for m in mixers if type(m).mix is not MultiHead.mix or m.position is not None]
    if not mixers or odd:
        raise TypeError(f"model must mix by MultiHead without positions of its own, got {odd or type(model).__name__}")
    maps: list[Tensor] = []

    def mix(owner: MultiHead) -> Any:
        def mixed(q: Tensor, k: Tensor, v: Tensor, *, pattern: Any = None, **_: Any) -> Tensor:
            if pattern is not None or owner.kv_heads != owner.heads:
                raise ValueError("recorded wants full attention, with as many key heads as query heads")
            weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
            maps.append(weights)
            return F.dropout(weights, owner.dropout, owner.training) @ v

        return mixed

    for mixer in mixers:
        mixer.mix = mix(mixer)  # type: ignore[method-assign]
    try:
        yield maps
    finally:
        for mixer in mixers:
            del mixer.mix


class PooledBlock(nn.Module):
    """A block of a plain ViT whose attention sees the pooled tokens: its residual path keeps the tokens themselves.

    The first `prefix` tokens (a class token) are not pooled.
    """

    def __init__(self, block: TokenBlock, pool: TokenPooling, *, prefix: int = 0) -> None:
        super().__init__()
        self.block, self.pool, self.prefix = block, pool, prefix

    def forward(self, x: Tensor, *, grid: tuple[int, int]) -> Tensor:
        places = x[:, self.prefix :].unflatten(1, grid).permute(0, 3, 1, 2)
        pooled = self.pool(places).permute(0, 2, 3, 1).flatten(1, 2)
        seen = pooled if not self.prefix else x.new_empty(x.shape).copy_(x)
        if self.prefix:
            seen[:, self.prefix :] = pooled
        return self.block.after(x, self.block.mixer(self.block.norm1(seen), grid=grid))


def pool_tokens(model: Plain, scales: int = 4) -> Plain:
    """Put token-aware pooling before the attention of every block of a plain ViT, in place."""
    for layer, block in enumerate(model.encoder.blocks):
        if not isinstance(block, TokenBlock):
            raise TypeError(f"model must be built of plain blocks, got {type(block).__name__} at layer {layer}")
        pool = TokenPooling(model.channels[0], scales=scales)
        model.encoder.blocks[layer] = PooledBlock(block, pool, prefix=model.positions.prefix)
    return model
