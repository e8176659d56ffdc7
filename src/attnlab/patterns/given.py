"""Patterns given as data: a label for each token, or the mask itself. Equal data make equal patterns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.patterns.base import Pattern


@dataclass(frozen=True, eq=False)
class _Given(Pattern):
    """Compares and hashes by the content of its tensor."""

    _hash = 0

    def __post_init__(self) -> None:
        data = self._data()
        if not isinstance(data, Tensor):
            raise TypeError(f"{type(self).__name__} needs a tensor, got {type(data).__name__}")
        content = data.detach().cpu().contiguous().numpy().tobytes()
        object.__setattr__(self, "_hash", hash((type(self), tuple(data.shape), data.dtype, content)))

    def _data(self) -> Tensor:
        raise NotImplementedError

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = self._data(), other._data()
        same = mine.shape == theirs.shape and mine.dtype == theirs.dtype
        return mine is theirs or (hash(self) == hash(other) and same and torch.equal(mine, theirs.to(mine.device)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' × '.join(map(str, self._data().shape))})"


@dataclass(frozen=True, eq=False, repr=False)
class Regions(_Given):
    """A query sees the keys that have its own label: `labels` is one integer per token, `(N,)` or `(B, N)`."""

    labels: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels.dim() not in (1, 2) or self.labels.is_floating_point() or self.labels.is_complex():
            raise ValueError(
                f"Regions: labels must be integers (N,) or (B, N), got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        object.__setattr__(self, "per_batch", self.labels.dim() == 2 and len(self.labels) > 1)

    def _data(self) -> Tensor:
        return self.labels

    def check(self, nq: int, nk: int) -> None:
        n = self.labels.shape[-1]
        if nk != n or nq > n:
            raise ValueError(f"Regions: {n} labels do not fit {nq} queries and {nk} keys")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        labels = self.labels.to(q.device)
        if self.per_batch:
            return labels[b, q] == labels[b, k]
        labels = labels.view(-1)
        return labels[q] == labels[k]

    def at(self, b: int, h: int) -> Pattern:
        return Regions(self.labels[b]) if self.per_batch else self

    def query_tiles(self, nq: int) -> Tensor | None:
        if self.per_batch:
            return None
        tile = 64
        order = self.labels.view(-1)[:nq].argsort(stable=True).cpu()
        counts = self.labels.view(-1)[:nq].unique(return_counts=True)[1].tolist()
        pieces = [piece for region in order.split(counts) for piece in region.split(tile)]
        return torch.stack([torch.nn.functional.pad(p, (0, tile - len(p)), value=-1) for p in pieces])

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        if self.per_batch:
            return None
        labels = self.labels.view(-1).to(tiles.device)
        mine = labels[tiles]
        if (mine != mine[:, :1]).any():
            return None
        order = labels.argsort(stable=True)
        first = torch.searchsorted(labels[order], mine[:, 0].contiguous())
        last = torch.searchsorted(labels[order], mine[:, 0].contiguous(), right=True)
        places = first[:, None] + torch.arange(int((last - first).max()), device=tiles.device)
        return torch.where(places < last[:, None], order[places.clamp_max(len(order) - 1)], -1)


@dataclass(frozen=True, eq=False, repr=False)
class Explicit(_Given):
    """A given boolean mask, True where a key is seen: `(Nq, Nk)`, `(H, Nq, Nk)` or `(B, H, Nq, Nk)`."""

    mask: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask.dtype != torch.bool or self.mask.dim() not in (2, 3, 4):
            raise ValueError(
                "Explicit: mask must be bool (Nq, Nk), (H, Nq, Nk) or (B, H, Nq, Nk), "
                f"got {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        object.__setattr__(self, "per_batch", self.mask.dim() == 4 and self.mask.shape[0] > 1)
        object.__setattr__(self, "per_head", self.mask.dim() >= 3 and self.mask.shape[-3] > 1)

    def _data(self) -> Tensor:
        return self.mask

    def check(self, nq: int, nk: int) -> None:
        if tuple(self.mask.shape[-2:]) != (nq, nk):
            raise ValueError(f"Explicit: mask {tuple(self.mask.shape)} does not fit {nq} queries and {nk} keys")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mask = self.mask.to(q.device)
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        zero = torch.zeros((), dtype=torch.long, device=q.device)
        return mask[b if self.per_batch else zero, h if self.per_head else zero, q, k]

    def at(self, b: int, h: int) -> Pattern:
        mask = self.mask.reshape((1,) * (4 - self.mask.dim()) + self.mask.shape)
        return Explicit(mask[b if self.per_batch else 0, h if self.per_head else 0])
