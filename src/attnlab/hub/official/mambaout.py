"""yuweihao/MambaOut (arXiv 2405.07992): the gated CNN block and the network; and timm's network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.mambaout import GatedBlock
from attnlab.models.vision.mambaout import MambaOut as Ours
from attnlab.nn.spatial.gated_cnn import GatedCNN

_REPOSITORY, _TIMM = "yuweihao/MambaOut", "huggingface/pytorch-image-models"

_BLOCK: tuple[Rule, ...] = ((r"(^|\.)(fc1|fc2|conv)\.(weight|bias)$", r"\1mixer.\2.\3"),)
_NETWORK: tuple[Rule, ...] = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^norm\.", "pooled_norm."),
    (r"^stages\.(\d)\.(\d+)\.(?:(norm)|(fc1|fc2|conv))\.", lambda m: f"stages.{m[1]}.blocks.{m[2]}.{_inner(m)}."),
    # timm's
    (r"^head\.norm\.(?=.*@timm)", "pooled_norm."),
    (r"^head\.pre_logits\.fc\.", "head.fc1."),
    (r"^head\.pre_logits\.norm\.", "head.norm."),
    (r"^head\.fc\.", "head.fc2."),
    (r"^(stages\.\d\.blocks\.\d+)\.(fc1|fc2|conv)\.", r"\1.mixer.\2."),
    (r"@timm$", ""),
)


def _inner(m: Any) -> str:
    return m[3] or f"mixer.{m[4]}"


@official(_REPOSITORY, "GatedCNNBlock")
@official(_TIMM, "GatedConvBlock")
class GatedCNNBlock:
    """On maps `(B, H, W, C)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _BLOCK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> GatedBlock:
        mixer = GatedCNN(
            arguments["dim"],
            kernel=arguments.get("kernel_size", 7),
            expansion=arguments.get("expansion_ratio", arguments.get("expension_ratio", 8 / 3)),
            conv_ratio=arguments.get("conv_ratio", 1.0),
        )
        block = GatedBlock(arguments["dim"], mixer)
        load(block, GatedCNNBlock.rename(params))
        return block.eval()

    @staticmethod
    def run(module: GatedBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}


@official(_REPOSITORY, "MambaOut", ours=Ours)
@official(_TIMM, "MambaOut")
class MambaOut:
    """Images to logits; the authors' names and timm's."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Both have a `head.norm`, which is the norm of the pooled features in timm and the head's own in the other.
        mark = "@timm" if any(name.startswith("head.pre_logits.") for name in params) else ""
        return rename({name + mark: tensor for name, tensor in params.items()}, _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        net = Ours(
            dims=arguments.get("dims", (96, 192, 384, 576)),
            depths=arguments.get("depths", (3, 3, 9, 3)),
            kernel=arguments.get("kernel_size", 7),
            expansion=arguments.get("expansion_ratio", 8 / 3),
            conv_ratio=arguments.get("conv_ratio", 1.0),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
            dropout=arguments.get("head_dropout", arguments.get("drop_rate", 0.0)),
        )
        load(net, MambaOut.rename(params))
        return net.eval()

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
