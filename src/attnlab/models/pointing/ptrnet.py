"""Pointer networks: from a set of points to a sequence of positions in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnlab.cards import OPERATOR, Card, register
from attnlab.nn.cross.pointer import Pointer

# From the positions so far (B, t) and the number n of points: which of n + 1 candidates may come next (B, n + 1).
Constraint = Callable[[Tensor, int], Tensor]


def unused(chosen: Tensor, n: int) -> Tensor:
    """No point twice; the end whenever: for polygons."""
    seen = torch.zeros(len(chosen), n + 1, dtype=torch.bool, device=chosen.device)
    seen.scatter_(1, chosen.clamp_min(0), True)
    seen[:, n] = False
    return ~seen


def permutation(chosen: Tensor, n: int) -> Tensor:
    """Every point once, and only then the end: for tours and sorting."""
    free = unused(chosen, n)
    free[:, n] = ~free[:, :n].any(1)
    return free


class Decoded(NamedTuple):
    """`positions` (B, T), −1 behind the end, and the log probability (B,) of the whole sequence."""

    positions: Tensor
    log_probability: Tensor


class _State(NamedTuple):
    h: Tensor
    c: Tensor


@register(
    Card(
        name="pointer_network",
        title="Pointer Networks",
        paper="1506.03134",
        family="cross",
        kind=OPERATOR,
        cost="M N",
        growth=2.0,
        sample=dict(dim=16),
        compiles="torch.compile does not take nn.LSTM",
    )
)
class PointerNetwork(nn.Module):
    """Answers about a set of points by pointing at them, one after the other, at any number of points.

        e = LSTM(points)                                       d_i = LSTM(d_{i−1}, point chosen at i − 1)
        u_ij = v · tanh(W1 e_j + W2 d_i)                       p(C_i = j | C_<i, points) = softmax_j u_ij

        log p (B, T, N + 1) = net(points (B, N, in_channels), targets (B, T))        with the answers so far given
        positions (B, T), log p (B,) = net.decode(points, beam=4, allowed=permutation)

    Candidate N is the end, with a learned e of its own; targets behind it are −1. The decoder starts from the encoder's
    last state and a learned first input. Cost: 16 (N + T) dim² + 3 T N dim. Source: arXiv 1506.03134.

    Args:
        embedding: a linear layer to so many channels before both LSTMs; None feeds the points themselves.
        end: whether there is an end; without it there are N candidates, and an answer of N positions.
        bias: biases in the pointer's projections.
        blend: joins Σ_j p_ij W1 e_j to d_i, tanh(W [blend, d_i]), before it goes on to the next step; not in the
            paper. Such a decoder runs step by step in training too.
        layers, bidirectional: of the encoder, each direction dim / 2 wide; the decoder has one layer.
    """

    def __init__(
        self,
        *,
        dim: int = 512,
        in_channels: int = 2,
        embedding: int | None = None,
        end: bool = True,
        bias: bool = False,
        blend: bool = False,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if bidirectional and dim % 2:
            raise ValueError(f"dim must be even for a bidirectional encoder, got {dim}")
        width = in_channels if embedding is None else embedding
        self.in_channels, self.bidirectional = in_channels, bidirectional
        self.embedding = nn.Identity() if embedding is None else nn.Linear(in_channels, embedding)
        self.encoder = nn.LSTM(
            width, dim // 2 if bidirectional else dim, layers, batch_first=True, bidirectional=bidirectional,
            dropout=dropout,
        )  # fmt: skip
        self.decoder = nn.LSTM(width, dim, batch_first=True)
        self.pointer = Pointer(dim, bias=bias)
        self.start = nn.Parameter(torch.empty(width).uniform_(-0.08, 0.08))
        self.end = nn.Parameter(torch.empty(dim).uniform_(-0.08, 0.08)) if end else None
        self.blend = nn.Linear(2 * dim, dim) if blend else None

    def encode(self, points: Tensor) -> tuple[Tensor, Tensor, _State]:
        """The decoder's possible inputs (B, N, width), the pointer's keys (B, N + 1, dim) and the first state."""
        if points.ndim != 3 or points.shape[-1] != self.in_channels or 0 in points.shape:
            raise ValueError(f"points must be (B, N, {self.in_channels}), not empty, got {tuple(points.shape)}")
        inputs = self.embedding(points)
        context, (h, c) = self.encoder(inputs)
        if self.bidirectional:
            h, c = (torch.cat((s[-2], s[-1]), -1).unsqueeze(0) for s in (h, c))
        if self.end is not None:
            context = torch.cat((context, self.end.expand(len(points), 1, -1)), 1)
        return inputs, self.pointer.keys(context), _State(h[-1:].contiguous(), c[-1:].contiguous())

    def step(self, given: Tensor, state: _State, keys: Tensor, allowed: Tensor | None) -> tuple[Tensor, _State]:
        """One answer: the input (B, width) → log p (B, candidates) and the state behind it."""
        out, (h, c) = self.decoder(given.unsqueeze(1), (state.h, state.c))
        scores = self.pointer.score(out, keys).squeeze(1)
        log_p = _log_softmax(scores, allowed)
        if self.blend is not None:
            blend = (log_p.exp().unsqueeze(1) @ keys).squeeze(1)
            h = self.blend(torch.cat((blend, h[0]), -1)).tanh().unsqueeze(0)
        return log_p, _State(h, c)

    def _given(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """The inputs (B, T, width) at `positions` (B, T); at the end or behind it, any."""
        at = positions.clamp(0, inputs.shape[1] - 1)
        return inputs.gather(1, at.unsqueeze(-1).expand(-1, -1, inputs.shape[-1]))

    def forward(self, points: Tensor, targets: Tensor, *, allowed: Constraint | None = None) -> Tensor:
        """log p (B, T, candidates) of each candidate at each step, given the `targets` (B, T) before it."""
        n, last = points.shape[1], points.shape[1] - (self.end is None)
        if targets.ndim != 2 or len(targets) != len(points) or targets.is_floating_point():
            raise ValueError(f"targets must be integers ({len(points)}, T), got {targets.dtype} {tuple(targets.shape)}")
        if not torch.compiler.is_compiling() and ((targets > last) | (targets < -1)).any():
            raise ValueError(f"targets must be in [-1, {last}] for {n} points, got up to {int(targets.max())}")
        inputs, keys, state = self.encode(points)
        start = self.start.expand(len(points), 1, -1)
        given = torch.cat((start, self._given(inputs, targets[:, :-1])), 1)
        steps = range(targets.shape[1])
        masks = None if allowed is None else [allowed(targets[:, :t], n)[:, : last + 1] for t in steps]
        if self.blend is None:
            out, _ = self.decoder(given, (state.h, state.c))
            return _log_softmax(self.pointer.score(out, keys), None if masks is None else torch.stack(masks, 1))
        found = []
        for t in steps:
            log_p, state = self.step(given[:, t], state, keys, None if masks is None else masks[t])
            found.append(log_p)
        return torch.stack(found, 1)

    def loss(self, points: Tensor, targets: Tensor) -> Tensor:
        """−log p of the answers, averaged over their positions and ends."""
        log_p = self(points, targets)
        return nn.functional.nll_loss(log_p.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def decode(
        self, points: Tensor, *, beam: int = 1, allowed: Constraint | None = None, steps: int | None = None
    ) -> Decoded:
        """The likeliest answer by beam search (greedy at 1), at most `steps` long (N, and the end, if None)."""
        if beam < 1:
            raise ValueError(f"beam must be at least 1, got {beam}")
        inputs, keys, state = self.encode(points)
        (b, n), candidates = points.shape[:2], keys.shape[1]
        rows = torch.arange(b, device=points.device).unsqueeze(1)
        scores = points.new_zeros(b, 1)
        chosen = torch.empty(b, 1, 0, dtype=torch.long, device=points.device)
        given = self.start.expand(b, -1)
        for _ in range(candidates if steps is None else steps):
            k = chosen.shape[1]
            mask = None if allowed is None else allowed(chosen.flatten(0, 1), n)[:, :candidates]
            here = keys if k == 1 else keys.repeat_interleave(k, 0)
            log_p, state = self.step(given, state, here, mask)
            log_p = log_p.unflatten(0, (b, k))
            if self.end is not None and chosen.shape[2]:
                over = (chosen[..., -1] == n) | (chosen[..., -1] == -1)
                # What is over goes on in one way only, at no cost.
                log_p = log_p.masked_fill(over.unsqueeze(-1), -torch.inf)
                log_p[..., n] = log_p[..., n].masked_fill(over, 0.0)
            total = (scores.unsqueeze(-1) + log_p).flatten(1)
            scores, picks = total.topk(min(beam, total.shape[1]), -1)
            parent, position = picks // candidates, picks % candidates
            chosen = torch.cat((chosen[rows, parent], position.unsqueeze(-1)), -1)
            state = _State(*(s[0].unflatten(0, (b, k))[rows, parent].flatten(0, 1).unsqueeze(0) for s in state))
            given = self._given(inputs, position).flatten(0, 1)
            if self.end is not None and (position == n).all():
                break
        best = chosen[:, 0]
        if self.end is not None:
            before = (best == n).cumsum(1) - (best == n).int() > 0
            best = best.masked_fill(before, -1)
        return Decoded(best, scores[:, 0])


def _log_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    return (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).log_softmax(-1)
