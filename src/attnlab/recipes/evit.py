"""How EViT is trained: the share of the patches that it keeps shrinks on the way."""

from __future__ import annotations

import math

from attnlab.cards import RECIPE, Card, register


@register(
    Card(
        name="keep_rate",
        title="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
        paper="2202.07800",
        system="evit",
        family="tokens",
        kind=RECIPE,
    )
)
def keep_rate(step: int, *, start: int, end: int, base: float = 0.7, top: float = 1.0) -> float:
    """The share of the patches that stays at a training step, for `EViT.forward(x, keep=…)`.

        1                                               before step `start`
        base + (top − base)·(1 + cos(π t)) / 2          t = (step − start) / (end − start)
        base                                            from `end` on

    The paper shrinks it from epoch 10 to epoch 100 of 300 when training from scratch, as DeiT is; a trained DeiT is
    tuned for 30 epochs. Source: arXiv 2202.07800 (youweiliang/evit).
    """
    if not 0 <= start < end:
        raise ValueError(f"start must be at least 0 and below end, got {start} and {end}")
    for name, rate in (("base", base), ("top", top)):
        if not 0 < rate <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {rate}")
    if step < start:
        return 1.0
    if step >= end:
        return base
    return base + (top - base) * (1 + math.cos(math.pi * (step - start) / (end - start))) / 2
