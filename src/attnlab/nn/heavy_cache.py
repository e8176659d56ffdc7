"""A cache that keeps what was attended to: the heavy hitters and the last tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.nn.cache import KVCache, Owner

# Queries that are read at once while nothing is evicted: their weights are written out.
_RUN = 128


class HeavyHitterCache(KVCache):
    """Keys and values of at most heavy + recent tokens per key-value head: those attended to most, and the last ones.

    While the text has at most max(heavy + recent, prompt) tokens all are kept and seen. Then each token is read after
    the ones kept so far, and of all but the last `recent` the one that has received least attention is dropped:

        S ← S ∪ {i} ∖ argmin_{j ∈ S, j ≤ i − recent} A_j        A_j = Σ of the weights that queries gave to key j so far

    A sums over the queries of a key-value head, in float32 or more. One head's order of tokens is not another's.
    Source: arXiv 2306.14048 (H2O).
    """

    def __init__(self, heavy: int, recent: int, prompt: int = 0, owner: Owner = ()) -> None:
        super().__init__(owner=owner)
        self.heavy, self.recent, self.prompt = heavy, recent, prompt
        self.settled = False  # whether all there was room for has been read, and each token now takes another's place
        self.received = torch.zeros(0)  # A, from the first token on (B, Hkv, kept)
        self.positions = torch.zeros(0, dtype=torch.long)  # where each kept token stands, likewise

    @property
    def budget(self) -> int:
        return self.heavy + self.recent

    def numbers(self) -> int:
        tensors = (self.k, self.v, self.received, self.positions) if self.length else ()
        return sum(t.numel() for t in tensors)

    def bytes_per_token(self) -> int:
        """Bytes that one more token takes, over the whole batch: none once the cache is full."""
        return 0 if self.settled else super().bytes_per_token()

    def _filled(self, buffer: Tensor | None) -> Tensor:
        return super()._filled(buffer)[:, :, : self.budget if self.settled else None]

    def read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Heads `(B, H, n, D)` of the next n tokens, whose keys and values `(B, Hkv, n, D)` are added."""
        early = max(min(max(self.budget, self.prompt) - self.length, q.shape[2]), 0)
        sizes = [_RUN] * (early // _RUN) + [early % _RUN] * (early % _RUN > 0) + [1] * (q.shape[2] - early)
        out = []
        for new in zip(*(t.split(sizes, 2) for t in (q, k, v)), strict=True):
            out.append(self._step(*new) if self.settled else self._fill(*new))
        return torch.cat(out, 2)

    def _fill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Read a run of tokens after all before it."""
        begin, rows = self.length, q.shape[2]
        keys, values = self.append(k, v)
        heads, received = _attend(q, keys, values, torch.ones(rows, begin + rows, device=q.device).tril(begin).bool())
        at = torch.arange(begin, begin + rows, device=q.device).expand(*k.shape[:2], rows)
        if begin:
            received = received + F.pad(self.received, (0, rows))
            at = torch.cat((self.positions, at), 2)
        self.received, self.positions = received, at
        if self.length == max(self.budget, self.prompt):
            self._settle(keys, values)
        return heads

    def _settle(self, keys: Tensor, values: Tensor) -> None:
        """Keep what the budget allows of what has been read, with one place more, for the token that comes next."""
        self.settled = True
        best = self._old(self.received, self.positions).topk(self.budget, 2).indices.sort(2).values
        self.received, self.positions = (t.gather(2, best) for t in (self.received, self.positions))
        best = best.unsqueeze(3)
        self._k, self._v = (
            F.pad(t.gather(2, best.expand(-1, -1, -1, t.shape[3])), (0, 0, 0, 1)) for t in (keys, values)
        )

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Read one token after those kept, and put it in the place of the one that is dropped."""
        keys, values = self._k, self._v
        if keys is None or values is None:
            raise ValueError("the cache is empty")
        keys[:, :, -1:], values[:, :, -1:] = k, v
        heads, received = _attend(q, keys, values)
        self.length += 1
        at = self.positions
        received, new = (received + F.pad(self.received, (0, 1))).split([self.budget, 1], 2)
        drop = self._old(received, at).argmin(2, keepdim=True)
        self.received, self.positions = received.scatter(2, drop, new), at.scatter(2, drop, self.length - 1)
        drop = drop.unsqueeze(3)
        self._k, self._v = (_put(t, drop, new) for t, new in ((keys, k), (values, v)))
        return heads

    def _old(self, received: Tensor, at: Tensor) -> Tensor:
        """What each token has received; without end for the last ones, which stay."""
        return received.masked_fill(at >= self.length - self.recent, math.inf)


def _put(buffer: Tensor, place: Tensor, new: Tensor) -> Tensor:
    """`buffer (B, H, n, D)` with `new (B, H, 1, D)` at each head's own `place (B, H, 1, 1)`; in place if untrained."""
    place = place.expand(-1, -1, -1, new.shape[3])
    return buffer.scatter(2, place, new) if buffer.requires_grad else buffer.scatter_(2, place, new)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Heads, and the weights that each key received, `(B, Hkv, keys)`: summed over queries and heads of a group."""
    groups, rows = q.shape[1] // k.shape[1], q.shape[2]
    scores = (q * q.shape[3] ** -0.5).unflatten(1, (-1, groups)).flatten(2, 3) @ k.mT
    if seen is not None:
        scores = scores.masked_fill(~seen.repeat(groups, 1), -math.inf)
    weights = scores.softmax(3, dtype=torch.promote_types(q.dtype, torch.float32))
    heads = (weights.to(v.dtype) @ v).unflatten(2, (groups, rows)).flatten(1, 2)
    return heads, weights.detach().sum(2)
