"""What a pattern is: a question about indices, from which everything else has a default."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Where a query may look, as data: frozen, comparable, hashable, printable and drawable.

    A subclass defines `allows` and nothing else is required: `matrix`, `density`, `reach` and `draw` follow from it,
    and so do the key lists of the fast backends. Patterns combine with `&`, `|` and `~`.
    """

    # Whether `allows` depends on the batch or the head; if not, one matrix serves all.
    per_batch = False
    per_head = False

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """True where query `q` may see key `k`: a bool tensor of the broadcast shape of four integer index tensors.

        This is FlexAttention's mask_mod signature, so a pattern's `allows` is a mask_mod.
        """
        raise NotImplementedError

    def check(self, nq: int, nk: int) -> None:
        """Raise ValueError if `nq` queries and `nk` keys do not fit this pattern (a grid of another size, say)."""

    def query_tiles(self, nq: int) -> Tensor | None:
        """Which queries share keys: every query once in a `(T, b)` tensor of tiles padded with −1.

        None is tiles of adjacent queries. Only speed depends on it.
        """
        return None

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        """For each tile of queries `(T, b)`, ascending keys `(T, n)`, padded with −1, among which are all it may see.

        None if the pattern cannot tell: then `allows` is asked about every key. Only speed depends on it.
        """
        return None

    def at(self, b: int, h: int) -> Pattern:
        """What one batch entry and head sees of a pattern that depends on them."""
        if not (self.per_batch or self.per_head):
            return self
        from attnlab.patterns.combine import At

        return At(self, b, h)

    def starting_at(self, offset: int) -> Pattern:
        """The same pattern seen by queries that begin at position `offset`: what decoding with a cache needs."""
        from attnlab.patterns.combine import Shifted

        return self if offset == 0 else Shifted(self, offset)

    def __and__(self, other: Pattern) -> Pattern:
        from attnlab.patterns.combine import And

        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        from attnlab.patterns.combine import Or

        return Or(self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        from attnlab.patterns.combine import Not

        return Not(self)

    def matrix(
        self,
        nq: int,
        nk: int | None = None,
        *,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The pattern as a bool matrix `(nq, nk)`, or `(B, H, nq, nk)` where it depends on the batch or the head.

        The dimension that it does not depend on has size 1. Memory nq·nk: for tests, pictures and small problems.
        """
        nk = nq if nk is None else nk
        self.check(nq, nk)
        b = torch.arange(batch if self.per_batch else 1, device=device).view(-1, 1, 1, 1)
        h = torch.arange(heads if self.per_head else 1, device=device).view(-1, 1, 1)
        q = torch.arange(nq, device=device).view(-1, 1)
        k = torch.arange(nk, device=device)
        seen = torch.broadcast_to(self.allows(b, h, q, k), (len(b), len(h), nq, nk))
        return seen if self.per_batch or self.per_head else seen[0, 0]

    def density(self, nq: int, nk: int | None = None) -> float:
        """The share of (query, key) pairs that the pattern allows, counted a stripe of queries at a time."""
        nk = nq if nk is None else nk
        self.check(nq, nk)
        zero, k = torch.zeros((), dtype=torch.long), torch.arange(nk)
        stripes = torch.arange(nq).split(max(1, 2**22 // max(nk, 1)))
        seen = sum(int(self.allows(zero, zero, q[:, None], k).expand(len(q), nk).sum()) for q in stripes)
        return seen / max(nq * nk, 1)

    def reach(self, depth: int, n: int) -> Tensor:
        """How far information travels in `depth` layers: bool `(n, n)`, True where query i can depend on token j.

        A token always keeps what it knows (the residual path), so the diagonal is True.
        """
        step = self.matrix(n)
        if step.dim() == 4:
            step = step.any(dim=(0, 1))
        step = (step | torch.eye(n, dtype=torch.bool)).float()
        total = torch.eye(n)
        for _ in range(depth):
            total = (step @ total > 0).float()
        return total.bool()

    def draw(self, nq: int, nk: int | None = None, *, width: int = 64) -> str:
        """The pattern as text, two rows of queries per line: for the terminal."""
        from attnlab.patterns.draw import draw

        return draw(self, nq, nk, width=width)


def key_range(first: Tensor, last: Tensor, nk: int) -> Tensor:
    """Keys first … last of each tile, cut to 0 … nk − 1: `(T, n)`, padded with −1."""
    first, last = first.clamp_min(0), last.clamp_max(nk - 1)
    keys = first[:, None] + torch.arange(max(0, int((last - first).max()) + 1), device=first.device)
    return keys.masked_fill(keys > last[:, None], -1)


def sorted_unique(keys: Tensor) -> Tensor:
    """Each row of `keys (T, n)` ascending and without repeats, the places left over filled with −1 at the end."""
    keys = keys.masked_fill(keys < 0, torch.iinfo(keys.dtype).max).sort(1).values
    repeat = torch.zeros_like(keys, dtype=torch.bool)
    repeat[:, 1:] = keys[:, 1:] == keys[:, :-1]
    keys = keys.masked_fill(repeat, torch.iinfo(keys.dtype).max).sort(1).values
    keys = keys.masked_fill(keys == torch.iinfo(keys.dtype).max, -1)
    return keys[:, : int((keys >= 0).sum(1).max())] if keys.numel() else keys
