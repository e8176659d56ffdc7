"""From a choice of blocks to groups of tiles: which queries meet which keys, all heads and batches in one list.

Two ways, by the size of a query block. *By rows*: a block of queries is a tile, and its keys are the blocks that it
chose. *By columns*, where queries choose alone: a block of keys is met by all queries that chose it, some at a time,
and what a query gets from its several blocks adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnlab.patterns import And, Causal, Full, Pattern
from attnlab.routing import Partition, Routed

# Queries that choose in blocks of at least so many are computed by rows.
ROWS_FROM = 16
# Queries per tile where a block of keys is met by single queries.
TILE = 128
# Pairs whose residual mask is evaluated at a time.
_ASKED = 2**22


@dataclass(frozen=True, eq=False)
class Group:
    """Tiles of one shape. `queries (T,)` are units of `Plan.unit` queries, or `(T, n)` of them; `keys (T, n)` units.

    `mask`, added to the scores of the last keys of each tile, is `(T or 1, queries or 1, masked keys)`: 0 and −inf.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Tiles over flat units: unit u of the queries of batch b and head h is number (b·H + h)·units + u.

    `queries` and `keys` pad blocks to one size. `once` says that no query is in two tiles.
    """

    queries: Padding
    keys: Padding
    groups: tuple[Group, ...]
    once: bool

    @property
    def pairs(self) -> int:
        """Scores that are computed, over all heads and batches."""
        width = self.keys.size
        return sum(g.keys.numel() * width * (g.queries.numel() * self.queries.size // len(g.keys)) for g in self.groups)


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
        token = token.masked_fill(place >= blocks.sizes[:, None], -1)
        return cls(blocks, blocks.size, blocks.count, token.flatten().to(device))

    def pad(self, x: Tensor) -> Tensor:
        """`x (B, H, N, D)` as flat units `(B·H·count, size·D)`, zero in padding."""
        if self.token is not None:
            x = x.index_select(2, self.token.clamp_min(0)).masked_fill_((self.token < 0)[:, None], 0.0)
        return x.reshape(-1, self.size * x.shape[-1])

    def unpad(self, units: Tensor, shape: tuple[int, int], dim: int) -> Tensor:
        """Flat units back to `(B, H, N, D)`."""
        x = units.view(*shape, -1, dim)
        if self.token is None:
            return x
        place = (self.token >= 0).nonzero()[:, 0]
        return x.index_select(2, place)  # places are in the order of their tokens


def parts(pattern: Pattern) -> tuple[Routed, tuple[Pattern, ...]] | None:
    """The one choice of blocks in `pattern` and what else must hold; None if it is not of that form."""
    leaves = list(_leaves(pattern))
    routed = [p for p in leaves if isinstance(p, Routed)]
    rest = dict.fromkeys(p for p in leaves if not isinstance(p, (Routed, Full)))
    if len(routed) != 1 or any(p.per_batch or p.per_head for p in rest):
        return None
    return routed[0], tuple(rest)


def _leaves(pattern: Pattern) -> Iterator[Pattern]:
    if isinstance(pattern, And):
        yield from _leaves(pattern.left)
        yield from _leaves(pattern.right)
    else:
        yield pattern


def plan(routed: Routed, rest: tuple[Pattern, ...], batch: int, heads: int, kv_heads: int) -> Plan:
    """The tiles of a choice of blocks, narrowed by the static patterns `rest`."""
    device = routed.table.device
    table, partial = routed.table, torch.zeros_like(routed.table[:1, :1])
    for pattern in rest:
        some, whole = cover(pattern, routed.queries, routed.keys, device)
        table, partial = table & some, partial | ~whole
    by_rows = routed.queries.size >= ROWS_FROM
    keys = Padding.of(routed.keys, device)
    queries = Padding.of(routed.queries, device, single=not by_rows)
    if keys.token is not None:
        partial = partial | (routed.keys.sizes < routed.keys.size).to(device)
    make = _by_rows if by_rows else _by_columns
    groups = make(table, partial, rest, queries, keys, (batch, heads, kv_heads))
    return Plan(queries, keys, tuple(groups), once=by_rows)


def _by_rows(
    table: Tensor, partial: Tensor, rest: tuple[Pattern, ...], queries: Padding, keys: Padding,
    shape: tuple[int, int, int],
) -> Iterator[Group]:  # fmt: skip
    """Tiles with as many whole and as many masked blocks each: the whole ones first."""
    batch, heads, kv_heads = shape
    # 2 for whole blocks, 1 for blocks to be masked, 0 for the others; sorted, they are each tile's list.
    rank = (table.byte() * 2 - (table & partial).byte()).expand(batch, heads, -1, -1)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    counts = (rank == 2).sum(-1), (rank == 1).sum(-1)
    kinds = (counts[0] * (keys.count + 1) + counts[1]).flatten()
    first = _first_unit(batch, heads, kv_heads, keys.count, table.device)
    order = order.flatten(0, 2)
    for kind in kinds.unique().tolist():
        whole, masked = divmod(kind, keys.count + 1)
        if whole + masked == 0:
            continue
        tiles = (kinds == kind).nonzero()[:, 0]
        chosen = order[tiles, : whole + masked]
        mask = None
        if masked:
            mask = _mask(tiles % table.shape[2], chosen[:, whole:], rest, queries, keys)
        yield Group(tiles, chosen + first[tiles // table.shape[2], None], mask)


def _by_columns(
    table: Tensor, partial: Tensor, rest: tuple[Pattern, ...], queries: Padding, keys: Padding,
    shape: tuple[int, int, int],
) -> Iterator[Group]:  # fmt: skip
    """Tiles of up to `TILE` single queries that chose the same block; the last of each block may be padded."""
    batch, heads, kv_heads = shape
    device = table.device
    total = batch * heads * queries.count
    first = _first_unit(batch, heads, kv_heads, keys.count, device)
    if queries.blocks.count != queries.count:
        owner = queries.blocks.block(torch.arange(queries.count, device=device))
        table, partial = table[:, :, owner], partial[:, :, owner if partial.shape[2] > 1 else slice(None)]
    table = table.expand(batch, heads, -1, -1)
    for masked in (False, True):
        chosen = table & (partial if masked else ~partial)
        # (b·H + h, block, query) of every choice, block by block.
        head, block, query = chosen.flatten(0, 1).transpose(1, 2).nonzero().unbind(1)
        if not len(head):
            continue
        column = head * keys.count + block
        counts = column.bincount(minlength=batch * heads * keys.count)
        tiles = -(-counts // TILE)
        start = tiles.cumsum(0) - tiles
        before = counts.cumsum(0) - counts
        place = start[column] * TILE + torch.arange(len(column), device=device) - before[column]
        # Places left over take the query after the last, which is nobody's.
        listed = torch.full((int(tiles.sum()) * TILE,), total, device=device)
        listed[place] = head * queries.count + query
        owner = torch.repeat_interleave(torch.arange(len(tiles), device=device), tiles)
        listed = listed.view(-1, TILE)
        unit = (first[owner // keys.count] + owner % keys.count)[:, None]
        mask = None
        if masked:
            mask = _mask(listed % queries.count, (owner % keys.count)[:, None], rest, queries, keys)
        yield Group(listed, unit, mask)


def _first_unit(batch: int, heads: int, kv_heads: int, count: int, device: torch.device) -> Tensor:
    """The number of the first key block of each (b·H + h)."""
    b, h = torch.arange(batch, device=device)[:, None], torch.arange(heads, device=device)
    return ((b * kv_heads + h // (heads // kv_heads)) * count).flatten()


def _mask(units: Tensor, blocks: Tensor, rest: tuple[Pattern, ...], queries: Padding, keys: Padding) -> Tensor:
    """What to add to the scores of query units `(T,)` or `(T, n)` with key blocks `(T, m)`."""
    one = torch.cat([units[:, None] if units.dim() == 1 else units, blocks], 1)
    if rest == (Causal(),) and units.dim() == 1 and queries.token is None and keys.token is None:
        # All that counts is how far the blocks lie behind the queries.
        distance = units[:, None] * queries.size - blocks * keys.size
        if bool((distance == distance[:1]).all()):
            one, units, blocks = one[:1], units[:1], blocks[:1]
    kinds, inverse = (one, None) if len(one) == 1 else one.unique(dim=0, return_inverse=True)
    split = 1 if units.dim() == 1 else units.shape[1]
    q, k = _tokens(queries, kinds[:, :split]), _tokens(keys, kinds[:, split:])
    masks = []
    zero = torch.zeros((), dtype=torch.long, device=k.device)
    for some, listed in zip(*(x.split(max(1, _ASKED // (q.shape[1] * k.shape[1]))) for x in (q, k)), strict=True):
        seen = (listed >= 0)[:, None]
        for pattern in rest:
            seen = seen & pattern.allows(zero, zero, some.clamp_min(0)[:, :, None], listed.clamp_min(0)[:, None])
        masks.append(torch.zeros(seen.shape, device=k.device).masked_fill_(~seen, -torch.inf))
    mask = torch.cat(masks)
    return mask if inverse is None else mask[inverse]


def _tokens(side: Padding, units: Tensor) -> Tensor:
    """The tokens `(T, n·size)` of units `(T, n)`, −1 in padding."""
    places = units[..., None] * side.size + torch.arange(side.size, device=units.device)
    return (places if side.token is None else side.token[places]).flatten(1)


def cover(pattern: Pattern, queries: Partition, keys: Partition, device: torch.device) -> tuple[Tensor, Tensor]:
    """For blocks of queries and keys `(Tq, C)`: whether some pair of them is seen, and whether every pair is."""
    if isinstance(pattern, Causal):
        first, last = queries.edges[:-1, None], queries.edges[1:, None] - 1
        return (keys.edges[:-1] <= last).to(device), (keys.edges[1:] - 1 <= first).to(device)
    return _counted(pattern, queries, keys, device)


@lru_cache(maxsize=16)
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
    whole = queries.sizes[:, None] * keys.sizes
    return seen > 0, seen == whole.to(device)
