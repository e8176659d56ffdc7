"""NJUDeepEngine/LongCA-bench's masks (arXiv 2510.17896) as patterns."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.patterns.training import SHAPES, STATIC, Setting, mask, rectangle


@official("NJUDeepEngine/LongCA-bench", "longca_bench/attn/baselines/utils.py mask functions")
class Masks:
    """Every named mask of the documents in `cu_seqlens`, and the four types of a range, wide and tall."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> dict[str, Any]:
        wide = re.search(r"\((\d+)x(\d+)", arguments["case_name"])
        return {
            "window": arguments["window_size"],
            "block": arguments["block_size"],
            "prefix": arguments["prefix_length"],
            "rectangle": (int(wide[1]), int(wide[2])) if wide else (5, 8),
        }

    @staticmethod
    def run(module: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        setting = dict(module)
        nq, nk = setting.pop("rectangle")
        s = Setting(tuple(inputs["cu_seqlens"].diff().tolist()), **setting)
        found = {kind: mask(kind, s).matrix(s.tokens) for kind in STATIC}
        for kind in SHAPES:
            found[f"ffa_{kind}"] = rectangle(kind, nq, nk).matrix(nq, nk)
            found[f"ffa_{kind}_tall"] = rectangle(kind, nk, nq).matrix(nk, nq)
        return found
