"""From a choice of blocks to groups of tiles: which queries meet which keys, all heads and batches in one list.

Two ways, by the size of a query block. *By rows*: a block of queries is a tile, and its keys are some of the blocks
that it chose. *By columns*, where queries choose alone: a block of keys is met by queries that chose it. Either way a
query may be in several tiles, and what it gets from each adds up.

Pairs of blocks of which only a part is seen (the diagonal of a causal pattern, say) are cut finer: what is not seen at
all falls away, what is seen wholly joins the others, and only the rest needs masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnlab.patterns import And, Causal, Full, Pattern
from attnlab.routing import Clustered, Partition, Routed

# Queries that choose in blocks of at least so many are computed by rows.
ROWS_FROM = 4
# Queries per tile where a block of keys is met by single queries.
TILE = 128
# Scores of one tile, at most (but for a single pair of blocks): half the second-level cache of a core.
TILE_SCORES = 2**18
# Blocks of which only a part is seen are cut in four per side, as long as so many tokens are left.
FINE = 4
FINE_FROM = 32
# Pairs whose residual mask is evaluated at a time.
_ASKED = 2**22


@dataclass(frozen=True, eq=False)
class Group:
    """Tiles of one shape. `queries (T, m)` and `keys (T, n)` are numbers of units, of `rows` and `columns` tokens.

    `hidden (T or 1, m·rows or 1, n·columns)` is True for pairs that are not seen.
    """

    queries: Tensor
    keys: Tensor
    rows: int
    columns: int
    hidden: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys of a tile."""
        return self.queries.shape[1] * self.rows, self.keys.shape[1] * self.columns


@dataclass(frozen=True, eq=False)
class Plan:
    """Tiles over flat units: unit u of the queries of batch b and head h is number (b·H + h)·units + u.

    `queries` and `keys` pad blocks to one size.
    """

    queries: Padding
    keys: Padding
    groups: tuple[Group, ...]

    @property
    def pairs(self) -> int:
        """Scores that are computed, over all heads and batches."""
        return sum(len(g.keys) * g.shape[0] * g.shape[1] for g in self.groups)


