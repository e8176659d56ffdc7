"""nightdessert/Retrieval_Head (arXiv 2404.15574): where the needle is, and the scores of the heads."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.lens.measures.retrieval import find_needle, retrieval_scores

_REPOSITORY = "nightdessert/Retrieval_Head"


def _numbered(inputs: dict[str, Tensor], name: str) -> list[Tensor]:
    found = {int(n.removeprefix(name)): t for n, t in inputs.items() if re.fullmatch(name + r"\d+", n)}
    return [found[i] for i in sorted(found)]


@official(_REPOSITORY, "LLMNeedleHaystackTester.find_needle_idx", "find_needle_idx")
class Span:
    """Prompts and needles to spans."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> None:
        return None

    @staticmethod
    def run(module: None, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        pairs = zip(_numbered(inputs, "prompt"), _numbered(inputs, "needle"), strict=True)
        return {f"span{i}": torch.tensor(find_needle(*pair)) for i, pair in enumerate(pairs)}


class _Setting(NamedTuple):
    span: tuple[int, int]
    top: int


@official(_REPOSITORY, "LLMNeedleHaystackTester.retrieval_calculate", "retrieval_calculate")
class Score:
    """Rows of attention and what was written to the table of scores."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _Setting:
        span = int(arguments["needle_start"]), int(arguments["needle_end"])
        return _Setting(span, int(arguments.get("topk", 1)))

    @staticmethod
    def run(module: _Setting, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, written = _numbered(inputs, "attn_step"), inputs["generated"]
        return {"score": retrieval_scores(rows, written, inputs["prompt_ids"], module.span, top=module.top)}
