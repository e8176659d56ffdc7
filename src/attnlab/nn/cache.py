"""The keys and values that a causal mechanism has seen."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys and values of all tokens so far, `(B, Hkv, length, D)`, in a buffer that grows by doubling.

    Appending costs amortised O(new tokens). Like a file it is written in place: a cache continues one sequence, and
    `clone` branches it.
    """

    def __init__(self, *, limit: int | None = None) -> None:
        """`limit` refuses to grow past so many tokens (a learned position table, say)."""
        self.limit = limit
        self.length = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

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
            raise ValueError(f"the cache holds at most {self.limit} tokens, and {end} were wanted")
        self._k = self._room(self._k, k, end)
        self._v = self._room(self._v, v, end)
        self._k[:, :, self.length : end] = k
        self._v[:, :, self.length : end] = v
        self.length = end
        return self.k, self.v

    def _room(self, buffer: Tensor | None, new: Tensor, end: int) -> Tensor:
        if buffer is not None:
            wanted, have = (*new.shape[:2], new.shape[3]), (*buffer.shape[:2], buffer.shape[3])
            if wanted != have or buffer.dtype != new.dtype or buffer.device != new.device:
                raise ValueError(
                    f"the cache holds (B, Hkv, D) = {have} in {buffer.dtype} on {buffer.device}; "
                    f"got {wanted} in {new.dtype} on {new.device}: it belongs to another model or batch"
                )
            if end <= buffer.shape[2]:
                # Autograd must not see one buffer written twice; decoding has no gradient anyway.
                return buffer if not (new.requires_grad or buffer.requires_grad) else buffer.clone()
        grown = new.new_empty(*new.shape[:2], max(end, 2 * self.length, 16), new.shape[3])
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def clone(self) -> KVCache:
        """An independent copy: both may be continued."""
        other = KVCache(limit=self.limit)
        other.length = self.length
        other._k = None if self._k is None else self._k.clone()
        other._v = None if self._v is None else self._v.clone()
        return other

    def bytes_per_token(self) -> int:
        """Bytes that one more token takes, over the whole batch."""
        return sum(
            0 if t is None else t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in (self._k, self._v)
        )
