"""A cache of cores of groups that are over, and of the last tokens as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.nn.cache import Cache, KVCache, Owner


class CoreCache(Cache):
    """Keys and values of one core per whole group, and those of the tokens from `begin` on.

    Of the group that is not over yet the keys are also kept unturned, since cores are pooled from those. Tokens before
    `begin` are forgotten, and their room is given back when there is as much of it as is used.
    """

    def __init__(self, group: int, owner: Owner = ()) -> None:
        super().__init__(owner)
        self.group = group
        self.begin = 0
        self.cores, self.near = KVCache(), KVCache()
        self.gone = 0  # forgotten tokens that still take room in `near`
        self.open: Tensor | None = None  # (B, Hkv, length mod group, D), unturned

    def append(self, k: Tensor, v: Tensor, still: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the next tokens: keys and values from `begin` on as views, and unturned keys since the last group."""
        k, v = (t[:, :, self.gone :] for t in self.near.append(k, v))
        still = still if self.open is None else torch.cat((self.open, still), 2)
        self.length = self.begin + k.shape[2]
        self.open = still[:, :, still.shape[2] - self.length % self.group :].contiguous()
        return k, v, still

    def add(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add cores; returns all so far, as views."""
        if k.shape[2] or not self.cores.length:
            return self.cores.append(k, v)
        return self.cores.k, self.cores.v

    def forget(self, begin: int) -> None:
        """Tokens before `begin` are not needed any more."""
        self.gone += begin - self.begin
        self.begin = begin
        if 2 * self.gone > max(self.near.length, 64):
            kept, rest = KVCache(), (t[:, :, self.gone :] for t in (self.near.k, self.near.v))
            kept.append(*rest)
            self.near, self.gone = kept, 0

    def clone(self) -> CoreCache:
        other = super().clone()
        other.cores, other.near = self.cores.clone(), self.near.clone()
        return other

    def numbers(self) -> int:
        if not self.length:
            return 0
        live = (self.near.k[:, :, self.gone :], self.near.v[:, :, self.gone :], self.open)
        return self.cores.numbers() + sum(0 if t is None else t.numel() for t in live)

    def bytes(self) -> int:
        opened = 0 if self.open is None else self.open.numel() * self.open.element_size()
        return self.cores.bytes() + self.near.bytes() + opened
