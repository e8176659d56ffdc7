"""Lackel/AGLA (arXiv 2406.12718): the mask by which the second view is made, and the mixing of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.lens.edits.agla import assemble
from attnlab.lens.measures.gradcam import attention_gradcam, heat_map, keep_hottest

_REPOSITORY = "Lackel/AGLA"


@official(_REPOSITORY, "compute_gradcam", "getAttMap", "augmentation")
class Augmentation:
    """Cross-attention and its gradient (1, H, L, 1 + patches) and the cosine, to the map, the heat and the mask."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> int:
        return int(arguments.get("image", 384))

    @staticmethod
    def run(module: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        attention, gradient = (inputs[n].float()[..., 1:] for n in ("cross_attention", "cross_attention_grad"))
        side = math.isqrt(attention.shape[-1])
        relevance = attention_gradcam(attention, gradient)[0].view(side, side)
        heat = heat_map(relevance, (module, module))
        mask = keep_hottest(heat, float(inputs["itc"]))
        return {
            "token_avg_gradcam": relevance,
            "heat": heat,
            "heat_every_16": heat[::16, ::16],
            "mask": mask,
            "mask_packed": torch.from_numpy(np.packbits(mask.numpy(), axis=1)),
            "kept_fraction": mask.float().mean(),
        }


@official(_REPOSITORY, "sample")
class Sample:
    """Logits of both views to the probabilities of the next token."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        alpha, beta = arguments.get("alpha", 2.0), arguments.get("beta", 0.5)
        return lambda image, augmented: assemble(image, augmented, alpha=alpha, beta=beta).softmax(-1)

    @staticmethod
    def run(module: Callable[[Tensor, Tensor], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"probs": module(inputs["logits_image"], inputs["logits_augmented"])}
