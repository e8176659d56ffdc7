"""Attention of complex vectors: each head scales and turns angle differences in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from attnlab.attend import attend
from attnlab.cards import ALL_FOUR, ANY_LENGTH, EXACT, STREAMING, TOKENS, Card, register
from attnlab.nn.multihead import MultiHead

_EPS = 1e-12  # under the root of a magnitude, whose gradient has no limit at zero


def _without_places(dim: int, grid: tuple[int, ...]) -> ComplexAttention:
    module = ComplexAttention(dim, heads=4)
    nn.init.zeros_(module.frequency)
    return module


@register(
    Card(
        name="complexformer",
        title="ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector "
        "Attention",
        paper="2505.10222",
        system="complexformer",
        family="softmax",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | EXACT,
        cost="N²",
        growth=2.0,
        state="2 * kv_heads * head_dim * N",
        sample=dict(heads=4),
        limit=_without_places,
    )
)
class ComplexAttention(MultiHead):
    """Softmax attention whose scores mix differences of content angle and of place, each head in its own way.

        q_c = ρ e^{iθ} of each pair of channels, k likewise
        s_mn = 1/√D Σ_c ρ^q_mc ρ^k_nc cos(s_hc (θ^q_mc − θ^k_nc) + t_hc + (m − n) ω_hc)
        y = Wo softmax(s) v

    x (B, N, C) → (B, N, C); s, t and ω are learned, 3·H·D/2 numbers, and begin as 1, 0 and RoPE's frequencies, where
    this is rotary attention. The cosine of a sum separates, so q and k are turned before a plain dot product: cost
    O(N²) as usual, no tensor of N²·D, and a cache of turned keys. Other `adapt` than "mlp" see the angle's jump at ±π
    as soon as s is no integer. With ω = 0 there are no places and it is plain attention.
    Source: arXiv 2505.10222, of which only the abstract can still be read (withdrawn in its second version, no code):
    every concrete choice here is an assumption, the defaults of `adapt`, `delta` and `layout` among them.

    Args:
        adapt: how content angles count. "affine": s and t per head and component; "scale": s alone; "head": one s and t
            per head; "mlp": AS + a small network of AS per head, 1 → 8 → 1, on the difference wrapped to ±π, which
            does need N²·D/2 numbers (small N only).
        delta: how places count. "learned": ω per head and component; "fixed": RoPE's; "scaled": RoPE's times e^g, one
            g per head.
        layout: pairs are "interleaved", (2c, 2c + 1), or "half", (c, c + D/2).
        base: of RoPE's frequencies.
        Others as for `MultiHead`, but no `position`: places enter through `delta`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        adapt: Literal["affine", "scale", "head", "mlp"] = "affine",
        delta: Literal["learned", "fixed", "scaled"] = "learned",
        layout: Literal["interleaved", "half"] = "interleaved",
        base: float = 10000.0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
        out_bias: bool | None = None,
    ) -> None:
        super().__init__(
            dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, causal=causal, qk_norm=qk_norm,
            dropout=dropout, out_bias=out_bias,
        )  # fmt: skip
        for name, given, known in (
            ("adapt", adapt, ("affine", "scale", "head", "mlp")),
            ("delta", delta, ("learned", "fixed", "scaled")),
            ("layout", layout, ("interleaved", "half")),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.kv_heads != heads:
            raise ValueError(f"kv_heads must be heads = {heads}: each head turns keys its own way, got {self.kv_heads}")
        self.adapt, self.delta, self.layout, pairs = adapt, delta, layout, self.head_dim // 2
        if base <= 0:
            raise ValueError(f"base must be positive, got {base}")
        with torch.device("cpu"):  # plain numbers even where a model is laid out on the meta device
            self._rope = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        if delta == "learned":
            self.frequency = nn.Parameter(self._rope.float().repeat(heads, 1))
        elif delta == "scaled":
            self.frequency_log = nn.Parameter(torch.zeros(heads, 1))
        components = 1 if adapt == "head" else pairs
        if adapt == "mlp":
            self.mlp_in = nn.Parameter(torch.randn(2, heads, 8))  # weights and biases
            self.mlp_out = nn.Parameter(torch.zeros(heads, 8))
            self.mlp_shift = nn.Parameter(torch.zeros(heads))
        else:
            self.angle_scale = nn.Parameter(torch.ones(heads, 1, components))
            self.angle_shift = nn.Parameter(torch.zeros(heads, 1, components)) if adapt != "scale" else None

    def frequencies(self, device: torch.device) -> Tensor:
        """ω `(H or 1, D/2)`, in float64."""
        if self.delta == "learned":
            return self.frequency.double()
        rope = self._rope.to(device)
        return rope[None] if self.delta == "fixed" else self.frequency_log.double().exp() * rope

    def places(self, start: int, n: int, device: torch.device) -> Tensor:
        """n·ω for positions from `start` on, `(H or 1, n, D/2)`: whole turns taken out, so that float32 will do."""
        at = torch.arange(start, start + n, device=device, dtype=torch.float64)
        return (at[:, None] * self.frequencies(device)[:, None]).remainder(2 * torch.pi)

    def polar(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Magnitudes and angles `(B, H, N, D/2)` of heads `(B, H, N, D)`, in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if self.layout == "interleaved" else x.chunk(2, -1)
        square = a * a + b * b
        # The angle of nothing is 0, with no gradient rather than an infinite one.
        nothing = square < _EPS * _EPS
        angle = torch.atan2(b.masked_fill(nothing, 0.0), a.masked_fill(nothing, 1.0))
        return (square + _EPS).sqrt(), angle

    def turn(self, x: Tensor, places: Tensor, shift: Tensor | None = None) -> Tensor:
        """Heads `(B, H, N, D)` with each pair ρ e^{iθ} made ρ e^{i(sθ + places + shift)}."""
        magnitude, angle = self.polar(x)
        places = places if shift is None else places + shift
        angle = torch.addcmul(places.to(angle.dtype), angle, self.angle_scale.to(angle.dtype))
        pair = (magnitude * angle.cos(), magnitude * angle.sin())
        y = torch.stack(pair, -1).flatten(-2) if self.layout == "interleaved" else torch.cat(pair, -1)
        return y.to(x.dtype)

    def project(
        self, x: Tensor, context: Tensor | None = None, offset: int = 0, *, grid: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x, context)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.adapt == "mlp":
            return q, k, v
        places = self.places(offset, max(q.shape[2], k.shape[2]), x.device)
        return self.turn(q, places[:, : q.shape[2]], self.angle_shift), self.turn(k, places[:, : k.shape[2]]), v

    def pair_scores(self, q: Tensor, k: Tensor, offset: int) -> Tensor:
        """Scores `(B, H, Nq, Nk)` with the angle differences written out: what "mlp" is, and N²·D/2 numbers."""
        (r, a), (s, b) = self.polar(q), self.polar(k)
        difference = a[:, :, :, None] - b[:, :, None]
        wrapped = (difference + torch.pi).remainder(2 * torch.pi) - torch.pi
        weight, bias = self.mlp_in.to(wrapped.dtype)[:, :, None, None, None]
        inner = gelu(wrapped[..., None] * weight + bias)
        adapted = wrapped + torch.einsum("bhmncj,hj->bhmnc", inner, self.mlp_out.to(inner.dtype))
        adapted = adapted + self.mlp_shift.to(inner.dtype).view(-1, 1, 1, 1)
        m, n = self.places(offset, q.shape[2], q.device), self.places(0, k.shape[2], q.device)
        angle = adapted + (m[:, :, None] - n[:, None]).to(adapted.dtype)
        scores = torch.einsum("bhmc,bhnc,bhmnc->bhmn", r, s, angle.cos())
        return (self.head_dim**-0.5 * scores).to(q.dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        if self.adapt != "mlp":
            return super().mix(q, k, v, **keywords)
        scores, dropout = self.pair_scores(q, k, keywords.get("offset", 0)), self.dropout if self.training else 0.0
        # The scores stand as a bias beside a product of zeros.
        q, k = q.new_zeros(*q.shape[:3], 1), k.new_zeros(*k.shape[:3], 1)
        return attend(q, k, v, pattern=keywords.get("pattern"), bias=scores, dropout=dropout)
