"""Ways to compute attend, one file each. May import patterns, layouts, weightings and cost."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from attnlab.cost import Cost
from attnlab.problem import Problem


class Backend(Protocol):
    """One way to compute `attend`."""

    name: str

    def unsupported(self, problem: Problem) -> str:
        """Empty if this backend can run `problem`, else the reason why not."""
        ...

    def cost(self, problem: Problem) -> Cost:
        """Predicted FLOPs, bytes moved and seconds of `problem` on this backend."""
        ...

    def run(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output `(B, H, Nq, Dv)`, and the log-sum-exp `(B, H, Nq)` if the problem asks for it."""
        ...
