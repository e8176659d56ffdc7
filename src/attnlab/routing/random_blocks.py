"""Blocks chosen at random: the dynamic masks of benchmarks, without the cost of choosing."""

from __future__ import annotations

import torch

from attnlab.routing.blocks import Partition, Routed


def block_sparse(
    tokens: int, *, heads: int, block: int = 128, sparsity: float = 0.9, shared: bool = False, variable: bool = False,
    seed: int = 0,
) -> Routed:  # fmt: skip
    """A dynamic mask: each query block sees the key blocks with the highest of random scores.

    Args:
        sparsity: the share of key blocks that is not seen; at least one always is.
        shared: all heads see the same blocks, else each its own.
        variable: blocks of random sizes with `block` as their mean, else all of `block` tokens.

    Returns:
        A route: give it to `attend` as `route=`.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    rng = torch.Generator().manual_seed(seed)
    blocks = Partition.sized(_sizes(tokens, block, rng)) if variable else Partition.of(block, tokens)
    keep = max(1, round(blocks.count * (1 - sparsity)))
    scores = torch.rand(1, 1 if shared else heads, blocks.count, blocks.count, generator=rng)
    return Routed.of(scores.topk(keep, -1).indices, blocks, blocks)


def _sizes(tokens: int, mean: int, rng: torch.Generator) -> list[int]:
    sizes: list[int] = []
    while (left := tokens - sum(sizes)) > 0:
        size = int(torch.randint(max(1, mean // 2), mean + mean // 2 + 1, (), generator=rng))
        sizes.append(min(size, left))
    return sizes
