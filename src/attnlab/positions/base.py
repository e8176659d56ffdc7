"""What every kind of position offers to attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attnlab.problem import Bias

# Of batch, head, query and key indices, broadcastable to (B, H, Nq, Nk).
IndexBias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Position(nn.Module):
    """How places enter attention: by turning queries and keys, by a bias on their scores, or both.

    A subclass overrides what it does; the rest leaves attention as it is.
    """

    on_grid = False  # whether `forward` wants `grid`

    def forward(
        self, q: Tensor, k: Tensor, offset: int = 0, *, grid: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys `(B, H, N, D)`, of which the first stand at position `offset`, turned to their places."""
        return q, k

    def bias(self, nq: int, nk: int, offset: int = 0) -> Bias | None:
        """The bias that `attend` takes, for `nq` queries from position `offset` on and keys from 0 to `nk`."""
        return None
