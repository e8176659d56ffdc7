"""Attention matrices made small enough for a page: 8 bits a weight, and of large ones what a reader can tell apart.

A row keeps its `top` strongest keys, each with its weight, and of all other keys the mean over groups (tiles of
patches, or neighbouring tokens). Small matrices have a group for each key and are whole. The page's script unpacks the
same way.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BUDGET = 13_500_000  # bytes before deflate and base64, which leaves room for the rest of 20 MB
_UNITS = 2048  # a scale s is kept as −log2(s) in 2048ths
# What is tried in order: tokens a query group is wide, strongest keys, groups of the other keys.
_LEVELS = [
    *((1, 16, 64), (1, 12, 64), (1, 8, 64), (1, 8, 36), (1, 8, 25), (1, 6, 16), (1, 4, 16)),
    *((2, 8, 36), (3, 8, 36), (4, 8, 25), (6, 8, 25), (8, 6, 16), (12, 6, 16), (16, 4, 16)),
]


@dataclass(frozen=True)
class Places:
    """How tokens lie: `start` single ones (class tokens), then a grid of patches or a text, then single ones again."""

    count: int
    grid: tuple[int, int] | None = None
    start: int = 0

    def groups(self, width: int) -> list[int]:
        """The group of each token: tiles of width×width patches, `width` neighbouring tokens of a text."""
        if self.grid is None:
            return [i // width for i in range(self.count)]
        across, tiles = math.ceil(self.grid[1] / width), self._tiles(width)
        before, loose = math.ceil(self.start / self._loose(width)), self._loose(width)
        patches = [r // width * across + c // width for r in range(self.grid[0]) for c in range(self.grid[1])]
        after = self.count - self.start - len(patches)
        return [
            *(i // loose for i in range(self.start)),
            *(before + t for t in patches),
            *(before + tiles + i // loose for i in range(after)),
        ]

    def count_groups(self, width: int) -> int:
        if self.grid is None:
            return math.ceil(self.count / width)
        loose, after = self._loose(width), self.count - self.start - math.prod(self.grid)
        return math.ceil(self.start / loose) + self._tiles(width) + math.ceil(after / loose)

    def _tiles(self, width: int) -> int:
        return 1 if self.grid is None else math.ceil(self.grid[0] / width) * math.ceil(self.grid[1] / width)

    def _loose(self, width: int) -> int:
        """How many tokens beside the grid share a group: none if they are few, else (text around an image) as many as
        patches do."""
        beside = self.count - (0 if self.grid is None else math.prod(self.grid))
        return 1 if beside <= 16 else width * width

    def width_for(self, most: int) -> int:
        """The narrowest groups of which there are at most `most`, or of which there are no fewer to have."""
        widest = max(self.grid or (self.count, 1))
        return next((w for w in range(1, widest) if self.count_groups(w) <= most), widest)


@dataclass(frozen=True)
class Layout:
    """What of a layer's matrices is kept: query groups, key groups and strongest keys; `whole` if nothing is lost."""

    heads: int
    queries: Places
    keys: Places
    query_width: int
    key_width: int
    top: int

    @property
    def rows(self) -> int:
        """Of all heads."""
        return self.heads * self.queries.count_groups(self.query_width)

    @property
    def groups(self) -> int:
        return self.keys.count_groups(self.key_width)

    @property
    def whole(self) -> bool:
        return self.query_width == 1 and self.key_width == 1

    @property
    def bytes(self) -> int:
        return self.rows * (4 + 3 * self.top + self.groups)


def layouts(shapes: Sequence[tuple[int, Places, Places]], budget: int = BUDGET) -> list[Layout]:
    """For layers of (heads, queries, keys): as much of each as goes into `budget` bytes together."""
    for level in (None, *_LEVELS):
        found = [_layout(*shape, level) for shape in shapes]
        if sum(layout.bytes for layout in found) <= budget:
            return found
    tokens, heads = max(q.count for _, q, _ in shapes), sum(h for h, _, _ in shapes)
    raise ValueError(f"{heads} heads with {tokens} tokens do not fit a page: choose fewer layers, heads or tokens")


