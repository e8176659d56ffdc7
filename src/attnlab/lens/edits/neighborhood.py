"""A diffusion model's attention, made local in its later steps without training (GNA)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlab.attend import attend
from attnlab.cards import LENS, Card, register
from attnlab.lens.event import Event
from attnlab.lens.steer import Edit
from attnlab.lens.where import Layers
from attnlab.patterns import Neighborhood, Pattern, Prefixed
from attnlab.patterns.grid import per_axis
from attnlab.patterns.speedup import Speedup, Tile, end_to_end, speedup
from attnlab.weightings import SOFTMAX


@dataclass(frozen=True)
class Suffixed(Pattern):
    """`Prefixed` from the other end: the last `count` of `total` tokens see all and are seen by all."""

    pattern: Pattern
    count: int
    total: int

    def check(self, nq: int, nk: int) -> None:
        if nk != self.total:
            raise ValueError(f"Suffixed: there must be {self.total} keys, got {nk}")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        last = self.total - self.count
        inner = self.pattern.allows(b, h, q.clamp_max(last - 1), k.clamp_max(last - 1))
        return inner | (q >= last) | (k >= last)


@register(
    Card(
        name="gna",
        title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
        paper="2504.16922",
        system="gna",
        family="spatial",
        kind=LENS,
        cost="N Πw",
    )
)
class NeighborhoodSteps(Edit):
    """Makes self-attention of an image or video model local to a strided window, but for the first denoising steps.

        token i of the grid sees Neighborhood(i), whose window it shares with its stride group, and all text
        a text token sees all;  a pass before `full` · `steps` is left as it is

        with lens.steer(pipeline.transformer, NeighborhoodSteps((64, 64), 20, stride=16, text=512, steps=28)):
            pipeline(prompt, num_inference_steps=28)

    Weights stay what they are: the window and the text are one softmax. Stride 1 is a sliding window, stride = kernel
    blocks, and what lies between trades how much neighbors share for time: `bound` says what a kernel on tiles can
    gain, and `patterns.speedup` why. Cost: O(N·Πkernel + N·text) a layer, instead of O(N²).
    The mechanism with its own weights is "neighborhood". Source: arXiv 2504.16922 (SHI-Labs/NATTEN).

    Args:
        grid: of the image's or video's tokens, row-major. kernel, stride, dilation: one value, or one for each axis.
        text: how many tokens come before the grid's (FLUX), or, negative, behind them (HunyuanVideo).
        steps: passes over the model in one generation; guidance by a pass of its own counts twice. None is endless.
        full: the share of `steps` that attends in full first (the paper: a quarter to a third), or, without `steps`,
            the number of passes.
        layers: as everywhere in `lens`; those that attend over other tokens must be left out.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        kernel: int | tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        dilation: int | tuple[int, ...] = 1,
        text: int = 0,
        steps: int | None = None,
        full: float | None = None,
        layers: Layers = None,
    ) -> None:
        super().__init__(layers=layers)
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        full = (0.25 if steps else 0) if full is None else full
        if full < 0 or (steps and full > 1):
            raise ValueError(
                f"full must be a share in [0, 1] of the steps, or without steps a number of them, got {full}"
            )
        self.steps, self.first = steps, round(full * steps) if steps else int(full)
        axes = len(grid)
        self.near = Neighborhood(
            tuple(grid), per_axis("kernel", kernel, axes), per_axis("dilation", dilation, axes),
            per_axis("stride", stride, axes),
        )  # fmt: skip
        self.text, self.tokens = text, math.prod(grid) + abs(text)
        self.pattern: Pattern = self.near
        if text:
            self.pattern = Prefixed(self.near, text) if text > 0 else Suffixed(self.near, -text, self.tokens)
        self._begin: int | None = None
        self._local = False

    def start(self, step: int) -> None:
        self._begin = step if self._begin is None else self._begin
        done = step - self._begin
        self._local = (done % self.steps if self.steps else done) >= self.first

    def close(self) -> None:
        self._begin = None

    def wants(self, event: Event) -> bool:
        # Joint attention has two inputs, and looks like cross attention but for its lengths.
        joint = bool(self.text) and event.q.shape[2] == event.k.shape[2] == self.tokens
        return self._local and (event.kind == "self" or joint) and event.source != "scan"

    def before(self, event: Event) -> None:
        if event.k.shape[2] != self.tokens or event.q.shape[2] != self.tokens:
            raise ValueError(
                f"grid {self.near.grid} and {abs(self.text)} text tokens are {self.tokens}, {event.name} has "
                f"{event.k.shape[2]}: give its grid, or leave it out of layers"
            )
        if event.pattern is not None or event.route is not None:
            raise ValueError(f"{event.name} has another pattern already")
        event.pattern = self.pattern
        plain = event.mask is None and event.bias is None and event.weighting == SOFTMAX and not event.is_causal
        if self.text < 0 and plain:
            # The text to the front, where tiles of the grid stay whole.
            event.stands(lambda: self._rolled(event))

    def _rolled(self, event: Event) -> Tensor:
        q, k, v = (torch.roll(t, -self.text, 2) for t in (event.q, event.k, event.v))
        where: Any = Prefixed(self.near, -self.text)
        return torch.roll(attend(q, k, v, pattern=where, scale=event.scale, dropout=event.dropout), self.text, 2)

    def bound(self, share: float, q_tile: Tile, kv_tile: Tile | None = None, *, dynamic: bool = False) -> float:
        """How much faster the whole generation can get, if `share` of its time is this attention (Amdahl).

        The window's part alone is counted, on a kernel with tiles of these shapes (see `patterns.speedup`).
        """
        local = 1.0 - self.first / self.steps if self.steps else 1.0
        return end_to_end(share, self.speedup(q_tile, kv_tile, dynamic=dynamic).reachable, local)

    def speedup(self, q_tile: Tile, kv_tile: Tile | None = None, *, dynamic: bool = False) -> Speedup:
        """The window's gain on a kernel with tiles, and whether it needs no mask there."""
        return speedup(self.near, q_tile, kv_tile, dynamic=dynamic)
