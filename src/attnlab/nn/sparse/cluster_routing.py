"""Routing attention: tokens attend within clusters of their content, whose means are learned as the model trains."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads
from attnlab.patterns import Causal, Halo

# The score of a token with itself where it should see others first: what is left if there are none.
OWN = -5e4


class OnlineMeans(nn.Module):
    """Means (H, count, D) of the tokens of each head, moved a little towards every batch that training sees."""

    means: Tensor
    started: Tensor

    def __init__(self, heads: int, count: int, dim: int, *, decay: float = 0.999, unit: bool = True) -> None:
        super().__init__()
        self.decay, self.unit = decay, unit
        self.register_buffer("means", F.normalize(torch.randn(heads, count, dim), dim=-1))
        self.register_buffer("started", torch.tensor(False))
        self._known = False  # that they have started: a device is asked once, not in every step

    def one_round(self, x: Tensor, means: Tensor) -> Tensor:
        """k-means once, over the batch: the direction of the sum of each mean's tokens; without any, it stays."""
        sums, sizes = self._sums(x, means)
        return torch.where(sizes > 0, F.normalize(sums, dim=-1), means)

    def _sums(self, x: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        nearest = F.one_hot((x @ means.mT).argmax(-1), means.shape[1]).to(x.dtype)
        return (nearest.mT @ x).sum(0), nearest.sum((0, 2))[..., None]

    def ensure_started(self, x: Tensor) -> None:
        """`start` with `x`, unless that happened before, here or in the checkpoint that was loaded."""
        if not self._known and not bool(self.started):
            self.start(x)
        self._known = True

    @torch.no_grad()
    def start(self, x: Tensor, rounds: int = 10) -> None:
        """Means of the first batch `x (B, H, N, D)`, from some of its tokens on."""
        tokens = x.transpose(0, 1).flatten(1, 2)
        count, n = self.means.shape[1], tokens.shape[1]
        chosen = torch.randperm(n, device=x.device)[:count] if n >= count else torch.randint(n, (count,))
        means = tokens[:, chosen.to(x.device)]
        for _ in range(rounds):
            means = self.one_round(x, means)
        self.means.copy_(means)
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """means ← λ means + (1 − λ) new. `unit`: new is one round of k-means; else the average of a mean's tokens."""
        means = self.means.to(x.dtype)
        if self.unit:
            new = self.one_round(x, means)
        else:
            sums, sizes = self._sums(x, means)
            new = torch.where(sizes > 0, sums / sizes.clamp_min(1), means)
        self.means.lerp_(new.to(self.means.dtype), 1 - self.decay)

    def commitment(self, x: Tensor) -> Tensor:
        """Mean squared distance of `x (B, H, N, D)` from the nearest means."""
        means = self.means.to(x.dtype)
        nearest = (x.detach() @ means.mT).argmax(-1)
        return F.mse_loss(x, means[torch.arange(len(means), device=x.device)[:, None], nearest])

    def members(self, x: Tensor, size: int) -> Tensor:
        """Positions (B, H, count, size), ascending, of the tokens that each mean takes: those nearest to it."""
        nearness = x.detach() @ self.means.to(x.dtype).mT
        return nearness.topk(min(size, x.shape[2]), dim=2, sorted=False).indices.sort(2).values.mT


def cluster_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    causal: bool = False,
    memory: tuple[Tensor, Tensor] | None = None,
    own_last: bool = False,
    eps: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    """Attention inside each cluster, and the mean over a token's clusters; a token in none gets zeros.

    q, k, v `(B, H, N, D)`; `queries` and `keys` `(B, H, count, size)` are the members' positions, ascending;
    `memory` holds keys and values `(H, count, M, D)` that all in a cluster see. `own_last`: a token sees itself only
    if it sees nothing else (queries and keys are the same members then). `eps` joins the number of clusters that
    divides the sum. Cost 4 · count · size² · D per head.
    """
    count = queries.shape[2]

    def gather(x: Tensor, members: Tensor) -> Tensor:
        return x.gather(2, members.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])).unflatten(2, (count, -1))

    q_in, k_in, v_in = gather(q, queries), gather(k, keys), gather(v, keys)
    slots = 0 if memory is None else memory[0].shape[2]
    same, pattern, bias = own_last or queries is keys, None, None
    if own_last:
        bias = OWN * torch.eye(queries.shape[3], keys.shape[3], dtype=q.dtype, device=q.device)
    if causal and same and not slots:
        pattern = Causal()  # the members stand in order
    elif causal:
        if same:
            later = torch.ones(queries.shape[3], keys.shape[3], dtype=torch.bool, device=q.device).triu(1)
        else:
            later = queries[..., :, None] < keys[..., None, :]
        bias = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
        bias = bias.masked_fill(later, -math.inf)
    if memory is not None and slots:
        k_in, v_in = (
            torch.cat((m.to(t.dtype).expand(len(t), -1, -1, -1, -1), t), 3)
            for m, t in zip(memory, (k_in, v_in), strict=True)
        )
        bias = None if bias is None else F.pad(bias, (slots, 0))
    if bias is not None and bias.dim() > 2:
        bias = bias.flatten(1, 2)
    out = attend(
        q_in.flatten(1, 2),
        k_in.flatten(1, 2),
        v_in.flatten(1, 2),
        pattern=pattern,
        bias=bias,
        dropout=dropout,
        # With a bias of their own for each, clusters are small dense problems: nothing is to be gained by tiling them.
        backend="auto" if bias is None else "dense",
    )
    index = queries.flatten(2)[..., None]
    out = out.unflatten(1, (-1, count)).flatten(2, 3)
    total = out.new_zeros(*q.shape[:3], v.shape[-1]).scatter_add(2, index.expand_as(out), out)
    times = out.new_zeros(*q.shape[:3], 1).scatter_add(2, index, torch.ones_like(out[..., :1]))
    return total / (times + eps if eps else times.clamp_min(1))


