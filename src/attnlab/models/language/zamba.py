"""Zamba2: layers of Mamba-2, and between some of them one or two layers of attention that are used again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, LM, STREAMING, Card, Size, register
from attnlab.models.skeletons.decoder import Decoder, DecoderState
from attnlab.nn.cache import KVCache
from attnlab.nn.decode import attend_one
from attnlab.nn.linear.selective import Mamba2
from attnlab.nn.mechanism import check_heads, join_heads, pattern_for, split_heads
from attnlab.positions import Rotary

# Parameter counts: transformers' `Zamba2ForCausalLM` at the released configurations, tied and shared weights once.
SIZES = {
    "zamba2_1_2b": Size(
        1_215_064_704,
        dict(vocabulary=32000, dim=2048, depth=38, heads=32, hidden=8192, states=128, shared=1, adapted=True,
             at=(5, 11, 17, 23, 29, 35)),
    ),
    "zamba2_2_7b": Size(
        2_662_214_560,
        dict(vocabulary=32000, dim=2560, depth=54, heads=32, hidden=10240, rotary=False,
             at=(6, 12, 18, 24, 30, 36, 42, 47, 51)),
    ),
    "zamba2_7b": Size(
        7_356_749_648,
        dict(vocabulary=32000, dim=3584, depth=81, heads=32, hidden=14336, groups=2, at=(6, *range(11, 78, 6))),
    ),
}  # fmt: skip


class Adapters(nn.Module):
    """What one use of a shared layer has of its own: maps of low rank beside its matrices, and one behind it."""

    def __init__(self, dim: int, hidden: int, rank: int, adapted: bool) -> None:
        super().__init__()
        self.qkv_down = nn.Linear(2 * dim, 3 * rank, bias=False) if adapted else None
        self.qkv_up = nn.Parameter(torch.empty(3, rank, 2 * dim).uniform_(-0.02, 0.02)) if adapted else None
        self.mlp = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, 2 * hidden, bias=False))
        self.out = nn.Linear(dim, dim, bias=False)

    def qkv(self, x: Tensor) -> Tensor | float:
        """What is added to q, k and v: `(B, N, 2C)` → `(B, N, 6C)`."""
        if self.qkv_down is None or self.qkv_up is None:
            return 0.0
        return torch.einsum("bnir,ird->bnid", self.qkv_down(x).unflatten(-1, (3, -1)), self.qkv_up).flatten(-2)


class SharedLayer(nn.Module):
    """Attention and a gated mlp in a row, without residuals, over a token's state beside its embedding.

    h = Wo attend(qkv norm₁(x, e)), u = W₂(gelu(g) ⊙ u) of (g, u) = W₁₃ norm₂ h; x, e `(B, N, C)` → `(B, N, C)`.
    Each use adds its own `Adapters` to qkv and W₁₃.
    """

    def __init__(self, dim: int, heads: int, hidden: int, rotary: bool, norm_eps: float) -> None:
        super().__init__()
        self.heads, head_dim = heads, check_heads(2 * dim, heads)[1]
        self.scale = (head_dim / 2) ** -0.5
        self.position = Rotary(head_dim) if rotary else None
        self.norm1, self.norm2 = nn.RMSNorm(2 * dim, eps=norm_eps), nn.RMSNorm(dim, eps=norm_eps)
        self.wqkv = nn.Linear(2 * dim, 6 * dim, bias=False)
        self.wo = nn.Linear(2 * dim, dim, bias=False)
        self.w13 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, embedded: Tensor, own: Adapters, cache: KVCache | None = None) -> Tensor:
        both = self.norm1(torch.cat((x, embedded), -1))
        q, k, v = (split_heads(t, self.heads) for t in (self.wqkv(both) + own.qkv(both)).chunk(3, -1))
        offset = 0 if cache is None else cache.length
        if self.position is not None:
            q, k = self.position(q, k, offset)
        if cache is not None:
            k, v = cache.append(k, v)
        if offset and x.shape[1] == 1:  # the last token sees all
            h = attend_one([(q, k, v)], scale=self.scale)
        else:
            h = attend(q, k, v, pattern=pattern_for(True, None, offset, x.shape[1]), scale=self.scale)
        h = self.norm2(self.wo(join_heads(h)))
        gate, up = (self.w13(h) + own.mlp(h)).chunk(2, -1)
        return own.out(self.w2(gelu(gate) * up))


@register(
    Card(
        name="zamba2",
        title="The Zamba2 Suite: Technical Report",
        paper="2411.15242",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF | ANY_LENGTH | STREAMING,
        cost="N²",
        state="layers + 4 * dim * len(uses) * N",
        sample=dict(
            vocabulary=64, dim=32, depth=5, heads=4, hidden=48, states=8, head_dim=16, groups=2, at=(1, 2, 4), rank=4,
            adapted=True,
        ),
        sizes=SIZES,
    )
)  # fmt: skip
class Zamba2(Decoder):
    """A language model of Mamba-2 layers that now and then look back over the text: `build("zamba2_1_2b")`.

        x = x + Mamba2(RMSNorm x)                            in most layers
        x = x + Mamba2(RMSNorm(x + Out shared(x, e)))        in the layers `at`, e the embeddings

    The attention and mlp of `SharedLayer` have one set of weights, or a few in turn, for all their uses, and small
    adapters for each; heads are twice as wide as usual. A text costs the keys and values of the uses alone, 4·C numbers
    per token each, and what the Mamba-2 layers keep. Logits, state and `generate` are the `Decoder`'s.
    Source: arXiv 2411.15242 (2405.16712 for the architecture), as in transformers.

    Args:
        at: layers (from 0) that a shared layer speaks into.
        shared: how many of these there are; they take turns.
        heads, hidden: of the shared layers.
        rank: of the adapters; adapted: the attention has them too, not just the mlp.
        rotary: whether the attention knows positions.
        states, head_dim, groups, conv, least_step: of `Mamba2`.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        dim: int,
        depth: int,
        at: Sequence[int],
        heads: int = 32,
        hidden: int | None = None,
        shared: int = 2,
        rank: int = 128,
        adapted: bool = False,
        rotary: bool = True,
        states: int = 64,
        head_dim: int = 64,
        groups: int = 1,
        expand: int = 2,
        conv: int = 4,
        least_step: float = 1e-3,
        norm_eps: float = 1e-5,
        tied: bool = True,
        length: int | None = None,
    ) -> None:
        at = tuple(at)
        if sorted(set(at)) != list(at) or any(not 0 <= i < depth for i in at):
            raise ValueError(f"at must rise through layers from 0 to depth − 1 = {depth - 1}, got {at}")
        if not 1 <= shared <= max(1, len(at)):
            raise ValueError(f"shared must lie in 1 to the {len(at)} layers in at, got {shared}")

        def mixer(_: int) -> nn.Module:
            return Mamba2(
                dim, states=states, head_dim=head_dim, groups=groups, expand=expand, conv=conv, least_step=least_step
            )

        super().__init__(
            vocabulary=vocabulary, dim=dim, depth=depth, heads=1, position="none", mixer=mixer, mlp=lambda _: None,
            norm_eps=norm_eps, tied=tied, length=length,
        )  # fmt: skip
        hidden = 4 * dim if hidden is None else hidden
        self.at = at
        self.shared = nn.ModuleList(SharedLayer(dim, heads, hidden, rotary, norm_eps) for _ in range(shared))
        self.uses = nn.ModuleList(Adapters(dim, hidden, rank, adapted) for _ in at)

    @property
    def _signature(self) -> tuple[Any, ...]:
        heads = self.shared[0].heads
        return (*super()._signature, (("", "shared layers"), ("heads", heads), ("at", self.at)))

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DecoderState:
        """As of `Decoder`, with a cache for each use of a shared layer behind the layers' states."""
        state = super().initial_state(batch, device=device, dtype=dtype)
        state.layers.append([KVCache() for _ in self.at])
        return state

    def forward(self, ids: Tensor, state: DecoderState | None = None, *, last: bool = False) -> Any:
        self._check(ids, state)
        x = embedded = self.embedding(ids)
        block: Any
        use = 0
        for i, block in enumerate(self.blocks):
            told: Tensor | float = 0.0
            if i in self.at:
                cache = None if state is None else state.layers[-1][use]
                told = self.shared[use % len(self.shared)](x, embedded, self.uses[use], cache)
                use += 1
            if state is None:
                y = block.mixer(block.norm1(x + told))
            else:
                y, state.layers[i] = block.mixer(block.norm1(x + told), state=state.layers[i])
            x = x + y
        if state is not None:
            state.length += ids.shape[1]
        logits = self.head(self.norm(x[:, -1:] if last else x))
        return logits if state is None else (logits, state)
