"""One attention call of any model, as those who watch and edit it see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.patterns import Causal, Pattern
from attnlab.problem import Bias
from attnlab.weightings import SOFTMAX, Weighting


@dataclass(eq=False)
class Event:
    """A call: who made it, on what, and how it is computed as it stands now.

    Everything under "what" may be replaced before the call is computed; then `run` computes what is there.

    Attributes:
        name: the module that made the call, "blocks.3.attn"; `module` is the module itself.
        layer: its place among the modules that attend, in the order of their first calls.
        index: which call of the module within the pass; step: which pass over the model since it is watched
            (generating, a step); recomputed: whether gradient checkpointing makes the call again.
        source: "sdpa", "multi_head_attention_forward", "attend" or "scan": the function that was called.
        kind: "self" or "cross".
        q, k, v: `(B, H, Nq, D)`, `(B, Hkv, Nk, D)`, `(B, Hkv, Nk, Dv)`; Hkv divides H, and key head j serves the query
            heads j·H/Hkv onwards, also where the model repeated its key heads.
        mask: bool (True may look) or float (added to the scores), broadcastable to `(B, H, Nq, Nk)`.
        pattern, bias, weighting, route: as `attend` takes them. `decay`, `beta`, `state`: as `scan` does.
    """

    name: str
    module: nn.Module
    source: str
    kind: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    layer: int = 0
    index: int = 0
    step: int = 0
    recomputed: bool = False
    mask: Tensor | None = None
    is_causal: bool = False  # torch's own flag: query i sees the keys up to i
    pattern: Pattern | None = None
    route: Any = None
    bias: Bias | None = None
    weighting: Weighting = SOFTMAX
    dropout: float = 0.0
    decay: Tensor | None = None
    beta: Tensor | None = None
    state: Tensor | None = None
    native: Callable[[], Tensor] | None = field(default=None, repr=False)  # the call as the model made it
    computed: Tensor | None = field(default=None, repr=False)  # its weights, where they have been computed and edited
    lse: Tensor | None = field(default=None, repr=False)  # of its scores `(B, H, Nq)`, where those were edited
    last: Tensor | None = field(default=None, repr=False)  # a scan's last state, from who computed it instead

    def __post_init__(self) -> None:
        self._given = self._what()

    def _what(self) -> tuple[Any, ...]:
        return (
            *(self.q, self.k, self.v, self.mask, self.is_causal, self.pattern, self.route, self.bias),
            *(self.weighting, self.scale, self.dropout),
        )

    @property
    def changed(self) -> bool:
        """Whether anything of what is attended has been replaced."""
        return any(a is not b for a, b in zip(self._what(), self._given, strict=True))

    def stands(self, native: Callable[[], Tensor]) -> None:
        """Say that the call is now as it stands, and that `native` is a faster way to compute just that."""
        self.native = native
        self._given = self._what()

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def offset(self) -> int:
        """The position of the first query: with a cache, the keys that were there before."""
        nq, nk = self.q.shape[2], self.k.shape[2]
        if self.kind != "self" or self.is_causal or nk <= nq:
            return 0
        if self.mask is not None and self.mask.shape[-1] == nk:
            # A cache of fixed length has places that are not written yet, where nobody may look.
            seen = self.mask if self.mask.dtype is torch.bool else _open(self.mask)
            written = seen.reshape(-1, nk).any(0).nonzero()
            nk = int(written[-1]) + 1 if len(written) else nk
        return max(nk - nq, 0)

    @property
    def causal(self) -> bool:
        """Whether no query looks past its own position. Takes the whole mask into hand where there is one."""
        if self.is_causal or self.source == "scan":
            return True
        seen = self.allowed()
        nq, nk = self.q.shape[2], self.k.shape[2]
        later = torch.arange(nk, device=seen.device) > torch.arange(nq, device=seen.device)[:, None] + self.offset
        return not bool((seen & later).any())

    def allowed(self) -> Tensor:
        """Where a query may look: bool, broadcastable to `(B, H, Nq, Nk)`."""
        nq, nk, device = self.q.shape[2], self.k.shape[2], self.q.device
        seen = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
        if self.is_causal:
            seen = seen & torch.ones(nq, nk, dtype=torch.bool, device=device).tril()
        if self.source == "scan":
            seen = seen & torch.ones(nq, nk, dtype=torch.bool, device=device).tril(nk - nq)
        if self.mask is not None:
            mask = (
                self.mask if self.mask.dim() == 4 else self.mask.reshape((1,) * (4 - self.mask.dim()) + self.mask.shape)
            )
            seen = seen & (mask if mask.dtype is torch.bool else _open(mask))
        pattern = self.pattern
        if self.route is not None:
            chosen = self.route.select(self.q, self.k)
            pattern = chosen if pattern is None else chosen & pattern
        if pattern is not None:
            batch, heads = len(self.q) if pattern.per_batch else 1, self.heads if pattern.per_head else 1
            seen = seen & pattern.matrix(nq, nk, batch=batch, heads=heads, device=device)
        return seen

    def scores(self) -> Tensor:
        """`(B, H, Nq, Nk)`: scaled, biased, −∞ where a query may not look."""
        if self.source == "scan":
            raise ValueError(f"{self.name} keeps a running state: it has weights, but no scores")
        q, k = self._wide()
        scores = (q.unflatten(1, (self.kv_heads, -1)) * self.scale @ k[:, :, None].mT).flatten(1, 2)
        if self.mask is not None and self.mask.dtype is not torch.bool:
            scores = scores + self.mask.to(scores.dtype)
        if self.bias is not None:
            scores = scores + (self.bias if isinstance(self.bias, Tensor) else self._looked_up(self.bias)).to(scores)
        return scores.masked_fill(~self.allowed(), -math.inf)

    def _looked_up(self, bias: Callable[..., Tensor]) -> Tensor:
        at = (
            torch.arange(n, device=self.q.device) for n in (len(self.q), self.heads, self.q.shape[2], self.k.shape[2])
        )
        b, h, i, j = at
        return bias(b.view(-1, 1, 1, 1), h.view(-1, 1, 1), i.view(-1, 1), j)

    def _wide(self) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.q.dtype, torch.float32)
        return self.q.to(wide), self.k.to(wide)

    def weigh(self, scores: Tensor) -> Tensor:
        """The weights of `scores`, zeros in the row of a query that sees no key."""
        return self.weighting.weights(scores, scores > -math.inf, scores.shape[-1])

    def weights(self) -> Tensor:
        """`(B, H, Nq, Nk)`: how much each query takes of each key's value; as edited, once it has been.

        Of a running state, the matrix that it stands for: what comes out when the values are the unit vectors.
        """
        if self.computed is not None:
            return self.computed
        if self.source != "scan":
            return self.weigh(self.scores())
        if self.state is not None:
            raise ValueError(f"{self.name} starts from a state of earlier tokens: its weights on them are not known")
        from attnlab.scan import scan

        units = torch.eye(self.k.shape[2], dtype=self.v.dtype, device=self.v.device)
        units = units.expand(*self.v.shape[:2], -1, -1)
        return scan(self.q, self.k, units, decay=self.decay, beta=self.beta, scale=self.scale)[0]

    def mix(self, weights: Tensor) -> Tensor:
        """The per-head outputs `(B, H, Nq, Dv)` of `weights`."""
        if self.dropout:
            weights = F.dropout(weights, self.dropout)
        v = (
            self.v
            if self.v.shape[1] == weights.shape[1]
            else self.v.repeat_interleave(weights.shape[1] // self.v.shape[1], 1)
        )
        return weights.to(v.dtype) @ v

    def run(self) -> Tensor:
        """Per-head outputs `(B, H, Nq, Dv)` of the call as it stands, by a fused kernel where there is one."""
        if self.native is not None and not self.changed:
            return self.native()
        if self.source == "scan":
            from attnlab.scan import scan

            return scan(
                self.q, self.k, self.v, decay=self.decay, beta=self.beta, scale=self.scale, state=self.state
            )[0]  # fmt: skip
        if self.pattern is None and self.route is None and self.bias is None and self.weighting == SOFTMAX:
            return F.scaled_dot_product_attention(
                self.q, self.k, self.v, attn_mask=self.mask, dropout_p=self.dropout, is_causal=self.is_causal,
                scale=self.scale, enable_gqa=self.heads != self.kv_heads,
            )  # fmt: skip
        pattern, bias = self.pattern, self.bias
        if self.is_causal:
            pattern = Causal() if pattern is None else pattern & Causal()
        if self.mask is not None:
            mask = self.mask
            if mask.dtype is torch.bool:
                mask = torch.zeros_like(mask, dtype=self.q.dtype).masked_fill(~mask, -math.inf)
            bias = mask if bias is None else mask + (bias if isinstance(bias, Tensor) else self._looked_up(bias))
        return attend(
            self.q, self.k, self.v, pattern=pattern, route=self.route, weighting=self.weighting, bias=bias,
            scale=self.scale, dropout=self.dropout,
        )  # fmt: skip


def _open(mask: Tensor) -> Tensor:
    """Where a float mask lets a query look: its lowest numbers mean no, unless a whole row of them says nothing."""
    shut = mask <= torch.finfo(mask.dtype).min / 2
    return ~shut | (shut.all(-1, keepdim=True) & (mask != -math.inf))
