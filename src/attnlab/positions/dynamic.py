"""A relative bias that a small network makes of the displacement: one set of weights for windows of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.positions.base import Position
from attnlab.positions.bias import Displacement, spread
from attnlab.problem import Lookup


class DynamicBias(Position):
    """The bias of a displacement (Δ₁, …) inside a window, from an MLP instead of a table, so that any window will do.

        bias_ij = MLP(place(i) − place(j))[h]        Linear → 3 × (LayerNorm → ReLU → Linear), of width `hidden`

    `axes` is the number of axes of the window; tokens are its places in row-major order. Evaluated once for each of the
    Π (2W−1) displacements. Source: arXiv 2108.00154 (its dynamic position bias, without residuals).
    """

    def __init__(self, heads: int, *, hidden: int, axes: int = 2, window: tuple[int, ...] | None = None) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.heads, self.axes, self.window = heads, axes, window
        layers: list[nn.Module] = [nn.Linear(axes, hidden)]
        for width in (hidden, hidden, heads):
            layers += [nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, width)]
        self.mlp = nn.Sequential(*layers)

    def table(self, window: tuple[int, ...]) -> Tensor:
        """The table `(Π (2W−1), H)` that `TableBias` would have for this window."""
        if len(window) != self.axes:
            raise ValueError(f"window must have {self.axes} axes, got {window}")
        weight = self.mlp[0].weight
        steps = [torch.arange(1 - w, w, device=weight.device, dtype=weight.dtype) for w in window]  # type: ignore[arg-type]
        return self.mlp(torch.cartesian_prod(*steps).view(-1, self.axes))

    def matrix(self, window: tuple[int, ...]) -> Tensor:
        """The bias `(H, N, N)` of a whole window, N = Π W."""
        return spread(self.table(window), window)

    def bias(self, nq: int, nk: int, offset: int = 0) -> Lookup:
        if self.window is None:
            raise ValueError("window must be given at construction where the bias is asked for by numbers of tokens")
        return Lookup(self.table(self.window), Displacement(self.window, offset))
