"""Attention of other packages as contestants of the arena; registers those of the packages that are installed.

Loaded like a user's file (`attnlab bench cab --peers`), so that no other command meets them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from attnlab import cards
from attnlab.cards import ALL_FOUR, ANY_LENGTH, CAUSAL_SELF, NONCAUSAL_CROSS, NONCAUSAL_SELF, TOKENS, Card
from attnlab.nn.mechanism import Mechanism


def _card(name: str, title: str, capabilities: cards.Capability, growth: float, **sample: Any) -> Card:
    return Card(
        name=name, title=title, paper="", family="peers", kind=TOKENS, capabilities=capabilities | ANY_LENGTH,
        growth=growth, sample=sample,
    )  # fmt: skip


class Torch(Mechanism):
    """torch.nn.MultiheadAttention."""

    def __init__(self, dim: int, *, heads: int = 4, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
        self.attention = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True)

    def forward(self, x: Tensor, context: Tensor | None = None, *, grid: Any = None) -> Tensor:
        context = x if context is None else context
        hidden = None
        if self.causal:
            hidden = torch.ones(x.shape[1], context.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.attention(x, context, context, attn_mask=hidden, need_weights=False)[0]


class XTransformers(Mechanism):
    """The attention layer of x-transformers."""

    def __init__(self, dim: int, *, heads: int = 4, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
        from x_transformers.x_transformers import Attention

        self.attention = Attention(dim, dim_head=dim // heads, heads=heads, causal=causal, flash=True)

    def forward(self, x: Tensor, context: Tensor | None = None, *, grid: Any = None) -> Tensor:
        y = self.attention(x, context)
        return y[0] if isinstance(y, tuple) else y


class Natten(Mechanism):
    """One-dimensional neighborhood attention of natten."""

    def __init__(self, dim: int, *, heads: int = 4, kernel: int = 31, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
        from natten import NeighborhoodAttention1D

        self.kernel = kernel
        self.attention = NeighborhoodAttention1D(dim, heads, kernel_size=kernel, is_causal=causal, qkv_bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, grid: Any = None) -> Tensor:
        if x.shape[1] < self.kernel:
            raise ValueError(f"x must have at least {self.kernel} tokens, the kernel of natten, got {x.shape[1]}")
        return self.attention(x)


class Fla(Mechanism):
    """Gated linear attention of flash-linear-attention, which runs on GPUs."""

    causal_only = "it keeps a state"

    def __init__(self, dim: int, *, heads: int = 4, causal: bool = True) -> None:
        super().__init__(dim, causal=causal)
        from fla.layers import GatedLinearAttention

        self.attention = GatedLinearAttention(hidden_size=dim, num_heads=heads)

    def forward(self, x: Tensor, context: Tensor | None = None, *, grid: Any = None) -> Tensor:
        return self.attention(x)[0]


ABSENT: dict[str, str] = {}  # of those that are not here, why
_SELF = NONCAUSAL_SELF | CAUSAL_SELF
for _module, _card_, _target in (
    ("torch", _card("peer_torch", "torch.nn.MultiheadAttention", ALL_FOUR, 2.0, heads=4), Torch),
    (
        "x_transformers.x_transformers",
        _card("peer_x_transformers", "x-transformers", _SELF | NONCAUSAL_CROSS, 2.0, heads=4),
        XTransformers,
    ),
    ("natten", _card("peer_natten", "natten, 1-D", _SELF, 1.0, heads=4), Natten),
    ("fla.layers", _card("peer_fla", "flash-linear-attention, GLA", CAUSAL_SELF, 1.0, heads=4), Fla),
):
    try:
        import_module(_module)
    except ImportError as error:  # it, or something that it needs
        ABSENT[_card_.name] = f"is not installed ({error})"
    else:
        cards.register(_card_)(_target)
