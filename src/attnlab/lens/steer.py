"""Steering: what attention does instead, by edits that compose in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attnlab.lens.event import Event
from attnlab.lens.subscriber import Subscriber
from attnlab.lens.tap import join
from attnlab.lens.where import Choice, Layers, Where


class Edit(Subscriber):
    """A change of attention at chosen layers, heads, queries, keys and steps (see `Where`); all of them if None.

    Override `before`, `scores`, `weights` or `output`; what these return outside the chosen heads, queries and keys
    is put back as it was by `put`.
    """

    def __init__(
        self, *, layers: Layers = None, heads: Choice = None, queries: Choice = None, keys: Choice = None,
        steps: Choice = None,
    ) -> None:  # fmt: skip
        self.where = Where(layers=layers, heads=heads, queries=queries, keys=keys, steps=steps)

    def put(self, event: Event, new: Tensor, old: Tensor) -> Tensor:
        """`new` in the chosen region of scores, weights `(B, H, Nq, Nk)` or outputs `(B, H, Nq, Dv)`; else `old`."""
        region = self.where.region(event)
        if old.shape[-1] != event.k.shape[2]:
            region = region[..., :1] if self.where.keys is None else region.any(-1, keepdim=True)
        return new if bool(region.all()) else torch.where(region, new, old)


@contextmanager
def steer(model: nn.Module, edits: Subscriber | Sequence[Subscriber]) -> Iterator[None]:
    """Let `edits` change the attention of `model`, in order, for as long as the block runs.

    Within each call all edits of scores come first, in their order, then those of weights, then those of outputs.
    Joins the open tap of the model, if there is one, so that `watch` sees what comes of the edits.

    Raises:
        TypeError: something among `edits` is none. ValueError, from the model's call: a layer or head that does not
        exist (which do is said), an edit that changes a shape or hides every key from a query.
    """
    listed = list(edits) if isinstance(edits, Iterable) else [edits]
    for edit in listed:
        if not isinstance(edit, Subscriber):
            raise TypeError(f"edits must be Edits, got {edit if isinstance(edit, type) else type(edit).__name__}")
    leave = join(model, *listed)
    try:
        yield
    finally:
        leave()
