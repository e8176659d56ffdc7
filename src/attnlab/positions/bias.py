"""Biases on scores that depend on where query and key stand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.positions.base import IndexBias, Position
from attnlab.problem import Lookup


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of ALiBi, float64: 2^(−8/H), 2^(−16/H), … for H a power of two.

    Otherwise those of the power of two below H, then every other one of the power above.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    below = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8.0 * torch.arange(1, below + 1, dtype=torch.float64) / below)
    if below < heads:
        slopes = torch.cat((slopes, alibi_slopes(2 * below)[::2][: heads - below]))
    return slopes


class ALiBi(Position):
    """Subtracts from each score a multiple of the distance, steeper for some heads than for others.

        bias_ij = −m_h |i − j|        m_h from `alibi_slopes`

    No parameters and any length. `signed=True` gives m_h (j − i), which rewards keys ahead of the query: the same for
    causal attention. Source: arXiv 2108.12409.
    """

    def __init__(self, heads: int, *, signed: bool = False) -> None:
        super().__init__()
        self.heads, self.signed = heads, signed
        with torch.device("cpu"):
            # Not a buffer: a model in bfloat16 still wants exact slopes.
            self.slopes = alibi_slopes(heads).float()

    def of(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The bias of head `h` between positions `q` and `k`."""
        return self.slopes.to(h.device)[h] * (k - q if self.signed else -(k - q).abs())

    def bias(self, nq: int, nk: int, offset: int = 0) -> IndexBias:
        return self.of if offset == 0 else lambda b, h, q, k: self.of(b, h, q + offset, k)


class TableBias(Position):
    """A learned bias for each head and each displacement inside a window of any number of axes, as in Swin.

        bias_ij = table[h, place(i) − place(j)]        table (Π (2W−1), H), zero at first or as `std` says

    Tokens are the window's places in row-major order: window=(7, 7) for Swin, (n,) for a sequence of at most n.
    Source: arXiv 2103.14030.
    """

    def __init__(self, window: tuple[int, ...], heads: int, *, std: float = 0.02) -> None:
        super().__init__()
        if not window or min(window) < 1:
            raise ValueError(f"window must be one or more positive sizes, got {window}")
        self.window, self.heads = tuple(window), heads
        self.table = nn.Parameter(torch.empty(math.prod(2 * w - 1 for w in window), heads))
        nn.init.trunc_normal_(self.table, std=std)

    def bias(self, nq: int, nk: int, offset: int = 0) -> Lookup:
        room = math.prod(self.window)
        if max(nq + offset, nk) > room:
            raise ValueError(f"window {self.window} has {room} places, got {max(nq + offset, nk)} tokens")
        return Lookup(self.table, Displacement(self.window, offset))

    def matrix(self) -> Tensor:
        """The bias `(H, N, N)` of a whole window, N = Π W."""
        return spread(self.table, self.window)

    @torch.no_grad()
    def resize(self, window: tuple[int, ...]) -> None:
        """Go on with another window of two axes: the table is interpolated bilinearly (MaxViT, arXiv 2204.01697)."""
        old, new = ([2 * w - 1 for w in sizes] for sizes in (self.window, window))
        if len(old) != 2 or len(new) != 2:
            raise ValueError(f"window must have two axes, as the table's {self.window}, got {window}")
        table = F.interpolate(self.table.mT.unflatten(1, old)[None], new, mode="bilinear")[0].flatten(1).mT
        self.window, self.table = tuple(window), nn.Parameter(table.contiguous())


def spread(table: Tensor, window: tuple[int, ...]) -> Tensor:
    """A table `(Π (2W−1), H)` of displacements to the bias `(H, N, N)` between all places of the window."""
    rows = (_rows if torch.compiler.is_compiling() else _kept_rows)(window, table.device)
    places = math.prod(window)
    return table.index_select(0, rows).view(places, places, -1).permute(2, 0, 1).contiguous()


def _rows(window: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, it may be saved for a backward pass later
        places = torch.arange(math.prod(window), device=device)
        return Displacement(window)(places[:, None], places).flatten()


_kept_rows = lru_cache(maxsize=32)(_rows)


@dataclass(frozen=True)
class Displacement:
    """The row of a `TableBias` for two tokens of a window, queries counted from `offset` on."""

    window: tuple[int, ...]
    offset: int = 0

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        q = q + self.offset
        row, stride = torch.zeros_like(q - k), 1
        for size in reversed(self.window):
            row = row + (q % size - k % size + size - 1) * stride
            q, k, stride = q // size, k // size, stride * (2 * size - 1)
        return row


def buckets(distance: Tensor, *, count: int = 32, limit: int = 128, causal: bool = True) -> Tensor:
    """T5's bucket of each `distance` = query − key: small distances one each, larger ones on a log scale to `limit`.

    Not causal: half of the buckets are for keys ahead of the query. Causal: keys ahead share bucket 0 with distance 0.
    """
    first = torch.zeros_like(distance)
    if causal:
        distance = distance.clamp_min(0)
    else:
        count //= 2
        first = (distance < 0) * count
        distance = distance.abs()
    exact = count // 2
    # Float32 as in T5: the borders of the large buckets lie where its rounding puts them.
    log = torch.log(distance.clamp_min(1).float() / exact) / math.log(limit / exact)
    large = (exact + (log * (count - exact)).long()).clamp_max(count - 1)
    return first + torch.where(distance < exact, distance, large)


class BucketBias(Position):
    """A learned bias for each head and each of T5's buckets of the distance: any length with `count` · H numbers.

    Source: arXiv 1910.10683. See `buckets`.
    """

    def __init__(self, heads: int, *, count: int = 32, limit: int = 128, causal: bool = True) -> None:
        super().__init__()
        if count < (2 if causal else 4) or count % 2 or limit <= count // 2:
            raise ValueError(f"count must be even and limit greater than half of it, got {count} and {limit}")
        self.heads, self.count, self.limit, self.causal = heads, count, limit, causal
        self.table = nn.Parameter(torch.randn(count, heads) * 0.02)

    def bias(self, nq: int, nk: int, offset: int = 0) -> Lookup:
        return Lookup(self.table, Bucket(self.count, self.limit, self.causal, offset))


@dataclass(frozen=True)
class Bucket:
    """The row of a `BucketBias` for two tokens, queries counted from `offset` on."""

    count: int
    limit: int
    causal: bool
    offset: int = 0

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return buckets(q + self.offset - k, count=self.count, limit=self.limit, causal=self.causal)
