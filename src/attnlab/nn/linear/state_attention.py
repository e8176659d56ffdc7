"""The linear attentions of Linear-Llama3: a state without a normaliser, whose outputs are normed head by head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, logsigmoid

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads, split_heads
from attnlab.patterns import Pattern
from attnlab.positions import Position
from attnlab.scan import scan

KINDS = ("basic", "lightning", "retention", "gla", "based", "rebased")


class Memory(NamedTuple):
    """How many tokens there were, and the state `(B, H, rows, D)`."""

    length: int
    state: Tensor
    owner: Owner = ()


@register(
    Card(
        name="state_attention",
        title="LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid",
        paper="2502.07563",
        family="linear",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N",
        growth=1.0,
        state="heads * rows * head_dim",
        sample=dict(heads=4),
    )
)
class StateAttention(Mechanism):
    """Linear attention whose outputs are normed instead of divided by the sum of their weights; six kinds of it.

        S ← e^g ⊙ S + φ(k) vᵀ,   o = Sᵀ φ(q),   y = Wo · RMSNorm(o), each head by itself

    | kind        | φ(x)                              | g                                                     |
    |-------------|-----------------------------------|-------------------------------------------------------|
    | "basic"     | elu(x) + 1                        | 0 (2006.16236)                                        |
    | "lightning" | elu(x) + 1                        | −8h/H for head h, fixed (2401.04658)                  |
    | "retention" | x, turned; D^-½ in q              | log(1 − 2^(−5−h)), fixed (2307.08621)                 |
    | "gla"       | x; D^-½ in q                      | logσ(W₂ W₁ x)/16 for each channel (2312.06635)        |
    | "based"     | 1, x, xxᵀ/√2 of `width` channels  | 0 (2402.18668)                                        |
    | "rebased"   | (γ ⊙ norm(x) + b)², `width` wide  | 0 (2402.10644)                                        |

    x `(B, N, C)` → `(B, N, C)`, causal; time linear in the length, a state of H·rows·D numbers. Whatever the kind,
    `attnlab.scale.scan` spreads it over ranks. Source: arXiv 2502.07563.

    Args:
        position: turns q and k (after φ where that is not squared).
        width: channels of q and k for based and rebased.
        gain: of the Xavier initialisation, the release's.
    """

    causal_only = "its state runs along the tokens"

    def __init__(
        self,
        dim: int,
        *,
        kind: str = "basic",
        heads: int = 8,
        head_dim: int | None = None,
        position: Position | None = None,
        width: int = 16,
        rank: int = 16,
        norm_eps: float = 1e-5,
        gain: float = 2**-2.5,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.heads = kind, heads
        self.head_dim = check_heads(dim, heads, None, head_dim)[1]
        narrow = kind in ("based", "rebased")
        if narrow and width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.width = width if narrow else self.head_dim
        self.rows = 1 + width + width * width if kind == "based" else self.width
        self.wq, self.wk = (nn.Linear(dim, heads * self.width, bias=False) for _ in range(2))
        self.wv = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
        self.position = None if narrow else position
        self.gate: nn.Module | None = None
        if kind == "gla":
            self.gate = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, heads * self.head_dim))
        if kind == "rebased":
            self.feature_norm = nn.LayerNorm(width, elementwise_affine=False)
            self.gamma = nn.Parameter(torch.ones(2, heads, 1, width))
            self.beta = nn.Parameter(torch.zeros(2, heads, 1, width))
        for module in (self.wq, self.wk, self.wv, self.wo):
            nn.init.xavier_uniform_(module.weight, gain)

    def features(self, x: Tensor, which: int) -> Tensor:
        """φ of queries (`which` 0) or keys (1), `(B, H, N, width)` → `(B, H, N, rows)`."""
        if self.kind in ("basic", "lightning"):
            return elu(x) + 1
        if self.kind == "based":
            x = x * self.width**-0.25
            pairs = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 2**-0.5
            return torch.cat([torch.ones_like(x[..., :1]), x, pairs], -1)
        if self.kind == "rebased":
            return (self.gamma[which] * self.feature_norm(x) + self.beta[which]).square()
        return x * self.head_dim**-0.5 if which == 0 else x

    def decay(self, x: Tensor) -> Tensor | None:
        """The logarithm of what is left after each token, `(B, H, N)` or `(B, H, N, D)`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.gate is not None:
            return split_heads(logsigmoid(self.gate(x).to(wide)) / 16, self.heads)
        if self.kind not in ("lightning", "retention"):
            return None
        head = torch.arange(self.heads, device=x.device, dtype=wide)
        fixed = -8 * head / self.heads if self.kind == "lightning" else torch.log1p(-(2 ** (-5 - head)))
        return fixed.view(1, -1, 1).expand(len(x), -1, x.shape[1])

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Memory:
        weight = self.wo.weight
        wide = torch.promote_types(dtype or weight.dtype, torch.float32)
        shape = (batch, self.heads, self.rows, self.head_dim)
        return Memory(0, torch.zeros(shape, device=device or weight.device, dtype=wide), self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Memory | None = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        if state is not None:
            self.check_state(state, Memory, len(x))
        q, k, v = (split_heads(w(x), self.heads) for w in (self.wq, self.wk, self.wv))
        q, k = self.features(q, 0), self.features(k, 1)
        if self.position is not None:
            q, k = self.position(q, k, 0 if state is None else state.length)
        o, after = scan(q, k, v, decay=self.decay(x), state=None if state is None else state.state)
        y = self.wo(join_heads(self.norm(o)))
        return y if state is None else (y, Memory(state.length + x.shape[1], after, state.owner))
