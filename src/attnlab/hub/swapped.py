"""What a swap is to whoever made it: undone, explained, used as a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attnlab.cost import count_flops


@dataclass(frozen=True)
class Difference:
    """What a swap changes on a probe: FLOPs of the whole model, and its output.

    `deviation` is ‖new − old‖ / ‖old‖ over all floating-point outputs, `largest` the largest single difference.
    """

    flops_before: int
    flops_after: int
    deviation: float
    largest: float
    layers: tuple[str, ...]

    @property
    def saved(self) -> float:
        """The share of the model's FLOPs that is saved; negative if there are more."""
        return 1.0 - self.flops_after / max(self.flops_before, 1)

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} layers swapped: {self.flops_before / 1e9:.4g} → {self.flops_after / 1e9:.4g} GFLOPs "
            f"({self.saved:+.1%} saved), output off by {self.deviation:.3g} of its norm, at most {self.largest:.3g}"
        )


class Swap:
    """A swap that holds until `undo`; as a context manager, until the end of the block."""

    model: nn.Module
    layers: tuple[str, ...] = ()

    def undo(self) -> None:
        """Leave the model as it was before; what has been undone stays so."""
        raise NotImplementedError

    @property
    def holds(self) -> bool:
        """Whether it has not been undone."""
        raise NotImplementedError

    def _switch(self, on: bool) -> None:
        raise NotImplementedError

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    @torch.no_grad()
    def explain(self, *probe: Any, **keywords: Any) -> Difference:
        """Run the model on a probe as it was and as it is, with the same randomness: FLOPs saved, output changed."""
        if not self.holds:
            raise ValueError("the swap has been undone: explain it while it holds")
        found: list[Any] = []
        flops = []
        at = torch.random.get_rng_state()
        try:
            for on in (False, True):
                self._switch(on)
                torch.random.set_rng_state(at)
                flops.append(count_flops(lambda: found.append(self.model(*probe, **keywords))))
        finally:
            self._switch(True)
        old, new = ([x.double() for x in tree_leaves(y) if _counts(x)] for y in found)
        if not old or [x.shape for x in old] != [x.shape for x in new]:
            raise ValueError(f"the outputs of {type(self.model).__name__} cannot be compared")
        apart = [b - a for a, b in zip(old, new, strict=True)]
        norm = sum(float(x.square().sum()) for x in old) ** 0.5
        deviation = sum(float(x.square().sum()) for x in apart) ** 0.5 / max(norm, 1e-300)
        return Difference(flops[0], flops[1], deviation, max(float(x.abs().max()) for x in apart), self.layers)


def _counts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0
