"""YuyaoGe/CARVE (arXiv 2509.06461): the maps of two generations to the fused map, the mask and its box."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.lens.measures.contrast import fuse, keep_regions
from attnlab.lens.regions import bounding_box

_RANKS: dict[str, Literal["sum", "area", "specks"]] = {
    "attention_sum": "sum",
    "size": "area",
    "remove_small": "specks",
}


@official("YuyaoGe/CARVE", "fuse_contrastive_attention", "create_attention_mask", "get_crop_bbox_from_mask")
class Focus:
    """Maps (steps, layers of the model, tokens) of the question and of the general instruction."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Any:
        width, height = arguments["image_size_wh"]
        fused = partial(
            fuse,
            grid=tuple(arguments["grid"]),
            size=(height, width),
            eps=arguments.get("lam", 1e-8),
            steps=arguments.get("step_mode", "all"),
        )
        kept = partial(
            keep_regions,
            fraction=arguments.get("top_percent", 0.2),
            rank=_RANKS[arguments.get("strategy", "attention_sum")],
            least=arguments.get("min_keep_regions", 3),
            specks=arguments.get("outlier_percent", 0.1),
        )
        return arguments.get("layers", list(range(20, 26))), fused, kept

    @staticmethod
    def run(module: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        layers, fused, kept = module
        query, general = inputs["query_attn"], inputs["general_attn"]
        there = [layer for layer in layers if layer < query.shape[1]]  # the authors pass over those that are not
        scores = fused(query[:, there], general[:, there])
        mask = kept(scores)
        return {"fused": scores, "mask": mask.byte(), "bbox_x0_y0_x1_y1": torch.tensor(bounding_box(mask))}
