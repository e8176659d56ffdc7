"""An independent reimplementation of DependencyViT (arXiv 2304.03282) in timm's style; its authors released no code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.dependencyvit import kept, prune
from attnlab.nn.softmax.reversed import ReversedAttention as Ours

_REPOSITORY = "huggingface/pytorch-image-models"

_NAMES: tuple[Rule, ...] = (
    (r"^qkv\.", "wqkv."),
    (r"^proj\.", "wo."),
    (r"^head_selector\.", "select."),
    (r"^message_controller\.fc(\d)\.", r"gate\1."),
)


@official(_REPOSITORY, "ReversedAttention", ours=Ours)
class ReversedAttention:
    """Gates come and go as `(B, 1, 1, N)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _NAMES)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        module = Ours(
            arguments["dim"],
            heads=arguments.get("num_heads", 8),
            bias="qkv.bias" in params,
            hidden=len(params["message_controller.fc1.weight"]),
            temperature=arguments.get("head_selector_temperature", 0.1),
        )
        load(module, ReversedAttention.rename(params))
        return module

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        sent = module.send(inputs["x"], inputs["m_in"][:, 0, 0], dependencies=True)
        dependencies = cast(Tensor, sent.dependencies)
        return {
            "y": sent.y,
            "m": sent.gates[:, None, None],
            "dependency_mask": dependencies,
            "prune_score": dependencies.sum(-1),
        }


@official(_REPOSITORY, "TokenPruner")
class TokenPruner:
    """Its order of the kept tokens is not defined: each channel is sorted."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[float, int]:
        return arguments["prune_ratio"], arguments["prune_index"]

    @staticmethod
    def run(module: tuple[float, int], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        x, gates, _ = prune(x, inputs["m_in"][:, 0, 0], inputs["s"], kept(x.shape[1], *module))
        return {"x": x.sort(1).values, "m": gates.sort(1).values[:, None, None]}
