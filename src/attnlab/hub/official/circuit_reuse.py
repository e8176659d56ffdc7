"""jmerullo/circuit_reuse (arXiv 2310.08744): path patching, on a transformer as TransformerLens holds it."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.lens.circuits.patching import logit_difference, path_patching
from attnlab.models.skeletons.decoder import DecoderBlock
from attnlab.models.skeletons.parts import MLP
from attnlab.nn.multihead import MultiHead
from attnlab.positions import Learned

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_new": lambda: nn.GELU("tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class Hooked(nn.Module):
    """A pre-norm causal transformer with learned positions, GPT-2's: ids `(B, N)` → logits `(B, N, V)`."""

    def __init__(
        self, *, vocabulary: int, length: int, dim: int, depth: int, heads: int, head_dim: int, hidden: int,
        activation: str = "gelu", norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:  # fmt: skip
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        self.embedding, self.learned = nn.Embedding(vocabulary, dim), Learned(length, dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                dim,
                MultiHead(dim, heads=heads, head_dim=head_dim, bias=True, causal=True),
                MLP(dim, hidden, activation=_ACTIVATIONS[activation]),
                norm=norm,
            )
            for _ in range(depth)
        )
        self.norm, self.head = norm(dim), nn.Linear(dim, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.learned(self.embedding(ids), 0)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@official("jmerullo/circuit_reuse", "path_patching")
class PathPatching:
    """Its receivers are heads [layer, head], or a point in the stream "blocks.2.hook_resid_post" with null."""

    @staticmethod
    def rename(params: dict[str, Tensor]) -> dict[str, Tensor]:
        """TransformerLens' names to ours: its weights are `(heads, in, out)`, and act from the right."""
        named = {
            "embedding.weight": params["embed.W_E"],
            "learned.table": params["pos_embed.W_pos"],
            "head.weight": params["unembed.W_U"].T,
        }
        if "unembed.b_U" in params:
            named["head.bias"] = params["unembed.b_U"]
        for name, value in params.items():
            if name.startswith("ln_final."):
                named[f"norm.{_NORM[name[9:]]}"] = value
            if not name.startswith("blocks."):
                continue
            _, layer, rest = name.split(".", 2)
            at = f"blocks.{layer}"
            if rest == "attn.W_Q":
                kinds = [params[f"{at}.attn.W_{kind}"] for kind in "QKV"]
                named[f"{at}.mixer.wqkv.weight"] = torch.cat([w.transpose(1, 2).flatten(0, 1) for w in kinds])
                kinds = [params[f"{at}.attn.b_{kind}"] for kind in "QKV"]
                named[f"{at}.mixer.wqkv.bias"] = torch.cat([b.flatten() for b in kinds])
            elif rest == "attn.W_O":
                named[f"{at}.mixer.wo.weight"] = value.flatten(0, 1).T
            elif rest == "attn.b_O":
                named[f"{at}.mixer.wo.bias"] = value
            elif rest.startswith("mlp."):
                which = "fc1" if rest.endswith("in") else "fc2"
                kind, value = ("weight", value.T) if ".W_" in rest else ("bias", value)
                named[f"{at}.mlp.{which}.{kind}"] = value
            elif rest.startswith("ln"):
                which, kind = rest.split(".")
                named[f"{at}.{which.replace('ln', 'norm')}.{_NORM[kind]}"] = value
        return named

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Any]]:
        model = Hooked(
            vocabulary=len(params["embed.W_E"]),
            length=len(params["pos_embed.W_pos"]),
            dim=arguments["d_model"],
            depth=arguments["n_layers"],
            heads=arguments["n_heads"],
            head_dim=arguments["d_head"],
            hidden=arguments["d_mlp"],
            activation=str(arguments.get("act", "gelu")).split()[0],
            norm=_norm(str(arguments.get("norm", "LN")), "ln_final.w" in params),
        )
        named = PathPatching.rename(params)
        named.setdefault("head.bias", torch.zeros(model.head.out_features))
        model.load_state_dict(named)
        return model.eval(), arguments

    @staticmethod
    def run(module: tuple[nn.Module, dict[str, Any]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # An effect is the difference of two numbers that are nearly the same: in float32 it keeps four digits.
        model, arguments = deepcopy(module[0]).double(), module[1]
        clean, corrupt, answers = inputs["source_tokens"], inputs["patch_tokens"], inputs["answer_tokens"]
        with torch.no_grad():
            logits = {"clean": model(clean), "corrupt": model(corrupt)}
        found: dict[str, Tensor] = {}
        for name, value in logits.items():
            per_prompt = logit_difference(value, answers)
            found[f"{name}_logits_last"] = value[:, -1]
            found[f"{name}_logit_diff_per_prompt"] = per_prompt
            found[f"{name}_logit_diff"] = per_prompt.mean()
        for name, asked in arguments["runs"].items():
            points = asked["receivers"]
            stream = isinstance(points[0][0], str)
            found[f"effect_{name}"] = path_patching(
                model, clean, corrupt, answers,
                receivers=_block(points) if stream else [(layer, head) for layer, head in points],
                part=None if stream else asked["component"],
                position=arguments.get("position", -1),
                freeze_mlps=asked.get("freeze_mlps", False),
                truncate=asked.get("truncate_to_max_layer", True),
            )  # fmt: skip
        return found


_NORM = {"w": "weight", "b": "bias"}


def _norm(told: str, affine: bool) -> Callable[[int], nn.Module]:
    """The norm that TransformerLens calls LN, LNPre (no weights), RMS, RMSPre or None; "eps 1e-5" may follow."""
    found = re.search(r"eps\D*([\d.]+(?:e-?\d+)?)", told)
    settings: dict[str, Any] = dict(eps=float(found[1]) if found else 1e-5, elementwise_affine=affine)
    if told.lower().startswith("none"):
        return lambda width: nn.Identity()
    return partial(nn.RMSNorm if told.startswith("RMS") else nn.LayerNorm, **settings)


def _block(points: list[list[Any]]) -> str:
    """Our module whose output is what stands at one point of TransformerLens, "blocks.2.hook_resid_post"."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", str(points[0][0]))
    if len(points) != 1 or found is None or found[2] not in _POINTS:
        raise ValueError(f"receivers must be heads, or one 'blocks.N.hook_…' of {', '.join(_POINTS)}, got {points}")
    layer = int(found[1])
    if found[2] == "resid_pre":
        return f"blocks.{layer - 1}" if layer else "learned"
    return f"blocks.{layer}{_POINTS[found[2]]}"


_POINTS = {"resid_pre": "", "resid_post": "", "attn_out": ".mixer", "mlp_out": ".mlp"}
