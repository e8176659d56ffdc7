"""Affine-scaled attention: softmax weights scaled by a factor of the query, with a share spread evenly."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from attnlab.attend import attend
from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache, Owner
from attnlab.nn.mechanism import split_heads
from attnlab.nn.softmax.gated import GatedAttention
from attnlab.patterns import Causal, Pattern, Shifted


class SummingCache(KVCache):
    """A KV cache that also keeps the sum of all values, so that their mean costs nothing to know."""

    def __init__(self, owner: Owner = ()) -> None:
        super().__init__(owner=owner)
        self.before: Tensor | None = None  # sum of the values before the last piece, (B, Hkv, 1, D)
        self._total: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().append(k, v)
        self.before = torch.zeros_like(v[:, :, :1], dtype=_wide(v)) if self._total is None else self._total
        self._total = self.before + v.sum(2, keepdim=True, dtype=_wide(v))
        return keys, values


@register(
    Card(
        name="affine",
        title="Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention",
        paper="2602.23057",
        system="affine_attn",
        family="softmax",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N²",
        growth=2.0,
        state="2 * kv_heads * head_dim * (N + 1)",
        sample=dict(heads=4, kv_heads=2),
    )
)
class AffineScaledAttention(GatedAttention):
    """Softmax attention of which each query may take less, the rest being spread evenly over what it sees.

        O_i = α_i Σ_j P_ij v_j + (ᾱ − α_i) · mean_j v_j        α_i = φ(Wα x_i) per head, φ(s) = clip(s/10 + ½, 0, 1)

    x (B, N, C) → (B, N, C). ᾱ is a moving average of α over training, so the weights of a query sum to ᾱ, not to one,
    and single weights may be negative. A mild alternative to attention sinks and output gates, for C·H more weights.
    Cost O(N²); the mean is a running sum of values, so kernel and decoding stay as they are. Source: arXiv 2602.23057.

    The paper leaves open, and this class assumes: Wα is zero at first; ᾱ is one number per head; a step uses the ᾱ
    before its own update; under a mask the mean is over the keys that the query sees (`count="visible"`).

    Args:
        act: φ, "clip" or "sigmoid".
        rate: ρ of ᾱ ← ρ ᾱ + (1 − ρ) mean(α), in training only (averaged over all processes of a process group).
        scope: one ᾱ per "head" or one for the "layer".
        start: ᾱ at first: 0 as in the paper (outputs are small early on), or 0.5.
        count: N of the paper's β = (ᾱ − α)/N: the "visible" keys of each query, or all "keys" of the call (the formula
            to the letter: a row then sums to α(1 − Nᵢ/N) + ᾱ Nᵢ/N, and pieces cannot equal the whole).
        gate: also gate the heads, as `GatedAttention` does ("gated + affine").
    """

    def __init__(
        self,
        dim: int,
        *,
        act: Literal["clip", "sigmoid"] = "clip",
        rate: float = 0.9,
        scope: Literal["head", "layer"] = "head",
        start: float = 0.0,
        count: Literal["visible", "keys"] = "visible",
        gate: Literal["head", "element"] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(dim, gate=gate, **keywords)
        for name, given, known in (
            ("act", act, ("clip", "sigmoid")),
            ("scope", scope, ("head", "layer")),
            ("count", count, ("visible", "keys")),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must lie in [0, 1], got {rate}")
        self.act, self.rate, self.count = act, rate, count
        self.wa = nn.Linear(dim, self.heads, bias=False)
        nn.init.zeros_(self.wa.weight)
        self.average: Tensor
        self.register_buffer("average", torch.full((self.heads if scope == "head" else 1, 1, 1), float(start)))

    def alpha(self, x: Tensor) -> Tensor:
        """The factor of each query, `(B, H, N, 1)`."""
        score = split_heads(self.wa(x), self.heads)
        return (0.1 * score + 0.5).clamp(0, 1) if self.act == "clip" else score.sigmoid()

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
        alpha = self.alpha(x)
        mean, seen = self.mean(q, k, v, pattern, offset, state)
        rest = self.average.to(alpha.dtype) - alpha
        if self.count == "keys":
            rest = rest * (seen / k.shape[2]).to(alpha.dtype)
        mean = mean.repeat_interleave(self.heads // mean.shape[1], 1)
        return alpha * super().mix(q, k, v, x=x, pattern=pattern, offset=offset, state=state) + rest * mean

    def mean(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None, offset: int, state: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """Mean value that each query sees, `(B, H or Hkv, N or 1, D)`, and of how many keys."""
        new = v[:, :, offset:]
        before = state.before if isinstance(state, SummingCache) else None
        if pattern is None and (before is None or q.shape[2] == 1):
            total = new.sum(2, keepdim=True, dtype=_wide(v)) if before is None else before + new
            return (total / k.shape[2]).to(v.dtype), torch.tensor(k.shape[2], device=v.device)
        plain = pattern.pattern if isinstance(pattern, Shifted) else pattern
        if isinstance(plain, Causal) and (before is not None or offset == 0):
            seen = torch.arange(offset + 1, offset + 1 + q.shape[2], device=v.device).clamp_max(k.shape[2])[:, None]
            total = new.cumsum(2, dtype=_wide(v))
            if total.shape[2] != q.shape[2]:  # cross-attention to a context of another length
                total = total[:, :, seen[:, 0] - 1]
            return ((total if before is None else before + total) / seen).to(v.dtype), seen
        # Softmax of equal scores is the mean over whatever the pattern allows, and its log-sum-exp the log of how many.
        mean, lse = attend(torch.zeros_like(q), k, v, pattern=pattern, return_lse=True)
        return mean, lse.exp().round()[..., None]

    def after(self, heads: Tensor, x: Tensor) -> Tensor:
        if self.training:
            self.update(x)
        return super().after(heads, x)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move ᾱ towards the mean of α over `x`."""
        mean = self.alpha(x).mean(dim=(0, 2), keepdim=True)[0].to(self.average.dtype)
        if len(self.average) == 1:
            mean = mean.mean(0, keepdim=True)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(mean)
            mean /= distributed.get_world_size()
        self.average.lerp_(mean, 1.0 - self.rate)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        super().initial_state(batch, device=device, dtype=dtype)
        if self.count == "keys":
            raise ValueError("streaming needs count='visible': the number of keys of a call changes with its pieces")
        return SummingCache(self.owner(batch))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32
