"""Attention turned round: each token sends its message to the tokens that it chooses (DependencyViT)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_LENGTH, NONCAUSAL_SELF, PERMUTATION_EQUIVARIANT, TOKENS, Card, register
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads, split_heads
from attnlab.patterns import Pattern


class Sent(NamedTuple):
    """What one layer of reversed attention did."""

    y: Tensor  # (B, N, C)
    gates: Tensor  # (B, N): how much each token still sends, the product over the layers so far
    dependencies: Tensor | None  # (B, N, N): [j, i] how much child i sends to parent j, over all heads


@register(
    Card(
        name="reversed",
        title="Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
        paper="2304.03282",
        system="dependencyvit",
        family="softmax",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N²",
        growth=2.0,
        sample=dict(heads=4),
    )
)
class ReversedAttention(Mechanism):
    """Softmax attention transposed: tokens do not ask for messages but send theirs, each to the parents it chooses.

        A = softmax_j(q_i·k_j / √D)                 of child i over its parents j, per head
        P_i = softmax_h(Ws x_i / temperature)       through which head child i speaks
        M_i = M_i of the layer before · σ(MLP(x_i)) whether it speaks at all: less and less from layer to layer
        y_j = Wo concat_h(Σ_i A_ij P_ih M_i v_i)    what parent j receives

    x (B, N, C) → (B, N, C), cost O(N²). What child i sends over all heads and parents is M_i, so the received messages
    form a soft dependency tree; see `attnlab.models.vision.dependency_tree`. Source: arXiv 2304.03282, of which no code
    was released: the bias-free gate of C/2 hidden channels and the temperature follow an independent reimplementation.

    Args:
        hidden: channels of the gate's MLP; C/2 if None.
        temperature: below 1, children speak through fewer heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        bias: bool = False,
        hidden: int | None = None,
        temperature: float = 0.1,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if causal:
            raise ValueError(f"{type(self).__name__} has no causal form: a parent may stand anywhere")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        check_heads(dim, heads)
        self.heads, self.temperature = heads, temperature
        self.wqkv, self.wo = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)
        self.select = nn.Linear(dim, heads, bias=False)
        width = max(dim // 2, 1) if hidden is None else hidden
        self.gate1, self.gate2 = nn.Linear(dim, width, bias=False), nn.Linear(width, 1, bias=False)

    def send(self, x: Tensor, gates: Tensor | None = None, *, dependencies: bool = False) -> Sent:
        """One layer: `gates` (B, N) are those of the layer before (ones at first)."""
        self.check(x)
        if gates is not None and gates.shape != x.shape[:2]:
            raise ValueError(f"gates must be (B, N) = {tuple(x.shape[:2])}, got {tuple(gates.shape)}")
        own = self.gate2(F.gelu(self.gate1(x))).sigmoid().squeeze(-1)
        gates = own if gates is None else gates * own
        q, k, v = (split_heads(t, self.heads) for t in self.wqkv(x).chunk(3, -1))
        chosen = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)  # (B, H, children, parents)
        weight = ((self.select(x) / self.temperature).softmax(-1) * gates.unsqueeze(-1)).mT.unsqueeze(-1)
        y = self.wo(join_heads(chosen.mT @ (v * weight)))
        return Sent(y, gates, torch.einsum("bhij,bhi->bji", chosen, weight.squeeze(-1)) if dependencies else None)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Tensor:
        self.refuse(context=context, pattern=pattern, state=state)
        return self.send(x).y
