"""SG-Former: the paper's cost, image sizes, positions, the fused network, and what it refuses."""

import math
import re

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.sgformer import SGFormer as Official
from attnlab.models.vision.sgformer import SelfGuidedPair, SGFormer, sines

TINY = {
    "dims": (8, 16), "depths": (4, 1), "heads": (2, 2), "reductions": (2, 1), "window": 2, "image": 32,
    "num_classes": 5,
}  # fmt: skip


# In multiply-adds at 224×224.
def test_costs_what_the_paper_says():
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build("sgformer_small").eval(), torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(4.8, rel=0.06)


def test_blocks_come_in_pairs_but_in_the_last_stage():
    net = SGFormer(**TINY, drop_path=0.4)
    first, last = ([*stage.blocks] for stage in net.stages)
    assert len(first) == 2 and all(isinstance(block, SelfGuidedPair) for block in first)
    assert len(last) == 1 and not isinstance(last[0], SelfGuidedPair)
    rates = [b.drop_path.rate for pair in first for b in (pair.hybrid, pair.guided)] + [last[0].drop_path.rate]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_takes_other_sizes_that_its_windows_divide():
    net = SGFormer(**TINY).eval()
    assert net.multiple == 8
    assert net(torch.randn(2, 3, 40, 48)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"sides that are multiples of 8, got \(36, 40\)"):
        net(torch.randn(1, 3, 36, 40))
    with torch.device("meta"):
        assert attnlab.build("sgformer_small").multiple == 224


def test_positions_are_sines_of_the_column_and_then_of_the_row():
    table = sines((3, 5), 8).unflatten(0, (3, 5))
    for row, column in ((0, 0), (2, 1), (1, 4)):
        wanted = [f(at * rate) for at in (column, row) for f in (math.sin, math.cos) for rate in (1.0, 0.01)]
        torch.testing.assert_close(table[row, column], torch.tensor(wanted))


def test_a_fused_network_gives_the_same():
    net = SGFormer(**TINY).double().eval()
    for p in net.parameters():
        nn.init.normal_(p, 0.0, 0.3)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = net(x)
    torch.testing.assert_close(net.fuse().fuse()(x), before)


def official_names(net: SGFormer) -> dict[str, torch.Tensor]:
    """The network's weights as the authors' code names and parts them."""
    found = {}
    for name, p in net.state_dict().items():
        if m := re.match(r"stages\.(\d)\.blocks\.(\d+)\.(?:(hybrid|guided)\.)?(.*)", name):
            stage, index, half, rest = int(m[1]) + 1, int(m[2]), m[3], m[4]
            index = 2 * index + (half == "guided") if half else index
            rest = rest.replace("mixer.local.", "mixer.lepe_")
            rest = rest.replace("mixer.reduce.", "mixer.sr.").replace("mixer.wo.", "mixer.proj.")
            rest = re.sub(r"mixer\.merging\.(\d)", lambda f: f"mixer.f{int(f[1]) + 1}", rest)
            rest = rest.replace("mixer.", "attn.").replace("mlp.conv.", "mlp.dwconv.dwconv.")
            start, end = f"block{stage}.{index}.", rest.rpartition(".")[2]
            if ".wx." in rest:
                parts = dict(zip(("q1", "q2", "kv2"), p.split([len(p) // 4, len(p) // 4, len(p) // 2]), strict=True))
            elif ".wcoarse." in rest:
                parts = {"kv1": p}
            elif ".wqkv." in rest and half:
                q, k, v = p.chunk(3)
                parts = {"q": q, **{f"kv{i + 1}": torch.cat((k.chunk(2)[i], v.chunk(2)[i])) for i in range(2)}}
            elif ".wqkv." in rest:
                parts = dict(zip(("q", "kv"), p.split([len(p) // 3, 2 * len(p) // 3]), strict=True))
            else:
                found[start + rest] = p
                continue
            found.update({f"{start}attn.{part}.{end}": t for part, t in parts.items()})
        elif m := re.match(r"(stem|stages\.(\d)\.downsample)\.(.*)", name):
            rest = re.sub(r"^(conv\d)\.0", r"\1.c", re.sub(r"^(conv\d)\.1", r"\1.bn", m[3]))
            if m[1] == "stem":
                rest = re.sub(r"^conv(\d)", lambda f: f"conv.{2 * int(f[1]) - 2}", rest)
            found[f"patch_embed{int(m[2] or 0) + 1}.{rest}"] = p
        elif m := re.match(r"stages\.(\d)\.norm\.(.*)", name):
            found[f"norm{int(m[1]) + 1}.{m[2]}"] = p
        else:
            found["pos_embed" if name == "positions.table" else name] = p[None] if "table" in name else p
    return found


def test_loads_by_the_authors_names():
    sizes = {"dims": (8, 8, 8, 8), "depths": (2, 2, 4, 2), "heads": (2, 2, 2, 2)}
    net = SGFormer(**sizes, num_classes=3).eval()
    arguments = {
        "embed_dims": (8,) * 4,
        "depths": (2, 2, 4, 2),
        "num_heads": (2,) * 4,
        "num_classes": 3,
        "qkv_bias": True,
    }
    params = official_names(net)
    assert {"block1.1.attn.f3.weight", "block4.1.attn.kv.bias", "patch_embed1.conv.4.c.weight", "norm2.bias"} < set(
        params
    )
    for name, p in Official.build(arguments, params).state_dict().items():
        assert torch.equal(p, net.state_dict()[name]), name


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="depths must be even where blocks come in pairs"):
        SGFormer(**{**TINY, "depths": (3, 1)})
    with pytest.raises(ValueError, match="groups must have sizes for the reduction 3"):
        SGFormer(**{**TINY, "reductions": (3, 1)})
    with pytest.raises(ValueError, match="heads needs one entry per stage, 2, got 1"):
        SGFormer(**{**TINY, "heads": (2,)})
