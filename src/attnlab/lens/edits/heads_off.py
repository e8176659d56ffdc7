"""Taking heads away: what they would say becomes nothing, or what all keys say on average."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from attnlab.lens.edits.heads import Ablate
from attnlab.lens.event import Event
from attnlab.lens.where import Choice


class HeadsOff(Ablate):
    """Disables heads, each given as (layer, head), from the second pass on: the prompt is read with all of them.

        uniform    out = mean of the values of all keys that the query may see: as scores of 0 give, or a query of 0
        zero       out = 0

    The paper masks uniformly. The other heads run as fused as before. Source: arXiv 2404.15574
    (nightdessert/Retrieval_Head).

    Args:
        steps: the passes in which they are off: those of decoding, `slice(1, None)`; None is all.
    """

    def __init__(
        self,
        heads: Iterable[tuple[int, int]],
        style: Literal["uniform", "zero"] = "uniform",
        *,
        steps: Choice = slice(1, None),
    ) -> None:
        if style not in ("uniform", "zero"):
            raise ValueError(f"style must be 'uniform' or 'zero', got {style!r}")
        self.off: dict[int, list[int]] = {}
        for layer, head in heads:
            if layer < 0 or head < 0:
                raise ValueError(f"heads must be (layer, head), counted from 0, got {(layer, head)}")
            self.off.setdefault(layer, []).append(head)
        super().__init__(style, layers=sorted(self.off), steps=steps)

    def put(self, event: Event, new: Tensor, old: Tensor) -> Tensor:
        heads = self.off[event.layer]
        if max(heads) >= event.heads:
            raise ValueError(
                f"heads of {event.name} (layer {event.layer}) are 0 to {event.heads - 1}, got {max(heads)}"
            )
        out = old.clone()
        out[:, heads] = new[:, heads]
        return out
