"""SHI-Labs/NATTEN's block mask of tiles (Generalized Neighborhood Attention, arXiv 2504.16922)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.official.na import rule
from attnlab.patterns import Neighborhood
from attnlab.patterns.speedup import Visits, visits


@official("SHI-Labs/NATTEN", "natten.backends.flex.get_na_flex_mask")
class BlockMask:
    """How many tiles of keys each tile of queries sees in full and in part, tiles being boxes of the grid."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Visits:
        pattern = Neighborhood(tuple(arguments["shape"]), **rule(arguments))
        return visits(pattern, tuple(arguments["q_tile_shape"]), tuple(arguments["kv_tile_shape"]))

    @staticmethod
    def run(module: Visits, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "full_blocks_per_q_tile": module.full,
            "partial_blocks_per_q_tile": module.partial,
            "visited_total": torch.tensor(module.total),
        }
