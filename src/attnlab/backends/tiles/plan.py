"""From a pattern to its tiling: choose the tiles, list their keys, build the residual masks; cached."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from functools import lru_cache

import torch
from torch import Tensor

from attnlab.backends.tiles.tiling import Group, Lists, Tiling, kinds_of
from attnlab.patterns import Or, Pattern

# Queries per tile of a sequence. More would see too many keys in vain, fewer would gather each key too often.
TILE = 64
# Pairs asked of `allows` at a time while a plan is built.
_ASKED = 2**22
# Masks up to this many elements are not worth sharing between tiles.
_SMALL = 2**20
# Pairs that cost as much as one more call of the kernel.
_CALL = 2**15

# Queries (T, b), keys (T, n) that some query of the tile sees, then −1, and which query sees which key.
Part = tuple[Tensor, Tensor, Tensor]


# Plans that were made, the oldest first; what they hold is limited.
_made: OrderedDict[tuple[object, ...], Tiling] = OrderedDict()
_KEPT_BYTES, _KEPT = 2**29, 64


def tiling(pattern: Pattern, nq: int, nk: int, device: torch.device | None = None, tile: int = TILE) -> Tiling:
    """The tiling of a pattern that depends on neither batch nor head; kept for the next call.

    `tile` is the number of queries per tile where the pattern does not say which belong together.

    Each tile lists exactly the keys that some query of it sees. Costs time linear in the pairs that the pattern's own
    `tile_keys` names, or Nq·Nk where a pattern cannot name them.
    """
    key = (pattern, nq, nk, device, tile)
    found = _made.get(key)
    if found is not None:
        return found
    found = _made[key] = _make(pattern, nq, nk, device, tile)
    while len(_made) > 1 and (len(_made) > _KEPT or sum(plan.bytes for plan in _made.values()) > _KEPT_BYTES):
        _made.popitem(last=False)
    return found


def _make(pattern: Pattern, nq: int, nk: int, device: torch.device | None, tile: int) -> Tiling:
    parts: dict[int, list[Part]] = defaultdict(list)
    for queries in _query_tiles(pattern, nq, device, tile):
        for part in _visible(pattern, queries, nk):
            parts[queries.shape[1]].append(part)
    groups = [group for size in parts for sized in _by_width(parts[size]) for group in _groups(*sized)]
    return Tiling(nq, nk, tuple(groups))


@lru_cache(maxsize=64)
def one_tile(nq: int, nk: int, causal: bool, device: torch.device | None = None) -> Tiling:
    """Full or causal attention as one tile, for the fused kernel alone: it never holds all pairs, and gives the lse."""
    queries, keys = (Lists(torch.arange(n, device=device)[None, None, None]) for n in (nq, nk))
    return Tiling(nq, nk, (Group(queries, keys, causal=causal),))


@lru_cache(maxsize=256)
def split(pattern: Pattern, nq: int, nk: int) -> tuple[Pattern, ...]:
    """Patterns over disjoint keys that make up `pattern`: more than one where sides of an "or" want other tiles.

    Rows and columns of a grid, say: tiles of one that also listed the keys of the other would list nearly all keys.
    """
    if not isinstance(pattern, Or) or pattern.per_batch or pattern.per_head:
        return (pattern,)
    left, right = (split(side, nq, nk) for side in (pattern.left, pattern.right))
    if 2 * sum(_listed(part, nq, nk) for part in (*left, *right)) > _listed(pattern, nq, nk):
        return (pattern,)
    return (*left, *(part & ~pattern.left for part in right))


def _listed(pattern: Pattern, nq: int, nk: int) -> int:
    """Pairs of queries and keys that the pattern's own tiles and lists name."""
    total = 0
    for queries in _query_tiles(pattern, nq, None, TILE):
        keys = pattern.tile_keys(queries, nk)
        total += queries.shape[1] * (len(queries) * nk if keys is None else int((keys >= 0).sum()))
    return total


