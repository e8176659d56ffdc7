"""An LSTM reads a set of points, another answers with positions in it: training and search, whatever scores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

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


class State(NamedTuple):
    """Of the decoder, each (1, B, dim)."""

    h: Tensor
    c: Tensor


class Answering(nn.Module):
    """Two LSTMs, from points to positions; a subclass scores the candidates, by `remember` and `score`.

        d_i = LSTM(d_{i−1}, point chosen at i − 1)         p(C_i = j | C_<i, points) = softmax_j score(d_i, memory)

    The decoder starts from the encoder's last state and a learned first input. The arguments are those of
    `PointerNetwork`; `ends` is whether the last of N + 1 candidates is the end. All weights start uniform
    within 0.08, as in the paper, or within dim^−½ where that is more: narrow networks learn nothing from less.
    """

    recurrent = False  # whether a step needs the scores of the one before it

    def __init__(
        self,
        *,
        dim: int,
        in_channels: int,
        embedding: int | None,
        ends: bool,
        layers: int,
        bidirectional: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        if bidirectional and dim % 2:
            raise ValueError(f"dim must be even for a bidirectional encoder, got {dim}")
        width = in_channels if embedding is None else embedding
        self.in_channels, self.bidirectional, self.ends = in_channels, bidirectional, ends
        self.embedding = nn.Identity() if embedding is None else nn.Linear(in_channels, embedding)
        self.encoder = nn.LSTM(
            width, dim // 2 if bidirectional else dim, layers, batch_first=True, bidirectional=bidirectional,
            dropout=dropout,
        )  # fmt: skip
        self.decoder = nn.LSTM(width, dim, batch_first=True)
        self.start = nn.Parameter(torch.empty(width))

    def _start_small(self) -> None:
        bound = max(0.08, self.decoder.hidden_size**-0.5)
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def remember(self, context: Tensor) -> Tensor:
        """The memory (B, M, ·) that the answers are scored against, from the encoder's states (B, N, dim)."""
        raise NotImplementedError

    def score(self, out: Tensor, memory: Tensor, n: int) -> Tensor:
        """The candidates' scores (B, T, N, or N + 1 with the end) from the decoder's states (B, T, dim)."""
        raise NotImplementedError

    def encode(self, points: Tensor) -> tuple[Tensor, Tensor, State]:
        """The decoder's possible inputs (B, N, width), the memory and the first state."""
        if points.ndim != 3 or points.shape[-1] != self.in_channels or 0 in points.shape:
            raise ValueError(f"points must be (B, N, {self.in_channels}), not empty, got {tuple(points.shape)}")
        inputs = self.embedding(points)
        context, (h, c) = self.encoder(inputs)
        if self.bidirectional:
            h, c = (torch.cat((s[-2], s[-1]), -1).unsqueeze(0) for s in (h, c))
        return inputs, self.remember(context), State(h[-1:].contiguous(), c[-1:].contiguous())

    def step(self, given: Tensor, state: State, memory: Tensor, n: int, allowed: Tensor | None) -> tuple[Tensor, State]:
        """One answer: the input (B, width) → log p (B, candidates) and the state behind it."""
        out, (h, c) = self.decoder(given.unsqueeze(1), (state.h, state.c))
        return log_softmax(self.score(out, memory, n).squeeze(1), allowed), State(h, c)

    def _given(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """The inputs (B, T, width) at `positions` (B, T); at the end or behind it, any."""
        at = positions.clamp(0, inputs.shape[1] - 1)
        return inputs.gather(1, at.unsqueeze(-1).expand(-1, -1, inputs.shape[-1]))

    def forward(self, points: Tensor, targets: Tensor, *, allowed: Constraint | None = None) -> Tensor:
        """log p (B, T, candidates) of each candidate at each step, given the `targets` (B, T) before it."""
        n, last = points.shape[1], points.shape[1] - (not self.ends)
        if targets.ndim != 2 or len(targets) != len(points) or targets.is_floating_point():
            raise ValueError(f"targets must be integers ({len(points)}, T), got {targets.dtype} {tuple(targets.shape)}")
        if not torch.compiler.is_compiling() and ((targets > last) | (targets < -1)).any():
            raise ValueError(f"targets must be in [-1, {last}] for {n} points, got up to {int(targets.max())}")
        inputs, memory, state = self.encode(points)
        start = self.start.expand(len(points), 1, -1)
        given = torch.cat((start, self._given(inputs, targets[:, :-1])), 1)
        steps = range(targets.shape[1])
        masks = None if allowed is None else [allowed(targets[:, :t], n)[:, : last + 1] for t in steps]
        if not self.recurrent:
            out, _ = self.decoder(given, (state.h, state.c))
            return log_softmax(self.score(out, memory, n), None if masks is None else torch.stack(masks, 1))
        found = []
        for t in steps:
            log_p, state = self.step(given[:, t], state, memory, n, None if masks is None else masks[t])
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
        inputs, memory, state = self.encode(points)
        (b, n), candidates = points.shape[:2], points.shape[1] + self.ends
        rows = torch.arange(b, device=points.device).unsqueeze(1)
        scores = points.new_zeros(b, 1)
        chosen = torch.empty(b, 1, 0, dtype=torch.long, device=points.device)
        given = self.start.expand(b, -1)
        for _ in range(candidates if steps is None else steps):
            k = chosen.shape[1]
            mask = None if allowed is None else allowed(chosen.flatten(0, 1), n)[:, :candidates]
            here = memory if k == 1 else memory.repeat_interleave(k, 0)
            log_p, state = self.step(given, state, here, n, mask)
            log_p = log_p.unflatten(0, (b, k))
            if self.ends and chosen.shape[2]:
                over = (chosen[..., -1] == n) | (chosen[..., -1] == -1)
                # What is over goes on in one way only, at no cost.
                log_p = log_p.masked_fill(over.unsqueeze(-1), -torch.inf)
                log_p[..., n] = log_p[..., n].masked_fill(over, 0.0)
            total = (scores.unsqueeze(-1) + log_p).flatten(1)
            scores, picks = total.topk(min(beam, total.shape[1]), -1)
            parent, position = picks // candidates, picks % candidates
            chosen = torch.cat((chosen[rows, parent], position.unsqueeze(-1)), -1)
            state = State(*(s[0].unflatten(0, (b, k))[rows, parent].flatten(0, 1).unsqueeze(0) for s in state))
            given = self._given(inputs, position).flatten(0, 1)
            if self.ends and (position == n).all():
                break
        best = chosen[:, 0]
        if self.ends:
            before = (best == n).cumsum(1) - (best == n).int() > 0
            best = best.masked_fill(before, -1)
        return Decoded(best, scores[:, 0])


def log_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    return (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).log_softmax(-1)
