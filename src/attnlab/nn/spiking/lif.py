"""The neuron of spiking networks: leaky, integrating, firing 0 or 1, and trained through a smooth stand-in."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attnlab.cards import OPERATOR, STREAMING, Card, register


def lif(
    x: Tensor,
    state: Tensor | None = None,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    slope: float = 4.0,
    axis: int = 0,
) -> tuple[Tensor, Tensor]:
    """Spikes of leaky integrate-and-fire neurons that `x` drives along the time axis, and their last potentials.

        h_t = v_{t−1} + (x_t − v_{t−1}) / τ        s_t = 1[h_t ≥ θ]        v_t = (1 − s_t) h_t

    x of any shape → s of the same shape, and v of x's shape without `axis`, which continues the sequence as `state`;
    every sequence begins at v = 0. Gradients pass the threshold as those of σ(slope · (h − θ)) and do not pass the
    reset (only 1 − s_t, held fixed). Cost O(1) per step: four elementwise passes, and one per step going back.
    """
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be one of x's {x.ndim} axes, got {axis}")
    rest = x.shape[: axis % x.ndim] + x.shape[axis % x.ndim + 1 :]
    if state is not None and state.shape != rest:
        raise ValueError(f"state must hold one potential per neuron, {tuple(rest)}, got {tuple(state.shape)}")
    if not x.shape[axis]:
        return x, x.new_zeros(rest) if state is None else state
    run = _traced if torch.compiler.is_compiling() else _LIF.apply
    spikes, last = run(x.movedim(axis, 0), state, tau, threshold, slope)
    return spikes.movedim(0, axis), last


def _traced(x: Tensor, v: Tensor | None, tau: float, threshold: float, slope: float) -> tuple[Tensor, Tensor]:
    """The same written out, for tracing: the value of the step, and the slope of the sigmoid."""
    spikes: list[Tensor] = []
    for drive in x.unbind(0):
        h = drive / tau if v is None else v + (drive - v) / tau
        soft = (slope * (h - threshold)).sigmoid()
        spike = (h >= threshold).to(h.dtype)
        spikes.append(spike + (soft - soft.detach()))
        v = h * (1 - spike)
    return torch.stack(spikes), cast(Tensor, v)


class _LIF(torch.autograd.Function):
    """Keeps the potentials alone: spikes are read from them again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor | None, tau: float, threshold: float, slope: float
    ) -> tuple[Tensor, Tensor]:
        kept = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        spikes = torch.empty_like(x)
        # Where no gradient is wanted, one potential, which is overwritten, does for all steps.
        potentials = torch.empty_like(x) if kept else torch.empty_like(x[:1]).expand(len(x), *x.shape[1:])
        last = None
        for drive, h, fires in zip(x.unbind(0), potentials.unbind(0), spikes.unbind(0), strict=True):
            if v is None:
                torch.mul(drive, 1 / tau, out=h)
            else:
                # The spikes' place serves for the difference, until it is known who fires.
                torch.sub(drive, v, out=fires)
                torch.add(v, fires, alpha=1 / tau, out=h)
            torch.ge(h, threshold, out=fires)
            v = last = torch.addcmul(h, h, fires, value=-1, out=last)
        if kept:
            ctx.save_for_backward(potentials)
            ctx.constants = tau, threshold, slope
        return spikes, cast(Tensor, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_spikes: Tensor, by_last: Tensor) -> tuple[Any, ...]:
        (potentials,) = ctx.saved_tensors
        tau, threshold, slope = ctx.constants
        soft = (potentials - threshold).mul_(slope).sigmoid_()
        into = (1 - soft).mul_(soft).mul_(by_spikes).mul_(slope)
        quiet = (potentials < threshold).to(into.dtype)
        after, factor = by_last, 1.0
        for h, silent in zip(reversed(into.unbind(0)), reversed(quiet.unbind(0)), strict=True):
            h.addcmul_(after, silent, value=factor)
            after, factor = h, 1 - 1 / tau
        return into / tau, (after * factor if ctx.needs_input_grad[1] else None), None, None, None


@register(
    Card(
        name="lif",
        title="Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN Ticket",
        paper="2401.02020",
        family="spiking",
        kind=OPERATOR,
        capabilities=STREAMING,
        cost="N",
    )
)
class LIF(nn.Module):
    """Leaky integrate-and-fire neurons as an activation: x of any shape, time along `axis`, to spikes in {0, 1}.

        spikes = neurons(x)                        from rest
        spikes, state = neurons(x, state)          from where the last call ended, or from rest if state is None

    A module that keeps nothing between calls, so that no sample is ever read with another's potentials. Equations and
    cost: `lif`. Sources: arXiv 2401.02020, 2402.04882 (both: τ = 2, hard reset to 0 outside the gradient, slope 4).

    Args:
        tau: time constant, > 1 leaks slowly. threshold: θ. slope: of the sigmoid whose gradient stands in.
    """

    def __init__(self, *, threshold: float = 1.0, tau: float = 2.0, slope: float = 4.0, axis: int = 0) -> None:
        super().__init__()
        if tau < 1:
            raise ValueError(f"tau must be at least 1, got {tau}")
        if threshold <= 0 or slope <= 0:
            raise ValueError(f"threshold and slope must be positive, got {threshold} and {slope}")
        self.threshold, self.tau, self.slope, self.axis = threshold, tau, slope, axis

    def forward(self, x: Tensor, *state: Tensor | None) -> Any:
        options = {"tau": self.tau, "threshold": self.threshold, "slope": self.slope, "axis": self.axis}
        if not state:
            return lif(x, **options)[0]  # type: ignore[arg-type]
        return lif(x, state[0], **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, tau={self.tau}, axis={self.axis}"
