"""ABC: attention over a bounded memory, into whose slots all keys and values are averaged."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.mechanism import check_keep, check_turns
from attnlab.nn.multihead import MultiHead

_CHUNK = 16  # tokens whose pairs are looked at for each slot: as many numbers as a state of 16 channels for each
_NEVER = -1e30  # a logit that weighs nothing, and whose differences are finite


class Memory(NamedTuple):
    """Slots of averaged keys and values `(B, H, r, D)`, and the logs of their weights' sums `(B, H, r)`."""

    keys: Tensor
    values: Tensor
    key_sums: Tensor
    value_sums: Tensor
    owner: Owner = ()
    length: int = 0


class Averages(NamedTuple):
    """Running averages of tokens x in slots, in chunks: `x̃_n = start · kept_n + Σ_{j ≤ n in the chunk} w_nj x_j`."""

    tokens: Tensor  # (B, H, chunks, c, D)
    shares: Tensor  # (B, H, chunks, n, j, r), the w
    kept: Tensor  # (B, H, chunks, n, r)
    starts: Tensor  # (B, H, chunks, r, D)
    last: Tensor  # (B, H, r, D), after all tokens
    sums: Tensor  # (B, H, r), likewise


def fading_by(exponents: Tensor) -> Tensor:
    """e to the power of each, which are ≤ 0 where they matter: where it would underflow CPUs are 100 times slower."""
    return exponents.clamp(-80, 0).exp()


def running_averages(x: Tensor, logits: Tensor, before: Tensor, sums: Tensor) -> Averages:
    """Averages of `x` (B, H, N, D) with weights exp(`logits`) (B, H, N, r), going on from `before` and its `sums`.

    Weights are exponentials of differences ≤ 0 throughout, so nothing overflows however far the logits drift.
    """
    tokens = x.shape[2]
    totals = torch.cat((sums.unsqueeze(2), logits), 2).logcumsumexp(2)
    after, missing = totals[:, :, -1], -tokens % _CHUNK
    x, logits = pad(x, (0, 0, 0, missing)), pad(logits, (0, 0, 0, missing), value=_NEVER)
    totals = torch.cat((totals, after.unsqueeze(2).expand(-1, -1, missing, -1)), 2)
    start, totals = totals[:, :, :-1:_CHUNK].unsqueeze(3), totals[:, :, 1:].unflatten(2, (-1, _CHUNK))
    x, logits = x.unflatten(2, (-1, _CHUNK)), logits.unflatten(2, (-1, _CHUNK))
    earlier = torch.ones(_CHUNK, _CHUNK, dtype=x.dtype, device=x.device).tril().unsqueeze(-1)
    shares = fading_by(logits.unsqueeze(-3) - totals.unsqueeze(-2)) * earlier
    kept = fading_by(start - totals)
    # Between chunks only r averages go on, one after another.
    fresh, lasting, starts = shares[..., -1, :, :].mT @ x, kept[..., -1, :].unsqueeze(-1), [before]
    for new, share in zip(fresh.unbind(2), lasting.unbind(2), strict=True):
        starts.append(starts[-1] * share + new)
    return Averages(x, shares, kept, torch.stack(starts[:-1], 2), starts[-1], after)


