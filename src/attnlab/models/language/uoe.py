"""Union of experts as a language model: attention and MLP cut into experts, with a memory of earlier segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab.cards import CAUSAL_SELF, LM, Card, Size, register
from attnlab.models.language.adaptive import AdaptiveVocabulary
from attnlab.models.skeletons.decoder import Decoder, DecoderState
from attnlab.nn.channel.union_mlp import UnionMLP
from attnlab.nn.sparse.union_attention import UnionAttention

_WIKITEXT: dict[str, Any] = dict(
    vocabulary=267735, dim=400, depth=16, heads=10, hidden=2100, cutoffs=(20000, 40000, 200000), reach=300, memory=150
)

# WikiText-103's words at the widths of the authors' script. Their own count is 2,566,400 more: each of their MLPs has a
# third layer, 400 × 400 with a bias, which is never used.
SIZES = {"uoe_wt103": Size(146_660_762, _WIKITEXT)}


class UnionBlock(nn.Module):
    """x = norm1(x + mixer(x, memory)), then x = norm2(x + mlp(x)): `(B, N, C)` → the same."""

    def __init__(self, dim: int, mixer: UnionAttention, mlp: UnionMLP, dropout: float) -> None:
        super().__init__()
        self.mixer, self.norm1 = mixer, nn.LayerNorm(dim)
        self.mlp, self.norm2 = mlp, nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.mixer(x, memory=memory))
        return self.norm2(x + self.dropout(self.mlp(x)))


@register(
    Card(
        name="uoe",
        system="uoe",
        title="Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
        paper="2503.02495",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF,
        cost="N (N + memory) · (active / heads)²",
        sample=dict(vocabulary=40, dim=24, depth=2, heads=4, hidden=48, cutoffs=(10, 25), reach=24, memory=8),
        sizes=SIZES,
        compiles="how many tokens each expert gets is read from data",
    )
)
class UnionLM(Decoder):
    """A language model of union attention and union MLPs that reads in segments: `build("uoe_wt103")`.

        x = norm(x + union_attention(x + places, memory + places))        x = norm(x + union_mlp(x))

    `logits, state = model(ids, state)` reads one segment, with `state = model.initial_state(batch)` before the first; a
    state is what the last `memory` tokens were when they came into each layer, and no gradient flows into it. Logits
    are log probabilities, since the softmax is adaptive; `loss` trains without those of all words. Every layer adds a
    learned vector for each place, counted from the end of the segment, which with its memory may be `reach` tokens
    long. `generate` reads the prompt and then token by token, with the memory.

    The authors train on WikiText-103 with segments and memory of 150, batches of 60, Adam at 2.5·10⁻⁴ with a cosine for
    200,000 steps. Their MLPs are handed tokens place by place, so that those of different texts compete for experts;
    here they choose within their own. Source: arXiv 2503.02495 (YujiaoYang-work/UoE).

    Args:
        vocabulary, dim, depth, heads: as for `Decoder`.
        hidden: inner width of all experts of an MLP; 4 C if None.
        active: heads that each token chooses; half of them if None.
        experts, active_experts: slices of each MLP, and how many of them each token chooses.
        cutoffs: of `AdaptiveVocabulary`.
        memory, reach: as above.
        variant: of `UnionAttention` and `UnionMLP`; only "paper" is causal.
        straight_through: the gates learn.
        dropout: of weights, inside MLPs, and on their paths.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        dim: int,
        depth: int,
        heads: int = 8,
        hidden: int | None = None,
        active: int | None = None,
        experts: int = 4,
        active_experts: int = 2,
        cutoffs: Sequence[int] = (),
        memory: int = 150,
        reach: int = 300,
        variant: Literal["paper", "release"] = "paper",
        straight_through: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if not 0 <= memory < reach:
            raise ValueError(f"memory must lie in 0 to reach − 1 = {reach - 1}, got {memory}")
        gates: dict[str, Any] = dict(variant=variant, straight_through=straight_through, dropout=dropout)

        def block() -> UnionBlock:
            mixer = UnionAttention(dim, heads=heads, active=active, causal=True, **gates)
            share = 0.5 if variant == "release" else None
            mlp = UnionMLP(dim, hidden=hidden, experts=experts, active=active_experts, share=share, **gates)
            return UnionBlock(dim, mixer, mlp, dropout)

        # The skeleton's own table and head are replaced: let them be small.
        super().__init__(vocabulary=1, dim=dim, depth=1, heads=heads, mlp=lambda _: None, position="none")
        self.vocabulary, self.memory, self.reach = vocabulary, memory, reach
        self.embedding = AdaptiveVocabulary(vocabulary, dim, cutoffs)  # type: ignore[assignment]
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.places = nn.Parameter(torch.randn(depth, reach, dim) * 0.01)
        self.norm, self.head = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.dropout = nn.Dropout(dropout)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DecoderState:
        """An empty memory."""
        return DecoderState(self._signature, batch, 0, [None] * len(self.blocks))

    def features(self, ids: Tensor, state: DecoderState | None = None) -> Tensor:
        """What comes out of the last block, `(B, N, C)`; a state is moved on."""
        self._check(ids, state)
        if ids.shape[1] > self.reach:
            raise ValueError(f"ids must be at most reach = {self.reach} tokens long, got {ids.shape[1]}")
        n = ids.shape[1]
        x = self.dropout(self.embedding.embed(ids))  # type: ignore[operator]
        for i, (block, places) in enumerate(zip(self.blocks, self.places, strict=True)):
            memory = None if state is None else state.layers[i]
            if state is not None and self.memory:
                seen = x.detach() if memory is None else torch.cat((memory, x.detach()), 1)
                state.layers[i] = seen[:, -self.memory :]
            if memory is not None:
                before = places[: self.reach - n][-memory.shape[1] :]
                memory = memory[:, memory.shape[1] - len(before) :] + before if len(before) else None
            x = block(x + places[self.reach - n :], memory)
        if state is not None:
            state.length += n
        return self.dropout(x)

    def forward(self, ids: Tensor, state: DecoderState | None = None, *, last: bool = False) -> Any:
        """Log probabilities `(B, N, vocabulary)` of one segment, and its memory for the next if one is given."""
        x = self.features(ids, state)
        found = self.embedding.log_probabilities(x[:, -1:] if last else x)  # type: ignore[operator]
        return found if state is None else (found, state)

    def loss(self, ids: Tensor, targets: Tensor, state: DecoderState | None = None) -> Tensor:
        """−log p of each target `(B, N)`, without the probabilities of all other words; a state is moved on."""
        return self.embedding.loss(self.features(ids, state), targets)  # type: ignore[operator]
