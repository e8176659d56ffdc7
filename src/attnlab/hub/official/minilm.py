"""bloomberg/minilmv2.bb (arXiv 2012.15828, which holds 2002.10957 as a case), and transformers' BERT."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.language.bert import Bert
from attnlab.recipes.minilm import Heads, attentions, last_attention, log_relation, minilm_losses

_BERT: tuple[Rule, ...] = (
    (r"^bert\.", ""),
    (r"^embeddings\.word_embeddings\.", "words."),
    (r"^embeddings\.position_embeddings\.", "positions."),
    (r"^embeddings\.token_type_embeddings\.", "segments."),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"attention\.self\.(query|key|value)\.", r"mixer.\1."),
    (r"attention\.output\.dense\.", "mixer.wo."),
    (r"attention\.output\.LayerNorm\.", "norm1."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
    (r"output\.LayerNorm\.", "norm2."),
    (r"^pooler\.dense\.", "pool."),
    (r"^cls\.predictions\.transform\.dense\.", "transform.0."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "transform.2."),
    (r"^cls\.predictions\.bias$", "bias"),
)


@official("huggingface/transformers", "BertModel", "BertForMaskedLM", ours=Bert)
class BertModel:
    """Ids, segments and mask to vectors, or to words' logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tied = ("cls.predictions.decoder.", "embeddings.position_ids")
        renamed = rename({n: t for n, t in params.items() if not any(part in n for part in tied)}, _BERT)
        for name in [n for n in renamed if ".mixer.query." in n]:
            parts = (renamed.pop(name.replace("query", part)) for part in ("query", "key", "value"))
            renamed[name.replace("query", "wqkv")] = torch.cat(list(parts))
        return renamed

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Bert:
        ours = BertModel.rename(params)
        model = Bert(
            vocabulary=len(ours["words.weight"]),
            dim=ours["words.weight"].shape[1],
            depth=1 + max(int(n.split(".")[1]) for n in ours if n.startswith("blocks.")),
            heads=arguments.get("num_attention_heads", arguments.get("heads", 12)),
            hidden=len(ours["blocks.0.mlp.fc1.bias"]),
            length=len(ours["positions.weight"]),
            segments=len(ours["segments.weight"]),
            output="words" if "bias" in ours else "pooled" if "pool.weight" in ours else "tokens",
            norm_eps=arguments.get("layer_norm_eps", 1e-12),
        )
        load(model, ours)
        return model.eval()

    @staticmethod
    def run(module: Bert, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, segments, keep = (inputs.get(n) for n in ("input_ids", "token_type_ids", "attention_mask"))
        if ids is None:
            raise ValueError(f"inputs must hold input_ids, got {sorted(inputs)}")
        tokens = module.encode(ids, segments, keep)
        outputs = {"last_hidden_state": tokens}
        if module.output != "tokens":
            name = {"words": "logits", "pooled": "pooler_output"}[module.output]
            outputs[name] = module(ids, segments, keep)
        return outputs


def _relations(text: Any) -> dict[str, dict[str, float]]:
    """Named sets of relations: "at: {(1,2): 1}; vr: {(3,3): 1}" as {"at": {"qk": 1.0}, "vr": {"vv": 1.0}}."""
    if isinstance(text, Mapping):
        named = {"all": text}
    else:
        named = {n: ast.literal_eval(pairs) for n, pairs in re.findall(r"(\w+):\s*(\{[^}]*\})", text)}
    return {n: {"qkv"[a - 1] + "qkv"[b - 1]: float(w) for (a, b), w in p.items()} for n, p in named.items()}


@official("bloomberg/minilmv2.bb", "MiniLM")
class MiniLM:
    """A teacher and a student of BERT's shape, and the losses between layer `L` of one and layer `M` of the other.

    `loss_total` is the sum over all sets of relations, `grad_student_last_*` its gradient.
    """

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[Bert, Bert, dict[str, Any]]:
        sides = []
        for side in ("teacher", "student"):
            own = {n.removeprefix(f"{side}."): t for n, t in params.items() if n.startswith(f"{side}.")}
            sides.append(BertModel.build(arguments[side], own))
        return sides[0], sides[1], arguments

    @staticmethod
    def run(module: tuple[Bert, Bert, dict[str, Any]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        teacher, student, arguments = module
        keep = inputs["attention_mask"]
        given = (inputs["input_ids"], inputs["token_type_ids"], keep)
        with torch.no_grad():
            wanted = last_attention(teacher, *given, layer=arguments["L"] - 1)
        found = last_attention(student, *given, layer=arguments["M"] - 1)
        outputs = {}
        for name, relations in _relations(arguments["relations"]).items():
            losses = minilm_losses(wanted, found, keep=keep, relations=relations, heads=arguments["A_r"])
            outputs[f"loss_{name}"] = torch.stack(list(losses.values())).sum().view(1)
        outputs["loss_total"] = torch.stack(list(outputs.values())).sum(0)
        return outputs | _gradients(student, outputs["loss_total"]) | _maps(wanted, found, keep)


def _gradients(student: Bert, loss: Tensor) -> dict[str, Tensor]:
    last = attentions(student)[-1].wqkv.weight
    projections, words = torch.autograd.grad(loss.sum(), (last, student.words.weight), retain_graph=True)
    parts = zip(("query", "key", "value"), projections.chunk(3), strict=True)
    named = {f"grad_student_last_{part}_weight": gradient for part, gradient in parts}
    return {**named, "grad_student_word_embeddings": words}


def _maps(teacher: Heads, student: Heads, keep: Tensor) -> dict[str, Tensor]:
    sides = {"teacher_attention": teacher, "student_attention": student}
    return {name: log_relation(side.q, side.k, keep).exp() for name, side in sides.items()}
