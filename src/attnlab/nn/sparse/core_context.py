"""Core-context attention: what is far is seen through one token per group, what is near exactly."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.core_cache import CoreCache
from attnlab.nn.decode import attend_one
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern
from attnlab.positions import Rotary


@register(
    Card(
        name="core_context",
        title="Core Context Aware Transformers for Long Context Language Modeling",
        paper="2412.12465",
        system="cca_attn",
        family="sparse",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N (N/g + s + g)",
        growth=1.8,
        sample=dict(heads=4, kv_heads=2, group=4, window=8),
        state="kv_heads * head_dim * (2 * (N // group) + 2 * (N - seen(N) * group) + N % group)",
    )
)
class CoreContext(MultiHead):
    """Causal softmax attention to the last s to s + g − 1 tokens, and to one core token for each group of g before.

        c_m = Σ_{j in group m} softmax_j(q_last · k_j / √d) x_j        last: the group's last token, which sees it all
        y_i = Wo · softmax(q_i [Wk c_1 … Wk c_n ; k_ng+1 … k_i] / √d) [Wv c_1 … Wv c_n ; v_ng+1 … v_i]
        n = max(0, ⌊(i − s)/g⌋), i counted from 1: every token up to i is seen once, by itself or in its core

    x (B, N, C) → (B, N, C). No weights beyond `MultiHead`'s, so a trained model's fit, and a short fine-tuning adapts
    them (`recipes/core_context.py`); g and s may be set anew at any time. With s ≥ N or g = 1 it is `MultiHead`. As
    weights sum to one, pooling x and projecting is pooling keys and values, and so it is computed, each key-value head
    with its own weights. A core's key is turned to its group's last place. Time O(N²/g + N s); decoding keeps N/g cores
    and the last s + g tokens. Source: arXiv 2412.12465; it leaves open what `pool_scope`, `gqa_query`, `core_pos` say.

    Args:
        group, window: g and s.
        pool_scope: each "head" pools by its own weights, or all by "shared" ones, of the dot product over all channels.
        gqa_query: where queries share a key, their "mean" pools, or the "first" one.
        core_pos: the place a core's key is turned to in its group: "last", "first" or "middle"; or it is "pooled" from
            keys that are turned already.
        Others as for `MultiHead`; the position is a `Rotary` or None.
    """

    causal_only = "it sums up what lies before"

    def __init__(
        self,
        dim: int,
        *,
        group: int = 16,
        window: int = 1024,
        pool_scope: Literal["head", "shared"] = "head",
        gqa_query: Literal["mean", "first"] = "mean",
        core_pos: Literal["last", "first", "middle", "pooled"] = "last",
        causal: bool = True,
        **keywords: Any,
    ) -> None:
        super().__init__(dim, causal=causal, **keywords)
        for name, value in (("group", group), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, choice, known in (
            ("pool_scope", pool_scope, ("head", "shared")),
            ("gqa_query", gqa_query, ("mean", "first")),
            ("core_pos", core_pos, ("last", "first", "middle", "pooled")),
        ):
            if choice not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {choice!r}")
        if self.position is not None and not isinstance(self.position, Rotary):
            raise ValueError(f"position must be a Rotary or None, got {type(self.position).__name__}")
        self.group, self.window = group, window
        self.pool_scope, self.gqa_query, self.core_pos = pool_scope, gqa_query, core_pos

    def seen(self, tokens: int) -> int:
        """How many cores the query after so many tokens sees; what it sees exactly begins with the next group."""
        return max(0, (tokens + 1 - self.window) // self.group)

    def initial_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CoreCache:
        """No cores and no tokens yet. It grows by one core's key and value per group."""
        return CoreCache(self.group, owner=self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Any:
        self.refuse(context=context, pattern=pattern, grid=grid)
        self.check(x)
        if state is not None:
            self.check_state(state, CoreCache, len(x))
        q, k, v = self.qkv(x)
        y = self.merge(self._heads(q, k, v, state))
        return y if state is None else (y, state)

    def _heads(self, q: Tensor, still: Tensor, v: Tensor, state: CoreCache | None = None) -> Tensor:
        """Heads `(B, H, n, D)` of the next n tokens, whose projections are neither normed nor turned yet."""
        offset, n = (0 if state is None else state.length), q.shape[2]
        q, k = self.q_norm(q), self.k_norm(still)
        if self.position is not None:
            q, k = self.position(q, k, offset)
        begin, first = 0, offset // self.group
        if state is not None:
            k, v, still = state.append(k, v, still)
            begin = state.begin
        # Groups that end in this piece; the queries of their last tokens are in it.
        ended, start = (offset + n) // self.group - first, first * self.group
        whole = slice(start - begin, start - begin + ended * self.group)
        cores = self.pool(
            q[:, :, start + self.group - 1 - offset :: self.group],
            k[:, :, whole], still[:, :, : ended * self.group], v[:, :, whole], first,
        )  # fmt: skip
        if state is not None:
            cores = state.add(*cores)
        heads = self._step(q, k, v, *cores, offset, begin) if n == 1 else self._walk(q, k, v, *cores, offset, begin)
        if state is not None:
            state.forget(self.seen(state.length) * self.group)
        return heads

    def pool(self, last: Tensor, k: Tensor, still: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, Hkv, m, D)` of m cores, of which the first has the number `first`.

        `last (B, H, m, D)` are the queries of the groups' last tokens; k (normed and turned), still (neither) and v
        `(B, Hkv, m·g, D)` are of all their tokens.
        """
        last = last.unflatten(1, (self.kv_heads, -1))
        last = last.mean(2) if self.gqa_query == "mean" else last[:, :, 0]
        k, still, v = (t.unflatten(2, (-1, self.group)) for t in (k, still, v))
        scores = (k @ last.unsqueeze(-1)).squeeze(-1) * self.head_dim**-0.5
        if self.pool_scope == "shared":
            scores = scores.sum(1, keepdim=True) * self.kv_heads**-0.5
        weights = scores.softmax(-1, dtype=torch.promote_types(k.dtype, torch.float32)).to(k.dtype).unsqueeze(-2)
        values = (weights @ v).squeeze(-2)
        if self.core_pos == "pooled":
            return (weights @ k).squeeze(-2), values
        keys = self.k_norm((weights @ still).squeeze(-2))
        if isinstance(self.position, Rotary):
            within = {"first": 0, "middle": self.group // 2, "last": self.group - 1}[self.core_pos]
            at = torch.arange(first, first + keys.shape[2], device=k.device) * self.group + within
            keys = self.position.turn_to(keys, at)
        return keys, values

    def _step(self, q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, offset: int, begin: int) -> Tensor:
        """The last token alone."""
        n = self.seen(offset)
        near = n * self.group - begin
        parts = [(q, k[:, :, near:], v[:, :, near:])]
        if n:
            parts.append((q, core_k[:, :, :n], core_v[:, :, :n]))
        return attend_one(parts, dropout=self.dropout if self.training else 0.0)

    def _walk(self, q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, offset: int, begin: int) -> Tensor:
        """Runs of queries, short beside the window: each with the cores it may see and the tokens from there on."""
        rows, out = max(64, self.window // 2), []
        for start in range(offset, offset + q.shape[2], rows):
            stop = min(start + rows, offset + q.shape[2])
            cores, low = self.seen(stop - 1), self.seen(start) * self.group
            at = torch.arange(start, stop, device=q.device)[:, None]
            n = ((at + 1 - self.window).clamp_min(0) // self.group).expand(-1, 1)
            far = torch.arange(cores, device=q.device) < n
            place = torch.arange(low, stop, device=q.device)
            mask = torch.cat((far, (place >= n * self.group) & (place <= at)), 1)
            keys, values = (
                torch.cat((core[:, :, :cores], near[:, :, low - begin : stop - begin]), 2)
                for core, near in ((core_k, k), (core_v, v))
            )
            # Queries of a key-value head are rows of it: keys are not copied for them.
            run = q[:, :, start - offset : stop - offset].unflatten(1, (self.kv_heads, -1))
            heads = F.scaled_dot_product_attention(
                run.flatten(2, 3), keys, values, attn_mask=mask.repeat(run.shape[2], 1),
                dropout_p=self.dropout if self.training else 0.0,
            )  # fmt: skip
            out.append(heads.unflatten(2, run.shape[2:4]).flatten(1, 2))
        return torch.cat(out, 2)

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        """The weights `(B, H, N, N)` with which `forward(x)` mixes values, those inside cores too: small N."""
        self.refuse(context=context, **keywords)
        q, k, _ = self.qkv(x)
        units = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        return self._heads(q, k, units)
