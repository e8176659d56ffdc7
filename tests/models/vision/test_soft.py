"""SOFT: blocks with norms behind, the released checkpoint layout, positions of other sizes, a class token."""

import pytest
import torch

import attnlab
from attnlab.hub.official import find
from attnlab.models.vision.soft import SOFT, LinearPositions, SoftBlock
from attnlab.nn.linear.soft import SoftAttention

TINY = {"dims": (16, 16, 16, 24), "depths": (1, 1, 1, 1), "heads": (2, 2, 2, 2), "image": 64, "num_classes": 5}


def test_norms_come_behind_the_sums():
    block, x = SoftBlock(8, SoftAttention(8, heads=2)), torch.randn(2, 8, 4, 6)
    tokens = x.flatten(2).mT
    y = block.norm1(tokens + block.mixer(tokens, grid=(4, 6)))
    y = block.norm2(y + block.mlp(y))
    torch.testing.assert_close(block(x).flatten(2).mT, y)


def test_the_last_stage_alone_has_the_smaller_eps_of_the_released_sizes():
    net = SOFT(**TINY)
    eps = {n: m.eps for n, m in net.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {e for n, e in eps.items() if n.startswith("stages.3.")} == {1e-6}
    assert {e for n, e in eps.items() if not n.startswith("stages.3.")} == {1e-5}


def official_names(net: SOFT) -> dict[str, torch.Tensor]:
    """The network's parameters as the authors' code names and splits them."""
    names = {}
    for name, t in net.state_dict().items():
        part, _, rest = name.partition(".")
        stage = "1" if part == "stem" else ""
        if part == "stages":
            number, _, rest = rest.partition(".")
            stage, last = str(int(number) + 1), number == "3"
            rest = rest.removeprefix("downsample.") if rest.startswith("downsample") else rest
        if rest == "positions.table":
            names[f"pos_embed{stage}"] = t[None]
        elif rest.startswith("convs."):
            names[f"patch_embed{stage}.proj.{rest[6:]}"] = t
        elif part == "head":
            names[name] = t
        elif rest == "class_token":
            names["cls_token"] = t[None, None]
        elif rest.startswith("norm."):
            names[rest] = t
        else:
            _, index, piece = rest.split(".", 2)
            where = f"block{stage}.{index}."
            for ours, theirs in ((".wqv.", "W_q W_v 1"), (".wqkv.", "q kv 2")):
                if ours in f".{piece}":
                    first, second, share = theirs.split()
                    kind, width = piece.rsplit(".", 1)[1], t.shape[0] // (1 + int(share))
                    prefix = where + ("attn." if last else "att.mha.")
                    names[f"{prefix}{first}.{kind}"], names[f"{prefix}{second}.{kind}"] = t[:width], t[width:]
                    break
            else:
                soft = {"mixer.landmarks": "att.mha.attn.Qlandmark_op", "mixer.norm": "att.mha.attn.Qnorm_act.0",
                        "mixer.conv": "att.mha.attn.conv", "mixer.wo": "att.mha.ff", "mlp.fc": "att.ff",
                        "norm": "att.norm"}  # fmt: skip
                for ours, theirs in ({"mixer.wo": "attn.proj"} if last else soft).items():
                    if piece.startswith(ours):
                        piece = theirs + piece.removeprefix(ours)
                        break
                names[where + piece] = t
    return names


@pytest.mark.parametrize("normalize", [False, True])
def test_loads_the_authors_layout(normalize):
    net = SOFT(**TINY, normalize=normalize, variant="release").eval()
    kind = "SoftmaxFreeNormVisionTransformer" if normalize else "SoftmaxFreeVisionTransformer"
    adapter = find("fudan-zvg/SOFT", kind)
    renamed = adapter.rename(official_names(net))
    state = net.state_dict()
    assert renamed.keys() == state.keys()
    assert all(torch.equal(renamed[n], state[n]) for n in state)


def test_the_sizes_of_both_forms_are_listed():
    assert attnlab.describe("softpp_tiny").sizes["softpp_tiny"].arguments["normalize"]
    assert not attnlab.describe("soft_tiny").sizes["soft_tiny"].arguments["normalize"]


def test_the_class_token_reads_what_the_last_map_shows():
    net, x = SOFT(**TINY).eval(), torch.randn(1, 3, 64, 64)
    maps = net.forward_features(x)
    stage = net.stages[-1]
    torch.testing.assert_close(stage.tokens(maps[-2])[0][:, 1:].mT.view_as(maps[-1]), maps[-1])
    torch.testing.assert_close(net.head(stage.tokens(maps[-2])[0][:, 0]), net(x))


def test_positions_are_interpolated_between_neighbours():
    positions = LinearPositions((2, 2), 1)
    positions.table.data = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    wanted = [0.0, 0.25, 0.75, 1.0]
    torch.testing.assert_close(positions.resized((4, 4))[:4, 0], torch.tensor(wanted))


@pytest.mark.parametrize("size", [(64, 64), (40, 90)])
def test_takes_any_image_size(size):
    assert SOFT(**TINY).eval()(torch.randn(1, 3, *size)).shape == (1, 5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"heads need one entry per stage \(4\).*got 4, 2 and 3"):
        SOFT(ratios=(8, 4))
