"""price112/Attentive-Convolution (arXiv 2510.20092): the convolution, the gated MLP, the block and the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.diffusion.sit import OnSquare
from attnlab.models.diffusion.sit import SiT as OurSiT
from attnlab.models.skeletons.convglu import ConvGLU
from attnlab.models.skeletons.pyramid import Block as OurBlock
from attnlab.models.vision.attnet import AttNet as Ours
from attnlab.models.vision.attnet import glu_width
from attnlab.nn.spatial.attentive_conv import AttentiveConv

_REPOSITORY = "price112/Attentive-Convolution"
# The file is named like the network, so that a class is known by both names together.

_CONV: tuple[Rule, ...] = (
    (r"(^|\.)kernel_proj\.", r"\1wk."),
    (r"(^|\.)kernel_gen\.", r"\1wg."),
    (r"(^|\.)x_proj\.", r"\1wv."),
    (r"(^|\.)proj\.", r"\1wo."),
    (r"(^|\.)difference_control$", r"\1inhibition"),
)
_GLU: tuple[Rule, ...] = ((r"(^|\.)dwconv\.", r"\1conv."), (r"(^|\.)norm_layer\.", r"\1norm."))
_BLOCK: tuple[Rule, ...] = (
    (r"token_mixer\.", "mixer."),
    (r"channel_mixer\.", "mlp."),
    (r"layer_scale_(\d)\.gamma$", r"scale\1"),
    (r"(^|\.)norm_(\d)\.", r"\1norm\2."),
    *_CONV,
    *_GLU,
)
_NETWORK: tuple[Rule, ...] = (
    (r"^stages\.(\d+)\.", r"stages.\1.blocks."),
    (r"^downsample_layers\.0\.(0|2)\.0\.", lambda m: f"stem.{int(m[1]) // 2}.conv."),
    (r"^downsample_layers\.0\.(0|2)\.1\.", lambda m: f"stem.{int(m[1]) // 2}.norm."),
    (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.norm."),
    *_BLOCK,
)


_SIT: tuple[Rule, ...] = (
    (r"^x_embedder\.proj\.", "embedding."),
    (r"^pos_embed$", "positions"),
    (r"^t_embedder\.mlp\.0\.", "time.fc1."),
    (r"^t_embedder\.mlp\.2\.", "time.fc2."),
    (r"^y_embedder\.embedding_table\.", "label."),
    (r"^final_layer\.linear\.", "head."),
    (r"^final_layer\.", ""),
    (r"adaLN_modulation\.1\.", "modulation."),
    (r"\.attn\.qkv\.", ".attention.wqkv."),
    (r"\.attn\.(?=kernel_|x_proj|difference)", ".attention.conv."),
    *_CONV[:3],
    _CONV[4],
)


def _renamed(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Our names; 1×1 convolutions become the linear layers that they are."""
    return rename({n: t.flatten(1) if t.ndim == 4 and t.shape[2:] == (1, 1) else t for n, t in params.items()}, rules)


class _Module:
    """On maps `(B, C, H, W)`."""

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "ATConv", "AttNet.ATConv", ours=AttentiveConv)
class ATConv(_Module):
    """On maps `(B, C, H, W)`, or, where its projections are linear layers, on tokens `(B, N, C)` of a square."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _CONV)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
        kernel, bias = arguments.get("kernel_size", 3), "proj.bias" in params
        if params["proj.weight"].ndim == 4:
            module = AttentiveConv(arguments["dim"], kernel=kernel, bias=bias)
            load(module, ATConv.rename(params))
            return module
        tokens = OnSquare(arguments["dim"], arguments.get("input_size", 16), kernel=kernel, bias=bias)
        load(tokens.conv, ATConv.rename(params))
        return tokens


@official(_REPOSITORY, "GLU", "AttNet.GLU")
class GLU(_Module):
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _GLU)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ConvGLU:
        module = ConvGLU(
            arguments["in_features"],
            arguments["hidden_features"],
            conv="dwconv.weight" in params,
            norm="norm_layer.weight" in params,
            dropout=arguments.get("drop", 0.0),
        )
        load(module, GLU.rename(params))
        return module.eval()

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)}


@official(_REPOSITORY, "Block", "AttNet.Block")
class Block(_Module):
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _BLOCK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurBlock:
        dim = arguments["dim"]
        block = OurBlock(
            dim,
            AttentiveConv(dim, kernel=arguments["kernel_size"], bias=arguments.get("conv_bias", True)),
            mlp=ConvGLU(
                dim,
                glu_width(dim, arguments.get("exp_rate", 4.0)),
                conv="channel_mixer.dwconv.weight" in params,
                norm="channel_mixer.norm_layer.weight" in params,
            ),
            norm=lambda width: nn.LayerNorm(width, eps=1e-6),
            layer_scale=1e-6 if arguments.get("use_layer_scale", True) else None,
        )
        load(block, Block.rename(params))
        return block.eval()


@official(_REPOSITORY, "AttNet", "AttNet.AttNet", ours=Ours)
class AttNet(_Module):
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        dims = arguments.get("dims", (64, 128, 256, 512))
        inner = [f"stages.{stage}.0.channel_mixer." for stage in range(len(dims))]
        net = Ours(
            dims=dims,
            depths=arguments.get("depths", (2, 2, 6, 2)),
            ratios=arguments.get("exp_rates", (4, 4, 4, 4)),
            kernels=arguments.get("kernel_sizes", (5, 5, 5, 5)),
            layer_scale=1e-6 if arguments.get("use_layer_scale", True) else None,
            glu_conv=[f"{name}dwconv.weight" in params for name in inner],
            glu_norm=[f"{name}norm_layer.weight" in params for name in inner],
            bias=arguments.get("conv_bias", True),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, AttNet.rename(params))
        return net.eval()


@official(_REPOSITORY, "SiT", ours=OurSiT)
class SiT:
    """Latent images `x`, times `t` and classes `y` to velocities."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        convolved = {n.rsplit(".", 1)[0] for n in params if n.endswith(".attn.difference_control")}
        found = {}
        for name, tensor in rename(params, _SIT).items():
            block, _, rest = name.partition(".attn.proj.")
            if rest:  # the last projection, of attention or of the convolution
                name = f"{block}.attention.{'conv.' if f'{block}.attn' in convolved else ''}wo.{rest}"
            found[name] = tensor
        return found

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurSiT:
        mixers = "attention"
        if arguments.get("hybrid", False):
            mixers = "alternate"
        elif arguments.get("token_mixer", "attn") == "atconv":
            mixers = "convolution"
        size, dropped = arguments.get("input_size", 32), arguments.get("class_dropout_prob", 0.1)
        net = OurSiT(
            size=size,
            patch=arguments.get("patch_size", 2),
            channels=arguments.get("in_channels", 4),
            dim=arguments.get("hidden_size", 1152),
            depth=arguments.get("depth", 28),
            heads=arguments.get("num_heads", 16),
            mixers=mixers,
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            classes=arguments.get("num_classes", 1000),
            drop_class=dropped,
            variance=arguments.get("learn_sigma", True),
        )
        load(net, SiT.rename(params))
        return net.eval()

    @staticmethod
    def run(module: OurSiT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"], inputs["t"], inputs["y"])}
