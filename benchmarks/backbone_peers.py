"""Which image backbones have a peer that runs here, how each is built and named there, and why the others have none."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from backbone_pairs import Make, Peer, fused_timm
from torch import Tensor, nn


def timm_eca_resnet50(timm: Any, side: int) -> nn.Module:
    resnet = importlib.import_module("timm.models.resnet")
    return resnet.ResNet(resnet.Bottleneck, (3, 4, 6, 3), block_args={"attn_layer": "eca"})


def of_timm(name: str, sized: bool = True, **ours: Any) -> Peer:
    """timm's network; images of another side are said to those that have to know (`sized`)."""

    def make(timm: Any, side: int) -> nn.Module:
        if sized and side != 224:
            with contextlib.suppress(TypeError):
                return timm.create_model(name, img_size=side)
        return timm.create_model(name)

    return Peer(make, ours=ours, fuse=fused_timm)


def named(name: str, image: str = "", **keywords: Any) -> Make:
    """The network that the module's function `name` makes; `image` is its keyword for the side of the image."""
    return lambda module, side: getattr(module, name)(**({image: side} if image else {}), **keywords)


def layer_norm() -> Any:
    return partial(nn.LayerNorm, eps=1e-6)


def rvt(name: str) -> Make:
    return named(name, pretrained=False, pretrained_cfg=None, num_scales=4)


def fan(module: Any, side: int, **keywords: Any) -> nn.Module:
    return module.FAN(
        img_size=side, patch_size=16, embed_dim=384, depth=12, num_heads=8, eta=1.0, tokens_norm=True,
        sr_ratio=[1] * 12, **keywords,
    )  # fmt: skip


def agent_swin(module: Any, side: int) -> nn.Module:
    return module.AgentSwinTransformer(
        img_size=side,
        agent_num=[9, 16, 49, 49],
        attn_type="AAAB",
        drop_path_rate=0.0,
        window_size=side // 4,
    )


def crossformer(module: Any, side: int) -> nn.Module:
    return module.CrossFormer(
        img_size=side, patch_size=[4, 8, 16, 32], embed_dim=64, depths=[1, 1, 8, 6], num_heads=[2, 4, 8, 16],
        group_size=[7, 7, 7, 7], mlp_ratio=[4, 4, 4, 4], drop_path_rate=0.0, merge_size=[[2, 4], [2, 4], [2, 4]],
    )  # fmt: skip


def soft(module: Any, side: int) -> nn.Module:
    layers, kernels = sys.modules["models.softmax_free_transformer"], sys.modules["SOFT.kernel.inverse"]

    class Inverse(torch.autograd.Function):  # theirs, which refuses tensors that are not on a GPU
        @staticmethod
        def forward(ctx: Any, matrix: Tensor, steps: int) -> Tensor:
            inverse = kernels.newton_inv(matrix, steps)
            ctx.save_for_backward(inverse)
            return inverse

        @staticmethod
        def backward(ctx: Any, *given: Tensor) -> Any:
            turned = ctx.saved_tensors[0].transpose(-1, -2)
            return -(turned @ given[0] @ turned), None

    layers.newton_inverse_kernel = Inverse.apply  # type: ignore[attr-defined]
    return module.soft_tiny(img_size=side, kernel_method="torch")


