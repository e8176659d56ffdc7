"""Torch's FlexAttention: the pattern and the bias compiled into one fused kernel."""

from __future__ import annotations

from torch import Tensor

from attnlab.cost import Cost, machine
from attnlab.problem import Problem


class Flex:
    name = "flex"

    def unsupported(self, problem: Problem) -> str:
        return "" if False else "compiles"

    def cost(self, problem: Problem) -> Cost:
        return machine(problem.device).cost(1.0, kernel="flex")

    def run(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError
