"""DynamicVis: the authors' checkpoints, sizes of images, and how many tokens are scanned."""

import pytest
import torch
import torch.nn.functional as F

from attnlab import hub
from attnlab.models.vision.dynamicvis import DynamicVis

TINY = {"dims": (8, 12, 16, 20), "depths": (1, 2, 1, 1), "states": 4, "image": 64}


def authors_names(net: DynamicVis) -> dict[str, torch.Tensor]:
    mixer = {"wi": "in_proj", "conv": "conv1d", "wx": "x_proj", "wdelta": "dt_proj", "a_log": "A_log", "skip": "D",
             "wo": "out_proj"}  # fmt: skip
    found = {}
    for name, t in net.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "stem":
            kind, _, rest = rest.partition(".")
            part = "pos_embed" if kind == "1" else f"layers.0.0.{rest.replace('conv', 'projection')}"
            found[part] = t[None] if kind == "1" else t
        elif part == "stages":
            stage, kind, rest = rest.split(".", 2)
            if kind == "downsample":
                found[f"layers.{stage}.0.{rest.replace('conv', 'projection')}"] = t
            elif kind == "norm":
                found[f"layers.{stage}.2.{rest}"] = t
            else:
                at, _, rest = rest.partition(".mixer.")
                rest = rest.replace("router.", "spatial_gate.").replace("block.norm.", "spatial_mamba_mixer.pre_norm.")
                if rest.startswith("block.mixer."):
                    first, dot, last = rest.removeprefix("block.mixer.").partition(".")
                    t = t.unsqueeze(1) if (first, last) == ("conv", "weight") else t
                    rest = f"spatial_mamba_mixer.mamba_layer.{mixer[first]}{dot}{last}"
                found[f"layers.{stage}.1.{at}.{rest}"] = t
        elif part == "pooled_norm":
            found[f"post_meanpool_norm.{rest}"] = t
    return found


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_loads_the_authors_checkpoints(tmp_path, prefix):
    net, other = DynamicVis(**TINY, num_classes=0), DynamicVis(**TINY, num_classes=0)
    for p in net.parameters():
        p.add_(0.1 * torch.randn_like(p))
    params = {prefix + n: t for n, t in authors_names(net).items()}
    if prefix:
        params["pre_neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    torch.save(params, tmp_path / "net.pth")
    hub.load_official(other, tmp_path / "net.pth")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.eval()(x), net.eval()(x))


@torch.no_grad()
def test_positions_are_resized_for_other_images():
    net = DynamicVis(**TINY, num_classes=5).eval()
    torch.nn.init.normal_(net.stem[1].table)
    maps = net.stem[1].table.T.view(1, 8, 16, 16)
    x = torch.randn(1, 8, 10, 30)
    torch.testing.assert_close(net.stem[1](x) - x, F.interpolate(maps, (10, 30), mode="bicubic"), atol=1e-5, rtol=1e-4)
    assert net(torch.randn(1, 3, 40, 120)).shape == (1, 5)
    assert DynamicVis(**{**TINY, "image": None}, num_classes=5)(torch.randn(1, 3, 40, 120)).shape == (1, 5)


@torch.no_grad()
def test_one_token_in_8_4_2_and_1_is_scanned_with_one_mean_per_row():
    net, seen = DynamicVis(**TINY).eval(), []
    for stage in net.stages:
        stage.blocks[0].mixer.block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    net(torch.randn(1, 3, 64, 128))
    assert seen == [16 * 32 // 8 + 16, 8 * 16 // 4 + 8, 4 * 8 // 2 + 4, 2 * 4 + 2]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"ratios need one entry per stage \(4\), got 2"):
        DynamicVis(ratios=(8, 4))
