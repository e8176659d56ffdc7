"""A mixture of experts whose router asks similar tokens, or the tokens that attention asked, before it decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from attnlab.attend import attend
from attnlab.cards import (
    ANY_LENGTH,
    CAUSAL_SELF,
    NONCAUSAL_SELF,
    PERMUTATION_EQUIVARIANT,
    STREAMING,
    TOKENS,
    Card,
    register,
)
from attnlab.nn.cache import KVCache
from attnlab.nn.channel.moe import SwiGLUExperts
from attnlab.nn.mechanism import Mechanism, pattern_for
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern

# q, k, v of the attention before, (B, H, N, D); or its weights (B, H, N, N).
Attention = Tensor | tuple[Tensor, Tensor, Tensor]

AWARENESS = ("none", "similarity", "attention")
SIMILARITIES = ("bilinear", "dot", "cosine")
HEAD_MIXES = ("mean", "posterior", "min_entropy")


class Decision(NamedTuple):
    """Each token's experts: `weights` and `picked` (B, N, active), out of `probabilities` (B, N, experts)."""

    weights: Tensor
    picked: Tensor
    probabilities: Tensor


class GraphRouter(nn.Module):
    """Decides over experts by a mean over related tokens: x (B, N, C) → `Decision`.

        r_i = Σ_j S_ij γ(x_j),  γ(x) = softmax(W x + b)        weights: the `active` largest of r_i, normalised
        similarity: S_ij = softmax_j(x_i · Ws x_j / τ)         attention: S the weights of the attention before x

    S is never stored: γ(x) are the values of an attention. Cost: 2N²(C + E). Arguments as for `GraphMoE`.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        active: int,
        *,
        aware: str = "similarity",
        similarity: str = "bilinear",
        temperature: float | None = None,
        mix: str = "prob",
        head_mix: str = "mean",
        causal: bool = False,
    ) -> None:
        super().__init__()
        for name, given, known in (
            ("aware", aware, AWARENESS), ("similarity", similarity, SIMILARITIES), ("mix", mix, ("prob", "logit")),
            ("head_mix", head_mix, HEAD_MIXES),
        ):  # fmt: skip
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        if not 1 <= active <= experts:
            raise ValueError(f"active must be between 1 and experts = {experts}, got {active}")
        if temperature is not None and temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.active, self.aware, self.similarity, self.mix, self.head_mix = active, aware, similarity, mix, head_mix
        self.temperature = temperature if temperature is not None else 0.1 if similarity == "cosine" else 1.0
        self.causal = causal
        self.gate = nn.Linear(dim, experts)
        learned = aware == "similarity" and similarity == "bilinear"
        self.ws = nn.Parameter(torch.eye(dim) * dim**-0.5) if learned else None

    def forward(
        self,
        x: Tensor,
        *,
        attention: Attention | None = None,
        pattern: Pattern | None = None,
        state: KVCache | None = None,
    ) -> Decision:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        gates = linear(x, self.gate.weight.to(wide), self.gate.bias.to(wide))
        r = self._mix(x, gates if self.mix == "logit" else gates.softmax(-1), attention, pattern, state)
        weights, picked = r.topk(self.active, -1)
        return Decision(weights / weights.sum(-1, keepdim=True), picked, r)

    def _mix(
        self, x: Tensor, gates: Tensor, attention: Attention | None, pattern: Pattern | None, state: KVCache | None
    ) -> Tensor:
        if (attention is not None) != (self.aware == "attention"):
            raise ValueError(f"attention goes with aware='attention', and only with it; aware is {self.aware!r}")
        if self.aware == "attention" and attention is not None:
            return self._over_heads(*self._mix_by_attention(gates, attention, pattern))
        if self.aware == "similarity":
            offset = 0 if state is None else state.length
            where = pattern_for(self.causal, pattern, offset, x.shape[1])
            q, k, values = self._query(x).unsqueeze(1), self._key(x).unsqueeze(1), gates.unsqueeze(1)
            if state is not None:
                k, values = state.append(k, values)
            gates = attend(q, k, values, pattern=where, scale=1 / self.temperature).squeeze(1)
        return gates.softmax(-1) if self.mix == "logit" else gates

    def _query(self, x: Tensor) -> Tensor:
        if self.ws is not None:
            return x @ self.ws.to(x.dtype)
        return x * x.shape[-1] ** -0.5 if self.similarity == "dot" else normalize(x, dim=-1)

    def _key(self, x: Tensor) -> Tensor:
        return normalize(x, dim=-1) if self.similarity == "cosine" else x

    def _mix_by_attention(
        self, gates: Tensor, attention: Attention, pattern: Pattern | None
    ) -> tuple[Tensor, Tensor | None]:
        """Every head's mean of the gates, (B, H, N, E), and the squared lengths (B, H, N) of the heads' outputs."""
        b, n, _ = gates.shape
        if isinstance(attention, Tensor):
            if attention.ndim != 4 or (attention.shape[0], *attention.shape[2:]) != (b, n, n):
                raise ValueError(f"attention must be weights ({b}, H, {n}, {n}), got {tuple(attention.shape)}")
            if self.head_mix == "posterior":
                raise ValueError("head_mix='posterior' needs attention as (q, k, v), got its weights alone")
            return attention.to(gates.dtype) @ gates.unsqueeze(1), None
        q, k, v = (t.to(gates.dtype) for t in attention)
        if q.ndim != 4 or (q.shape[0], q.shape[2], k.shape[2]) != (b, n, n):
            raise ValueError(f"attention must be q, k, v of ({b}, H, {n}, D), got q {tuple(q.shape)}")
        where = pattern_for(self.causal, pattern, 0, n)
        mixed = attend(q, k, gates.unsqueeze(1).expand(-1, k.shape[1], -1, -1), pattern=where)
        if self.head_mix != "posterior":
            return mixed, None
        return mixed, attend(q, k, v, pattern=where).square().sum(-1)

    def _over_heads(self, mixed: Tensor, strength: Tensor | None) -> Tensor:
        logits = self.mix == "logit"
        if self.head_mix == "mean":
            mean = mixed.mean(1)
            return mean.softmax(-1) if logits else mean
        r = mixed.softmax(-1) if logits else mixed
        if strength is not None:
            share = strength / strength.sum(1, keepdim=True).clamp_min(torch.finfo(strength.dtype).tiny)
            return (share.unsqueeze(-1) * r).sum(1)
        entropy = torch.special.entr(r).sum(-1)
        least = (entropy == entropy.amin(1, keepdim=True)).cumsum(1)
        # The first head that is there.
        head = (least == 0).sum(1)
        return r.gather(1, head[:, None, :, None].expand(-1, 1, -1, r.shape[-1])).squeeze(1)


@register(
    Card(
        name="graph_moe",
        title="Improving Routing in Sparse Mixture of Experts with Graph of Tokens",
        paper="2505.00792",
        system="graph_smoe",
        family="channel",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | ANY_LENGTH | PERMUTATION_EQUIVARIANT | STREAMING,
        cost="N²",
        growth=2.0,
        state="(dim + len(router.gate.bias)) * N",
        sample=dict(experts=4, active=2, hidden=8),
        compiles="how many tokens each expert gets is read from data",
        exports="how many tokens each expert gets is read from data",
    )
)
class GraphMoE(Mechanism):
    """A sparse mixture of experts with calmer routing: similar tokens decide together on their experts.

        y_i = Σ_e∈top(r_i) r_ie / Σ r · w2_e(silu(w1_e x_i) ⊙ w3_e x_i)        r from `GraphRouter`

    x (B, N, C) → (B, N, C). In a block it stands in the MLP's place. Cost: the active experts', and 2N²(C + E) for the
    router. The paper's text is public in part: forms of S beside the paper's idea are ours. Source: arXiv 2505.00792.

    Args:
        hidden: inside each expert; 4 C if None.
        experts, active: E, and how many of them a token meets; all of them is a soft mixture.
        aware: "similarity"; "attention", which takes `attention` in `forward` and has no parameters of its own; or
            "none", the usual router.
        similarity: "bilinear", Ws learned from I / √C on; "dot", Ws = I / √C; "cosine".
        temperature: τ; 1, and 0.1 for cosines, if None.
        mix: means of probabilities ("prob"), or of what is before the softmax ("logit").
        head_mix: of the attention's heads: "mean"; "posterior", heads by the squared length of their output;
            "min_entropy", each token's most decided head.
        causal: tokens ask only those before them.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        experts: int = 16,
        active: int = 2,
        aware: str = "similarity",
        similarity: str = "bilinear",
        temperature: float | None = None,
        mix: str = "prob",
        head_mix: str = "mean",
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.router = GraphRouter(
            dim, experts, active, aware=aware, similarity=similarity, temperature=temperature, mix=mix,
            head_mix=head_mix, causal=causal,
        )  # fmt: skip
        self.experts = SwiGLUExperts(dim, 4 * dim if hidden is None else hidden, experts)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """The tokens so far and their own decisions: C + E numbers per token."""
        if not self.causal or self.router.aware == "attention":
            raise ValueError("streaming needs causal=True, and another awareness than 'attention'")
        return KVCache(owner=self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: KVCache | None = None,
        attention: Attention | None = None,
    ) -> Any:
        self.check(x, context)
        self.refuse(context=context)
        if state is not None:
            self.check_state(state, KVCache, len(x))
        decision = self.router(x, attention=attention, pattern=pattern, state=state)
        pairs = (part.flatten(0, 1) for part in (decision.weights.to(x.dtype), decision.picked))
        y = self.experts(x.flatten(0, 1), *pairs).view_as(x)
        return y if state is None else (y, state)


