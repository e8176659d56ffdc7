"""From how much each token sends to each other one to a tree of parents."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def dependency_tree(strength: Tensor, root: int | None = None) -> Tensor:
    """The tree of the greatest total strength: `(N, N)`, [parent, child], → `(N,)`, the parent of each token.

    The root is its own parent; it is the token that receives most from the others, if not given. This is the maximum
    spanning arborescence of Chu, Liu and Edmonds: every token takes its best parent; cycles among them become one token
    each, for which it begins anew. Cost O(N² log² N), on the CPU.
    """
    if strength.ndim != 2 or strength.shape[0] != strength.shape[1] or not len(strength):
        raise ValueError(f"strength must be (N, N) with N of at least 1, got {tuple(strength.shape)}")
    weights = strength.detach().double().cpu().numpy().copy()
    if not np.isfinite(weights).all():
        raise ValueError("strength must be finite")
    n = len(weights)
    if root is not None and not 0 <= root < n:
        raise ValueError(f"root must lie in 0 to {n - 1}, got {root}")
    np.fill_diagonal(weights, 0.0)
    root = int(weights.sum(1).argmax()) if root is None else root
    return torch.from_numpy(_arborescence(weights, root))


def _arborescence(weights: np.ndarray, root: int) -> np.ndarray:
    n = len(weights)
    weights = weights.copy()
    np.fill_diagonal(weights, -np.inf)
    parent = weights.argmax(0)
    parent[root] = root
    far = parent
    for _ in range(n.bit_length()):
        far = far[far]  # 2, 4, 8, … steps up: at last on a cycle, or at the root
    cyclic = np.zeros(n, dtype=bool)
    cyclic[far] = True
    cyclic[root] = False
    if not cyclic.any():
        return parent

    # A cycle goes by its least member.
    name, hop = np.arange(n), np.where(cyclic, parent, np.arange(n))
    for _ in range(n.bit_length()):
        name, hop = np.minimum(name, name[hop]), hop[hop]
    _, group = np.unique(name, return_inverse=True)
    m = int(group.max()) + 1
    # Whoever enters a cycle at v spares it v's parent.
    gain = weights - np.where(cyclic, weights[parent, np.arange(n)], 0.0)
    pair = (group[:, None] * m + group).ravel()
    order = gain.ravel().argsort(kind="stable")
    best = np.zeros(m * m, dtype=np.int64)
    best[pair[order]] = order  # the last one written is the greatest
    merged = gain.ravel()[best].reshape(m, m)
    above = _arborescence(merged, int(group[root]))
    for child in range(m):
        if child != group[root]:
            u, v = divmod(int(best[above[child] * m + child]), n)
            parent[v] = u
    return parent


def subtree(parents: Tensor, token: int) -> Tensor:
    """Which tokens `(N,)` hang below `token`, itself included: a part of the picture, say."""
    if not 0 <= token < len(parents):
        raise ValueError(f"token must lie in 0 to {len(parents) - 1}, got {token}")
    inside = torch.zeros(len(parents), dtype=torch.bool)
    inside[token] = True
    parents = parents.clone()
    parents[token] = token
    far = parents
    for _ in range(len(parents).bit_length()):
        inside |= inside[far]
        far = far[far]
    return inside
