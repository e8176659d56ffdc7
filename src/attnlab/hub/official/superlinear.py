"""concavity-ai/superlinear (arXiv 2601.18401): the span search of its reference kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.nn.sparse.superlinear import SpanSearch


@official(
    "concavity-ai/superlinear",
    "get_search_mask",
    "get_spans",
    "get_search_scores",
    "compute_qend_from_qanchor",
)
class Search:
    """Where anchors lie, the spans of the best, and their scores; what does not exist scores −1e9."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SpanSearch:
        exponent = arguments.get("search_power")
        search = SpanSearch(
            window=arguments["sw_index"],
            topk=arguments["topk"],
            power=arguments.get("inv_search_power_int", 2) if exponent is None else 1 / exponent,
            backward=arguments["backward_factor"],
            forward=arguments.get("forward_factor") or 0.0,
            span_power=arguments.get("span_power", 0.5),
        )
        given = arguments.get("window_len")
        if given is not None and given != search.window_size:
            raise ValueError(f"window_len must be {search.window_size} for these arguments, got {given}")
        return search

    @staticmethod
    def run(module: SpanSearch, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        q, k = inputs["Q1"], inputs["K"]
        batch, length = len(q), q.shape[2]
        spans = module(q, k)
        anchors = module.anchors(torch.arange(length), length - 1)
        mask = torch.zeros(length, length + 1, dtype=torch.bool)
        mask = mask.scatter(1, anchors + 1, True)[:, 1:].expand(batch, 1, -1, -1)  # the column of −1 falls away
        return {
            "search_mask": mask,
            "qanchor": spans.anchor,
            "qstart": spans.start,
            "qend": spans.end,
            "scores": spans.scores,
            "values": spans.scores,
        }
