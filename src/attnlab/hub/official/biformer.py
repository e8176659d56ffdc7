"""rayleizhu/BiFormer (arXiv 2303.08810): the attention and both networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.parts import ChannelNorm
from attnlab.models.vision.biformer import BiFormer as Ours
from attnlab.nn.sparse.bilevel_routing import BilevelRouting

_REPOSITORY = "rayleizhu/BiFormer"

_ATTENTION: tuple[Rule, ...] = (
    (r"\bqkv\.qkv\.", "wqkv."),
    (r"\bqkv\.", "wqkv."),
    (r"\bproj\.", "wo."),
    (r"\brouter\.emb\.", "router."),
)
_CONVOLUTION: Rule = (r"\battn\.([123])\.", lambda m: f"mixer.{int(m[1]) - 1}.")
_BLOCK: tuple[Rule, ...] = (
    *_ATTENTION,
    _CONVOLUTION,
    (r"\battn\.", "mixer."),
    (r"\bpos_embed\.", "local."),
    (r"\bgamma(\d)$", r"scale\1"),
    (r"\bmlp\.0\.", "mlp.fc1."),
    (r"\bmlp\.1\.dwconv\.", "mlp.dwconv."),
    (r"\bmlp\.[23]\.", "mlp.fc2."),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^downsample_layers\.0\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.3\.", "stem.conv2."),
    (r"^downsample_layers\.0\.4\.", "stem.norm2."),
    (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.norm."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    *_BLOCK,
)
_SWIN_LAYOUT: tuple[Rule, ...] = (
    (r"^downsample_layers\.0\.0\.", "stem.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.norm."),
    (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.norm."),
    (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.conv."),
    *_BLOCK,
)


def _routing(arguments: Mapping[str, Any], stage: int | None = None) -> dict[str, Any]:
    """Our keywords for the options that the attention and the network share; the network has lists of some."""

    def option(name: str, default: Any) -> Any:
        if stage is None:
            return arguments.get(name, default)
        return arguments[name + "s"][stage] if name + "s" in arguments else default

    mode = arguments.get("kv_downsample_mode", "identity" if stage is None else "ada_avgpool")
    if mode not in ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"):
        raise ValueError(f"kv_downsample_mode {mode!r} was never implemented by the authors")
    return {
        "scale": arguments.get("qk_scale") or None,
        "pool": None if mode == "identity" else "avg" if "avg" in mode else "max",
        "pool_to": option("kv_per_win", 4 if stage is None else (2, 2, -1, -1)[stage]) if "ada" in mode else None,
        "pool_ratio": option("kv_downsample_ratio", 4 if stage is None else (4, 2, 1, 1)[stage]),
        "soft_routing": arguments.get("soft_routing", False),
        "diff_routing": arguments.get("diff_routing", False),
        "param_routing": arguments.get("param_routing", False),
        "auto_pad": arguments.get("auto_pad", False),
        "output": arguments.get("param_attention", "qkvo") == "qkvo",
    }


@official(_REPOSITORY, "BiLevelRoutingAttention", ours=BilevelRouting)
class BiLevelRoutingAttention:
    """`ops/bra_legacy.py`, on maps `(B, H, W, C)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _ATTENTION)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> BilevelRouting:
        module = BilevelRouting(
            arguments["dim"],
            heads=arguments.get("num_heads", 8),
            regions=arguments.get("n_win", 7),
            topk=arguments.get("topk", 4),
            qk_dim=arguments.get("qk_dim") or None,
            local=arguments.get("side_dwconv", 3),
            **_routing(arguments),
        )
        load(module, BiLevelRoutingAttention.rename(params))
        return module

    @staticmethod
    def run(module: BilevelRouting, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        y, choice, attention = module.details(x.flatten(1, 2), (x.shape[1], x.shape[2]))
        y = y.view(x.shape)
        found = {"y": y, "y0": y, "y1": choice.weights, "y2": choice.regions}
        return found if attention is None else {**found, "y3": attention}


@official(_REPOSITORY, "BiFormer", ours=Ours)
class BiFormer:
    """Images to logits. `rename` reads checkpoints of both networks: only this one's stem has two convolutions."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        two = "downsample_layers.0.3.weight" in params
        return rename(params, _NETWORK if two else _SWIN_LAYOUT)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        dims = arguments.get("embed_dim", (64, 128, 320, 512))
        net = Ours(
            dims=dims,
            depths=arguments.get("depth", (3, 4, 8, 3)),
            head_dim=arguments.get("head_dim", 64),
            qk_dims=arguments.get("qk_dims"),
            regions=arguments.get("n_win", 7),
            topk=arguments.get("topks", (8, 8, -1, -1)),
            local=arguments.get("side_dwconv", 5),
            position=arguments.get("before_attn_dwconv", 3),
            mlp_ratio=arguments.get("mlp_ratios", (4, 4, 4, 4)),
            pre_norm=arguments.get("pre_norm", True),
            local_mlp=arguments.get("mlp_dwconv", False),
            layer_scale=_positive(arguments.get("layer_scale_init_value", -1)),
            routing=[_routing(arguments, stage) for stage in range(len(dims))],
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, BiFormer.rename(params))
        return net

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "BiFormerSTL")
class BiFormerSTL:
    """Images to logits, in the layout of Swin-T (`models/biformer_stl.py`)."""

    rename = BiFormer.rename

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        batch_norm = "norm.running_mean" in params
        net = Ours(
            dims=arguments.get("embed_dim", (96, 192, 384, 768)),
            depths=arguments.get("depth", (2, 2, 6, 2)),
            head_dim=arguments.get("head_dim", 32),
            regions=arguments.get("n_wins", 7),
            topk=arguments.get("topks", (1, 4, 16, -2)),
            local=arguments.get("side_dwconv", 5),
            mlp_ratio=arguments.get("mlp_ratios", (4, 4, 4, 4)),
            swin_layout=True,
            # The authors' other choice is timm's LayerNorm2d.
            norm=nn.BatchNorm2d if batch_norm else lambda dim: ChannelNorm(dim, eps=1e-6),
            routing={"auto_pad": False},
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, BiFormerSTL.rename(params))
        return net

    run = BiFormer.run


def _positive(value: float) -> float | None:
    return value if value > 0 else None
