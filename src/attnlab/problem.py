"""One call of attend as data: what the planner chooses a backend for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnlab.patterns import Causal, Full, Pattern
from attnlab.weightings import Softmax, Weighting


@dataclass(frozen=True, eq=False)
class Lookup:
    """A bias that is looked up: `bias[h, q, k] = table[row(q, k), h]`, trained where the table is.

    A backend that never holds all scores can still give the table its gradient, since `row` is all that it needs to
    know. `row` takes broadcastable integer tensors; make it comparable (a frozen dataclass), and plans are reused.
    For pairs outside the pattern it may return any row.
    """

    table: Tensor  # (rows, H)
    row: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.table[self.row(q, k), h]


Bias = Tensor | Lookup | Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """Shapes and choices of one `attend` call, without the values of q, k and v.

    `key` compares two problems for the planner's cache: equal keys get the same backend. `traced` is True inside
    torch.compile and torch.export; `may_compile` says whether a backend may compile by itself; `routed`, that the
    pattern was chosen from the values of q and k, so that it will not come again.
    """

    batch: int
    heads: int
    kv_heads: int
    nq: int
    nk: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    pattern: Pattern
    weighting: Weighting
    bias: Bias | None
    scale: float
    dropout: float
    return_lse: bool
    needs_grad: bool
    trained_bias: bool = False
    traced: bool = False
    may_compile: bool = False
    routed: bool = False

    @property
    def groups(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def is_full(self) -> bool:
        return isinstance(self.pattern, Full)

    @property
    def is_causal(self) -> bool:
        return isinstance(self.pattern, Causal)

    @property
    def is_softmax(self) -> bool:
        return self.weighting == Softmax()

    def materialised_bias(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """The bias as a tensor with four axes, broadcastable to (B, H, Nq, Nk): Nq·Nk of memory for a function's."""
        if self.bias is None:
            return None
        bias = self.bias if isinstance(self.bias, Tensor) else self.bias(*self.indices())
        return bias.reshape((1,) * (4 - bias.dim()) + bias.shape).to(self.dtype if dtype is None else dtype)

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch, head, query and key indices, broadcastable to (B, H, Nq, Nk)."""
        at = self.device
        return (
            torch.arange(self.batch, device=at).view(-1, 1, 1, 1),
            torch.arange(self.heads, device=at).view(-1, 1, 1),
            torch.arange(self.nq, device=at).view(-1, 1),
            torch.arange(self.nk, device=at),
        )

    def parts(self) -> Iterator[tuple[Problem, slice, slice, slice]]:
        """The problem cut so that in each part the pattern looks the same for all batch entries and heads.

        With each part come its batch entries, its heads, and their key heads.
        """
        apart = self.pattern.per_batch or self.pattern.per_head
        for b in _slices(self.batch, self.pattern.per_batch):
            for h in _slices(self.heads, self.pattern.per_head):
                kv = slice(h.start // self.groups, (h.stop - 1) // self.groups + 1)
                yield (self._part(b, h) if apart else self), b, h, kv

    def _part(self, b: slice, h: slice) -> Problem:
        heads, bias = h.stop - h.start, self.bias
        if isinstance(bias, Tensor):
            bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
            bias = bias[b if len(bias) > 1 else slice(None), h if bias.shape[1] > 1 else slice(None)]
        elif isinstance(bias, Lookup):
            bias = Lookup(bias.table[:, h], bias.row)
        elif bias is not None:
            whole = bias
            bias = lambda i, j, q, k: whole(i + b.start, j + h.start, q, k)  # noqa: E731
        return replace(
            self, batch=b.stop - b.start, heads=heads, kv_heads=self.kv_heads if heads == self.heads else 1,
            pattern=self.pattern.at(b.start, h.start), bias=bias,
        )  # fmt: skip

    @property
    def pairs(self) -> int:
        """Scores of full attention: B·H·Nq·Nk."""
        return self.batch * self.heads * self.nq * self.nk

    @property
    def key(self) -> tuple[object, ...]:
        # A bias that is broadcast over the queries costs other than one that is not.
        bias = self.bias.shape if isinstance(self.bias, Tensor) else type(self.bias)
        return (
            *(self.batch, self.heads, self.kv_heads, self.nq, self.nk, self.dim, self.value_dim, self.dtype),
            *(self.device, self.pattern, self.weighting, bias, self.dropout > 0, self.return_lse),
            *(self.needs_grad, self.trained_bias, self.traced, self.may_compile),
        )


def _slices(count: int, apart: bool) -> list[slice]:
    return [slice(i, i + 1) for i in range(count)] if apart else [slice(0, count)]
