"""One call of attend as data: what the planner chooses a backend for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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

    `key` compares two problems for the planner's cache: equal keys get the same backend.
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
    compiling: bool

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

    @property
    def bias_tensor(self) -> Tensor | None:
        return self.bias if isinstance(self.bias, Tensor) else None

    def materialised_bias(self) -> Tensor | None:
        """The bias as a tensor broadcastable to (B, H, Nq, Nk): memory Nq·Nk if it was a function of indices."""
        if self.bias is None or isinstance(self.bias, Tensor):
            return self.bias
        b, h, q, k = self.indices()
        return self.bias(b, h, q, k).to(self.dtype)

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch, head, query and key indices, broadcastable to (B, H, Nq, Nk)."""
        at = self.device
        return (
            torch.arange(self.batch, device=at).view(-1, 1, 1, 1),
            torch.arange(self.heads, device=at).view(-1, 1, 1),
            torch.arange(self.nq, device=at).view(-1, 1),
            torch.arange(self.nk, device=at),
        )

    @property
    def bias_kind(self) -> str:
        """ "", "tensor", "lookup" or "function", with a "+" where it is to be trained."""
        if self.bias is None:
            return ""
        values = self.bias.table if isinstance(self.bias, Lookup) else self.bias
        kind = "tensor" if values is self.bias else "lookup"
        if not isinstance(values, Tensor):
            return "function"
        return kind + "+" * (self.needs_grad and values.requires_grad)

    @property
    def key(self) -> tuple[object, ...]:
        # A bias with a query axis of its own costs other than one that is broadcast over queries.
        shape = self.bias.shape if isinstance(self.bias, Tensor) else None
        return (
            *(self.batch, self.heads, self.kv_heads, self.nq, self.nk, self.dim, self.value_dim, self.dtype),
            *(self.device.type, self.pattern, self.weighting, self.bias_kind, shape, self.dropout > 0),
            *(self.return_lse, self.needs_grad, self.compiling),
        )
