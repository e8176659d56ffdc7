"""The scan on flash-linear-attention's Triton kernels (CUDA only; `pip install flash-linear-attention`)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@cache
def installed() -> bool:
    return find_spec("fla") is not None


def usable(q: Tensor) -> bool:
    """Whether the kernels are there and take these inputs; torch.compile cannot look into them."""
    fits = q.is_cuda and q.dtype != torch.float64 and q.shape[-1] <= 256
    return fits and installed() and not torch.compiler.is_compiling()


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """The kernel of each case of `scan`; the kernels take tokens before heads, and the state in float32."""
    if not q.is_cuda:
        raise ValueError(f"backend='fla' runs on CUDA only, but q is on {q.device}; use backend='chunked'")
    if not installed():
        raise ValueError("backend='fla' needs flash-linear-attention: pip install 'attnlab[gpu]'")
    if q.dtype == torch.float64:
        raise ValueError("backend='fla' has no float64 kernels; use backend='chunked'")
    from fla import ops  # type: ignore[import-not-found,unused-ignore]

    repeats = v.shape[1] // q.shape[1]
    grouped = decay is not None and decay.ndim == 4 and beta is not None  # chunk_kda serves grouped heads itself
    if repeats > 1 and not grouped:
        q, k = q.repeat_interleave(repeats, dim=1), k.repeat_interleave(repeats, dim=1)
    arguments: dict[str, Any] = {name: x.transpose(1, 2).contiguous() for name, x in (("q", q), ("k", k), ("v", v))}
    if decay is not None:
        arguments["g"] = decay.transpose(1, 2).float().contiguous()
    if beta is not None:
        arguments["beta"] = beta.transpose(1, 2).contiguous()
    if bounds is not None:
        arguments["cu_seqlens"] = torch.tensor(bounds, device=q.device)
    if beta is None:
        kernel = ops.chunk_gla if decay is not None and decay.ndim == 4 else ops.chunk_simple_gla
    elif decay is None:
        kernel = ops.chunk_delta_rule
    else:
        kernel = ops.chunk_kda if decay.ndim == 4 else ops.chunk_gated_delta_rule
    out, last = kernel(**arguments, scale=scale, initial_state=state.float(), output_final_state=True)
    return out.transpose(1, 2), last