def _layout(heads: int, queries: Places, keys: Places, level: tuple[int, int, int] | None) -> Layout:
    whole = Layout(heads, queries, keys, 1, 1, 0)
    if level is None:
        return whole
    wide, top, most = level
    cut = Layout(heads, queries, keys, wide, keys.width_for(most), min(top, keys.count))
    return cut if cut.bytes < whole.bytes else whole


def pack(weights: Tensor, layout: Layout) -> tuple[bytes, float]:
    """`weights (H, Nq, Nk)` deflated, and the share of the attention that is kept key by key, mean over rows."""
    weights = weights.detach().float().cpu()
    queries, keys = _tensor(layout.queries, layout.query_width), _tensor(layout.keys, layout.key_width)
    rows, groups = layout.rows // layout.heads, layout.groups
    if rows < len(queries):
        counts = queries.bincount()[:, None]
        weights = weights.new_zeros(len(weights), rows, len(keys)).index_add_(1, queries, weights) / counts
    strongest, at = weights.topk(layout.top, dim=-1)
    rest = weights.scatter(-1, at, 0.0)
    left = torch.ones_like(weights).scatter_(-1, at, 0.0)
    sums = weights.new_zeros(len(weights), rows, groups).index_add_(2, keys, rest)
    coarse = sums / weights.new_zeros(len(weights), rows, groups).index_add_(2, keys, left).clamp_min(1)
    parts: list[np.ndarray] = []
    for values in (strongest, coarse):
        code, scaled = _codes(values)
        parts += [code.astype("<u2"), scaled]
    index = at.numpy().astype(np.uint16)
    parts += [(index & 255).astype(np.uint8), (index >> 8).astype(np.uint8)]
    total = weights.sum()
    kept = 1.0 if layout.whole else float(strongest.sum() / total) if total > 0 else 1.0
    return zlib.compress(b"".join(part.tobytes() for part in parts), 6), kept


def unpack(packed: bytes, layout: Layout) -> Tensor:
    """`(H, Nq, Nk)`: what the page shows; rows of a query group are alike."""
    raw, heads, rows = zlib.decompress(packed), layout.heads, layout.rows // layout.heads
    start = 0

    def take(kind: str, width: int) -> np.ndarray:
        nonlocal start
        size = heads * rows * width * np.dtype(kind).itemsize
        found = np.frombuffer(raw[start : start + size], kind).reshape(heads, rows, width)
        start += size
        return found

    strongest = _values(take("<u2", 1), take("u1", layout.top))
    coarse = _values(take("<u2", 1), take("u1", layout.groups))
    index = take("u1", layout.top).astype(np.int64) + 256 * take("u1", layout.top).astype(np.int64)
    weights = torch.from_numpy(coarse)[:, :, _tensor(layout.keys, layout.key_width)]
    weights = weights.scatter(-1, torch.from_numpy(index), torch.from_numpy(strongest))
    return weights[:, _tensor(layout.queries, layout.query_width)]


def _tensor(places: Places, width: int) -> Tensor:
    return torch.tensor(places.groups(width))


def _codes(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Each row's largest number as a code, and √(number / largest) in 255ths: small weights keep their digits."""
    if values.shape[-1] == 0:
        return np.full((*values.shape[:-1], 1), 65535), np.zeros(values.shape, np.uint8)
    largest = values.amax(-1, keepdim=True)
    code = (-largest.clamp_min(2.0**-31).log2() * _UNITS).round().clamp(0, 65534).masked_fill(largest <= 0, 65535)
    scale = torch.where(code < 65535, (-code / _UNITS).exp2(), torch.ones(()))
    return code.numpy(), (255 * (values / scale).clamp(0, 1).sqrt()).round().numpy().astype(np.uint8)


def _values(code: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    scale = np.where(code < 65535, np.exp2(-code.astype(np.float32) / _UNITS), 0).astype(np.float32)
    return scale * (scaled.astype(np.float32) / 255) ** 2


def quantised(values: Tensor) -> tuple[bytes, list[float]]:
    """Rows `(M, n)` as √(value / the row's largest) in 255ths, and the largest of each: for small pictures."""
    largest = values.amax(-1, keepdim=True)
    codes = (255 * (values / largest.clamp_min(1e-30)).clamp(0, 1).sqrt()).round()
    return codes.to(torch.uint8).cpu().numpy().tobytes(), [float(f"{x:.4g}") for x in largest.flatten().tolist()]