@register(
    Card(
        name="abc",
        title="ABC: Attention with Bounded-memory Control",
        paper="2110.02488",
        family="linear",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N r",
        growth=1.0,
        state="heads * slots * (2 * head_dim + 2)",
        sample=dict(heads=4, slots=16),
    )
)
class BoundedMemory(MultiHead):
    """Softmax attention over r slots, each a learned average of all keys and of all values.

        α = k C_k,  β = v C_v                                        logits (…, N, r); C_k and C_v (D, r) for all heads
        K̃ = softmax_N(α)ᵀ k,  Ṽ = softmax_N(β)ᵀ v                   the memory (…, r, D)
        y = Wo · softmax_r(q K̃ᵀ/√D) Ṽ

    x (B, N, C) → (B, N, C), O(N · C · r). Causal, the softmax over tokens becomes a running one:

        K̃_n = e^{A_{n−1} − A_n} K̃_{n−1} + e^{α_n − A_n} k_nᵀ        A_n = log Σ_{j ≤ n} e^{α_j}, slot by slot

    which is exact, O(N · C · (r + 16)), and streams with r averages of each. Source: arXiv 2110.02488, with logits of
    keys and values as in CAB's library (Shark-NLP/CAB).

    Args:
        slots: r. position: turns q and k, before the averages.
        variant: "paper", or "release": that library's causal form, which forgets the first term of the recurrence, so
            that token n sees nothing but its own key and value, shrunk by e^{α_n − A_n}. Both are the same otherwise.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        slots: int = 16,
        variant: Literal["paper", "release"] = "paper",
        bias: bool = True,
        causal: bool = False,
        position: Any = None,
    ) -> None:
        check_turns(position)
        super().__init__(dim, heads=heads, bias=bias, causal=causal, position=position)
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        self.slots, self.variant = slots, variant
        self.ck, self.cv = (nn.Parameter(torch.empty(self.head_dim, slots)) for _ in range(2))
        for compress in (self.ck, self.cv):
            nn.init.xavier_uniform_(compress, gain=2**-0.5)

    def initial_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Memory:
        if not self.causal:
            raise ValueError("streaming needs causal=True")
        dtype = torch.promote_types(dtype or self.ck.dtype, torch.float32)
        empty = torch.zeros(batch, self.heads, self.slots, self.head_dim, dtype=dtype, device=device or self.ck.device)
        sums = torch.full_like(empty[..., 0], _NEVER)
        return Memory(empty, empty, sums, sums, self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
        keep: Tensor | None = None,
    ) -> Any:
        """As every mechanism; `keep` (B, M) is False where a token of the context is padding, which nothing sees."""
        self.check(x, context)
        self.refuse(pattern=pattern)
        if state is not None:
            self.refuse(context=context)
            if not self.causal:
                raise ValueError("streaming needs causal=True")
            self.check_state(state, Memory, len(x))
        offset = 0 if state is None else state.length
        q, k, v = self.project(x, context, offset, grid=grid if self.on_grid else None)
        q, alpha, beta = q * self.head_dim**-0.5, k @ self.ck, v @ self.cv
        if keep is not None:
            real = check_keep(keep, k)
            alpha, beta = (logits.masked_fill(~real, _NEVER) for logits in (alpha, beta))
            k, v = k * real, v * real  # while nothing but padding has been seen, the average is of nothing
        if not self.causal:
            slots_k, slots_v = alpha.softmax(2).mT @ k, beta.softmax(2).mT @ v
            return self.merge((q @ slots_k.mT).softmax(-1) @ slots_v)
        if missing := q.shape[2] - k.shape[2]:  # query i sees the context up to i: cut it, or add nothing
            k, v = (pad(t, (0, 0, 0, missing)) for t in (k, v))
            alpha, beta = (pad(t, (0, 0, 0, missing), value=_NEVER) for t in (alpha, beta))
        heads, after = self.recall(q, k, v, alpha, beta, state or self.initial_state(len(x), device=x.device))
        y = self.merge(heads.to(x.dtype))
        return y if state is None else (y, after)

    def recall(
        self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, before: Memory
    ) -> tuple[Tensor, Memory]:
        """Heads of tokens that each read the memory of those so far, and the memory after the last."""
        q, k, v, alpha, beta = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v, alpha, beta))
        keys, values, key_sums, value_sums = (t.to(q) for t in before[:4])
        if self.variant == "release":
            a, b = (
                torch.cat((sums.unsqueeze(2), logits), 2).logcumsumexp(2)[:, :, 1:]
                for sums, logits in ((key_sums, alpha), (value_sums, beta))
            )
            weights = ((q * k).sum(-1, keepdim=True) * fading_by(alpha - a)).softmax(-1)
            heads = (weights * fading_by(beta - b)).sum(-1, keepdim=True) * v
            return heads, Memory(keys, values, a[:, :, -1], b[:, :, -1], before.owner, before.length + q.shape[2])
        tokens = q.shape[2]
        mk, mv = running_averages(k, alpha, keys, key_sums), running_averages(v, beta, values, value_sums)
        q = pad(q, (0, 0, 0, -tokens % _CHUNK)).unflatten(2, (-1, _CHUNK))
        pairs = q @ mk.tokens.mT  # (…, n, j)
        scores = (pairs.unsqueeze(-2) @ mk.shares).squeeze(-2) + mk.kept * (q @ mk.starts.mT)
        weights = scores.softmax(-1)
        near = (mv.shares @ weights.unsqueeze(-1)).squeeze(-1)  # (…, n, j)
        heads = near @ mv.tokens + (weights * mv.kept) @ mv.starts
        after = Memory(mk.last, mv.last, mk.sums, mv.sums, before.owner, before.length + tokens)
        return heads.flatten(2, 3)[:, :, :tokens], after
