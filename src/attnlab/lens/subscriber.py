"""Somebody at the tap: what may be seen and changed of each call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn

from attnlab.lens.event import Event
from attnlab.lens.where import Where


class Handle(Protocol):
    def remove(self) -> None: ...


class Subscriber:
    """Somebody at the tap: override what you need.

    `scores` and `weights`, where overridden, make a call be computed by hand, with all its scores in memory; else it
    runs as fused as the model made it. Of several subscribers, each step is done by all before the next step comes:
    before, scores, weights, output, after.
    """

    where = Where()

    def open(self, model: nn.Module) -> Iterable[Handle]:
        """Put hooks of one's own into the model; the tap removes them."""
        return ()

    def close(self) -> None:
        """The tap is closed, or this subscriber has left it."""

    def start(self, step: int) -> None:
        """A pass over the model begins."""

    def finish(self, step: int) -> None:
        """A pass over the model has ended well."""

    def wants(self, event: Event) -> bool:
        """Whether the other methods are called for this event, beyond what `where` says."""
        return True

    def before(self, event: Event) -> None:
        """Replace what is attended: q, k, v, mask, pattern, scale."""

    def scores(self, event: Event, scores: Tensor) -> Tensor:
        """The scores `(B, H, Nq, Nk)` to go on with; −∞ where a query may not look."""
        return scores

    def weights(self, event: Event, weights: Tensor) -> Tensor:
        """The weights `(B, H, Nq, Nk)` to go on with."""
        return weights

    def output(self, event: Event, out: Tensor) -> Tensor:
        """The heads' outputs `(B, H, Nq, Dv)` to go on with, before the output projection."""
        return out

    def after(self, event: Event, out: Tensor) -> None:
        """The call is done, all edits included."""
