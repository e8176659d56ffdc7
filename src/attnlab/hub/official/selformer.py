"""HUBioDataLab/SELFormer (arXiv 2304.04662), and transformers' RoBERTa, whose layout its checkpoints have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.official.minilm import BertModel
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.language.selformer import Selformer
from attnlab.recipes.selformer import property_loss

_HEADS: tuple[Rule, ...] = (
    (r"^roberta\.", ""),
    (r"^lm_head\.dense\.", "transform.0."),
    (r"^lm_head\.layer_norm\.", "transform.2."),
    (r"^lm_head\.bias$", "bias"),
    (r"^classifier\.dense\.", "head.1."),
    (r"^classifier\.out_proj\.", "head.4."),
)
# Tied to the words, or without effect on any output.
_IDLE = ("lm_head.decoder.", "pooler.", "position_ids", "embeddings.token_type_ids")


@official(
    "huggingface/transformers", "RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification", ours=Selformer
)
class Roberta:
    """Ids and mask to vectors, to words' logits or to labels'."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return BertModel.rename(rename({n: t for n, t in params.items() if not any(i in n for i in _IDLE)}, _HEADS))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Selformer:
        ours, pad = Roberta.rename(params), _number(arguments, "pad_token_id", "pad id", 1)
        output = "words" if "bias" in ours else "labels" if "head.4.bias" in ours else "tokens"
        model = Selformer(
            vocabulary=len(ours["words.weight"]),
            dim=ours["words.weight"].shape[1],
            depth=1 + max(int(n.split(".")[1]) for n in ours if n.startswith("blocks.")),
            heads=_number(arguments, "num_attention_heads", "heads", 12),
            hidden=len(ours["blocks.0.mlp.fc1.bias"]),
            length=len(ours["positions.weight"]) - pad - 1,
            pad=pad,
            output=output,
            labels=len(ours["head.4.bias"]) if output == "labels" else 2,
            norm_eps=arguments.get("layer_norm_eps", 1e-12),
        )
        load(model, ours)
        return model.eval()

    @staticmethod
    def run(module: Selformer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, keep = inputs["input_ids"], inputs.get("attention_mask")
        name = "last_hidden_state" if module.output == "tokens" else "logits"
        return {name: module(ids, keep=keep)}


def _number(arguments: dict[str, Any], key: str, words: str, default: int) -> int:
    """`key=4` among the arguments, or "words 4" in their text."""
    for name in (key, words):
        if name in arguments:
            return int(arguments[name])
    said = re.search(rf"\b{words}\s+(\d+)", arguments.get("text", ""))
    return int(said[1]) if said else default


@official("HUBioDataLab/SELFormer", "SELFIESTransformers_For_Classification")
class Classification(Roberta):
    """Ids, mask and labels to (loss, logits)."""

    task = "classes"

    @classmethod
    def run(cls, module: Selformer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = Roberta.run(module, inputs)["logits"]
        if inputs.get("labels") is None:
            return {"logits": logits}
        return {"logits": logits, "loss": property_loss(logits, inputs["labels"], cls.task).view(1)}


@official("HUBioDataLab/SELFormer", "SELFIESTransformers_For_Regression")
class Regression(Classification):
    """As `Classification`, with one number per molecule."""

    task = "number"
