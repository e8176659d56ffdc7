"""NATTEN's own kernels for neighborhood attention on a GPU, where the package is installed."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from attnlab.cost import Cost, machine
from attnlab.patterns import Neighborhood
from attnlab.patterns.speedup import speedup
from attnlab.problem import Problem


@lru_cache(maxsize=1)
def _missing() -> str:
    if find_spec("natten") is None:
        return "natten is not installed (pip install attnlab[gpu])"
    import natten

    return "" if getattr(natten, "HAS_LIBNATTEN", False) else "this natten was built without its CUDA kernels"


# Tiles of 64 tokens, by the number of axes.
_TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


class Natten:
    """`natten.functional.na1d/na2d/na3d`: fused kernels of generalized neighborhood attention (arXiv 2504.16922)."""

    name = "natten"

    def unsupported(self, problem: Problem) -> str:
        p = problem
        if not isinstance(p.pattern, Neighborhood):
            return f"pattern {type(p.pattern).__name__} (only Neighborhood)"
        if p.device.type != "cuda":
            return f"device {p.device.type} (only cuda)"
        if not 1 <= len(p.pattern.grid) <= 3:
            return f"{len(p.pattern.grid)} axes (1 to 3)"
        if p.nq != p.nk:
            return "queries are a part of the grid"
        if not p.is_softmax:
            return f"weighting {p.weighting} (only softmax)"
        if p.bias is not None or p.dropout:
            return "bias" if p.bias is not None else "dropout"
        if p.dtype is torch.float64:
            return "dtype float64"
        if p.dim != p.value_dim or p.dim % 8 or p.dim > 256:
            return f"head dimension {p.dim} and {p.value_dim} (equal, a multiple of 8, at most 256)"
        if p.return_lse and p.needs_grad:
            return "the gradient of the lse"
        if p.traced:
            return "cannot be traced by torch.compile"
        return _missing()

    def cost(self, problem: Problem) -> Cost:
        p = problem
        moved = 2.0 * p.dtype.itemsize * p.batch * p.heads * p.nq * (3 * p.dim + p.value_dim)
        axes = len(p.pattern.grid)  # type: ignore[attr-defined]
        visited = p.pairs / speedup(p.pattern, _TILES[axes]).reachable
        return machine(p.device).cost(
            "natten", visited, p.dim + p.value_dim, train=p.needs_grad, dtype=p.dtype, moved=moved
        )

    def run(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        from natten import functional

        pattern = problem.pattern
        if not isinstance(pattern, Neighborhood):
            raise ValueError(self.unsupported(problem))
        grid = pattern.grid
        # (B, H, N, D) → (B, *grid, H, D)
        q, k, v = (x.transpose(1, 2).unflatten(1, grid).contiguous() for x in (q, k, v))
        found = getattr(functional, f"na{len(grid)}d")(
            q, k, v, kernel_size=pattern.kernel, stride=pattern.stride, dilation=pattern.dilation,
            is_causal=pattern.causal, scale=problem.scale, return_lse=problem.return_lse,
        )  # fmt: skip
        out, lse = found if problem.return_lse else (found, None)
        axes = len(grid)
        out = out.flatten(1, axes).transpose(1, 2)
        return out, None if lse is None else lse.flatten(1, axes).transpose(1, 2)
