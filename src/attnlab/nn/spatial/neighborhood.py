"""Neighborhood attention: each token attends to the tokens nearest to it on a grid of one, two or three axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend, merge
from attnlab.cards import ANY_GRID, CAUSAL_SELF, EXACT, NONCAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import GridCache
from attnlab.nn.mechanism import check_grid, join_heads
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Neighborhood, Pattern, SoFar
from attnlab.patterns.grid import per_axis
from attnlab.problem import Lookup


@dataclass(frozen=True)
class Offset:
    """The row of a table of `Π (2·kernel − 1)` for a key's place relative to its query, counted in dilated steps."""

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        row, stride = torch.zeros_like(q - k), 1
        for length, kernel, dilation in zip(self.grid[::-1], self.kernel[::-1], self.dilation[::-1], strict=True):
            step = k % length // dilation - q % length // dilation
            # Keys outside the window are masked; they only need to stay inside the table.
            row = row + (step + kernel - 1).clamp(0, 2 * kernel - 2) * stride
            q, k, stride = q // length, k // length, stride * (2 * kernel - 1)
        return row


@register(
    Card(
        name="neighborhood",
        title="Faster Neighborhood Attention; Generalized Neighborhood Attention",
        paper="2403.04690",
        system="na",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | ANY_GRID | STREAMING | EXACT,
        cost="N w²",
        growth=1.0,
        state="2 * kv_heads * head_dim * N",
        sample=dict(heads=4, kernel=3, small="shrink"),
        limit=lambda dim, grid: NeighborhoodAttention(dim, heads=4, kernel=grid, bias=False),
    )
)
class NeighborhoodAttention(MultiHead):
    """Softmax attention of each token over the `kernel` nearest tokens on every axis of a grid.

        y_i = Wo Σ_j softmax_j(q_i·k_j / √D + table[place(j) − place(i)]) v_j        j in Neighborhood(i), or extra

    x `(B, N, C)` on `grid` → the same. At the border windows move inward, never shrink. With `dilation` a window's
    places lie that far apart; with `stride` so many neighbors share one window, which is cheaper on tiled hardware
    (`patterns.speedup` says how much). `kernel = grid` is full attention, `stride = kernel` blocked attention.
    Cost: O(N·Πkernel) time, O(N) memory. Sources: arXiv 2204.07143 (NA and the table), 2209.15001 (dilation),
    2403.04690 (causal axes, 1 to 3 axes), 2504.16922 (stride).

    Args:
        axes: of the grid. `kernel`, `dilation`, `stride` and `causal` are one value, or one for each axis.
        relative: the learned bias table `(Π (2·kernel − 1), H)` of NAT; needs stride 1 and no causal axis.
        small: what to do with an axis shorter than kernel · dilation: "error"; "pad" the grid with zeros before the
            projection, whose tokens then are keys like any other (NAT); or "shrink" dilation, then kernel, to fit.
        bias, kv_heads, head_dim, qk_norm, dropout: as for `MultiHead`; scale: D^-½ if None.
    """

    on_grid = True

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        axes: int = 2,
        kernel: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        relative: bool = False,
        small: str = "error",
        bias: bool = True,
        out_bias: bool | None = None,
        scale: float | None = None,
        **multihead: Any,
    ) -> None:
        super().__init__(dim, heads=heads, bias=bias, out_bias=out_bias, **multihead)
        self.axes = axes
        self.kernel = per_axis("kernel", kernel, axes)
        self.dilation = per_axis("dilation", dilation, axes)
        self.stride = per_axis("stride", stride, axes)
        self.causal_axes = tuple(causal) if isinstance(causal, Sequence) else (causal,) * axes
        self.causal = all(self.causal_axes)
        # What the pattern checks for every grid, it checks here for the smallest that fits.
        Neighborhood(self.least, self.kernel, self.dilation, self.stride, self.causal_axes)
        if small not in ("error", "pad", "shrink"):
            raise ValueError(f"small must be error, pad or shrink, got {small!r}")
        if relative and (max(self.stride) > 1 or any(self.causal_axes)):
            raise ValueError(f"relative needs stride 1 and no causal axis, got {self.stride} and {self.causal_axes}")
        self.small, self.scale = small, scale
        self.table: nn.Parameter | None = None
        if relative:
            self.table = nn.Parameter(torch.empty(math.prod(2 * k - 1 for k in self.kernel), heads))
            nn.init.trunc_normal_(self.table, std=0.02)

    @property
    def least(self) -> tuple[int, ...]:
        """The smallest grid that holds a whole window."""
        return tuple(k * d for k, d in zip(self.kernel, self.dilation, strict=True))

    def neighborhood(self, grid: tuple[int, ...]) -> Neighborhood:
        """The pattern on `grid`; ValueError if that is too small and `small` does not say what to do."""
        kernel, dilation, stride = self.kernel, self.dilation, self.stride
        if self.small == "shrink":
            kernel = tuple(min(k, n) for k, n in zip(kernel, grid, strict=True))
            dilation = tuple(min(d, n // k) for d, n, k in zip(dilation, grid, kernel, strict=True))
            stride = tuple(min(s, k) for s, k in zip(stride, kernel, strict=True))
        return Neighborhood(grid, kernel, dilation, stride, self.causal_axes)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], given: Pattern | None, extra: Tensor | None
    ) -> Tensor:
        own = self.neighborhood(grid)
        bias = None if self.table is None else Lookup(self.table, Offset(grid, self.kernel, own.dilation))  # type: ignore
        common: dict[str, Any] = dict(scale=self.scale, dropout=self.dropout if self.training else 0.0)
        keywords: dict[str, Any] = dict(pattern=own if given is None else own & given, bias=bias, **common)
        if extra is None:
            return attend(q, k, v, **keywords)
        _, more_k, more_v = self.qkv(extra)
        others = attend(q, self.k_norm(more_k), more_v, return_lse=True, **common)
        return merge([attend(q, k, v, return_lse=True, **keywords), others])[0]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: GridCache | None = None,
        extra: Tensor | None = None,
    ) -> Any:
        """`(B, N, C)` on `grid` → the same. `pattern` narrows the neighborhood.

        Every token attends to the tokens `extra (B, M, C)` too, in one softmax with its neighbors (text, say).
        With a state, where every axis is causal, x are the next tokens of the grid, and `(y, state)` is returned.
        """
        self.check(x, extra)
        self.refuse(context=context)
        if state is not None:
            self.refuse(pattern=pattern, extra=extra)
            self.check_state(state, GridCache, len(x))
            return self._go_on(x, grid, state), state
        grid = given = check_grid(grid, x.shape[1], self.axes)
        if self.small == "pad":
            grid = tuple(max(n, least) for n, least in zip(grid, self.least, strict=True))
        if grid != given:
            self.refuse(pattern=pattern)
            # Channels first, then the axes from the last to the first: before and after each.
            room = [0, 0, *(p for n, had in zip(grid[::-1], given[::-1], strict=True) for p in (0, n - had))]
            x = F.pad(x.unflatten(1, given), room).flatten(1, -2)
        q, k, v = self.project(x)
        y = join_heads(self._attend(q, k, v, grid, pattern, extra))
        if grid != given:
            y = y.unflatten(1, grid)
            for axis, length in enumerate(given, 1):
                y = y.narrow(axis, 0, length)
            y = y.flatten(1, -2)
        return self.wo(y)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GridCache:
        super().initial_state(batch, device=device, dtype=dtype)
        return GridCache(owner=self.owner(batch))

    def _go_on(self, x: Tensor, grid: tuple[int, ...] | None, state: GridCache) -> Tensor:
        """The next tokens of the grid, which has room for a whole window."""
        offset = state.length
        grid = check_grid(grid, x.shape[1], self.axes, begin=offset)
        where = SoFar(self.neighborhood(grid)).starting_at(offset)
        state.keep(grid)
        q, k, v = self.project(x, None, offset)
        if self.scale is not None:
            q = q * (self.scale * self.head_dim**0.5)
        k, v = state.append(k, v)
        return self.merge(self.mix(q, k, v, x=x, pattern=where, offset=offset, state=state))

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        """The weights `(B, H, N, N)` with which `forward(x, grid=grid)` mixes values: to look at, small N."""
        grid, pattern = check_grid(keywords.pop("grid", None), x.shape[1], self.axes), keywords.pop("pattern", None)
        self.refuse(context=context, **keywords)
        q, k, _ = self.project(x)
        units = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        return self._attend(q, k, units, grid, pattern, None)