class Around(nn.Module):
    """A network called in another way; its weights keep their names."""

    def __init__(self, net: nn.Module, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.run = net, run

    def state_dict(self, *args: Any, **given: Any) -> Any:
        return self.net.state_dict(*args, **given)

    def forward(self, x: Tensor) -> Any:
        return self.run(self.net, x)


def spikformer(module: Any, side: int) -> nn.Module:
    node = module.MultiStepLIFNode
    if not issubclass(node, nn.Module):
        raise ImportError("spikingjelly 0.0.0.0.12 is not there")
    module.MultiStepLIFNode = lambda backend, **given: node(backend="torch", **given)  # theirs is for GPUs
    net = module.spikformer()
    neurons = [part for part in net.modules() if isinstance(part, node)]

    def run(net: Any, x: Tensor) -> Tensor:
        for neuron in neurons:  # which remember, from batch to batch
            neuron.reset()
        return net(x)

    return Around(net, run)


def sparsifiner(module: Any, side: int) -> nn.Module:
    space = types.SimpleNamespace
    scores = space(USE_TOPK=True, THRESHOLD=1e-4)
    spar = space(
        BASIS_THRESHOLD=0.02, BASIS_COEF=space(USE_TOPK=True, TOPK=8, THRESHOLD=0.05), ATTN_SCORE=scores,
        PRUNE_ATTN_MATRIX_ROW=False, OUT_BASIS_SPARSITY=False, OUT_BASIS_COEF_SPARSITY=False,
        OUT_ATTN_MASK_SPARSITY=False,
    )  # fmt: skip
    net = module.Sparsifiner(
        img_size=side, embed_dim=192, num_heads=3, attn_keep_rate_list=[0.25] * 12, token_keep_rate_list=[1.0] * 12,
        token_pruning_loc_indicator=[False] * 12, reduce_n_factor=6,
        cfg=space(SPAR=spar, LOSS=space(USE_ATTN_RECON=False)),
    )  # fmt: skip
    wanted = ("x", "features", "approx_attn_list")
    return Around(net, lambda net, x: [net(x)] if not net.training else pick(net(x), wanted))


def pick(out: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    return [out[name] for name in names]


def spartan(module: Any, side: int) -> nn.Module:
    return module.SpaRTAN(1000, 4, [3, 3, 12, 2], [4, 4, 2, 2], [64, 128, 256], 32)


def ninformer(module: Any, side: int) -> nn.Module:
    class Images(module.NiNformer):
        """As in their training script, which cannot be imported without training."""

        def __init__(self) -> None:
            super().__init__(256, 512, 64, 4, 0.0)
            self.patcher, self.classifier = nn.Conv2d(3, 256, 4, 4), nn.Linear(256, 10)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patcher(x).permute(0, 2, 3, 1).flatten(1, 2)
            return self.classifier(self.model(tokens).mean(1))

    return Images()


def infvit(module: Any, side: int, variant: str) -> nn.Module:
    home = importlib.import_module("torchvision.models.vision_transformer")
    net = home.VisionTransformer(side, 16, 4, 16, 1024, 4096, representation_size=1024)
    return module.convert(net, variant=variant, inplace=True, verbose=False)


def roma(module: Any, side: int) -> nn.Module:
    scans = sys.modules["utils_mamba.selective_scan_interface"]
    sys.modules["mamba_simple"].selective_scan_fn = scans.selective_scan_ref  # type: ignore[attr-defined]
    net = module.VisionMamba(
        img_size=side, patch_size=16, embed_dim=192, depth=12, dec_embed_dim=512, if_abs_pos_embed=True,
        drop_path_rate=0.0, ssm_cfg={"use_fast_path": False},
    )  # fmt: skip

    def run(net: Any, x: Tensor) -> Tensor:
        """The encoder, row by row as they fine-tune it."""
        x = net.patch_embed(x) + net.pos_embed
        for layer in net.layers:
            x = layer(x)
        return net.norm_4(x).mean(1)

    return Around(net, run)


def merged_branches(net: nn.Module) -> nn.Module:
    for part in list(net.modules()):
        if hasattr(part, "merge_dilated_branches"):
            part.merge_dilated_branches()  # type: ignore[operator]
    return net


AGENT, TAP = "LeapLabTHU/Agent-Attention", "guoyongcs/TAPADL"
PAIRS: dict[str, Peer] = {
    "focalnet_tiny_srf": of_timm("focalnet_tiny_srf"),
    "focalnet_tiny_lrf": of_timm("focalnet_tiny_lrf"),
    "eca_resnet50": Peer(timm_eca_resnet50, ours={"kernels": (5, 5, 5, 7)}, names=((r"\.se\.", ".eca."),)),
    "deit_small_patch16_224": of_timm("deit_small_patch16_224"),
    "volo_d1": of_timm("volo_d1_224", mix_token=False),
    "haloregnetz_b": of_timm("haloregnetz_b"),
    "convit_small": of_timm("convit_small"),
    "shvit_s1": of_timm("shvit_s1"),
    "maxvit_tiny": of_timm("maxvit_tiny_tf_224", sized=False),
    "mambaout_tiny": of_timm("mambaout_tiny"),
    "davit_tiny": of_timm("davit_tiny"),
    "gcvit_xxtiny": of_timm("gcvit_xxtiny"),
    "transnext_micro": Peer(
        named("transnext_micro", "img_size"), "DaiShiResearch/TransNeXt", "transnext", "classification"
    ),
    "moh_vit_small_80": Peer(named("moh_transnext_small_80", "img_size"), "SkyworkAI/MoH", "transnext", "MoH-ViT"),
    "van_b1": Peer(named("van_b1", "img_size"), "Visual-Attention-Network/VAN-Classification", "models.van"),
    "spectformer_s": Peer(
        named("spectformer_s", "img_size"), "badripatro/SpectFormers", "spectformer", "hierarchical_architecture"
    ),
    "spectformer_vanilla_xs": Peer(
        named("SpectFormer", "img_size", embed_dim=384, depth=12, mlp_ratio=4, norm_layer=layer_norm()),
        "badripatro/SpectFormers", "spectformer", "vanilla_architecture",
    ),
    "soft_tiny": Peer(soft, "fudan-zvg/SOFT", "models.softmax_free_vision_transformer", ours={"image": 224},
                      note="their kernels for GPUs in plain PyTorch"),
    "sgformer_small": Peer(named("sgformer_s", "img_size"), "OliverRensu/SG-Former", "sgformer"),
    "tap_rvt_tiny": Peer(rvt("tap_rvt_tiny"), TAP, "tap_robust_models", "TAPADL_RVT"),
    "rvt_tiny": Peer(rvt("rvt_tiny"), TAP, "robust_models", "TAPADL_RVT"),
    "tap_fan_small_12_p16_224": Peer(
        lambda module, side: fan(module, side, num_scales=4), TAP, "models.tap_fan", "TAPADL_FAN"
    ),
    "fan_small_12_p16_224": Peer(fan, TAP, "models.fan", "TAPADL_FAN"),
    "spikformer_8_512": Peer(spikformer, "ZK-Zhou/spikformer", "model", "imagenet", side=224,
                             note="spikingjelly's neurons in its PyTorch form"),
    "vitaev2_vsa_s": Peer(named("ViTAEv2_VSA_S", "img_size"), "ViTAE-Transformer/ViTAE-VSA", "vitaev2_vsa.models",
                          "Image-Classification"),
    "hornet_tiny_7x7": Peer(named("hornet_tiny_7x7"), "raoyongming/HorNet", "hornet"),
    "hornet_tiny_gf": Peer(named("hornet_tiny_gf"), "raoyongming/HorNet", "hornet"),
    "attnet_t1": Peer(named("AttNet_T1"), "price112/Attentive-Convolution", "models.AttNet"),
    "stvit_small": Peer(lambda m, side: m.stvit_small(types.SimpleNamespace(drop=0.0, drop_path=0.0)), "hhb072/STViT",
                        "models.stvit"),
    "evit_small": Peer(
        named("EViT", "img_size", patch_size=16, embed_dim=384, depth=12, num_heads=6, fuse_token=True,
              keep_rate=(1, 1, 1, 0.7, 1, 1, 0.7, 1, 1, 0.7, 1, 1)),
        "youweiliang/evit", "evit",
    ),
    "patnet_t2": Peer(
        named("PartialNet", embed_dim=64, depths=[2, 2, 6, 4], use_spatial_attn=False, patnet_t0=False),
        "haiduo/PartialNet", "models.partialnet",
    ),
    "crossformer_tiny": Peer(crossformer, "cheerss/CrossFormer", "models.crossformer"),
    "biformer_tiny": Peer(named("biformer_tiny"), "rayleizhu/BiFormer", "models.biformer"),
    "dhvt_tiny_imagenet_patch16": Peer(
        named("VisionTransformer", "img_size", patch_size=16, embed_dim=192, depth=12, num_heads=3, mlp_ratio=4,
              apply_dhvt=True, num_classes=1000),
        "ArieSeirack/DHVT", "vision_transformer",
    ),
    "l2vit_tiny": Peer(named("L2ViT_Tiny"), "ChuanyangZheng/L2ViT", "models.l2vit", "classification"),
    "agent_deit_tiny": Peer(named("VisionTransformer", "img_size", patch_size=16, embed_dim=192, depth=12, num_heads=3,
                                  agent_num=[49] * 12), AGENT, "models.agent_deit", "agent_transformer"),
    "agent_swin_tiny": Peer(agent_swin, AGENT, "models.agent_swin", "agent_transformer",
                            ours={"window": lambda side: side // 32}),
    "agent_pvt_tiny": Peer(named("agent_pvt_tiny", "img_size", agent_num=[9, 16, 49, 49], attn_type="AAAA",
                                 agent_sr_ratios="1111"), AGENT, "models.agent_pvt", "agent_transformer"),
    "eca_mobilenetv2": Peer(named("eca_mobilenet_v2"), "BangguWu/ECANet", "models.eca_mobilenetv2"),
    "sparsifiner_tiny": Peer(sparsifiner, "lim142857/Sparsifiner", "models.sparsifiner", "src"),
    "spartan": Peer(spartan, "henry-pay/SpaRTAN", "model.spartan", "src"),
    "ninformer": Peer(ninformer, "Abdullah-88/NiNformer", "ninformer", side=32),
    "infvit_4": Peer(partial(infvit, variant="pure_infsa"), "giorgioroffo/infinite-self-attention", "infsa"),
    "linear_infvit_4": Peer(partial(infvit, variant="linear_infsa"), "giorgioroffo/infinite-self-attention", "infsa"),
    "roma_tiny": Peer(roma, "MiliLab/RoMA", "models_mamba", "RoMA", ours={"num_classes": 0},
                      note="their selective scan for GPUs in its own plain form"),
    "overlock_xt": Peer(named("overlock_xt"), "LMMMEng/OverLoCK", "models.overlock", fuse=merged_branches,
                        note="NATTEN's kernel in plain PyTorch"),
}  # fmt: skip

WITHOUT_PEER = {
    "dependencyvit": "the authors' repository holds no code",
    "dinat": "NATTEN has neither kernels for CPUs nor the authors' tables of relative positions since 0.20",
    "dynamicvis": "no peer has been set up",
    "minimal_transformer": "the authors have published no code",
    "nat": "NATTEN has neither kernels for CPUs nor the authors' tables of relative positions since 0.20",
    "s2aformer": "the authors have published no code",
    "spikformer_v2": "the authors have published the first version only, which has a row",
    "stepnet": "the authors have published no code",
    "swin_vsa": "the authors have published ViTAEv2-VSA only, which has a row",
    "terminator": "the authors' repository lacks the network",
    "tic": "the authors have published the operator only",
    "union_vit": "no peer has been set up",
    "vim2": "the authors have published no code",
}