@register(
    Card(
        name="cluster_routing",
        title="Efficient Content-Based Sparse Attention with Routing Transformers",
        paper="2003.05997",
        system="routing",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH,
        cost="N · size + N · clusters",
        sample=dict(heads=4, clusters=3, window=4),
    )
)
class ClusterRouting(Mechanism):
    """Half of the heads attend locally, half within clusters that k-means finds in the content.

        cluster c of a head: the `size` queries and the `size` keys with the largest products with the mean μ_c
        y_i = Wo mean_{c ∋ i} attend(q_i, k in c, v in c)                      and zero where i is in no cluster
        μ_c ← λ μ_c + (1 − λ) · average of the queries and keys nearest to μ_c                  while training

    x `(B, N, C)` → the same shape. A local head sees its block of `window` tokens and the one before it (and the one
    behind it, if not causal). q and k of routed heads pass a layer norm without weights, and with `causal` they are one
    and the same. The paper writes half the sum for the average, whose length would depend on the batch; its authors'
    code divides by counts too. Means start from k-means on the first batch in training; before, they are random. After
    a forward in training `commitment_loss` is 10⁻⁴ times the squared distance of tokens to their means, to be added to
    the loss.

    With `causal` no token reads a later one, but which tokens share a cluster is decided over the whole sequence, so
    later tokens do have an influence (the paper accepts that): the card does not claim it. Cost per head
    O(N · count · D) for the choice and O(count · size² · D): N^1.5 at count = size = √N. Source: arXiv 2003.05997.

    Args:
        clusters: count of means per head; size: tokens in each, ⌈N / clusters⌉ if None.
        local_heads: how many of the heads are local; half if None.
        shared: queries are keys too in routed heads; as `causal` if None.
        memory: learned keys and values in each cluster; at least 1 if causal and not shared, as a query may find
            nothing else that it may see.
        variant: "release" follows the PyTorch port (lucidrains/routing-transformer): unit lengths instead of layer
            norms, for the choice and for shared keys only; a token sees itself last if shared; new means are unit
            vectors; sums are divided by clusters + 10⁻⁵.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        clusters: int = 16,
        size: int | None = None,
        local_heads: int | None = None,
        window: int = 256,
        shared: bool | None = None,
        memory: int = 0,
        decay: float = 0.999,
        variant: Literal["paper", "release"] = "paper",
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, (_, self.head_dim) = heads, check_heads(dim, heads, None, head_dim)
        self.local_heads = heads // 2 if local_heads is None else local_heads
        self.shared = causal if shared is None else shared
        if not 0 <= self.local_heads < heads:
            raise ValueError(f"local_heads must be in [0, heads = {heads}), got {local_heads}")
        if min(clusters, window, 1 if size is None else size) < 1:
            raise ValueError(f"clusters, window and size must be at least 1, got {clusters}, {window} and {size}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        if causal and not self.shared and memory < 1:
            raise ValueError(f"memory must be at least 1 if causal and not shared, got {memory}")
        self.clusters, self.size, self.window, self.variant, self.dropout = clusters, size, window, variant, dropout
        routed = heads - self.local_heads
        self.key_heads = self.local_heads if self.shared else heads
        self.wqkv = nn.Linear(dim, (2 * heads + self.key_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.means = OnlineMeans(routed, clusters, self.head_dim, decay=decay, unit=variant == "release")
        self.memory = nn.Parameter(torch.randn(2, routed, clusters, memory, self.head_dim)) if memory else None
        self.commitment_loss: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
    ) -> Tensor:
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        widths = [n * self.head_dim for n in (self.heads, self.key_heads, self.heads)]
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.wqkv(x).split(widths, -1))
        cut, n, heads = self.local_heads, x.shape[1], []
        if cut:
            local = Halo((n,), min(self.window, n), min(self.window, n))
            where = local & Causal() if self.causal else local
            dropout = self.dropout if self.training else 0.0
            heads.append(attend(q[:, :cut], k[:, :cut], v[:, :cut], pattern=where, dropout=dropout))
        heads.append(self.routed(q[:, cut:], None if self.shared else k[:, cut:], v[:, cut:]))
        return self.wo(join_heads(torch.cat(heads, 1)))

    def routed(self, q: Tensor, k: Tensor | None, v: Tensor) -> Tensor:
        """What the routed heads make of their q, k (None: shared) and v `(B, H, N, D)`."""
        unit = self.variant == "release"
        near_q = self._normed(q)
        near_k = near_q if k is None else self._normed(k)
        tokens = near_q if k is None else torch.cat((near_q, near_k), 2)
        if self.training:
            self.means.ensure_started(tokens.detach())
            self.commitment_loss = 1e-4 * self.means.commitment(tokens)
        size = -(-q.shape[2] // self.clusters) if self.size is None else self.size
        queries = self.means.members(near_q, size)
        keys = queries if k is None else self.means.members(near_k, size)
        out = cluster_attention(
            q if unit else near_q,
            k if unit and k is not None else near_k,
            v,
            queries,
            keys,
            causal=self.causal,
            memory=None if self.memory is None else (self.memory[0], self.memory[1]),
            own_last=unit and self.shared,
            eps=1e-5 if unit else 0.0,
            dropout=self.dropout if self.training else 0.0,
        )
        if self.training:
            self.means.update(tokens.detach())
        return out

    def _normed(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.variant == "release" else F.layer_norm(x, x.shape[-1:])
