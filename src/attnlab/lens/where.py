"""Which layers, heads, queries, keys and steps are meant, checked against what there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnlab.lens.event import Event

Choice = int | slice | Iterable[int] | None
Layers = int | str | slice | Iterable[int | str] | Callable[["Event"], bool] | None


def chosen(choice: Choice, count: int, what: str) -> list[int]:
    """The indices that `choice` names among `count`: negative ones from the end; ValueError says which there are."""
    if choice is None:
        return list(range(count))
    if isinstance(choice, slice):
        return list(range(count))[choice]
    try:
        wanted = [index(i) for i in ([choice] if isinstance(choice, int) else choice)]
    except TypeError as error:
        raise TypeError(f"{what} chosen by an index, several, or a slice, got {choice!r}") from error
    wrong = [i for i in wanted if not -count <= i < count]
    if wrong:
        raise ValueError(f"{what} {', '.join(map(str, wrong))} not there: there are 0 to {count - 1}")
    return [i % count for i in wanted]


class Where:
    """A choice of layers, heads, queries, keys and steps; None is all of them.

    layers: ordinals in the order in which the model calls them (negative from the end), names, globs on names
    ("decoder.*"), or a function of the event. heads, queries, keys, steps: an index, several, or a slice; negative
    from the end, but for steps, whose end is not known.
    """

    def __init__(
        self, *, layers: Layers = None, heads: Choice = None, queries: Choice = None, keys: Choice = None,
        steps: Choice = None,
    ) -> None:  # fmt: skip
        self.layers: list[int | str] | slice | Callable[[Event], bool] | None
        if layers is None or callable(layers) or isinstance(layers, slice):
            self.layers = layers
        else:
            given = [layers] if isinstance(layers, int | str) or not isinstance(layers, Iterable) else list(layers)
            if not all(isinstance(w, str) or hasattr(w, "__index__") for w in given):
                raise TypeError(f"layers are ordinals, names, a slice or a function of the event, got {layers!r}")
            self.layers = [w if isinstance(w, str) else index(w) for w in given]
        self.heads, self.queries, self.keys, self.steps = (
            x if x is None or isinstance(x, int | slice) else list(x) for x in (heads, queries, keys, steps)
        )
        numbers = [] if self.steps is None or isinstance(self.steps, slice) else self.steps
        if any(s < 0 for s in ([numbers] if isinstance(numbers, int) else numbers)):
            raise ValueError(f"steps must be 0 or more (nobody knows the last one), got {steps!r}")

    def layer(self, event: Event, expected: Sequence[str]) -> bool:
        """Whether the event's layer is meant; `expected` are the layers' names, which negative ordinals count from."""
        if self.layers is None:
            return True
        if callable(self.layers):
            return bool(self.layers(event))
        if isinstance(self.layers, slice):
            return event.layer in range(*self.layers.indices(max(len(expected), event.layer + 1)))
        return any(
            fnmatchcase(event.name, w) if isinstance(w, str) else event.layer == (w if w >= 0 else w + len(expected))
            for w in self.layers
        )

    def step(self, step: int) -> bool:
        if self.steps is None:
            return True
        if isinstance(self.steps, slice):
            return step in range(*self.steps.indices(step + 1))
        return step == self.steps if isinstance(self.steps, int) else step in self.steps

    @property
    def counts_back(self) -> bool:
        """Whether a layer is counted from the end."""
        if isinstance(self.layers, slice):
            return any(x is not None and x < 0 for x in (self.layers.start, self.layers.stop, self.layers.step))
        return isinstance(self.layers, list) and any(isinstance(w, int) and w < 0 for w in self.layers)

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError if a layer that is asked for is not among `names`, those that have attended."""
        wrong: list[Any]
        if isinstance(self.layers, slice):
            wrong = [] if range(*self.layers.indices(len(names))) else [self.layers]
        elif isinstance(self.layers, list):
            wrong = [
                w for w in self.layers
                if not (any(fnmatchcase(n, w) for n in names) if isinstance(w, str) else -len(names) <= w < len(names))
            ]  # fmt: skip
        else:
            return
        if wrong:
            there = ", ".join(f"{i} {n}" for i, n in enumerate(names))
            raise ValueError(f"layers {wrong} do not attend in this model; those that do: {there}")

    def head_list(self, event: Event) -> list[int]:
        found = chosen(self.heads, event.heads, f"heads of {event.name}:")
        if isinstance(self.heads, slice) and not found:
            raise ValueError(f"heads of {event.name}: none in {self.heads}: there are 0 to {event.heads - 1}")
        return found

    def region(self, event: Event) -> Tensor:
        """The chosen pairs: bool, broadcastable to `(B, H, Nq, Nk)`."""
        region = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=event.q.device)
        sizes = (event.heads, event.q.shape[2], event.k.shape[2])
        for axis, (choice, size, what) in enumerate(
            zip((self.heads, self.queries, self.keys), sizes, ("heads", "queries", "keys"), strict=True), start=1
        ):
            if choice is not None:
                shape: list[Any] = [1, 1, 1, 1]
                shape[axis] = size
                line = torch.zeros(size, dtype=torch.bool, device=event.q.device)
                line[chosen(choice, size, f"{what} of {event.name}:")] = True
                region = region & line.view(shape)
        return region
