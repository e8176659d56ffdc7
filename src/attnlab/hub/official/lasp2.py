"""Linear attention as flash-linear-attention's functions compute it: what any split over ranks must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from attnlab.hub.official import official
from attnlab.scan import scan

_NAIVE = "naive_chunk_linear_attn", "naive_recurrent_linear_attn"


@official("fla-org/flash-linear-attention", *_NAIVE, "chunk_linear_attn", "fused_chunk_linear_attn")
class LinearAttention:
    """q, k `(B, T, H, K)`, v `(B, T, H, V)` → y `(B, T, H, V)`, causal; divided by the sum of its weights on request.

    scale is K^-½ if None. The naive functions do not normalise unless asked to, the others do unless asked not to.
    """

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
        naive = any(name in arguments.get("case_name", "") for name in _NAIVE)
        given, normalise = arguments.get("scale"), arguments.get("normalize", not naive)

        def run(inputs: dict[str, Tensor]) -> Tensor:
            q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
            scale = float(given) if isinstance(given, (int, float)) else q.shape[-1] ** -0.5
            out, _ = scan(q, k, pad(v, (0, 1), value=1.0) if normalise else v, scale=scale)
            out = out[..., :-1] / (out[..., -1:] + 1e-10) if normalise else out
            return out.transpose(1, 2)

        return run

    @staticmethod
    def run(module: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs)}
