"""Hey1Li/Salient-Relevance-Propagation (arXiv 1712.08268): the rules of relevance of a chain of layers."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.lens.measures.relevance import layerwise_relevance

_REPOSITORY = "Hey1Li/Salient-Relevance-Propagation"


@official(_REPOSITORY, "relprop", "Linear", "Conv2d", "MaxPool2d", "ReLU", "Reshape")
class Relprop:
    """A network said as "0 conv1(3x3,stride2,pad1) 1 relu 2 maxpool2 5 flatten 6 fc1", with its parameters by name."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Sequential:
        network = nn.Sequential()
        said = re.findall(r"(\d+) ([a-zA-Z]+)(\d*)(?:\(([^)]*)\))?", arguments["layers"])
        for _, kind, number, how in said:
            weight = params.get(f"{kind}{number}.weight")
            network.append(_layer(kind, int(number or 0), how, weight, f"{kind}{number}.bias" in params))
            if weight is not None:
                network[-1].load_state_dict(
                    {n: params[f"{kind}{number}.{n}"] for n in ("weight", "bias") if f"{kind}{number}.{n}" in params}
                )
        return network.eval()

    @staticmethod
    def run(module: nn.Sequential, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = layerwise_relevance(module, inputs["x"])
        layers = {f"relevance_in_layer{name}": r for name, r in found.layers.items()}
        return {"logits": found.logits, "relevance_top": found.top, **layers}


def _layer(kind: str, number: int, how: str, weight: Tensor | None, bias: bool) -> nn.Module:
    if weight is not None and weight.ndim == 2:
        return nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    if weight is not None:
        stride, padding = (
            int(f[1]) if (f := re.search(rf"{w}\D*(\d+)", how)) else d for w, d in (("str", 1), ("pad", 0))
        )
        return nn.Conv2d(
            weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]), stride, padding, bias=bias
        )
    if kind == "maxpool":
        return nn.MaxPool2d(number or 2)
    if kind in ("relu", "flatten"):
        return nn.ReLU() if kind == "relu" else nn.Flatten()
    raise ValueError(f"layer {kind!r} is none of conv, fc, maxpool, relu, flatten")