class GraphBlock(nn.Module):
    """x = x + attention(norm1(x)), then x = x + moe(norm2(x)), routed by that attention if `moe` is aware of it.

    The weights that route are those of the attention without its dropout.
    """

    def __init__(self, attention: MultiHead, moe: GraphMoE) -> None:
        super().__init__()
        if attention.dim != moe.dim or attention.causal != moe.causal:
            raise ValueError("attention and moe must have the same dim and causal")
        self.norm1, self.attention = nn.LayerNorm(attention.dim), attention
        self.norm2, self.moe = nn.LayerNorm(moe.dim), moe

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm1(x)
        heads = self.attention.project(tokens)
        pattern = self.attention.where(None, 0, x.shape[1])
        x = x + self.attention.merge(self.attention.mix(*heads, x=tokens, pattern=pattern))
        return x + self.moe(self.norm2(x), attention=heads if self.moe.router.aware == "attention" else None)


@contextmanager
def decisions(model: nn.Module) -> Iterator[list[Decision]]:
    """While it is open, what every `GraphRouter` of `model` decides is appended to the list."""
    seen: list[Decision] = []
    routers = [module for module in model.modules() if isinstance(module, GraphRouter)]
    hooks = [r.register_forward_hook(lambda module, args, out: seen.append(out)) for r in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(seen: list[Decision], weight: float = 0.01) -> Tensor:
    """weight · mean over layers of E Σ_e f_e p_e: f the share of tokens whose first expert is e, p its mean r."""
    if not seen:
        raise ValueError("seen must hold at least one decision; run the model inside decisions(model)")
    losses = []
    for decision in seen:
        r = decision.probabilities.flatten(0, 1)
        first = torch.bincount(decision.picked[..., 0].flatten(), minlength=r.shape[1]).to(r) / len(r)
        losses.append(r.shape[1] * (first * r.mean(0)).sum())
    return weight * torch.stack(losses).mean()


def routing_entropy(probabilities: Tensor) -> Tensor:
    """The mean over tokens of the entropy, in nats, of what they decide, (…, E)."""
    return torch.special.entr(probabilities).sum(-1).mean()


def fluctuation(before: Tensor, after: Tensor) -> Tensor:
    """The share of tokens whose set of picked experts, (…, K) in any order, is another than before."""
    if before.shape != after.shape:
        raise ValueError(f"before and after must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    return (before.sort(-1).values != after.sort(-1).values).any(-1).double().mean()
