"""TransNeXt and MoH-ViT: the authors' cost and names, any image size, larger images than in training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.moh import WholeViT
from attnlab.hub.official.transnext import TransNeXt as Official
from attnlab.models.skeletons.convglu import ConvGLU
from attnlab.models.vision.moh_vit import MoHViT
from attnlab.models.vision.transnext import TransNeXt
from attnlab.nn.spatial.aggregated import AggregatedAttention
from attnlab.recipes.moh import balanced

# GFLOPs (multiply-adds) at 224×224, arXiv 2311.17132 table 1. Ours include the biases' MLP and keys that a piece of a
# row shares: a little more.
PUBLISHED = {"transnext_micro": 2.7, "transnext_base": 18.4}

TINY = {
    "dims": (8, 12, 16, 24),
    "heads": (2, 2, 4, 4),
    "depths": (1, 1, 2, 1),
    "mlp_ratios": (2,) * 4,
    "num_classes": 5,
}
GATES = {"shared": (1, 2, 2, 1), "routed": (1, 0, 1, 2)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_what_the_paper_says(name: str) -> None:
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build(name), torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(PUBLISHED[name], rel=0.03)


@pytest.mark.parametrize("size", [(32, 32), (45, 70)])
def test_takes_any_image_size(size: tuple[int, int]) -> None:
    net, x = TransNeXt(**TINY, image=64), torch.randn(1, 3, *size)
    assert net(x).shape == (1, 5)
    wanted = [tuple(-(-s // r) for s in size) for r in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in net.forward_features(x)] == wanted


@torch.no_grad()
def test_a_larger_image_keeps_the_window_and_the_meaning_of_places_but_pools_to_more_cells() -> None:
    net = TransNeXt(**TINY, image=64).eval()
    mixer = net.stages[0].blocks[0].mixer
    assert isinstance(mixer, AggregatedAttention)
    assert (mixer.pooled((16, 16)), mixer.pooled((32, 32))) == ((2, 2), (4, 4))
    small, large = mixer.bias((16, 16), torch.zeros(1)), mixer.bias((32, 32), torch.zeros(1))
    assert small.shape == (2, 256, 9 + 4) and large.shape == (2, 1024, 9 + 16)
    # Token (20, 20) of the large grid lies as far from the pooled cell around (11.5, 11.5) as token (12, 12) of the
    # small one from that around (3.5, 3.5): 8.5 places on both axes, whatever the image's size.
    torch.testing.assert_close(large[:, 20 * 32 + 20, 9 + 5], small[:, 12 * 16 + 12, 9])


def test_every_stage_gives_its_map_normed() -> None:
    for maps in TransNeXt(**TINY).forward_features(torch.randn(1, 3, 64, 64)):
        torch.testing.assert_close(maps.mean(1), torch.zeros_like(maps[:, 0]), atol=1e-5, rtol=0)


def by_hand(glu: ConvGLU, x: Tensor) -> Tensor:
    """One place at a time."""
    out = torch.zeros_like(x)
    u, v = (F.linear(x, w, b) for w, b in zip(glu.fc1.weight.chunk(2), glu.fc1.bias.chunk(2), strict=True))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            gate = glu.conv.bias.expand(len(x), -1)
            for a in range(max(i - 1, 0), min(i + 2, x.shape[1])):
                for b in range(max(j - 1, 0), min(j + 2, x.shape[2])):
                    gate = gate + u[:, a, b] * glu.conv.weight[:, 0, a - i + 1, b - j + 1]
            out[:, i, j] = glu.fc2(F.gelu(gate) * v[:, i, j])
    return out


@torch.no_grad()
def test_convglu_equals_its_definition() -> None:
    glu, x = ConvGLU(6, 5).double(), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(glu(x), by_hand(glu, x))


def test_starts_as_the_authors_do_and_names_what_has_no_decay() -> None:
    net = TransNeXt(dims=(64,), heads=(4,), depths=(2,), ratios=(2,), mlp_ratios=(8,))
    block = net.stages[0].blocks[0].requires_grad_(False)
    assert block.mlp.conv.weight.std() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert net.stem.conv.weight.detach().std() == pytest.approx((2 / 49 / 64) ** 0.5, rel=0.1)
    assert block.mixer.window_bias.std() == pytest.approx(4e-4, rel=0.4) and not block.mixer.window_shift.any()
    assert F.softplus(block.mixer.temperature).flatten().tolist() == pytest.approx([1 / 0.24] * 4)
    free = {n.split("mixer.")[1] for n, _ in net.named_parameters() if any(w in n for w in net.no_weight_decay)}
    ends = {f"cpb_fc{i}.{end}" for i in (1, 2) for end in ("weight", "bias")}
    assert free == {"query_embedding", "window_bias", "temperature", *ends}


@pytest.mark.parametrize("name", ["transnext_base", "moh_vit_base_50", "transnext_micro_aaaa"])
def test_the_authors_checkpoints_load_by_their_names(name: str) -> None:
    with torch.device("meta"):
        ours = attnlab.build(name).state_dict()
    adapter = WholeViT if name.startswith("moh") else Official
    theirs: dict[str, Tensor] = {}
    back = {"window_tokens": "learnable_tokens", "window_shift": "learnable_bias", "wo": "proj", "reduce": "sr"}
    for name, p in ours.items():  # the authors' layout, written out backwards
        parts = [back.get(part, part) for part in name.split(".")]
        if parts[0] == "stem":
            parts[:2] = ["patch_embed1", {"conv": "proj"}.get(parts[1], parts[1])]
        elif parts[0] == "stages":
            stage = int(parts[1]) + 1
            if parts[2] == "blocks":
                parts[:3] = [f"block{stage}"]
            elif parts[2] == "downsample":
                parts[:4] = [f"patch_embed{stage}", {"conv": "proj"}.get(parts[3], parts[3])]
            else:
                parts[:3] = [f"norm{stage}"]
        name = ".".join(parts).replace(".mixer.", ".attn.").replace(".window_bias", ".relative_pos_bias_local")
        name = name.replace(".mlp.conv.", ".mlp.dwconv.dwconv.")
        prefix = name.rpartition(".attn.")[0] + ".attn."
        if name.endswith("router.weight"):
            stage = int(name[5]) - 1
            heads, shared = ((4, 2), (8, 2), (16, 2), (32, 4))[stage]
            rows = dict(zip(("wg_1", "wg", "wg_0"), p.split([shared, heads - shared, 2]), strict=True))
            theirs.update({f"{prefix}{n}.weight": r for n, r in rows.items()})
        elif ".wqkv." in name:
            end, dim = name.rpartition(".")[2], len(p) // 3
            stage, block = name.split(".")[:2]
            if f"stages.{int(stage[5]) - 1}.blocks.{block}.mixer.reduce.weight" in ours:
                theirs[f"{prefix}q.{end}"], theirs[f"{prefix}kv.{end}"] = p[:dim], p[dim:]
            else:
                theirs[f"{prefix}qkv.{end}"] = p
        else:
            theirs[name] = p[:, :, None, None] if name.endswith("sr.weight") else p
    assert {n: p.shape for n, p in adapter.rename(theirs).items()} == {n: p.shape for n, p in ours.items()}


def test_all_heads_picked_by_a_router_of_zeros_are_plain_transnext() -> None:
    mixed = MoHViT(**TINY, shared=(1, 1, 2, 0), routed=(1, 1, 2, 4)).eval()
    plain = TransNeXt(**TINY).eval()
    plain.load_state_dict({n: p for n, p in mixed.state_dict().items() if "router" not in n})
    x = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(mixed(x), plain(x))
    for m in mixed.modules():
        if hasattr(m, "routed") and isinstance(m, nn.Module):
            nn.init.zeros_(m.weight)
    torch.testing.assert_close(mixed(x), plain(x))


def test_the_balance_of_each_layer_that_routes_is_found() -> None:
    net = MoHViT(**TINY, **GATES)
    with balanced(net) as balance:
        net(torch.randn(2, 3, 32, 32))
    assert len(balance.losses) == 4  # the second stage shares all of its heads
    assert balance.loss().item() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TransNeXt(**{**TINY, "heads": (2, 2)}), r"heads must be one per stage \(4\), got 2"),
        (lambda: TransNeXt(**TINY, image=16), "image must be at least 32, got 16"),
        (lambda: MoHViT(**TINY, shared=(1,), routed=(1, 1, 1, 1)), r"shared must be one per stage \(4\), got 1"),
        (lambda: TransNeXt(**TINY)(torch.randn(1, 3, 31, 64)), "x must be at least 32 pixels"),
        (lambda: TransNeXt(**TINY)(torch.randn(1, 4, 64, 64)), r"x must be images \(B, 3, H, W\)"),
        (lambda: ConvGLU(4, 0), "hidden must be at least 1"),
    ],
)
def test_errors_name_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
