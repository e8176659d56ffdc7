"""What a module makes of its parameters alone, kept from call to call where nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor


class Kept:
    """The last tensor that was made of some parameters: a table of positions, say, that is the same at each call.

        self.kept = Kept()
        bias = self.kept(about, self.table.parameters(), lambda: self.table(grid))

    It is made again where `about` or a parameter has changed; while gradients are recorded, under a compiler and on a
    GPU (which would have to wait for the comparison), always. Copies and pickles of the module are without it.
    """

    def __init__(self) -> None:
        self._last: tuple[Hashable, list[Tensor], Tensor] | None = None

    def __call__(self, about: Hashable, parameters: Iterable[Tensor], make: Callable[[], Tensor]) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        weights = list(parameters)
        if weights[0].device.type != "cpu":
            return make()
        about = (about, weights[0].dtype)
        if self._last is None or self._last[0] != about or not all(map(torch.equal, self._last[1], weights)):
            self._last = about, [w.clone() for w in weights], make().contiguous()
        return self._last[2]

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None}
