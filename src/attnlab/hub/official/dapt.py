"""Ferenas/DAPT (arXiv 2508.00395): the losses of its CustomCLIP, over stand-in encoders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.recipes.dapt import BACKGROUNDS, DAPT


class _StandIns(nn.Module):
    """One linear layer on pixels, and a table of texts."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = params["image_encoder.lin.weight"], params.get("image_encoder.lin.bias")
        self.table, self.logit_scale = params["text"], params["logit_scale"]

    def image(self, images: Tensor) -> Tensor:
        return F.linear(images.flatten(1), self.weight, self.bias)

    def text(self) -> Tensor:
        return self.table


@official("Ferenas/DAPT", "CustomCLIP")
class CustomCLIP:
    """Images to the loss and its terms; labels, masks and epoch stand in the arguments."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> DAPT:
        module = DAPT(_StandIns(params), arguments["classes"], variant="release", backgrounds=len(BACKGROUNDS))
        module.case = arguments  # type: ignore[assignment]
        return module

    @staticmethod
    def run(module: DAPT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        case: Any = module.case
        masks, labels = (torch.as_tensor(case[name]) for name in ("mask", "labels"))
        found = module.terms(inputs["image"], masks.reshape(-1, *masks.shape[-2:]), labels, case["epoch"])
        return {
            "loss": found.loss,
            "logits": found.logits,
            "vd": found.pull,
            "fg": found.foreground,
            "bg": found.background,
        }
