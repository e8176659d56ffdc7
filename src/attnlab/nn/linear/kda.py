"""Kimi Delta Attention: a delta-rule memory in which every key channel forgets at its own pace."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.linear.short_conv import ShortConv
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads, split_heads
from attnlab.patterns import Pattern
from attnlab.scan import scan


class KDAState(NamedTuple):
    """What a KDA layer remembers: the last inputs of its convolution, and the memory `(B, H, D, Dv)`."""

    inputs: Tensor | None
    memory: Tensor
    owner: Owner = ()


def log_decay(f: Tensor, a_log: Tensor, bias: Tensor | None, lower_bound: float | None = None) -> Tensor:
    """The logarithm of the decay, ≤ 0, in at least float32: f `(…, H, D)`, a_log with H entries, bias with H·D.

    −exp(a_log) · softplus(f + bias); or lower_bound · σ(exp(a_log) · (f + bias)), which lies in (lower_bound, 0).
    """
    wide = torch.promote_types(f.dtype, torch.float32)
    rate = a_log.to(wide).exp().view(-1, 1)
    f = f.to(wide) if bias is None else f.to(wide) + bias.to(wide).view(len(rate), -1)
    return -rate * softplus(f) if lower_bound is None else lower_bound * (rate * f).sigmoid()


def unit(x: Tensor) -> Tensor:
    """x / √(Σ x² + 1e-6) over the last axis, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


@register(
    Card(
        name="kda",
        title="Kimi Linear: An Expressive, Efficient Attention Architecture",
        paper="2510.26692",
        system="kda",
        family="linear",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N",
        growth=1.0,
        state="heads * head_dim * value_dim + (taps - 1) * sum(widths)",
        sample=dict(heads=4),
    )
)
class KimiDeltaAttention(Mechanism):
    """A memory per head that is read, corrected and forgotten channel by channel; time linear in the length.

        q, k, v = silu(conv(Wqkv x)), q and k of unit length     β = σ(Wβ x)     g = −e^A · softplus(Wd₂ Wd₁ x + b) ≤ 0
        S ← diag(e^g) S,   S ← S + β k (v − Sᵀk)ᵀ,   o = D^-½ Sᵀq
        y = Wo · (RMSNorm(o) ⊙ σ(Wg₂ Wg₁ x))

    x `(B, N, C)` → `(B, N, C)`; in chunks while training (`scan`), one step at a time in decoding, with a state of
    H·D·Dv numbers whatever the length. Causal only. Source: arXiv 2510.26692.

    Args:
        dim: C.
        heads, head_dim: H and D, the width of q and k (C/H if None).
        key_heads: heads of q and k, which divides `heads`: each serves several value heads (H if None).
        value_dim: Dv (D if None).
        conv: taps of the short convolution; None for none. conv_bias: with a bias.
        rank: the width between the two maps of the decay and of the output gate (Dv if None).
        gate_bias: a bias in the output gate's second map.
        negative_eigenvalues: β in (0, 2), so that the state's transition may have eigenvalues in (−1, 1)
            (arXiv 2411.12537).
        lower_bound: the bounded decay g = lower_bound · σ(e^A · (Wd₂ Wd₁ x + b)); the authors advise −5.
    """

    causal_only = "its state runs along the tokens"

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        key_heads: int | None = None,
        value_dim: int | None = None,
        conv: int | None = 4,
        conv_bias: bool = False,
        rank: int | None = None,
        gate_bias: bool = False,
        negative_eigenvalues: bool = False,
        lower_bound: float | None = None,
        norm_eps: float = 1e-5,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        if lower_bound is not None and lower_bound >= 0:
            raise ValueError(f"lower_bound bounds a logarithm below 0, got {lower_bound}")
        if key_heads is not None and (key_heads < 1 or heads % key_heads):
            raise ValueError(f"key_heads must divide heads = {heads}, got {key_heads}")
        self.heads, self.key_heads = heads, key_heads or heads
        self.head_dim = check_heads(dim, heads, None, head_dim)[1]
        self.value_dim = value_dim or self.head_dim
        self.lower_bound = lower_bound
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        rank = rank or self.value_dim
        keys, values = self.key_heads * self.head_dim, heads * self.value_dim
        self.widths, self.taps = [keys, keys, values], conv or 1
        self.wqkv = nn.Linear(dim, 2 * keys + values, bias=False)
        self.conv = None if conv is None else ShortConv(2 * keys + values, conv, bias=conv_bias)
        self.wbeta = nn.Linear(dim, heads, bias=False)
        self.decay = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, heads * self.head_dim, bias=False))
        self.a_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        # softplus(dt_bias) is log-uniform in [0.001, 0.1]: at first most channels remember for long.
        dt = torch.empty(heads * self.head_dim).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + (-torch.expm1(-dt)).log())
        self.gate = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, values, bias=gate_bias))
        self.norm = nn.RMSNorm(self.value_dim, eps=norm_eps)
        self.wo = nn.Linear(values, dim, bias=False)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KDAState:
        weight = self.wo.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        memory = torch.zeros(
            batch, self.heads, self.head_dim, self.value_dim, device=device,
            dtype=torch.promote_types(dtype, torch.float32),
        )  # fmt: skip
        past = None if self.conv is None else self.conv.initial_state(batch, device=device, dtype=dtype)
        return KDAState(past, memory, self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: KDAState | None = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        past, memory = None, None
        if state is not None:
            self.check_state(state, KDAState, len(x))
            past, memory = state.inputs, state.memory
        mixed = self.wqkv(x)
        if self.conv is not None:
            mixed, past = self.conv(mixed, past)
        q, k, v = silu(mixed).split(self.widths, -1)
        q, k = (unit(split_heads(t, self.key_heads)) for t in (q, k))
        beta = self.beta_scale * self.wbeta(x).sigmoid().transpose(1, 2)
        decay = log_decay(self.decay(x).unflatten(-1, (self.heads, -1)), self.a_log, self.dt_bias, self.lower_bound)
        o, memory = scan(
            q, k, split_heads(v, self.heads), decay=decay.transpose(1, 2), beta=beta, scale=self.head_dim**-0.5,
            state=memory,
        )  # fmt: skip
        y = self.wo(join_heads(self.norm(o)) * self.gate(x).sigmoid())
        return y if state is None else (y, KDAState(past, memory, state.owner))
