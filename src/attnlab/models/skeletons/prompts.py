"""Learned tokens among a transformer's own: a stack of blocks run with prompts, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def freeze(model: nn.Module) -> nn.Module:
    """No gradient for any parameter of `model`, which is put in evaluation mode."""
    return model.requires_grad_(False).eval()


def insert(x: Tensor, prompts: Tensor, at: int, held: int = 0) -> Tensor:
    """Tokens (B, N, C) with `prompts` (P, C) or (B, P, C) at place `at`, in place of the `held` tokens there."""
    if prompts.shape[-1] != x.shape[-1] or prompts.ndim not in (2, 3):
        raise ValueError(f"prompts must be (P, {x.shape[-1]}) or (B, P, {x.shape[-1]}), got {tuple(prompts.shape)}")
    return torch.cat((x[:, :at], prompts.expand(len(x), -1, -1), x[:, at + held :]), 1)


def run_prompted(
    blocks: Iterable[nn.Module],
    x: Tensor,
    prompts: Sequence[Tensor | None],
    *,
    at: int = 1,
    held: int = 0,
    **keywords: Any,
) -> Tensor:
    """Tokens (B, N, C) through `blocks`, with prompts among them, which are gone again at the end.

    `prompts` has an entry per block: (P, C) or (B, P, C) are put at place `at` before the block, and what stood there
    as prompts goes; None leaves the prompts that came out of the block before. With the first entry alone this is
    shallow prompting, with all of them deep prompting (VPT, arXiv 2203.12119). Entries may end early.

    Args:
        held: how many prompts `x` has at `at` already; they belong to the text and stay in the result.
        keywords: for each block.
    """
    before = held
    for layer, block in enumerate(blocks):
        new = prompts[layer] if layer < len(prompts) else None
        if new is not None:
            x = insert(x, new, at, held)
            held = new.shape[-2]
        x = block(x, **keywords)
    return x if before else torch.cat((x[:, :at], x[:, at + held :]), 1)
