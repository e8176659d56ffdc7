"""Where a language model plans and anchors in a text of its own, and the credit that its tokens get for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnlab.lens.event import Event
from attnlab.lens.measures.anchors import Rhythm, multipliers, rhythm
from attnlab.lens.tap import Subscriber, join
from attnlab.lens.where import Where


class _Maps(Subscriber):
    """The maps of chosen layers; of none, how many layers there are."""

    def __init__(self, layers: Sequence[int] = ()) -> None:
        self.where = Where(layers=list(layers) if layers else None)
        self.maps: list[Tensor] | None = [] if layers else None
        self.depth = 0

    def wants(self, event: Event) -> bool:
        return event.kind == "self"

    def after(self, event: Event, out: Tensor) -> None:
        self.depth = max(self.depth, event.layer + 1)
        if self.maps is not None:
            self.maps.append(event.weights())


def middle_layers(depth: int, count: int = 5) -> list[int]:
    """At most `count` layers, evenly spaced from ⌊depth/3⌋ to ⌊2·depth/3⌋: those that the paper listens to."""
    if depth < 1 or count < 1:
        raise ValueError(f"depth and count must be at least 1, got {depth} and {count}")
    first, last = depth // 3, min(2 * depth // 3, depth - 1)
    return sorted({round(first + (last - first) * i / max(count - 1, 1)) for i in range(count)})


@torch.no_grad()
def listen(
    model: nn.Module, ids: Tensor, prompt: int, *, layers: Sequence[int] | None = None, **keywords: float
) -> Rhythm:  # fmt: skip
    """WAAD and FAI of what a model wrote: ids `(N)` of prompt and response, of which the first `prompt` are the prompt.

    One pass over any causal language model, two if `layers` are not given (`middle_layers`); the maps of the layers are
    in memory, H·N² each. `keywords` are `measures.anchors.rhythm`'s. Source: arXiv 2510.13554.
    """
    if ids.dim() != 1:
        raise ValueError(f"ids must be (N), of one text, got {tuple(ids.shape)}")

    def run(watch: _Maps) -> _Maps:
        leave = join(model, watch)
        try:
            model(ids[None])
        finally:
            leave()
        return watch

    chosen = list(layers) if layers is not None else middle_layers(run(_Maps()).depth)
    if not chosen:
        raise ValueError("layers must name one or more")
    maps = run(_Maps(chosen)).maps or []
    return rhythm(torch.cat(maps, 1)[0], prompt, **keywords)  # type: ignore[arg-type]


@torch.no_grad()
def credit(
    model: nn.Module, ids: Tensor, prompt: int, mode: str = "coupled", *, layers: Sequence[int] | None = None,
    window: int = 10, lo: int = 10, hi: int = 50, **keywords: float,
) -> Tensor:  # fmt: skip
    """The multiplier γ `(N − prompt)` of the advantage of each token of a response: for `recipes.token_credit`.

    `keywords` are `measures.anchors.multipliers`'.
    """
    heard = listen(model, ids, prompt, layers=layers, window=window, lo=lo, hi=hi)
    return multipliers(heard.waad, heard.fai, mode, **keywords)  # type: ignore[arg-type]