def _query_tiles(pattern: Pattern, nq: int, device: torch.device | None, tile: int) -> list[Tensor]:
    """The queries `(T, b)` of every tile, one tensor for each tile size b."""
    tiles = pattern.query_tiles(nq)
    if tiles is None:
        positions = torch.arange(-(-nq // tile) * tile)
        tiles = torch.where(positions < nq, positions, -1).view(-1, tile)
    tiles = tiles.to(device)
    counts = (tiles >= 0).sum(-1)
    tiles = tiles.gather(1, (tiles < 0).long().argsort(dim=1, stable=True))
    return [tiles[counts == n, :n] for n in counts.unique().tolist() if n]


def _visible(pattern: Pattern, queries: Tensor, nk: int) -> list[Part]:
    """The keys that each tile sees, a piece of the tiles at a time."""
    zero = torch.zeros((), dtype=torch.long, device=queries.device)
    keys = pattern.tile_keys(queries, nk)
    if keys is None:
        keys = torch.arange(nk, device=queries.device).expand(len(queries), nk)
    found = []
    piece = max(1, _ASKED // max(1, keys.shape[1] * queries.shape[1]))
    for some, listed in zip(queries.split(piece), keys.split(piece), strict=True):
        seen = pattern.allows(zero, zero, some[:, :, None], listed.clamp_min(0)[:, None])
        seen = seen.expand(*some.shape, listed.shape[1]) & (listed >= 0)[:, None]
        wanted = seen.any(1)
        if not wanted.all():
            order = (~wanted).long().argsort(dim=1, stable=True)[:, : int(wanted.sum(1).max())]
            listed = listed.masked_fill(~wanted, -1).gather(1, order)
            seen = seen.gather(2, order[:, None].expand(*seen.shape[:2], order.shape[1]))
        found.append((some, listed, seen))
    return found


def _by_width(parts: list[Part]) -> list[Part]:
    """The tiles of one size by their number of keys, those joined whose padding costs less than one more call."""
    width = max(keys.shape[1] for _, keys, _ in parts)
    queries = torch.cat([q for q, _, _ in parts])
    keys = torch.cat([torch.nn.functional.pad(k, (0, width - k.shape[1]), value=-1) for _, k, _ in parts])
    seen = torch.cat([torch.nn.functional.pad(s, (0, width - s.shape[2])) for _, _, s in parts])
    counts = (keys >= 0).sum(1)
    widths, tiles = (x.tolist() for x in counts.unique(return_counts=True))
    found, begin, padding = [], 0, 0
    for i, width in enumerate(widths):
        wider = widths[i + 1] if i + 1 < len(widths) else None
        if wider is not None:
            padding += sum(tiles[begin : i + 1]) * queries.shape[1] * (wider - width)
            if padding <= _CALL or wider * 8 <= widths[begin] * 9:
                continue
        if width:
            one = (counts >= widths[begin]) & (counts <= width)
            found.append((queries[one], keys[one, :width], seen[one, :, :width]))
        begin, padding = i + 1, 0
    return found


def _groups(queries: Tensor, keys: Tensor, seen: Tensor) -> list[Group]:
    """Groups of tiles of one shape: one for each mask that many tiles share, one for the rest."""
    # A tile with fewer keys repeats its last one, unseen.
    keys = torch.where(keys >= 0, keys, keys.amax(1, keepdim=True)).clamp_min(0)
    if seen.all():
        return [_group(queries, keys, None)]
    if seen.numel() <= _SMALL:
        return [_group(queries, keys, seen)]
    kinds = kinds_of(seen)
    many = kinds.bincount()
    groups, rest = [], torch.zeros(len(kinds), dtype=torch.bool, device=kinds.device)
    for kind, count in enumerate(many.tolist()):
        one = kinds == kind
        if count < 8:
            rest |= one
            continue
        mask = seen[one][:1]
        groups.append(_group(queries[one], keys[one], None if mask.all() else mask))
    if rest.any():
        groups.append(_group(queries[rest], keys[rest], seen[rest]))
    return groups


def _group(queries: Tensor, keys: Tensor, seen: Tensor | None) -> Group:
    return Group(Lists(queries[None, None]), Lists(keys[None, None]), None if seen is None else seen[None, None])
