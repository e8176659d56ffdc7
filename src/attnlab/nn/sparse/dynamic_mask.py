"""Dynamic-mask attention: values say how much a key matters, and a query sees those that matter most so far."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern


class Kept(NamedTuple):
    """The keys that are still seen after `length` tokens, at most w: a key that fell out never comes back."""

    k: Tensor  # (B, Hkv, n, D)
    v: Tensor  # (B, Hkv, n, D)
    bias: Tensor  # (B, Hkv, n)
    length: int
    owner: Owner = ()


@register(
    Card(
        name="dynamic_mask",
        title="Trainable Dynamic Mask Sparse Attention",
        paper="2508.02124",
        system="dma",
        family="sparse",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N·w",
        growth=1.0,
        state="kv_heads * (2 * head_dim + 1) * min(N, keep)",
        sample=dict(heads=4, kv_heads=2, keep=6),
    )
)
class DynamicMask(MultiHead):
    """Causal attention in which each key-value head keeps the w keys of the largest bias, which their values give.

        δ = exp(A ⊙ softplus(Wdt v))        v of all key-value heads, δ one number per key and key-value head
        y_i = Wo · softmax(q_i·k_j/√d + δ_j) v_j        over the w keys j ≤ i of the largest δ_j (of equals the later)

    x (B, N, C) → the same. δ is trained through the keys that are kept. With A = 0, as at first, all keys are alike and
    this is a sliding window; with w ≥ N then, causal attention. Since a key that falls out of the best w so far never
    returns, the text is walked in runs of queries that see w kept keys and their own run: O(N·w) time where the
    authors' code makes an N×N mask, and decoding keeps w keys however long the text. Source: arXiv 2508.02124
    (transformers' `doge`; SmallDoges/flash-dmattn).

    Args:
        keep: w.
        variant: "release" chooses among equal biases (equal tokens in a first layer) as transformers' code does on this
            machine, by an N×N mask; it streams as "paper" does.
        exponential: False leaves out exp, as the authors' later kernels do: weights of one do not fit the other.
        qk_norm: RMS norms if None.
        Others as for `MultiHead`.
    """

    causal_only = "what is kept is chosen among the keys so far"

    def __init__(
        self,
        dim: int,
        *,
        keep: int = 2048,
        variant: Literal["paper", "release"] = "paper",
        exponential: bool = True,
        causal: bool = True,
        qk_norm: Any = None,
        **keywords: Any,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        super().__init__(dim, causal=causal, qk_norm=qk_norm or partial(nn.RMSNorm, eps=1e-6), **keywords)
        self.keep, self.variant, self.exponential = keep, variant, exponential
        self.wdt = nn.Linear(self.kv_heads * self.head_dim, self.kv_heads, bias=self.wqkv.bias is not None)
        self.rate = nn.Parameter(torch.zeros(self.kv_heads))  # A

    def key_bias(self, v: Tensor) -> Tensor:
        """δ `(B, Hkv, N)` of values `(B, Hkv, N, D)`."""
        scaled = self.rate * F.softplus(self.wdt(v.transpose(1, 2).flatten(2)))
        return (scaled.exp() if self.exponential else scaled).transpose(1, 2)

    def initial_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Kept:
        """Nothing kept yet. The state grows to w keys and values per head, and no further."""
        none = self.wqkv.weight.new_empty(batch, self.kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        return Kept(none, none, none[..., 0:0].sum(-1), 0, self.owner(batch))

    def walk(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Kept | None = None) -> tuple[Tensor, Kept]:
        """Heads `(B, H, N, D)` of the next N tokens, whose keys have `bias (B, Hkv, N)`, and what is then kept."""
        if kept is None:
            kept = Kept(k[:, :, :0], v[:, :, :0], bias[:, :, :0], 0)
        out = []
        # Runs long enough that little of what is computed is beyond the w keys, and short enough for the same.
        runs = (t.split(max(64, self.keep // 2), 2) for t in (q, k, v, bias))
        for q, k, v, bias in zip(*runs, strict=True):
            heads, kept = self._run(q, k, v, bias, kept)
            out.append(heads)
        return torch.cat(out, 2), kept

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """All N tokens at once, by an N×N mask and torch's own choice among equal biases."""
        n = q.shape[2]
        seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        return self._attend(q, k, v, bias, top_mask(bias.unsqueeze(2).expand(-1, -1, n, -1), seen, self.keep))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        mask = bias.unsqueeze(2).masked_fill(~seen, -math.inf)
        groups = q.shape[1] // k.shape[1]
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask.repeat_interleave(groups, 1) if groups > 1 else mask,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=groups > 1,
        )

    def _run(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        rows, old = q.shape[2], kept.k.shape[2]
        k, v, bias = (torch.cat(pair, 2) for pair in ((kept.k, k), (kept.v, v), (kept.bias, bias)))
        seen = torch.ones(rows, old + rows, dtype=torch.bool, device=q.device).tril(old)
        if old + rows > self.keep:
            # In order of their bias, later keys first among equals, a row keeps the first w that it may see.
            latest = (old + rows - 1) - bias.detach().flip(-1).sort(dim=-1, descending=True, stable=True).indices
            ordered = seen[:, latest].movedim(0, 2)  # (B, Hkv, rows, keys)
            ordered = ordered & (ordered.cumsum(-1) <= self.keep)
            seen = torch.zeros_like(ordered).scatter(-1, latest.unsqueeze(2).expand_as(ordered), ordered)
        heads = self._attend(q, k, v, bias, seen)
        length = kept.length + rows
        if old + rows <= self.keep:
            return heads, Kept(k, v, bias, length, kept.owner)
        last = latest[:, :, : self.keep].sort(-1).values
        k, v = (t.gather(2, last.unsqueeze(-1).expand(-1, -1, -1, t.shape[-1])) for t in (k, v))
        return heads, Kept(k, v, bias.gather(2, last), length, kept.owner)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Kept | None = None,  # type: ignore[override]
    ) -> Any:
        self.refuse(context=context, pattern=pattern, grid=grid)
        self.check(x)
        if state is not None:
            self.check_state(state, Kept, len(x))
        offset = 0 if state is None else state.length
        q, k, v = self.project(x, None, offset)
        if self.position_bias(q, k, offset) is not None:
            raise ValueError(f"position must turn queries and keys, got {type(self.position).__name__}, a bias")
        if state is None:
            return self.merge(self._heads(q, k, v, self.key_bias(v)))
        heads, kept = self.walk(q, k, v, self.key_bias(v), state)
        return self.merge(heads), kept

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        whole = self.variant == "release" and q.shape[2] > self.keep
        return self._whole(q, k, v, bias) if whole else self.walk(q, k, v, bias)[0]

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        """The weights `(B, H, N, N)` with which `forward(x)` mixes values: to look at, small N."""
        self.refuse(context=context, **keywords)
        q, k, v = self.project(x)
        units = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        return self._heads(q, k, units, self.key_bias(v))


