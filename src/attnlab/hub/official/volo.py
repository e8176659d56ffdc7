"""sail-sg/volo (arXiv 2106.13112): outlook attention, the blocks, the networks and the token-label losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.plain import TokenBlock
from attnlab.models.vision.volo import VOLO as Ours
from attnlab.models.vision.volo import ClassBlock as OurClassBlock
from attnlab.nn.cross.class_attention import ClassAttention as OurClassAttention
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.outlook import OutlookAttention as OurAttention
from attnlab.recipes.token_labelling import token_label_loss

_REPOSITORY = "sail-sg/volo"

_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)attn\.(?=\w+\.)", r"\1mixer."),
    (r"(^|mixer\.)(v|q|kv|qkv)\.", r"\1w\2."),
    (r"(^|mixer\.)proj\.", r"\1wo."),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed\.conv\.", "stem."),
    (r"^patch_embed\.proj\.", "stem.9."),
    (r"^network\.1\.proj\.", "down."),
    (r"^network\.(\d+)\.", lambda m: f"groups.{max(int(m[1]) - 1, 0)}."),
    (r"^post_network\.", "class_blocks."),
    (r"^pos_embed$", "positions.table"),
    (r"^cls_token$", "class_token"),
    (r"^aux_head\.", "dense_head."),
    *_BLOCK,
)


def _renamed(params: Mapping[str, Tensor], rules: tuple[Rule, ...], kernel: int = 3) -> dict[str, Tensor]:
    """Our names, and the rows of the weights' predictor from (head, output, value) to (value, head, output)."""
    slots = kernel**2

    def vectorised(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, slots, slots)).movedim(2, 0).flatten(0, 2)

    return {
        name: vectorised(tensor) if re.search(r"(^|mixer\.)attn\.(weight|bias)$", name) else tensor
        for name, tensor in rename(params, rules).items()
    }


def _no_scale(arguments: Mapping[str, Any]) -> None:
    if arguments.get("qk_scale") is not None:
        raise ValueError(f"qk_scale must be None (head_dim^-½), got {arguments['qk_scale']}")


def _outlook(arguments: Mapping[str, Any]) -> OurAttention:
    return OurAttention(
        arguments["dim"],
        heads=arguments.get("num_heads", 1),
        kernel=arguments.get("kernel_size", 3),
        stride=arguments.get("stride", 1),
        padding=arguments.get("padding", 1),
        bias=arguments.get("qkv_bias", False),
        scale=arguments.get("qk_scale"),
        dropout=arguments.get("attn_drop", 0.0),
    )


