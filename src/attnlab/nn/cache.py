"""The keys and values that a causal mechanism has seen, and how many numbers a state holds."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

C = TypeVar("C", bound="Cache")
# What began a state: its class, batch and settings, as pairs (see `Mechanism.owner`).
Owner = tuple[tuple[str, Any], ...]


def numbers(state: Any) -> int:
    """How many numbers a state holds, over its whole batch; of a buffer with room to grow, those that are filled."""
    if isinstance(state, Tensor):
        return state.numel()
    if isinstance(state, Cache):
        return state.numbers()
    if isinstance(state, Mapping):
        return sum(map(numbers, state.values()))
    if isinstance(state, (tuple, list)):
        return sum(map(numbers, state))
    return sum(map(numbers, vars(state).values())) if hasattr(state, "__dict__") else 0


class Cache:
    """Keys and values of tokens so far. Like a file it is written in place: it continues one sequence."""

    def __init__(self, owner: Owner = ()) -> None:
        self.owner = owner
        self.length = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def clone(self: C) -> C:
        """An independent copy: both may be continued."""
        other = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.clone())
        return other

    def numbers(self) -> int:
        """How many numbers it holds, without the room to grow."""
        return sum(t.numel() for t in vars(self).values() if isinstance(t, Tensor))

    def bytes(self) -> int:
        """What the buffers take."""
        return sum(0 if t is None else t.numel() * t.element_size() for t in (self._k, self._v))


class KVCache(Cache):
    """Keys and values of all tokens so far, `(B, Hkv, length, D)`, in a buffer that grows by doubling.

    Appending costs amortised O(new tokens), and copies nothing old but when the buffer grows.
    """

    def __init__(self, *, limit: int | None = None, owner: Owner = ()) -> None:
        """`limit` refuses to grow past so many tokens (a learned position table, say)."""
        super().__init__(owner)
        self.limit = limit

    def numbers(self) -> int:
        room = sum(t.numel() // t.shape[2] * (t.shape[2] - self.length) for t in (self._k, self._v) if t is not None)
        return super().numbers() - room

    @property
    def k(self) -> Tensor:
        return self._filled(self._k)

    @property
    def v(self) -> Tensor:
        return self._filled(self._v)

    def _filled(self, buffer: Tensor | None) -> Tensor:
        if buffer is None:
            raise ValueError("the cache is empty")
        return buffer[:, :, : self.length]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add `(B, Hkv, n, D)` keys and values; returns all so far, as views."""
        end = self.length + k.shape[2]
        if self.limit is not None and end > self.limit:
            raise ValueError(f"x must end within the {self.limit} tokens that state can hold, but it ends at {end}")
        _check(self._k, k)
        _check(self._v, v)
        self._k, self._v = self._room(self._k, k, end), self._room(self._v, v, end)
        self._k[:, :, self.length : end] = k
        self._v[:, :, self.length : end] = v
        self.length = end
        return self.k, self.v

    def _room(self, buffer: Tensor | None, new: Tensor, end: int) -> Tensor:
        if buffer is not None and end <= buffer.shape[2]:
            return _writable(buffer, new)
        grown = new.new_empty(*new.shape[:2], max(end, 2 * self.length, 16), new.shape[3])
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def bytes_per_token(self) -> int:
        """Bytes that one more token takes, over the whole batch."""
        return sum(
            0 if t is None else t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in (self._k, self._v)
        )


class GridCache(KVCache):
    """The keys and values of the first tokens of one grid."""

    grid: tuple[int, ...] | None = None

    def keep(self, grid: tuple[int, ...]) -> None:
        """Remember on which grid the tokens lie; ValueError if those before lay on another."""
        if self.grid not in (None, grid):
            raise ValueError(f"grid must stay {self.grid} as long as state goes on, got {grid}")
        self.grid = grid


class RollingCache(Cache):
    """Keys and values of the first `sinks` tokens and of the last `window`: bounded memory however long the text.

    The buffers have exactly sinks + window places. Recent tokens lie in a ring, so not in order: one query at the end
    sees all of them as they are (`step`); for a longer piece they are put in order (`extend`).
    """

    def __init__(self, window: int, sinks: int, owner: Owner = ()) -> None:
        super().__init__(owner)
        self.window, self.sinks = window, sinks

    def step(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token `(B, Hkv, 1, D)`; keys and values of all that it sees, sinks first, as views.

        `positions` says where each of them stands.
        """
        keys, values = self._buffers(k, v)
        place = self.length if self.length < self.sinks else self.sinks + (self.length - self.sinks) % self.window
        keys[:, :, place] = k[:, :, 0]
        values[:, :, place] = v[:, :, 0]
        self.length += 1
        filled = min(self.length, self.sinks + self.window)
        return keys[:, :, :filled], values[:, :, :filled]

    def positions(self) -> Tensor:
        """The position of the token in each filled place."""
        place = torch.arange(
            min(self.length, self.sinks + self.window), device=None if self._k is None else self._k.device
        )
        # The latest position that is congruent to the place's, for places in the ring.
        turns = (self.length - 1 - place).div(self.window, rounding_mode="floor")
        return torch.where(place < self.sinks, place, place + turns * self.window)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Add a piece `(B, Hkv, n, D)`; the sinks, the window before the piece and the piece in order, as copies.

        The third result is how many tokens between sinks and window are gone.
        """
        keys, values = self._buffers(k, v)
        begin, end = self.length, self.length + k.shape[2]
        heads = min(self.sinks, begin)
        first = min(max(self.sinks, begin - self.window + 1), begin)
        old = self._places(torch.cat((torch.arange(heads), torch.arange(first, begin)))).to(k.device)
        all_keys, all_values = (torch.cat((b[:, :, old], new), 2) for b, new in ((keys, k), (values, v)))
        new = torch.arange(begin, end)
        kept = new[(new < self.sinks) | (new >= end - self.window)]
        places, kept = self._places(kept).to(k.device), (kept - begin).to(k.device)
        keys[:, :, places] = k[:, :, kept]
        values[:, :, places] = v[:, :, kept]
        self.length = end
        return all_keys, all_values, first - heads

    def _places(self, positions: Tensor) -> Tensor:
        return torch.where(positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window)

    def _buffers(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        _check(self._k, k)
        _check(self._v, v)
        if self._k is None or self._v is None:
            places = self.sinks + self.window
            self._k, self._v = (t.new_empty(*t.shape[:2], places, t.shape[3]) for t in (k, v))
        self._k, self._v = _writable(self._k, k), _writable(self._v, v)
        return self._k, self._v


def _check(buffer: Tensor | None, new: Tensor) -> None:
    if buffer is None:
        return
    wanted, have = (*new.shape[:2], new.shape[3]), (*buffer.shape[:2], buffer.shape[3])
    if wanted != have or buffer.dtype != new.dtype or buffer.device != new.device:
        raise ValueError(
            f"state holds (B, Hkv, D) = {have} in {buffer.dtype} on {buffer.device}; "
            f"got {wanted} in {new.dtype} on {new.device}: it belongs to another model or batch"
        )


def _writable(buffer: Tensor, new: Tensor) -> Tensor:
    """`buffer`, or a copy where autograd would see one buffer written twice: never without gradients."""
    return buffer.clone() if new.requires_grad or buffer.requires_grad else buffer
