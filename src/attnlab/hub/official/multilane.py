"""tdemin16/multi-lane: the attention and the block in which lanes run beside a frozen stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import load, rename
from attnlab.models.skeletons.plain import TokenBlock
from attnlab.nn.multihead import MultiHead
from attnlab.recipes.multilane import lane_attention, lane_block

_REPOSITORY = "tdemin16/multi-lane"


class _WithPrompts(nn.Module):
    """A frozen part, the prefix prompts of the lanes up to the last one, and which ablation runs."""

    def __init__(self, part: nn.Module, prompts: Tensor | None, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.part = part
        self.prefix = None if prompts is None else prompts[:, : arguments.get("t", 0) + 1]
        self.how = {
            "replace": not arguments.get("disable_dandr", False),
            "first": arguments.get("id", 0) == 0,
            "merge": arguments.get("tome", 0),
        }


def _mixer(arguments: Mapping[str, Any], params: Mapping[str, Tensor]) -> MultiHead:
    prompts = next((t for name, t in params.items() if name.endswith("prompts")), None)
    # Without prompts, whose shape tells, and without a number: as in the case that the arguments name in words.
    default = prompts.shape[3] if prompts is not None else 2 if "as pret_attention" in arguments["text"] else 8
    bias = any(name.endswith("qkv.bias") for name in params)
    dim = next(t for name, t in params.items() if name.endswith("proj.weight")).shape[0]
    return MultiHead(dim, heads=arguments.get("num_heads", default), bias=bias, out_bias=True)


def _split(params: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    rules = ((r"(^|\.)attn\.", r"\1mixer."), (r"(^|\.)qkv\.", r"\1wqkv."), (r"(^|\.)proj\.", r"\1wo."))
    found = rename(params, rules)
    names = [name for name in found if name.endswith("prompts")]
    return found, found.pop(names[0]) if names else None


@official(_REPOSITORY, "PreT_Attention")
class PreTAttention:
    """Normed tokens (B, N, C) and lanes (T, B, 1 + S, C) to both."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _WithPrompts:
        found, prompts = _split(params)
        mixer = _mixer(arguments, params)
        load(mixer, found)
        return _WithPrompts(mixer, prompts, arguments)

    @staticmethod
    def run(module: _WithPrompts, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, lanes = inputs["x"], inputs["tokens"].transpose(0, 1)
        mixer: Any = module.part
        with torch.no_grad():
            y = mixer(x)
        return {"x": y, "tokens": lane_attention(mixer, x, lanes, module.prefix, **module.how).transpose(0, 1)}


@official(_REPOSITORY, "Block")
class Block:
    """Tokens (B, N, C) and lanes (T, B, 1 + S, C) to both."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _WithPrompts:
        found, prompts = _split(params)
        if arguments.get("init_values") is not None:
            raise ValueError(f"init_values must be None: no layer scale, got {arguments['init_values']}")
        block = TokenBlock(arguments["dim"], _mixer(arguments, params), mlp_ratio=arguments.get("mlp_ratio", 4.0))
        load(block, found)
        return _WithPrompts(block, prompts, arguments)

    @staticmethod
    def run(module: _WithPrompts, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        block: Any = module.part
        x, lanes = lane_block(block, inputs["x"], inputs["tokens"].transpose(0, 1), module.prefix, **module.how)
        return {"x": x, "tokens": lanes.transpose(0, 1)}