class _OnMaps:
    """Runs a module of tokens on maps (B, H, W, C), as the authors call theirs."""

    @staticmethod
    def rename(params: Mapping[str, Tensor], kernel: int = 3) -> dict[str, Tensor]:
        return _renamed(params, _BLOCK, kernel)

    @staticmethod
    def run(module: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        return {"y": module(x.flatten(1, 2), grid=tuple(x.shape[1:3])).view(x.shape)}


@official(_REPOSITORY, "OutlookAttention", ours=OurAttention)
class OutlookAttention(_OnMaps):
    """On maps (B, H, W, C)."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurAttention:
        module = _outlook(arguments)
        load(module, _OnMaps.rename(params, module.kernel))
        return module


@official(_REPOSITORY, "Outlooker")
class Outlooker(_OnMaps):
    """The block of outlook attention, on maps (B, H, W, C)."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> TokenBlock:
        mixer = _outlook(arguments)
        return _block(arguments, mixer, 3.0, _OnMaps.rename(params, mixer.kernel))


@official(_REPOSITORY, "Attention")
class Attention(_OnMaps):
    """Softmax attention on maps (B, H, W, C)."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MultiHead:
        module = _softmax(arguments)
        load(module, _OnMaps.rename(params))
        return module


@official(_REPOSITORY, "Transformer")
class Transformer(_OnMaps):
    """The block of softmax attention, on maps (B, H, W, C)."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> TokenBlock:
        return _block(arguments, _softmax(arguments), 4.0, _OnMaps.rename(params))


def _softmax(arguments: Mapping[str, Any]) -> MultiHead:
    _no_scale(arguments)
    heads, bias = arguments.get("num_heads", 8), arguments.get("qkv_bias", False)
    return MultiHead(arguments["dim"], heads=heads, bias=bias, out_bias=True, dropout=arguments.get("attn_drop", 0.0))


def _block(
    arguments: Mapping[str, Any], mixer: torch.nn.Module, mlp_ratio: float, params: Mapping[str, Tensor]
) -> TokenBlock:
    rates = {"mlp_ratio": arguments.get("mlp_ratio", mlp_ratio), "drop_path": arguments.get("drop_path", 0.0)}
    block = TokenBlock(arguments["dim"], mixer, **rates)
    load(block, params)
    return block


@official(_REPOSITORY, "ClassAttention")
class ClassAttention:
    """Tokens (B, N, C) to the new class token (B, 1, C)."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurClassAttention:
        module = OurClassAttention(
            arguments["dim"],
            heads=arguments.get("num_heads", 8),
            head_dim=arguments.get("head_dim"),
            bias=arguments.get("qkv_bias", False),
            scale=arguments.get("qk_scale"),
            dropout=arguments.get("attn_drop", 0.0),
        )
        load(module, rename(params, _BLOCK))
        return module

    @staticmethod
    def run(module: OurClassAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        return {"y": module(x[:, :1], x[:, 1:])}


@official(_REPOSITORY, "ClassBlock")
class ClassBlock:
    """Tokens (B, N, C), of which the first, the class token, changes."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurClassBlock:
        block = OurClassBlock(
            arguments["dim"],
            heads=arguments["num_heads"],
            head_dim=arguments.get("head_dim"),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            qkv_bias=arguments.get("qkv_bias", False),
            scale=arguments.get("qk_scale"),
            drop_path=arguments.get("drop_path", 0.0),
        )
        load(block, rename(params, _BLOCK))
        return block

    @staticmethod
    def run(module: OurClassBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        return {"y": torch.cat((module(x[:, :1], x[:, 1:]), x[:, 1:]), dim=1)}


@official(_REPOSITORY, "VOLO", ours=Ours)
class VOLO:
    """Images to logits; in training to class logits, place logits and the mixed box."""

    @staticmethod
    def rename(params: Mapping[str, Tensor], kernel: int = 3) -> dict[str, Tensor]:
        renamed = _renamed(params, _NETWORK, kernel)
        return {n: t.flatten(0, -2) if n == "positions.table" else t.flatten() if n == "class_token" else t
                for n, t in renamed.items()}  # fmt: skip

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        _no_scale(arguments)
        kernel, padding = arguments.get("out_kernel", 3), arguments.get("out_padding", 1)
        downsamples = list(arguments["downsamples"])
        if padding != (kernel - 1) // 2:
            raise ValueError(f"out_padding must be (out_kernel - 1) // 2, got {padding} with kernel {kernel}")
        if arguments.get("pooling_scale", 2) != 2 or downsamples != [True] + [False] * (len(downsamples) - 1):
            raise ValueError(
                f"the map must shrink once, by 2, after the first group; got downsamples={downsamples}, "
                f"pooling_scale={arguments.get('pooling_scale', 2)}"
            )
        model = Ours(
            depths=arguments["layers"],
            dims=arguments["embed_dims"],
            heads=arguments["num_heads"],
            outlook=arguments["outlook_attention"],
            mlp_ratio=arguments["mlp_ratios"],
            kernel=kernel,
            stride=arguments.get("out_stride", 2),
            qkv_bias=arguments.get("qkv_bias", False),
            stem=arguments.get("stem_hidden_dim", 64),
            patch=arguments.get("patch_size", 8),
            image=arguments.get("img_size", 224),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            class_layers=len(arguments.get("post_layers") or ()),
            mean=arguments.get("return_mean", False),
            dense=arguments.get("return_dense", True),
            mix_token=arguments.get("mix_token", True),
            drop_path=arguments.get("drop_path_rate", 0.0),
            dropout=arguments.get("drop_rate", 0.0),
        )
        load(model, VOLO.rename(params, kernel))
        return model

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "TokenLabelCrossEntropy")
class TokenLabelCrossEntropy:
    """Class logits `xc`, place logits `xa` and targets `tgt` to the loss; the box stands in the call."""

    ground_truth = False

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[..., Tensor]:
        found = re.search(r"bbox\s*=\s*\(([^)]*)\)", arguments.get("call", ""))
        box = arguments.get("bbox") or (tuple(int(edge) for edge in found[1].split(",")) if found else (0, 0, 0, 0))
        return partial(
            token_label_loss,
            box=box,
            class_weight=arguments.get("cls_weight", 1.0),
            dense_weight=arguments.get("dense_weight", 1.0),
            ground_truth=cls.ground_truth,
        )

    @staticmethod
    def run(module: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["xc"], inputs["xa"], inputs["tgt"])}


@official(_REPOSITORY, "TokenLabelGTCrossEntropy")
class TokenLabelGTCrossEntropy(TokenLabelCrossEntropy):
    """The same with the soft label blended with the true one."""

    ground_truth = True
