"""FAN with and without token-aware pooling: its parts written out, its checkpoints, and the loss on its maps."""

import pytest
import torch
import torch.nn.functional as F

from attnlab.hub.official.tap_adl import FAN as Official
from attnlab.models.vision.fan import FAN, ChannelGate, FourierPositions, RobustClassBlock
from attnlab.recipes.robust_attention import diversity_loss, recorded

TINY = {"dim": 16, "depth": 2, "heads": 2, "num_classes": 5}


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Away from the initial values, which hide scales, biases and temperatures."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.double().eval()


def test_a_channel_gate_is_its_equations_written_out() -> None:
    mlp, x = shaken(ChannelGate(8, 2, 12)), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    flat = x.flatten(1, 2)
    q, k = mlp.wq(flat).softmax(1), flat.softmax(1)
    h = mlp.fc1(x)
    first, norm, second = mlp.local[0], mlp.local[2], mlp.local[3]
    inner = F.gelu(F.conv2d(h.permute(0, 3, 1, 2), first.weight, first.bias, padding=1, groups=12))
    inner = (inner - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    inner = inner * norm.weight[:, None, None] + norm.bias[:, None, None]
    inner = F.conv2d(inner, second.weight, second.bias, padding=1, groups=12).permute(0, 2, 3, 1)
    v = mlp.norm(mlp.fc2(h + mlp.scale * inner))
    for c in range(8):
        head = slice(c // 4 * 4, c // 4 * 4 + 4)
        seen = torch.stack([(q[:, n, c] * k[:, n, head].mean(-1)) for n in range(15)]).sum(0)
        wanted = v[..., c] * (mlp.temperature[c // 4] * seen.sigmoid())[:, None, None]
        torch.testing.assert_close(mlp(x)[..., c], wanted)


def test_a_class_block_norms_the_other_tokens_into_their_path() -> None:
    block, x = shaken(RobustClassBlock(8, 2)), torch.randn(2, 6, 8, dtype=torch.float64)
    seen = block.norm1(x)
    q, (k, v) = block.mixer.wq(seen[:, :1]), block.mixer.wkv(seen).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    token = block.mixer.wo(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
    y = block.norm2(x + block.scale1 * torch.cat((token, seen[:, 1:]), 1))
    found = block(x)
    torch.testing.assert_close(found[:, 1:], 2 * y[:, 1:])
    torch.testing.assert_close(found[:, :1], y[:, :1] + block.scale2 * block.mlp(y[:, :1]))


def test_positions_are_those_of_timms_xcit(timm) -> None:
    peer, ours = timm.models.xcit.PositionalEncodingFourier(32, 24), FourierPositions(24)
    with torch.no_grad():
        ours.project.weight.copy_(peer.token_projection.weight.flatten(1))
        ours.project.bias.copy_(peer.token_projection.bias)
    torch.testing.assert_close(ours(torch.zeros(2, 24, 5, 9)), peer(2, 5, 9))


def test_one_scale_is_the_plain_network() -> None:
    net, plain = shaken(FAN(**TINY, scales=1)), FAN(**TINY, scales=0).double().eval()
    plain.load_state_dict({n.replace("norm1.norm", "norm1"): t for n, t in net.state_dict().items() if "pool" not in n})
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    torch.testing.assert_close(net(images), plain(images), rtol=0, atol=1e-12)


def test_each_block_attends_to_pooled_tokens_and_its_path_keeps_them() -> None:
    block = shaken(FAN(**TINY, scales=4)).stages[0].blocks[0]
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    pooled = block.norm1.pool(x).flatten(2).mT
    y = x.flatten(2).mT + block.scale1 * block.mixer(block.norm1.norm(pooled))
    y = y + block.scale2 * block.mlp(block.norm2(y).unflatten(1, (4, 5))).flatten(1, 2)
    torch.testing.assert_close(block(x).flatten(2).mT, y)


@pytest.mark.parametrize(("scales", "stem"), [(4, None), (0, (1, 2))])
def test_reads_the_authors_layout(scales: int, stem: tuple[int, int] | None) -> None:
    net = FAN(**TINY, scales=scales, stem_depths=stem).eval()
    theirs: dict[str, torch.Tensor] = {}
    for name, tensor in net.state_dict().items():
        for ours, official in (
            ("stem.1.project.", "pos_embed.token_projection."),
            ("stem.0.out.", "patch_embed.proj."),
            ("stem.0.patches.conv.", "patch_embed.backbone.stem.0."),
            ("stem.0.patches.norm.", "patch_embed.backbone.stem.1."),
            ("stem.0.first.", "patch_embed.backbone.stages.0.blocks."),
            ("stem.0.second.", "patch_embed.backbone.stages.1.blocks."),
            ("stem.0.down.norm.", "patch_embed.backbone.stages.1.downsample.0."),
            ("stem.0.down.conv.", "patch_embed.backbone.stages.1.downsample.1."),
            ("stages.0.blocks.", "blocks." if "patch_embed" not in name else "stages.0.blocks."),
            ("class_blocks.", "cls_attn_blocks."),
            ("class_token", "cls_token"),
            ("norm1.pool.predict.", "dilation_predictor.proj."),
            ("norm1.norm.", "norm1."),
            ("mlp.local.0.", "mlp.mlp_v.dwconv.conv1."),
            ("mlp.local.2.", "mlp.mlp_v.dwconv.bn."),
            ("mlp.local.3.", "mlp.mlp_v.dwconv.conv2."),
        ):
            if "patch_embed" not in name:
                name = name.replace(ours, official)
        for i in range(4):
            name = name.replace(f"stem.0.{i}.conv.", f"patch_embed.proj.{2 * i}.0.")
            name = name.replace(f"stem.0.{i}.norm.", f"patch_embed.proj.{2 * i}.1.")
        if name.startswith("blocks.") and ".mlp." in name and "mlp_v" not in name:
            for part in ("fc1", "fc2"):
                name = name.replace(f"mlp.{part}", f"mlp.mlp_v.{part}")
            name = name.replace("mlp.scale", "mlp.mlp_v.gamma").replace("mlp.norm", "mlp.norm_v")
            name = name.replace("mlp.wq", "mlp.q")
        name = name.replace("scale1", "gamma1").replace("scale2", "gamma2")
        if "patch_embed.backbone" in name:
            name = name.replace(".scale", ".gamma").replace("blocks.0.conv.", "blocks.0.conv_dw.")
            name = name.replace("blocks.1.conv.", "blocks.1.conv_dw.")
            if ".mlp." in name and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        if "token_projection" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        if "temperature" in name:
            tensor = tensor[:, None, None]
        if name == "cls_token":
            tensor = tensor[None, None]
        if ".mixer." not in name:
            theirs[name] = tensor
            continue
        begin, end = name.split(".mixer.")
        kind, last = end.split(".")
        if kind == "wqkv":
            q, k, v = tensor.chunk(3)
            theirs |= {f"{begin}.attn.q.{last}": q, f"{begin}.attn.kv.{last}": torch.cat((k, v))}
        elif kind == "wkv":
            theirs |= {f"{begin}.attn.{p}.{last}": t for p, t in zip("kv", tensor.chunk(2), strict=True)}
        else:
            theirs[f"{begin}.attn.{'q' if kind == 'wq' else 'proj'}.{last}"] = tensor
    arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5, "num_scales": scales}
    images = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(Official.build(arguments, theirs).eval()(images), net(images))


def test_the_diversification_loss_reaches_its_attention() -> None:
    net = FAN(**TINY, scales=4)
    with recorded(net) as maps:
        loss = F.cross_entropy(net(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2]))
    assert [tuple(m.shape) for m in maps] == [(2, 2, 16, 16)] * 2
    diversity_loss(maps, 1.0).backward(retain_graph=True)
    assert net.stages[0].blocks[0].mixer.wqkv.weight.grad.any()
    (loss + diversity_loss(maps)).backward()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="class_layers must be at least 1 and dim a multiple of 8, got 0 and 16"):
        FAN(**TINY, class_layers=0)
    with pytest.raises(ValueError, match="se_mlp"):
        Official.build({"se_mlp": True}, {})
