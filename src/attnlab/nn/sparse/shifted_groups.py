"""Shifted groups with sinks: long texts at the price of short ones, for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache
from attnlab.nn.decode import attend_one
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Causal, Groups, Pattern, Sinks


@register(
    Card(
        name="shifted_groups",
        title="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
        paper="2406.05678",
        system="sinklora",
        family="sparse",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N (G + s)",
        growth=1.0,
        sample=dict(heads=4, kv_heads=2, group=16, sinks=2),
        state="2 * kv_heads * head_dim * N",
    )
)
class ShiftedGroups(MultiHead):
    """Causal attention in groups of G tokens, which lie half a group earlier in some heads, and to the first tokens.

        query i sees key j ≤ i  ⟺  ⌊i/G⌋ = ⌊j/G⌋  or  j < s        in the last heads  ⌊(i + G/2)/G⌋ = ⌊(j + G/2)/G⌋

    x (B, N, C) → (B, N, C). With a quarter of the heads moved and 4 sinks it is the sink-fixed attention of SinkLoRA;
    with half of them and none, LongLoRA's S²-Attn. A model is fine-tuned so and then used with full attention
    (`recipes/sinklora.py`). Groups are views of the text, so time is N/G times that of G tokens; decoding reads one
    group. With G ≥ 2N it is `MultiHead`. Sources: arXiv 2406.05678, whose release has S²-Attn alone; 2309.12307.

    Args:
        group: G, even, in tokens; or as a share of the text, as the authors have it (0.25).
        moved: the share of the heads whose groups are moved, the last ones.
        sinks: s, at most G/2.
        wrap: in moved heads the last half group goes on with the first, as in the papers; by default both stand alone,
            so that a text can grow: only so, and with G in tokens, texts have any length and stream.
        variant: "release" orders that wrapped group as the released code does: the first tokens of the text see the
            last ones. It is here to reproduce what was trained with it; "paper" lets no token see the future.
        Others as for `MultiHead`; a position may turn queries and keys, not add a bias.
    """

    causal_only = "it trains language models"

    def __init__(
        self,
        dim: int,
        *,
        group: int | float = 2048,
        moved: float = 0.25,
        sinks: int = 4,
        wrap: bool = False,
        variant: Literal["paper", "release"] = "paper",
        causal: bool = True,
        **keywords: Any,
    ) -> None:
        super().__init__(dim, causal=causal, **keywords)
        if isinstance(group, int) and (group < 2 or group % 2):
            raise ValueError(f"group must be even and at least 2, got {group}")
        if isinstance(group, float) and not 0 < group <= 1:
            raise ValueError(f"group must be a number of tokens or a share in (0, 1], got {group}")
        if not 0 <= moved <= 1:
            raise ValueError(f"moved must be a share in [0, 1], got {moved}")
        if sinks < 0 or (isinstance(group, int) and 2 * sinks > group):
            raise ValueError(f"sinks must be 0 to half a group, got {sinks} for groups of {group}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        if variant == "release" and not wrap:
            raise ValueError("variant='release' needs wrap=True: it differs in the group that wraps")
        self.group, self.moved, self.sinks, self.wrap, self.variant = group, moved, sinks, wrap, variant

    def size(self, tokens: int) -> int:
        """G for a text of so many tokens."""
        size = self.group if isinstance(self.group, int) else int(tokens * self.group)
        if size < 2 or size % 2 or 2 * self.sinks > size:
            least = max(2, 2 * self.sinks)
            raise ValueError(f"group must give an even number of at least {least} tokens, got {size} of {tokens}")
        if self.wrap and tokens % size:
            raise ValueError(f"x must hold whole groups of {size} where they wrap, got {tokens} tokens")
        return size

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        if self.wrap or not isinstance(self.group, int):
            raise ValueError("streaming needs wrap=False and group in tokens: the groups of a text must not move")
        return super().initial_state(batch, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: KVCache | None = None,
    ) -> Any:
        self.refuse(context=context, pattern=pattern)
        return super().forward(x, grid=grid, state=state)

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        pattern: Pattern | None = None,
        offset: int = 0,
        state: KVCache | None = None,
    ) -> Tensor:
        if self.position_bias(q, k, offset) is not None:
            raise ValueError(f"position must turn queries and keys, got {type(self.position).__name__}, a bias")
        tokens, still = k.shape[2], self.heads - math.ceil(self.heads * self.moved)
        size, kept = self.size(tokens), self.heads // self.kv_heads
        if still % kept:  # the border runs through the queries of one key-value head
            k, v, kept = k.repeat_interleave(kept, 1), v.repeat_interleave(kept, 1), 1
        out = []
        for first, last, shift in ((0, still, 0), (still, self.heads, size // 2)):
            if first < last:
                own = slice(first // kept, last // kept)
                heads = q[:, first:last], k[:, own], v[:, own]
                if offset == 0 and q.shape[2] == tokens:
                    out.append(self._folded(*heads, size, shift))
                elif q.shape[2] == 1:
                    out.append(self._step(*heads, (offset + shift) // size * size - shift))
                else:
                    where = self.pattern(size, shift).starting_at(offset)
                    out.append(attend(*heads, pattern=where, dropout=self.dropout if self.training else 0.0))
        return torch.cat(out, 1)

    def pattern(self, size: int, shift: int, ring: int | None = None) -> Pattern:
        """Where heads with groups of `size` tokens, `shift` earlier, look; in a `ring` of tokens where they wrap."""
        groups: Pattern = Groups(size, shift, ring)
        return (groups | Sinks(self.sinks) if self.sinks else groups) & Causal()

    def _step(self, q: Tensor, k: Tensor, v: Tensor, begin: int) -> Tensor:
        """The last token alone, whose group begins at `begin`."""
        begin, sinks = max(begin, 0), min(self.sinks, max(begin, 0))
        parts = [(q, k[:, :, begin:], v[:, :, begin:])]
        if sinks:
            parts.append((q, k[:, :, :sinks], v[:, :, :sinks]))
        return attend_one(parts, dropout=self.dropout if self.training else 0.0)

    def _folded(self, q: Tensor, k: Tensor, v: Tensor, size: int, shift: int) -> Tensor:
        """A whole text: the first group, in which the sinks lie, then all whole ones as a batch, then the rest."""
        if q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        heads = [t.transpose(1, 2) for t in (q, k, v)]  # (B, N, H, D): groups of tokens are views
        n = q.shape[2]
        first = min(size - shift, n)
        stop = n - (n - first) % size
        if shift and self.wrap:
            ends = [[t[:, :first], t[:, stop:]] for t in heads]
            if self.variant == "release":  # a triangle over the tail and then the head, as they come after a roll
                tail, head = self._groups(*(torch.cat(pair[::-1], 1) for pair in ends)).split([n - stop, first], 1)
            else:
                head, tail = self._groups(*(torch.cat(pair, 1) for pair in ends)).split([first, n - stop], 1)
        else:
            head = self._groups(*(t[:, :first] for t in heads))
            tail = self._groups(*(t[:, stop:] for t in heads), sinks=[t[:, : self.sinks] for t in heads])
        middle = (
            self._groups(
                *(t[:, first:stop].unflatten(1, (-1, size)).flatten(0, 1) for t in heads),
                sinks=[t[:, : self.sinks].repeat_interleave((stop - first) // size, 0) for t in heads],
            )
            .unflatten(0, (len(q), -1))
            .flatten(1, 2)
        )
        return torch.cat((head, middle, tail), 1).transpose(1, 2)

    def _groups(self, q: Tensor, k: Tensor, v: Tensor, *, sinks: Sequence[Tensor] = ()) -> Tensor:
        """Causal attention in each group `(groups, G, H, D)`, after its sinks `(groups, s, H, D)` of q, k and v.

        The sinks' queries come along and are dropped: so what is seen stays a triangle, which kernels know.
        """
        if not q.numel():
            return q
        if self.sinks and sinks:
            q, k, v = (torch.cat(pair, 1) for pair in zip(sinks, (q, k, v), strict=True))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout).transpose(1, 2)
        return out[:, self.sinks :] if self.sinks and sinks else out
