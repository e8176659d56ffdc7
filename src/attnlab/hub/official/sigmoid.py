"""apple/ml-sigmoid-attention (arXiv 2409.04431): attention, cross-attention, block and norm of its simulator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, rename
from attnlab.models.skeletons.plain import TokenBlock
from attnlab.nn.mechanism import join_heads
from attnlab.nn.softmax.sigmoid import SigmoidAttention
from attnlab.patterns import Explicit
from attnlab.positions import ALiBi, Position, Rotary
from attnlab.weightings import SOFTMAX, Weighting

_REPOSITORY = "apple/ml-sigmoid-attention"
_RULES: tuple[Rule, ...] = (
    (r"(^|\.)qkv\.", r"\1wqkv."),
    (r"(^|\.)proj\.", r"\1wo."),
    (r"^attn\.", "mixer."),
    (r"^ls(\d)\.gamma$", r"scale\1"),
)


class SoftmaxSetting(SigmoidAttention):
    """The authors' baseline: their module with a softmax in it."""

    @property
    def weighting(self) -> Weighting:
        return SOFTMAX


class WholeNorm(nn.Module):
    """The authors' RMSNorm, as released: x / (‖x‖ · numel^(−1/ndim) + ε), by the size of the whole tensor.

    A root mean square divides by √C. What they have depends on the batch's shape; it is here to read their checkpoints.
    """

    def __init__(self, dim: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=-1, keepdim=True) * x.numel() ** (-1.0 / x.dim())
        return self.weight * x / (size + self.eps)


def read(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; `q_proj` and `kv_proj` joined to `wqkv`; temperature and shift together as our extra state."""
    renamed = rename(params, _RULES)
    for name in [n for n in renamed if re.search(r"(^|\.)q_proj\.", n)]:
        other = name.replace("q_proj.", "kv_proj.")
        renamed[name.replace("q_proj.", "wqkv.")] = torch.cat((renamed.pop(name), renamed.pop(other)))
    for name in [n for n in renamed if n.endswith("attn_temp")]:
        home = name.removesuffix("attn_temp")
        pair = (renamed.pop(name), renamed.pop(f"{home}attn_bias"))
        renamed[f"{home}_extra_state"] = torch.cat([t.reshape(1).double() for t in pair])
    return renamed


def _norm(params: Mapping[str, Tensor], name: str) -> Any:
    """The kind of norm `name` is, by its parameters; None if there is none."""
    if f"{name}.weight" not in params:
        return None
    return nn.LayerNorm if f"{name}.bias" in params else WholeNorm


def _heads(arguments: Mapping[str, Any]) -> int:
    if "num_heads" in arguments:
        return int(arguments["num_heads"])
    found = re.search(r"heads\D{0,3}(\d+)", arguments["text"])
    return int(found[1]) if found else 8


def _attention(arguments: Mapping[str, Any], params: Mapping[str, Tensor], *, causal: bool) -> SigmoidAttention:
    """Our module for their (cross-)attention, without its parameters."""
    heads, dim = _heads(arguments), len(params["proj.weight"])
    settings = " ".join(f"{k}={v}" for k, v in arguments.items()).lower()
    position: Position | None = None
    if "alibi" in settings:
        position = ALiBi(heads, signed=True)
    elif "rotary" in settings or "rope" in settings:
        position = Rotary(dim // heads, interleaved=True)
    activation = str(arguments.get("attn_activ_fn", "sigmoid"))
    rows = 0.5 if "sqrt_seq_len" in activation else 1.0 if "seq_len" in activation else 0.0
    kind = SoftmaxSetting if "softmax" in activation else SigmoidAttention
    return kind(
        dim,
        heads=heads,
        causal=causal,
        bias="proj.bias" in params,
        position=position,
        qk_norm=_norm(params, "q_norm"),
        v_norm=_norm(params, "v_norm"),
        rows=rows,
        dropout=float(arguments.get("attn_drop", 0.0)),
    )


@official(_REPOSITORY, "Attention", "RoPEAttention", "ALiBiAttention", ours=SigmoidAttention)
class Attention:
    """Self-attention: causal where a masking function is given."""

    rename = staticmethod(read)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SigmoidAttention:
        module = _attention(arguments, params, causal=arguments.get("masking_fn") is not None)
        module.load_state_dict(read(params))
        return module

    @staticmethod
    def run(module: SigmoidAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, context, mask = inputs.get("x", inputs.get("q")), inputs.get("kv"), inputs.get("mask")
        if x is None:
            raise ValueError(f"inputs must hold x, or q and kv, got {sorted(inputs)}")
        seen = {} if mask is None else {"pattern": Explicit(mask.bool())}
        y, matrix = module(x, context, **seen), module.weights(x, context, **seen)
        values = module.project(x, context)[2]
        return {"y": y, "attn_proj": y, "attn_matrix": matrix, "attn_times_v": join_heads(matrix @ values)}


@official(_REPOSITORY, "CrossAttention", "RoPECrossAttention", "ALiBiCrossAttention")
class CrossAttention(Attention):
    """Queries of `q`, keys and values of `kv`; the values are normed."""


@official(_REPOSITORY, "TransformerBlock")
class TransformerBlock:
    """Pre-norm block of their language models: causal attention with ALiBi unless told otherwise, layer scale, MLP."""

    rename = staticmethod(read)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> TokenBlock:
        inner = {n.removeprefix("attn."): t for n, t in params.items() if n.startswith("attn.")}
        hidden, dim = params["mlp.fc1.weight"].shape
        named = re.search("rope|rotary|_transform", str(arguments).lower())
        position = {} if named else {"attn_logits_transform": "alibi"}
        block = TokenBlock(
            dim,
            _attention({**position, **arguments}, inner, causal=True),
            mlp_ratio=hidden / dim,
            norm=_norm(params, "norm1"),
            layer_scale=1.0 if "ls1.gamma" in params else None,
        )
        # Their own MLP has no bias in its first layer, and the second one's is an option.
        biases = {f"mlp.fc{i}.bias": torch.zeros(n) for i, n in ((1, hidden), (2, dim))}
        block.load_state_dict({**biases, **read(params)})
        return block

    @staticmethod
    def run(module: TokenBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = module(inputs["x"])
        inner = Attention.run(module.mixer, {"x": module.norm1(inputs["x"])})  # type: ignore[arg-type]
        return {**inner, "y": y, "block_output": y}


@official(_REPOSITORY, "RMSNorm")
class RMSNorm:
    """Their norm, which is not a root mean square; see `WholeNorm`."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> WholeNorm:
        module = WholeNorm(len(params["weight"]), eps=float(arguments.get("eps", 1e-8)))
        module.load_state_dict(params)
        return module

    @staticmethod
    def run(module: WholeNorm, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
