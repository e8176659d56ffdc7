"""From a pattern to its tiling: choose the tiles, list their keys, build the residual masks; cached."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import torch
from torch import Tensor

from attnlab.backends.tiles.tiling import Group, Lists, Tiling
from attnlab.patterns import Pattern

# Queries per tile of a sequence. More would see too many keys in vain, fewer would gather each key too often.
TILE = 64
# Pairs asked of `allows` at a time while a plan is built.
_ASKED = 2**22
# Masks up to this many elements are not worth sharing between tiles.
_SMALL = 2**20


@lru_cache(maxsize=64)
def tiling(pattern: Pattern, nq: int, nk: int, device: torch.device | None = None) -> Tiling:
    """The tiling of a pattern that depends on neither batch nor head.

    Each tile lists exactly the keys that some query of it sees. Costs time linear in the pairs that the pattern's own
    `tile_keys` names, or Nq·Nk where a pattern cannot name them.
    """
    parts: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for queries in _query_tiles(pattern, nq, device):
        for keys, seen, some in _visible(pattern, queries, nk):
            counts = (keys >= 0).sum(-1)
            buckets = _bucket(counts)
            for bucket in buckets.unique().tolist():
                if bucket:
                    one = buckets == bucket
                    parts[queries.shape[1], bucket].append((some[one], *_narrow(keys[one], seen[one])))
    groups = [group for part in parts.values() for group in _groups(part)]
    return Tiling(nq, nk, tuple(groups))


def _query_tiles(pattern: Pattern, nq: int, device: torch.device | None) -> list[Tensor]:
    """The queries `(T, b)` of every tile, one tensor for each tile size b."""
    tiles = pattern.query_tiles(nq)
    if tiles is None:
        positions = torch.arange(-(-nq // TILE) * TILE)
        tiles = torch.where(positions < nq, positions, -1).view(-1, TILE)
    tiles = tiles.to(device)
    counts = (tiles >= 0).sum(-1)
    tiles = tiles.gather(1, (tiles < 0).long().argsort(dim=1, stable=True))
    return [tiles[counts == n, :n] for n in counts.unique().tolist() if n]


def _visible(pattern: Pattern, queries: Tensor, nk: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For pieces of the tiles: keys `(T, n)` that some query sees, then −1; which query sees which; the queries."""
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
        found.append((listed, seen, some))
    return found


def _bucket(counts: Tensor) -> Tensor:
    """Counts rounded up so that few different ones remain: to 8, then to an eighth of their power of two."""
    power = 2 ** counts.clamp_min(1).double().log2().floor().long()
    grain = (power // 8).clamp_min(8)
    return (counts + grain - 1) // grain * grain


def _narrow(keys: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    width = int((keys >= 0).sum(-1).max())
    return keys[:, :width], seen[:, :, :width]


def _groups(parts: list[tuple[Tensor, Tensor, Tensor]]) -> list[Group]:
    """Groups of tiles with as many queries and (padded) keys, one group for each mask that many tiles share."""
    width = max(keys.shape[1] for _, keys, _ in parts)
    queries = torch.cat([q for q, _, _ in parts])
    keys = torch.cat([torch.nn.functional.pad(k, (0, width - k.shape[1]), value=-1) for _, k, _ in parts])
    seen = torch.cat([torch.nn.functional.pad(s, (0, width - s.shape[2])) for _, _, s in parts])
    # A tile with fewer keys repeats its last one, unseen.
    keys = torch.where(keys >= 0, keys, keys.amax(1, keepdim=True))
    if seen.all():
        return [_group(queries, keys, None)]
    if seen.numel() <= _SMALL:
        return [_group(queries, keys, seen)]
    kinds = _kinds(seen)
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


def _kinds(seen: Tensor) -> Tensor:
    """A number for each tile, equal for tiles with equal masks: by a hash, then checked."""
    flat = seen.flatten(1)
    words = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).contiguous().view(torch.int64)
    random = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=random).to(words.device)
    kinds = (words * factors).sum(1).unique(return_inverse=True)[1]
    first = torch.full((int(kinds.max()) + 1,), len(kinds), device=kinds.device)
    first.scatter_reduce_(0, kinds, torch.arange(len(kinds), device=kinds.device), "amin")
    equal = all(torch.equal(words[first[k]], w) for k, w in zip(kinds.split(1024), words.split(1024), strict=True))
    return kinds if equal else torch.arange(len(kinds), device=kinds.device)


def _group(queries: Tensor, keys: Tensor, seen: Tensor | None) -> Group:
    return Group(Lists(queries[None, None]), Lists(keys[None, None]), None if seen is None else seen[None, None])
