"""xing0047/cca-llava (arXiv 2410.15926): positions and visibility of one sequence with one image."""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.lens.edits.concentric import ConcentricCausal, place, rings


@official("xing0047/cca-llava", "cca_forward")
class Concentric:
    """Where the image starts and how long the sequence is to the grid of rings, position ids and the packed mask."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[int, int]:
        side = arguments.get("grid") or math.isqrt(arguments["image_tokens"])
        return (side, side) if isinstance(side, int) else tuple(side)

    @staticmethod
    def run(module: tuple[int, int], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        start, length = int(inputs["image_start"]), int(inputs["seq_len"])
        allowed = ConcentricCausal(start, module).matrix(length)
        return {
            "concentric_grid": rings(*module),
            "position_ids": place(torch.arange(length), start, module),
            "allowed_packed": torch.from_numpy(numpy.packbits(allowed.numpy(), axis=1)),
            "allowed_per_query": allowed.sum(1),
        }
