"""raoyongming/HorNet (arXiv 2207.14284): the filter, the gated convolution, the block and the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.pyramid import Block as OurBlock
from attnlab.models.vision.horfpn import HorFPN
from attnlab.models.vision.hornet import HorNet as Ours
from attnlab.nn.spatial.gated_conv import GlobalLocalFilter as OurFilter
from attnlab.nn.spatial.gated_conv import RecursiveGatedConv

_REPOSITORY = "raoyongming/HorNet"

_FILTER: tuple[Rule, ...] = (
    (r"(^|\.)dw\.weight$", r"\1local.weight"),
    (r"(^|\.)complex_weight$", r"\1filter"),
    (r"(^|\.)pre_norm\.", r"\1norm1."),
    (r"(^|\.)post_norm\.", r"\1norm2."),
)
_CONV: tuple[Rule, ...] = (
    *_FILTER,
    (r"(^|\.)proj_in\.", r"\1wi."),
    (r"(^|\.)proj_out\.", r"\1wo."),
    (r"(^|\.)pws\.", r"\1steps."),
    (r"(^|\.)dwconv\.", r"\1filter."),
)
_BLOCK: tuple[Rule, ...] = (
    *_CONV,
    (r"gnconv\.", "mixer."),
    (r"pwconv(\d)\.", r"mlp.fc\1."),
    (r"gamma(\d)$", r"scale\1"),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^stages\.(\d+)\.", r"stages.\1.blocks."),
    (r"^downsample_layers\.0\.0\.", "stem.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.norm."),
    (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.norm."),
    (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.conv."),
    *_BLOCK,
)


def _renamed(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Our names; 1×1 convolutions become the linear layers that they are."""
    inner = {
        n: t.flatten(1) if t.ndim == 4 and t.shape[2:] == (1, 1) and re.search(r"proj_(in|out)|pws", n) else t
        for n, t in params.items()
    }
    return rename(inner, rules)


def _scale(arguments: Mapping[str, Any]) -> float:
    """The argument `s`, wherever and however it is written: 0.5, "1/3", "partial(gnconv, order=2, s=1/3)"."""
    if "s" in arguments:
        return float(Fraction(str(arguments["s"])))
    found = re.search(r"\bs\W{1,4}(\d[\d./]*)", str(dict(arguments)))
    return float(Fraction(found[1])) if found else 1.0


def _options(params: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Order and spectrum that the convolution under `prefix` has."""
    weight = params.get(f"{prefix}dwconv.complex_weight")
    return {
        "order": 1 + sum(n.startswith(f"{prefix}pws.") and n.endswith("weight") for n in params),
        "spectrum": None if weight is None else (weight.shape[1], weight.shape[2]),
    }


class _Module:
    """On maps `(B, C, H, W)`."""

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "GlobalLocalFilter", ours=OurFilter)
class GlobalLocalFilter(_Module):
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _FILTER)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurFilter:
        module = OurFilter(arguments["dim"], spectrum=(arguments.get("h", 14), arguments.get("w", 8)))
        load(module, GlobalLocalFilter.rename(params))
        return module


@official(_REPOSITORY, "gnconv", ours=RecursiveGatedConv)
class GnConv(_Module):
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _CONV)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> RecursiveGatedConv:
        module = RecursiveGatedConv(arguments["dim"], scale=_scale(arguments), **_options(params))
        load(module, GnConv.rename(params))
        return module


@official(_REPOSITORY, "Block")
class Block(_Module):
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _BLOCK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurBlock:
        dim = arguments["dim"]
        block = OurBlock(
            dim,
            RecursiveGatedConv(dim, scale=_scale(arguments), **_options(params, "gnconv.")),
            norm=lambda width: nn.LayerNorm(width, eps=1e-6),
            layer_scale=1e-6 if "gamma1" in params else None,
        )
        load(block, Block.rename(params))
        return block.eval()


@official(_REPOSITORY, "HorNet", ours=Ours)
class HorNet(_Module):
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        depths = arguments.get("depths", (3, 3, 9, 3))
        options = [_options(params, f"stages.{stage}.0.gnconv.") for stage in range(len(depths))]
        net = Ours(
            dim=arguments.get("base_dim", 96),
            depths=depths,
            orders=[o["order"] for o in options],
            spectra=[o["spectrum"] for o in options],
            scale=_scale(arguments),
            layer_scale=1e-6 if "stages.0.0.gamma1" in params else None,
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, HorNet.rename(params))
        return net.eval()


_NECK: tuple[Rule, ...] = (
    (r"^lateral_convs\.(\d+)\.conv\.", r"lateral.\1."),
    (r"^fpn_convs\.(\d+)\.0\.conv\.", r"down.\1."),
    (r"^fpn_convs\.(\d+)\.1\.", r"mix_down.\1."),
    (r"^fpn_convs\.(\d+)\.", r"mix.\1."),
    *_CONV,
)


@official(_REPOSITORY, "GNFPN", ours=HorFPN)
class GNFPN:
    """The neck of their detectors, without norms and activations (as in all their settings): maps to maps."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = _renamed(params, _NECK)
        levels = sum(bool(re.fullmatch(r"lateral\.\d+\.weight", n)) for n in found)
        return {
            re.sub(r"^(down|mix_down)\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) - levels}", n): t for n, t in found.items()
        }

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> HorFPN:
        channels = arguments["in_channels"]
        if arguments.get("norm_cfg") or arguments.get("act_cfg") or arguments.get("start_level", 0):
            raise ValueError(f"norm_cfg, act_cfg and start_level must be unset, got {arguments}")
        source = arguments.get("add_extra_convs", False)
        neck = HorFPN(
            channels,
            arguments["out_channels"],
            levels=arguments["num_outs"],
            extra=("input" if source is True else source.removeprefix("on_")) if source else None,
            kernel=params["fpn_convs.0.dwconv.weight"].shape[-1] if "fpn_convs.0.dwconv.weight" in params else 7,
            relu=arguments.get("relu_before_extra_convs", False),
            **_options(params, "fpn_convs.0."),
        )
        load(neck, GNFPN.rename(params))
        return neck

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"y{i}": y for i, y in enumerate(module([inputs[n] for n in sorted(inputs)]))}
