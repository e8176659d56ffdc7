"""zhoujiahuan1991/ICML2025-TCPA (arXiv 2505.02406): one layer's picks, prompts and attention."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import load, rename
from attnlab.models.skeletons.plain import Plain
from attnlab.nn.multihead import MultiHead
from attnlab.recipes.tcpa import TCPA, coordinated_attention


class _Layer(nn.Module):
    """One layer of a TCPA, which stands in a ViT of the right depth."""

    def __init__(self, net: TCPA, layer: int) -> None:
        super().__init__()
        self.net, self.layer = net, layer


@official("zhoujiahuan1991/ICML2025-TCPA", "Pool_TCPA", "Model_VFPT_TCPA", "Model_VFPT_TCPA.forward_attn")
class Coordinated:
    """A layer's input before its norm to the mask, the distance, the prompts and the attention's output.

    The layer stands in the call, as `layer=1`; heads, if not in the arguments, are 12 at width 768 and else 2.
    """

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _Layer:
        for option in ("ADVP", "IPrompt", "simam", "random_prompt"):
            if arguments.get(option):
                raise ValueError(f"{option} must be False here: only the plain layer is read")
        dim = params["norm1.weight"].shape[0]
        heads = arguments.get("num_heads", 12 if dim == 768 else 2)
        found = re.search(r"layer\s*=\s*(\d+)", arguments.get("call", ""))
        depth = params["Pool_cls.keys"].shape[0]
        vit = Plain(
            dim=dim,
            depth=depth,
            mixer=lambda _: MultiHead(dim, heads=heads, bias="attn.qkv.bias" in params, out_bias=True),
            image=16,
            num_classes=1,
        )
        net = TCPA(
            vit,
            sizes=(arguments["pool_size_cls"], arguments["pool_size_image"]),
            picks=(arguments["topk_cls"], arguments["topk_image"]),
            lengths=(arguments["len_prompts_cls"], arguments["len_prompts_image"]),
            with_fourier=arguments.get("fourier", True),
            matched=arguments.get("TDVP", True),
            dropout=arguments.get("prompt_dropout_dvp", 0.1),
        )
        for kind, pool in (("cls", net.class_pool), ("image", net.patch_pool)):
            load(pool, {name: params[f"Pool_{kind}.{name}"] for name in ("keys", "prompts")})
        layer = int(found[1]) if found else 0
        block: Any = vit.encoder.blocks[layer]
        rules = ((r"^attn\.qkv\.", "wqkv."), (r"^attn\.proj\.", "wo."))
        load(block.mixer, rename({n: t for n, t in params.items() if n.startswith("attn.")}, rules))
        load(block.norm1, {n.removeprefix("norm1."): t for n, t in params.items() if n.startswith("norm1.")})
        block.norm1.eps = arguments.get("eps", 1e-6)
        return _Layer(net, layer)

    @staticmethod
    def run(module: _Layer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, net, layer = inputs["x"], module.net, module.layer
        block: Any = net.backbone.encoder.blocks[layer]
        hidden, distance = net.hidden(layer, x)
        prompts = net.prompts(layer)
        out = coordinated_attention(block.mixer, block.norm1(x), block.norm1(prompts), hidden)
        seen = (~hidden).to(x)
        ones = torch.ones_like(x[..., :1]).mT.expand(-1, x.shape[1], -1)  # of the real tokens
        mask = torch.cat((ones[..., :1], seen, ones[..., 1:]), 2)
        return {
            "attn_out": out,
            "mask": mask[:, None].expand(-1, block.mixer.heads, -1, -1),
            "dist": distance,
            "prompt_fourier": prompts.expand(len(x), -1, -1),
        }
