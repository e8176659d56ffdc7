"""fudan-zvg/SOFT (arXiv 2207.03341): Newton's inverse, both attentions, their blocks and the networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.soft import SOFT as Ours
from attnlab.models.vision.soft import SoftBlock
from attnlab.nn.linear.soft import SoftAttention, newton_inverse

_REPOSITORY = "fudan-zvg/SOFT"

_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)mha\.", r"\1mixer."),
    (r"(^|\.)attn\.Qlandmark_op\.", r"\1landmarks."),
    (r"(^|\.)attn\.Qnorm_act\.0\.", r"\1norm."),
    (r"(^|\.)attn\.conv\.", r"\1conv."),
    (r"(^|\.)ff\.", r"\1wo."),
)
_BLOCK: tuple[Rule, ...] = ((r"(^|\.)att\.", r"\1"), *_ATTENTION, (r"(^|\.)ff(\d)\.", r"\1mlp.fc\2."))
_NETWORK: tuple[Rule, ...] = (
    (r"^block4\.(\d+)\.attn\.proj\.", r"block4.\1.mixer.wo."),
    (r"^block4\.(\d+)\.attn\.", r"block4.\1.mixer."),
    *_BLOCK,
    (r"^patch_embed1\.proj\.", "stem.convs."),
    (r"^patch_embed(\d)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.convs."),
    (r"^pos_embed1$", "stem.positions.table"),
    (r"^pos_embed4$", "stages.3.positions.table"),
    (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.downsample.positions.table"),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^cls_token$", "stages.3.class_token"),
    (r"^norm\.", "stages.3.norm."),
)
_FUSED = (("W_q", "W_v", "wqv"), ("q", "kv", "wqkv"))


def _joined(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projections that we make in one, one below the other."""
    joined = dict(params)
    for first, second, ours in _FUSED:
        for name in [n for n in joined if re.search(rf"(^|\.){first}\.(weight|bias)$", n)]:
            head, part = re.split(rf"(?:^|(?<=\.)){first}\.(?=weight|bias)", name)
            joined[f"{head}{ours}.{part}"] = torch.cat((joined.pop(name), joined.pop(f"{head}{second}.{part}")))
    return joined


def _grid(arguments: Mapping[str, Any]) -> tuple[int, int]:
    found = re.search(r"(\d+)\s*,\s*(\d+)\s*\)", arguments.get("call", ""))
    if found is None:
        raise ValueError("the map's size must be given: a call that says m(x,H,W)")
    return int(found[1]), int(found[2])


class _OnGrid(nn.Module):
    """A module with the grid that its calls are about."""

    def __init__(self, module: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.module, self.grid = module, grid


def _attention(arguments: Mapping[str, Any], normalize: bool) -> SoftAttention:
    return SoftAttention(
        arguments["dim"], heads=arguments["num_heads"], ratio=arguments["ratio"],
        kernel=arguments.get("conv_size", 3) or 0, iterations=arguments.get("max_iter", 20), normalize=normalize,
        variant="release",
    )  # fmt: skip


@official(_REPOSITORY, "newton_inverse_kernel")
class NewtonInverse:
    """`mat` (…, m, m) to its inverse; the number of iterations stands in the call."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[..., Tensor]:
        said = re.search(r"newton_inverse_kernel\([^,]*,\s*(?:iter\s*=\s*)?(\d+)", arguments.get("call", ""))
        return partial(newton_inverse, iterations=arguments.get("iter", int(said[1]) if said else 20))

    @staticmethod
    def run(module: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["mat"])}


@official(_REPOSITORY, "SoftmaxFreeAttention", ours=SoftAttention)
class SoftmaxFreeAttention:
    """On tokens (B, H·W, C); the map's size stands in the call."""

    normalize = False

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(_joined(params), _ATTENTION)

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> _OnGrid:
        module = _attention(arguments, cls.normalize)
        load(module, cls.rename(params))
        return _OnGrid(module, _grid(arguments))

    @staticmethod
    def run(module: _OnGrid, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module.module(inputs["x"], grid=module.grid)}


@official(_REPOSITORY, "SoftmaxFreeNormAttention")
class SoftmaxFreeNormAttention(SoftmaxFreeAttention):
    normalize = True


@official(_REPOSITORY, "SoftmaxFreeTransformerBlock", ours=SoftBlock)
class SoftmaxFreeTransformerBlock:
    """On tokens (B, H·W, C); the map's size stands in the call."""

    normalize = False

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(_joined(params), _BLOCK)

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> _OnGrid:
        mixer = _attention(arguments, cls.normalize)
        block = SoftBlock(arguments["dim"], mixer, dropout=arguments.get("drop_path", 0.0))
        load(block, cls.rename(params))
        return _OnGrid(block.eval(), _grid(arguments))

    @staticmethod
    def run(module: _OnGrid, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = inputs["x"].unflatten(1, module.grid).permute(0, 3, 1, 2)
        return {"y": module.module(maps).permute(0, 2, 3, 1).flatten(1, 2)}


@official(_REPOSITORY, "SoftmaxFreeNormTransformerBlock")
class SoftmaxFreeNormTransformerBlock(SoftmaxFreeTransformerBlock):
    normalize = True


@official(_REPOSITORY, "SoftmaxFreeVisionTransformer", ours=Ours)
class SoftmaxFreeVisionTransformer:
    """Images to logits."""

    normalize = False

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = rename(_joined(params), _NETWORK)
        # Positions and the class token without their leading axes of one.
        return {
            n: t.flatten(0, -2) if n.endswith("positions.table") else t.flatten() if n.endswith("class_token") else t
            for n, t in renamed.items()
        }

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        if (sr := arguments.get("sr_ratios", (8, 4, 2, 1)))[-1] != 1:
            raise ValueError(f"sr_ratios must end with 1, got {sr}")
        if arguments.get("qk_scale") is not None:
            raise ValueError(f"qk_scale must be None (head_dim^-½), got {arguments['qk_scale']}")
        ratios = arguments.get("mlp_ratios", (4, 4, 4, 4))
        net = Ours(
            dims=arguments.get("embed_dims", (64, 128, 256, 512)),
            depths=arguments.get("depths", (3, 4, 6, 3)),
            heads=arguments.get("num_heads", (1, 2, 4, 8)),
            ratios=sr[:-1],
            iterations=arguments.get("newton_max_iter", 20),
            normalize=cls.normalize,
            variant="release",
            mlp_ratio=ratios[-1],
            qkv_bias=arguments.get("qkv_bias", False),
            eps=1e-6 if re.search(r"1e-0?6", str(arguments.get("norm_layer"))) else 1e-5,
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )  # the authors' positions are those of 224², whatever img_size is
        load(net, cls.rename(params))
        return net.eval()

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "SoftmaxFreeNormVisionTransformer")
class SoftmaxFreeNormVisionTransformer(SoftmaxFreeVisionTransformer):
    normalize = True
