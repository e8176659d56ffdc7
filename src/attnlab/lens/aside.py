"""Runs of a tapped model that are no passes of it: what an edit runs for its own sake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from attnlab.lens.subscriber import Subscriber
from attnlab.lens.tap import _taps


@contextmanager
def aside(model: nn.Module, *subscribers: Subscriber) -> Iterator[None]:
    """Runs of `model` within, or of a part of it, are no passes of it: only `subscribers` see their calls.

    For a measurement, or the stream of another prompt. Without a tap, this does nothing.
    """
    there = _taps.get(model)
    if there is None:
        yield
        return
    here = there._thread
    before = here.aside, here.calls, here.seen
    here.aside, here.calls = subscribers, Counter()
    try:
        yield
    finally:
        here.aside, here.calls, here.seen = before


def shown(model: nn.Module, subscriber: Subscriber) -> bool:
    """Whether what `model` runs now, in this thread, is shown to `subscriber`: hooks of its own should ask."""
    there = _taps.get(model)
    among = None if there is None else there._thread.aside
    return among is None or subscriber in among