@dataclass(frozen=True, eq=False)
class Padding:
    """Blocks of a sequence, each padded to `size` tokens: `token (count·size)` for each place, −1 in padding."""

    blocks: Partition
    size: int
    count: int
    token: Tensor | None  # None: the blocks are a view of the sequence

    @classmethod
    def of(cls, blocks: Partition, device: torch.device, *, single: bool = False) -> Padding:
        """Of all blocks, or (`single`) of every token by itself."""
        if single or (blocks.uniform and blocks.length == blocks.count * blocks.size):
            size = 1 if single else blocks.size
            return cls(blocks, size, blocks.length // size, None)
        place = torch.arange(blocks.size)
        token = blocks.edges[:-1, None] + place
        token = token.masked_fill(place >= blocks.numbers[:, None], -1)
        return cls(blocks, blocks.size, blocks.count, token.flatten().to(device))

    @cached_property
    def fine(self) -> Padding:
        """The same places in smaller blocks, where they can be cut."""
        size = self.size // FINE
        if self.token is not None or size < FINE_FROM or size * FINE != self.size:
            return self
        return Padding(Partition.of(size, self.blocks.length), size, self.count * FINE, None)

    def pad(self, x: Tensor) -> Tensor:
        """`x (B, H, N, D)` as flat tokens `(B·H·count·size, D)`, zero in padding."""
        if self.token is not None:
            x = x.index_select(2, self.token.clamp_min(0)).masked_fill_((self.token < 0)[:, None], 0.0)
        return x.reshape(-1, x.shape[-1]).contiguous()

    def unpad(self, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """Flat tokens back to `(B, H, N, D)`."""
        x = tokens.view(*shape, -1, tokens.shape[-1])
        if self.token is None:
            return x
        place = (self.token >= 0).nonzero()[:, 0]
        return x.index_select(2, place)  # places are in the order of their tokens


def parts(pattern: Pattern) -> tuple[Routed | Clustered, tuple[Pattern, ...]] | None:
    """The one choice in `pattern` and what else must hold; None if it is not of that form."""
    leaves = list(_leaves(pattern))
    chosen = [p for p in leaves if isinstance(p, (Routed, Clustered))]
    rest = dict.fromkeys(p for p in leaves if not isinstance(p, (Routed, Clustered, Full)))
    if len(chosen) != 1 or any(p.per_batch or p.per_head for p in rest):
        return None
    return chosen[0], tuple(rest)


def _leaves(pattern: Pattern) -> Iterator[Pattern]:
    if isinstance(pattern, And):
        yield from _leaves(pattern.left)
        yield from _leaves(pattern.right)
    else:
        yield pattern


def block_plan(routed: Routed, rest: tuple[Pattern, ...], batch: int, heads: int, kv_heads: int) -> Plan:
    """The tiles of a choice of blocks, narrowed by the static patterns `rest`."""
    device = routed.table.device
    table = routed.table.expand(batch, heads, -1, -1)
    by_rows = routed.queries.size >= ROWS_FROM
    queries, keys = Padding.of(routed.queries, device, single=not by_rows), Padding.of(routed.keys, device)
    some, whole = _cover(rest, routed.queries, keys, device)
    first = first_unit(batch, heads, kv_heads, device)
    groups: list[Group] = []
    if not by_rows:
        parts = (table & whole, None), (table & (some & ~whole), rest)
        for chosen, masks in parts:
            groups += _by_columns(chosen, masks, first, routed.queries, queries, keys)
        return Plan(queries, keys, tuple(groups))
    groups += _by_rows(table & whole, first, queries, keys)
    partial = some & ~whole
    if bool(partial.any()):
        fine = queries.fine, keys.fine
        some, whole = _cover(rest, fine[0].blocks, fine[1], device)
        partial = table & partial
        for dim, times in ((2, fine[0].count // queries.count), (3, fine[1].count // keys.count)):
            partial = partial.repeat_interleave(times, dim)
        groups += _by_rows(partial & whole, first, *fine)
        groups += _masked(partial & (some & ~whole), rest, first, *fine)
    return Plan(queries, keys, tuple(groups))


def _by_rows(table: Tensor, first: Tensor, queries: Padding, keys: Padding) -> Iterator[Group]:
    """Tiles of one query block and as many of its blocks as fit, all wholly seen."""
    counts = table.sum(-1).flatten()
    most = int(counts.max())
    # Each tile's list: chosen blocks come first.
    order = table.byte().argsort(dim=-1, descending=True, stable=True)[..., :most].flatten(0, 2)
    order += first.repeat_interleave(queries.count)[:, None] * keys.count
    size = max(1, TILE_SCORES // (queries.size * keys.size))
    for n in range(1, min(size, most) + 1):
        # Full tiles of `size` blocks from the list's beginning, and one of what is left over.
        starts = range(0, most, size) if n == size else [0]
        found = []
        for start in starts:
            tiles = (counts - start >= size if n == size else counts % size == n).nonzero()[:, 0]
            begin = start if n == size else (counts[tiles] - n)[:, None]
            places = begin + torch.arange(n, device=table.device).expand(len(tiles), n)
            found.append((tiles, order[tiles].gather(1, places)))
        tiles, chosen = (torch.cat(x) for x in zip(*found, strict=True))
        if len(tiles):
            yield Group(tiles[:, None], chosen, queries.size, keys.size)


def _masked(
    table: Tensor, rest: tuple[Pattern, ...], first: Tensor, queries: Padding, keys: Padding
) -> Iterator[Group]:
    """Tiles of one query block and one key block of which a part is seen."""
    head, query, block = table.flatten(0, 1).nonzero().unbind(1)
    if len(head):
        hidden = _hidden(query[:, None], block[:, None], rest, queries, keys)
        units = (head * queries.count + query)[:, None], (first[head] * keys.count + block)[:, None]
        yield Group(*units, queries.size, keys.size, hidden)


def _by_columns(
    table: Tensor, rest: tuple[Pattern, ...] | None, first: Tensor, choosers: Partition, queries: Padding, keys: Padding
) -> Iterator[Group]:
    """Tiles of up to `TILE` single queries that chose the same block; the last of each block may be padded."""
    device = table.device
    if choosers.count != queries.count:
        table = table[:, :, choosers.block(torch.arange(queries.count, device=device))]
    # (b·H + h, block, query) of every choice, block by block.
    head, block, query = table.flatten(0, 1).transpose(1, 2).nonzero().unbind(1)
    if not len(head):
        return
    column = head * keys.count + block
    counts = column.bincount(minlength=len(first) * keys.count)
    size = TILE
    while size > 16 and size * int(counts.count_nonzero()) > 2 * len(column):
        size //= 2  # blocks are met by few: more would be padding than queries
    tiles = -(-counts // size)
    start = (tiles.cumsum(0) - tiles) * size - (counts.cumsum(0) - counts)
    # Places left over take the query after the last, which is nobody's.
    listed = torch.full((int(tiles.sum()) * size,), len(first) * queries.count, device=device)
    listed[start[column] + torch.arange(len(column), device=device)] = head * queries.count + query
    listed = listed.view(-1, size)
    owner = torch.repeat_interleave(torch.arange(len(tiles), device=device), tiles)
    head, block = owner // keys.count, owner % keys.count
    hidden = None
    if rest is not None:
        hidden = _hidden(listed % queries.count, block[:, None], rest, queries, keys)
    yield Group(listed, (first[head] * keys.count + block)[:, None], 1, keys.size, hidden)


def first_unit(batch: int, heads: int, kv_heads: int, device: torch.device) -> Tensor:
    """The number b·Hkv + h·Hkv/H of the keys of each (b·H + h)."""
    b, h = torch.arange(batch, device=device)[:, None], torch.arange(heads, device=device)
    return (b * kv_heads + h // (heads // kv_heads)).flatten()


def _hidden(units: Tensor, blocks: Tensor, rest: tuple[Pattern, ...], queries: Padding, keys: Padding) -> Tensor:
    """Which pairs of query units `(T, m)` and key blocks `(T, n)` are not seen."""
    if rest == (Causal(),) and units.shape[1] == blocks.shape[1] == 1 and queries.token is None and keys.token is None:
        # All that counts is how far the block lies behind the queries.
        distance = units * queries.size - blocks * keys.size
        if bool((distance == distance[0]).all()):
            units, blocks = units[:1], blocks[:1]
    kinds, inverse = torch.cat([units, blocks], 1).unique(dim=0, return_inverse=True)
    q, k = _tokens(queries, kinds[:, : units.shape[1]]), _tokens(keys, kinds[:, units.shape[1] :])
    pieces = zip(*(x.split(max(1, _ASKED // (q.shape[1] * k.shape[1]))) for x in (q, k)), strict=True)
    hidden = torch.cat([~seen(rest, *piece) for piece in pieces])
    return hidden if len(hidden) == 1 else hidden[inverse]


def seen(rest: tuple[Pattern, ...], q: Tensor, k: Tensor) -> Tensor:
    """Which pairs of query tokens `(T, m)` and key tokens `(T, n)`, −1 in padding, are seen: `(T, m or 1, n)`."""
    zero = torch.zeros((), dtype=torch.long, device=k.device)
    found = (k >= 0)[:, None]
    for pattern in rest:
        found = found & pattern.allows(zero, zero, q.clamp_min(0)[:, :, None], k.clamp_min(0)[:, None])
    return found


def _tokens(side: Padding, units: Tensor) -> Tensor:
    """The tokens `(T, n·size)` of units `(T, n)`, −1 in padding."""
    places = units[..., None] * side.size + torch.arange(side.size, device=units.device)
    return (places if side.token is None else side.token[places]).flatten(1)


def _cover(rest: tuple[Pattern, ...], queries: Partition, keys: Padding, device: torch.device) -> tuple[Tensor, Tensor]:
    """For blocks of queries and keys `(Tq or 1, C)`: whether some pair of them is seen, and whether every place is."""
    whole = torch.ones(1, keys.count, dtype=torch.bool, device=device)
    if keys.token is not None:
        whole = (keys.blocks.numbers == keys.size).to(device)[None]
    some = torch.ones_like(whole)
    for pattern in rest:
        one, every = cover(pattern, queries, keys.blocks, device)
        some, whole = some & one, whole & every
    return some, whole


def cover(pattern: Pattern, queries: Partition, keys: Partition, device: torch.device) -> tuple[Tensor, Tensor]:
    """For blocks of queries and keys `(Tq, C)`: whether some pair of them is seen, and whether every pair is."""
    if isinstance(pattern, Causal):
        first, last = queries.edges[:-1, None], queries.edges[1:, None] - 1
        return (keys.edges[:-1] <= last).to(device), (keys.edges[1:] - 1 <= first).to(device)
    return _counted(pattern, queries, keys, device)


def _counted(pattern: Pattern, queries: Partition, keys: Partition, device: torch.device) -> tuple[Tensor, Tensor]:
    """`cover` by asking about every pair, a stripe of queries at a time."""
    zero = torch.zeros((), dtype=torch.long, device=device)
    k = torch.arange(keys.length, device=device)
    owner = queries.block(torch.arange(queries.length, device=device))
    columns = keys.block(k)
    seen = torch.zeros(queries.count, keys.count, dtype=torch.long, device=device)
    for q in torch.arange(queries.length, device=device).split(max(1, _ASKED // keys.length)):
        pairs = pattern.allows(zero, zero, q[:, None], k).expand(len(q), len(k)).long()
        by_block = torch.zeros(len(q), keys.count, dtype=torch.long, device=device).index_add_(1, columns, pairs)
        seen.index_add_(0, owner[q], by_block)
    whole = queries.numbers[:, None] * keys.numbers
    return seen > 0, seen == whole.to(device)
