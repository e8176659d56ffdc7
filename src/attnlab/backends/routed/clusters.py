"""From clusters to groups of tiles: the queries of a cluster, some at a time, meet its keys."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.backends.routed.plan import TILE, Group, Padding, Plan, first_unit, seen
from attnlab.patterns import Pattern
from attnlab.routing import Clustered, Partition

# Pairs looked at together while it is found out which clusters they share.
_ASKED = 2**22


def cluster_plan(chosen: Clustered, rest: tuple[Pattern, ...], batch: int, heads: int, kv_heads: int) -> Plan:
    """The tiles of a choice of clusters, narrowed by the static patterns `rest`.

    A pair that shares several clusters is seen in the first of them alone, since it counts once.
    """
    device = chosen.queries.device
    nq, nk, count = chosen.queries.shape[2], chosen.keys.shape[2], chosen.queries.shape[3]
    queries, keys = (Padding.of(Partition.of(1, n), device, single=True) for n in (nq, nk))
    owner = first_unit(batch, heads, kv_heads, device)
    of_q = _lists(chosen.queries.expand(batch, -1, -1, -1), TILE)  # (B·H, clusters, tokens)
    of_k = _lists(chosen.keys.expand(batch, -1, -1, -1), 1)[owner]
    if not of_q.numel() or not of_k.numel():
        return Plan(queries, keys, ())
    width = min(TILE, of_q.shape[-1])
    of_q = of_q.unflatten(-1, (-1, width))  # (B·H, clusters, tiles, queries)
    of_k = of_k.unsqueeze(2).expand(*of_q.shape[:3], -1)
    head = torch.arange(batch * heads, device=device).view(-1, 1, 1).expand(of_q.shape[:3])
    cluster = torch.arange(count, device=device).view(1, -1, 1).expand(of_q.shape[:3])
    used = (of_q >= 0).any(-1) & (of_k >= 0).any(-1)
    of_q, of_k, head, cluster = of_q[used], of_k[used], head[used], cluster[used]
    members = (
        chosen.queries.expand(batch, -1, -1, -1).flatten(0, 1),
        chosen.keys.expand(batch, -1, -1, -1).flatten(0, 1),
    )
    hidden = []
    for part in torch.arange(len(head), device=device).split(max(1, _ASKED // (width * of_k.shape[-1]))):
        q, k, h, c = of_q[part], of_k[part], head[part, None], cluster[part, None, None]
        before = torch.arange(count, device=device) < c
        shared = torch.bmm(
            (members[0][h, q.clamp_min(0)] & before).float(), members[1][owner[h], k.clamp_min(0)].float().mT
        )
        hidden.append((shared > 0) | ~seen(rest, q, k))
    everyone = torch.where(of_q >= 0, of_q + head[:, None] * nq, batch * heads * nq)
    group = Group(everyone, of_k.clamp_min(0) + owner[head][:, None] * nk, 1, 1, torch.cat(hidden))
    return Plan(queries, keys, (group,))


def _lists(members: Tensor, multiple: int) -> Tensor:
    """The members of each cluster, `(B·H, clusters, n)` from `(B, H, N, clusters)`, −1 where there are no more."""
    table = members.flatten(0, 1).transpose(1, 2)
    counts = table.sum(-1)
    most = int(counts.max())
    most = -(-most // multiple) * multiple if most > multiple else most
    row, token = table.flatten(0, 1).nonzero().unbind(1)
    start = counts.flatten().cumsum(0) - counts.flatten()
    lists = torch.full((counts.numel(), most), -1, device=members.device)
    lists[row, torch.arange(len(row), device=members.device) - start[row]] = token
    return lists.view(*counts.shape, most)
