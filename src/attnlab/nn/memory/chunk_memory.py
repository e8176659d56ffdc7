"""A neural memory that is written once per chunk: the form of Titans that the open implementation trains."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad, rms_norm

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads, split_heads
from attnlab.nn.memory.deep import DeepMemory, Weights, course
from attnlab.patterns import Pattern

# Tokens of small chunks that are worked on together: what they write is read as products of matrices of this size.
TOKENS_AT_A_TIME = 64
# From this size on the weights after each chunk are made, and all chunks read at once.
LARGE = 16


class ChunkMemoryState(NamedTuple):
    """The memory after the last whole chunk, and the tokens of the unfinished one."""

    weights: Weights
    momentum: Weights
    pending: Tensor  # (B, fewer than chunk, C)
    owner: Owner


@register(
    Card(
        name="chunk_memory",
        title="Titans: Learning to Memorize at Test Time",
        paper="2501.00663",
        system="titans",
        family="memory",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N",
        growth=1.0,
        state="2 * memory.numbers + N % chunk * dim",
        sample=dict(heads=4, chunk=5),
    )
)
class ChunkMemory(Mechanism):
    """A network M per head that learns a text's keys and values chunk by chunk, from gradients at its first weights.

        xₛ, xᵣ = RMSNorm(x) with weights of their own;   k, v = W xₛ,  q = W xᵣ;   θ = max_rate · σ(Wθ xₛ) per token
        η, α = σ(W mean(xₛ)) per chunk c
        S_c = η S_{c−1} − Σ_t θ_t ∇ mean(M₀(k_t) − v_t)²,   M_c = (1 − α) M_{c−1} + S_c
        y_t = Wo (M_c(q_t) · σ(Wg xᵣ) per head)          with the last chunk that is whole at t

    x `(B, N, C)` → `(B, N, C)`; one head has neither gates nor Wo. `NeuralMemory` is the paper's form: it writes at
    every token, takes gradients at the chunk's start, and adds convolutions, unit keys and an output norm. Streams with
    two sets of weights and the tokens of the unfinished chunk: 2·H·|M| + (chunk − 1)·C numbers at most. Causal only.
    Source: arXiv 2501.00663, as in lucidrains/titans-pytorch.

    Args:
        dim: C.
        heads, head_dim, depth, expansion: H networks of `depth` layers on D channels, expansion · D between.
        chunk: tokens per chunk.
        max_rate: the largest θ.
        momentum: False for η = 0.
        residual: M has a residual and a norm, see `DeepMemory`.
        qk_norm, out_norm: RMSNorm per head of q and k, and of what M says.
    """

    causal_only = "its state runs along the tokens"

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        head_dim: int | None = None,
        depth: int = 2,
        expansion: float = 4.0,
        chunk: int = 16,
        max_rate: float = 0.1,
        momentum: bool = True,
        residual: bool = True,
        qk_norm: bool = False,
        out_norm: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if max_rate < 0:
            raise ValueError(f"max_rate must be 0 or more, got {max_rate}")
        self.heads, self.head_dim = heads, check_heads(dim, heads, None, head_dim)[1]
        if heads == 1 and self.head_dim != dim:
            raise ValueError(f"head_dim must be dim = {dim} with one head, which has no output map; got {head_dim}")
        self.chunk, self.max_rate = chunk, max_rate
        inner = heads * self.head_dim
        self.write_norm, self.read_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.wq = nn.Linear(dim, inner, bias=False)
        self.wkv = nn.Linear(dim, 2 * inner, bias=False)
        self.rate, self.forget = nn.Linear(dim, heads), nn.Linear(dim, heads)
        self.momentum = nn.Linear(dim, heads) if momentum else None
        gains = [
            nn.Parameter(torch.zeros(heads, 1, self.head_dim)) if g else None for g in (qk_norm, qk_norm, out_norm)
        ]
        self.q_gain, self.k_gain, self.out_gain = gains
        self.memory = DeepMemory(
            heads, self.head_dim, depth=depth, expansion=expansion, activation="gelu", residual=residual
        )
        self.gate = nn.Linear(dim, heads, bias=False) if heads > 1 else None
        self.wo = nn.Linear(inner, dim, bias=False) if heads > 1 else None

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ChunkMemoryState:
        device, dtype = device or self.wq.weight.device, dtype or self.wq.weight.dtype
        weights = self.memory.initial(batch, torch.promote_types(dtype, torch.float32), device)
        pending = torch.zeros(batch, 0, self.dim, device=device, dtype=dtype)
        return ChunkMemoryState(weights, tuple(map(torch.zeros_like, weights)), pending, self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: ChunkMemoryState | None = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        before = self.initial_state(len(x), dtype=x.dtype) if state is None else state
        self.check_state(before, ChunkMemoryState, len(x))
        weights, momentum, pending, owner = before
        self.memory.check(weights, len(x))
        seen = torch.cat([pending, x], 1) if pending.shape[1] else x
        whole = seen.shape[1] // self.chunk * self.chunk
        read = self.read_norm(seen)
        q = _scaled(split_heads(self.wq(read), self.heads), self.q_gain)
        out = []
        if whole and self.chunk >= LARGE:
            y, weights, momentum = self._by_weights(q, seen[:, :whole], weights, momentum)
            out.append(y)
        elif whole:
            anchor = self.memory.initial(len(x), weights[0].dtype)
            step = self.chunk * max(1, TOKENS_AT_A_TIME // self.chunk)
            cut = zip(*(t.split(step, 2) for t in (q[:, :, :whole], *self._writes(seen[:, :whole]))), strict=True)
            for q_, k_, v_, rate_, keep_, push_ in cut:
                ends = torch.zeros(q_.shape[2], device=x.device, dtype=q_.dtype)
                ends[self.chunk - 1 :: self.chunk] = 1
                way = course(keep_, push_, ends)
                y, weights, momentum = self.memory.step(q_, k_, v_, rate_, way, anchor, weights, momentum)
                out.append(y)
        if whole < seen.shape[1] and not (whole and self.chunk >= LARGE):
            out.append(self.memory.read(q[:, :, whole:], weights))
        new = slice(seen.shape[1] - x.shape[1], None)
        o = _scaled(torch.cat(out, 2)[:, :, new], self.out_gain).to(x.dtype)
        if self.gate is not None:
            o = o * self.gate(read[:, new]).sigmoid().transpose(1, 2).unsqueeze(-1)
        y = join_heads(o) if self.wo is None else self.wo(join_heads(o))
        return y if state is None else (y, ChunkMemoryState(weights, momentum, seen[:, whole:], owner))

    def _by_weights(self, q: Tensor, x: Tensor, weights: Weights, momentum: Weights) -> tuple[Tensor, Weights, Weights]:
        """Write the whole chunks x and read at all of q, each token with the weights of the last chunk whole at it."""
        k, v, rate, at_end, at_start = self._writes(x)
        size, length = self.chunk, q.shape[2]
        keeps = at_end[:, :, size - 1 :: size, None, None].exp().unbind(2)
        pushes = at_start[:, :, ::size, None, None].exp().unbind(2)
        courses, after, moved = [], [], []
        updates = self.memory.updates(k, v, rate, self.memory.initial(len(x), k.dtype))
        for (a, d), w, s in zip(updates, weights, momentum, strict=True):
            written, course_ = a.unflatten(2, (-1, size)).mT @ d.unflatten(2, (-1, size)), [w]
            for keep, push, u in zip(keeps, pushes, written.unbind(2), strict=True):
                s = push * s + u
                w = keep * w + s
                course_.append(w)
            courses.append(torch.stack(course_, 2))
            after.append(w)
            moved.append(s)
        # The last token of a chunk reads with its weights: moved by one token, tokens that read alike are a chunk.
        groups = pad(q, (0, 0, 1, (x.shape[1] + size) - length - 1)).unflatten(2, (-1, size))
        y = self.memory.through(groups, lambda i, h: h @ courses[i]).flatten(2, 3)
        return y[:, :, 1 : length + 1], tuple(after), tuple(moved)

    def _writes(self, x: Tensor) -> tuple[Tensor, ...]:
        """k, v, rates, log(1 − α) and log η of whole chunks, `(B, H, N, …)`: α at a chunk's end, η at its start."""
        x = self.write_norm(x)
        k, v = (split_heads(t, self.heads) for t in self.wkv(x).chunk(2, -1))
        means = x.unflatten(1, (-1, self.chunk)).mean(2)
        rate = self.max_rate * self.rate(x).sigmoid().transpose(1, 2).unsqueeze(-1) / self.head_dim
        keep = logsigmoid(-_wide(self.forget(means)).transpose(1, 2))
        none = torch.full_like(keep, -torch.inf)
        push = none if self.momentum is None else logsigmoid(_wide(self.momentum(means)).transpose(1, 2))
        still = keep.new_zeros(*keep.shape, self.chunk - 1)
        at_end = torch.cat([still, keep.unsqueeze(-1)], -1).flatten(2)
        at_start = torch.cat([push.unsqueeze(-1), still], -1).flatten(2)
        return _scaled(k, self.k_gain), _wide(v), _wide(rate), at_end, at_start


def _scaled(x: Tensor, gain: Tensor | None) -> Tensor:
    """x in at least float32, normed with 1 + gain if there is a gain."""
    x = _wide(x)
    return x if gain is None else rms_norm(x, x.shape[-1:]) * (1 + gain)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
