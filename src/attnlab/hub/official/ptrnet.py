"""shirgur/PointerNet, an unofficial port of pointer networks (arXiv 1506.03134), which blends its decoder's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.pointing.ptrnet import PointerNetwork, permutation
from attnlab.nn.cross.pointer import Pointer

_REPOSITORY = "shirgur/PointerNet"
_PLACEHOLDERS = ("_inf", "mask", "runner", "h0", "c0")

_ATTENTION: tuple[Rule, ...] = ((r"input_linear\.", "wq."), (r"context_linear\.", "wk."), (r"(^|\.)V$", r"\1v"))
_NETWORK: tuple[Rule, ...] = (
    (r"^decoder_input0$", "start"),
    (r"^encoder\.lstm\.", "encoder."),
    (r"^decoder\.att\.", "pointer."),
    (r"^decoder\.input_to_hidden\.(\w+)$", r"decoder.\1_ih_l0"),
    (r"^decoder\.hidden_to_hidden\.(\w+)$", r"decoder.\1_hh_l0"),
    (r"^decoder\.hidden_out\.", "blend."),
    *_ATTENTION,
)


def _own(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Without placeholders, and with 1×1 convolutions as the linear layers that they are."""
    kept = {n: t for n, t in params.items() if n.rpartition(".")[2] not in _PLACEHOLDERS}
    return {n: t.flatten(1) if t.ndim == 3 else t for n, t in rename(kept, rules).items()}


@official(_REPOSITORY, "Attention", "PointerNet.py::Attention")
class Attention:
    """A query (B, C) and a context (B, N, C), with True where a place is excluded."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _own(params, _ATTENTION)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Pointer:
        module = Pointer(len(params["V"]), bias="input_linear.bias" in params)
        load(module, Attention.rename(params))
        return module

    @staticmethod
    def run(module: Pointer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = inputs.get("mask")
        allowed = None if mask is None else ~mask.unsqueeze(1)
        alpha = module(inputs["query"].unsqueeze(1), inputs["context"], allowed=allowed).softmax(-1)
        return {"alpha": alpha.squeeze(1), "blend": (alpha @ module.keys(inputs["context"])).squeeze(1)}


@official(_REPOSITORY, "PointerNet", "PointerNet.py::PointerNet", ours=PointerNetwork)
class PointerNet:
    """Points (B, N, 2) to every step's probabilities and the greedy permutation."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _own(params, _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> PointerNetwork:
        ours = PointerNet.rename(params)
        network = PointerNetwork(
            dim=len(ours["pointer.v"]),
            in_channels=ours["embedding.weight"].shape[1],
            embedding=len(ours["embedding.weight"]),
            end=False,
            bias="pointer.wq.bias" in ours,
            blend=True,
            layers=sum(n.startswith("encoder.weight_hh_l") and not n.endswith("_reverse") for n in ours),
            bidirectional=any(n.endswith("_reverse") for n in ours),
        )
        load(network, ours)
        return network

    @staticmethod
    def run(module: PointerNetwork, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        pointers = module.decode(inputs["x"], allowed=permutation).positions
        return {"pointers": pointers, "probs": module(inputs["x"], pointers, allowed=permutation).exp()}
