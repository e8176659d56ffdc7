"""Gated attention: a sigmoid gate of the token behind, before or inside softmax attention."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead

Place = Literal["heads", "values", "keys", "queries", "output"]


@register(
    Card(
        name="gated",
        title="Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
        paper="2505.06708",
        system="gated_attention",
        family="softmax",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N²",
        growth=2.0,
        state="2 * kv_heads * head_dim * N",
        sample=dict(heads=4, kv_heads=2),
    )
)
class GatedAttention(MultiHead):
    """Softmax attention whose heads pass through a sigmoid gate of the query's token.

        y = Wo (σ(Wg x) ⊙ attend(q, k, v))        x (B, N, C) → (B, N, C)

    The gate makes the low-rank map from v to y non-linear and lets a head say nothing, so no attention sink forms. It
    costs C·H weights with `gate="head"`, C·H·D with `gate="element"`, and next to no time. At zero scores it halves
    its input; so does the authors' code at initialisation, nearly. Source: arXiv 2505.06708 (qiuzh20/gated_attention).

    Args:
        gate: one score per head, per element, or None for no gate (the baseline).
        at: which tensor is gated: "heads" after attention (the paper's G1, the best), "values" (G2), "keys" (G3),
            "queries" (G4), each right after its projection and by its own token, or the "output" after Wo (G5).
        combine: "multiply" or "add".
        activation: "sigmoid" or "silu".
        shared: all heads have the same scores.
        content: the scores depend on the token; False learns them as constants, zero at first.
        Others as for `MultiHead`; `bias` also puts one into Wg.
    """

    def __init__(
        self,
        dim: int,
        *,
        gate: Literal["head", "element"] | None = "head",
        at: Place = "heads",
        combine: Literal["multiply", "add"] = "multiply",
        activation: Literal["sigmoid", "silu"] = "sigmoid",
        shared: bool = False,
        content: bool = True,
        **keywords: Any,
    ) -> None:
        super().__init__(dim, **keywords)
        for name, given, known in (
            ("gate", gate, ("head", "element", None)),
            ("at", at, ("heads", "values", "keys", "queries", "output")),
            ("combine", combine, ("multiply", "add")),
            ("activation", activation, ("sigmoid", "silu")),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {given!r}")
        if at == "output" and gate == "head":
            raise ValueError("gate must be 'element' at 'output': there are no heads any more")
        self.gate, self.at, self.combine, self.activation = gate, at, combine, activation
        heads = self.kv_heads if at in ("values", "keys") else self.heads
        self.gates = 1 if shared or at == "output" else heads
        width = self.gates * (1 if gate == "head" else dim if at == "output" else self.head_dim)
        self.wg = nn.Linear(dim, width, bias=self.wqkv.bias is not None) if gate and content else None
        self.scores = nn.Parameter(torch.zeros(width)) if gate and not content else None

    def gated(self, y: Tensor, tokens: Tensor, at: Place) -> Tensor:
        """`y`, heads `(B, H, N, D)` or tokens `(B, N, C)`, through the gate of `tokens (B, N, C)` if it stands here."""
        if self.at != at:
            return y
        if self.wg is not None:
            scores = self.wg(tokens)
        elif self.scores is not None:
            scores = self.scores.expand(1, 1, -1)
        else:
            return y
        if at != "output":
            scores = split_heads(scores, self.gates)
        weight = scores.sigmoid() if self.activation == "sigmoid" else silu(scores)
        return y * weight if self.combine == "multiply" else y + weight

    def qkv(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(x, context)
        source = x if context is None else context
        return self.gated(q, x, "queries"), self.gated(k, source, "keys"), self.gated(v, source, "values")

    def after(self, heads: Tensor, x: Tensor) -> Tensor:
        return self.gated(heads, x, "heads")

    def forward(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Any:
        y = super().forward(x, context, **keywords)
        if isinstance(y, tuple):
            return self.gated(y[0], x, "output"), y[1]
        return self.gated(y, x, "output")
