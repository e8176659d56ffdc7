"""sascha-kirch/samba-mixer: MambaMixer (arXiv 2403.19888), of which the authors released no code, by a third party."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnlab.hub.official import mamba, official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.averaging import Average, SambaStack, Transposed
from attnlab.nn.linear.scans import BidirectionalMamba
from attnlab.nn.linear.selective import Mamba

_REPOSITORY = "sascha-kirch/samba-mixer"

# What belongs to one direction, by the name that both have; the other direction has "_backward" in it.
_DIRECTIONS: tuple[Rule, ...] = (
    (r"(^|\.)A_backward_log$", r"\1scans.1.A_log"),
    (r"(^|\.)D_backward$", r"\1scans.1.D"),
    (r"(^|\.)(conv1d|x_proj|dt_proj)_backward\.", r"\1scans.1.\2."),
    (r"(^|\.)(?<!scans\.1\.)(conv1d|x_proj|dt_proj)\.", r"\1scans.0.\2."),
    (r"(^|\.)(?<!scans\.1\.)(A_log|D)$", r"\1scans.0.\2"),
)
_BACKBONE: tuple[Rule, ...] = (
    (r"^layers\.(\d+)\.token_mixer\.norm\.", r"token_norms.\1."),
    (r"^layers\.(\d+)\.channel_mixer\.norm\.", r"channel_norms.\1."),
    (r"^layers\.(\d+)\.(token|channel)_mixer\.weighted_average_input\.alphas$", r"before_\2s.\1.tokens"),
    (r"^layers\.(\d+)\.(token|channel)_mixer\.weighted_average_input\.betas$", r"before_\2s.\1.channels"),
    (r"^layers\.(\d+)\.token_mixer\.mixer\.", r"token_mixers.\1."),
    (r"^layers\.(\d+)\.channel_mixer\.mixer\.", r"channel_mixers.\1.mixer."),
    (r"^norm_f\.", "norm."),
)


def both_ways(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of `BiSamba` by our names."""
    return mamba.layer(rename(params, _DIRECTIONS))


def _of(params: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in params.items() if n.startswith(prefix)}


def _mixer(params: Mapping[str, Tensor]) -> Mamba | BidirectionalMamba:
    """The mixer that has these parameters, with other values."""
    dim, inner = params["in_proj.weight"].shape[1], params["out_proj.weight"].shape[1]
    kind = BidirectionalMamba if "D_backward" in params else Mamba
    return kind(
        dim, states=params["A_log"].shape[1], expand=inner // dim, conv=params["conv1d.weight"].shape[2],
        rank=params["dt_proj.weight"].shape[1],
    )  # fmt: skip


@official(_REPOSITORY, "Mamba")
class TokenMixer(mamba.MambaMixer):
    """The copy of Mamba that mixes tokens."""

    @staticmethod
    def run(module: Mamba | Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["hidden_states"])}


@official(_REPOSITORY, "BiSamba", ours=BidirectionalMamba)
class BiSamba:
    rename = staticmethod(both_ways)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> BidirectionalMamba:
        module = _mixer(params)
        load(module, both_ways(params))
        return module  # type: ignore[return-value]

    @staticmethod
    def run(module: BidirectionalMamba, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["hidden_states"])}


@official(_REPOSITORY, "WeightedAverageFromPreviousMixers", ours=Average)
class WeightedAverage:
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, ((r"^alphas$", "tokens"), (r"^betas$", "channels")))

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> Average:
        a, b = params["alphas"], params["betas"]
        module = Average(len(a), len(b), kind="samba", tokens=a.shape[1])
        load(module, cls.rename(params))
        return module

    @staticmethod
    def run(module: Average, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["token_mixer_outputs"].unbind(1), inputs["channel_mixer_outputs"].unbind(1))}


@official(_REPOSITORY, "SambaMixerBackbone", ours=SambaStack)
class SambaMixerBackbone:
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        one_way = {n: t for n, t in params.items() if ".token_mixer.mixer." in n}
        twofold = {n: t for n, t in params.items() if ".channel_mixer.mixer." in n}
        others = {n: t for n, t in params.items() if ".mixer." not in n}
        return rename({**others, **mamba.layer(one_way), **both_ways(twofold)}, _BACKBONE)

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> SambaStack:
        if arguments.get("rms_norm"):
            raise ValueError("rms_norm must be False: norms are layer norms here")
        depth = 1 + max(int(n.split(".")[1]) for n in params if n.startswith("layers."))
        mixers = {
            kind: [_mixer(_of(params, f"layers.{i}.{kind}_mixer.mixer.")) for i in range(depth)]
            for kind in ("token", "channel")
        }
        stack = SambaStack(
            len(params["norm_f.weight"]), mixers["channel"][0].dim, mixers["token"],
            [Transposed(mixer) for mixer in mixers["channel"]],
        )  # fmt: skip
        load(stack, cls.rename(params))
        return stack

    @staticmethod
    def run(module: SambaStack, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