def top_indices(key_bias: Tensor, keep: int) -> Tensor:
    """The places of the `keep` largest of `key_bias (…, Nk)`, in ascending order: one choice for all queries."""
    return key_bias.detach().topk(keep, -1).indices.sort(-1).values


def top_mask(bias: Tensor, seen: Tensor | None, keep: int, block: int = 1) -> Tensor:
    """Where each row of `bias (…, Nk)` has its `keep` largest entries, of those that the bool `seen` allows."""
    bias = bias.detach()
    bias = bias if seen is None else bias.masked_fill(~seen, -math.inf)
    found = bias.topk(keep, -1)
    mask = torch.zeros_like(bias, dtype=torch.bool).scatter(-1, found.indices, found.values != -math.inf)
    return smooth(mask, block)


def positive_mask(bias: Tensor, seen: Tensor | None, block: int = 1) -> Tensor:
    """Where `bias (…, Nk)` is positive, of what the bool `seen` allows."""
    mask = bias.detach() > 0
    return smooth(mask if seen is None else mask & seen, block)


def smooth(mask: Tensor, block: int) -> Tensor:
    """A bool mask `(…, Nk)` made whole: blocks of keys of which more than half is seen are seen, others not.

    The last block may be short.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if block == 1:
        return mask
    parts = [(2 * part.sum(-1, keepdim=True) > part.shape[-1]).expand_as(part) for part in mask.split(block, -1)]
    return torch.cat(parts, -1)
