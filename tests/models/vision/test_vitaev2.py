"""ViTAEv2 and Swin with varied-size windows: sizes, any image, the authors' names, what stands where."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.vsa import Network
from attnlab.models.vision.vitaev2 import ReductionCell, SwinVSA, ViTAEv2

TINY = {"dims": (8, 16), "hidden": (8, 8), "depths": (1, 1), "heads": (2, 2), "reduction_heads": (2, 2),
        "kernels": (7, 3), "dilations": ((1, 2, 3), (1, 2)), "groups": (1, 2), "reduction_groups": (1, 2),
        "strides": (4, 2), "window": 3, "num_classes": 5}  # fmt: skip


@pytest.mark.parametrize("size", [(32, 32), (37, 51), (8, 90)])
@pytest.mark.parametrize("swin", [False, True])
def test_takes_any_image_size(size: tuple[int, int], swin: bool) -> None:
    net = (SwinVSA(dim=8, depths=(1, 1), heads=(2, 2), window=3, num_classes=5) if swin else ViTAEv2(**TINY)).eval()
    assert net(torch.randn(1, 3, *size)).shape == (1, 5)
    if not swin:
        maps = net.forward_features(torch.randn(1, 3, *size))
        assert [m.shape[2:] for m in maps] == [tuple(-(-n // r) for n in size) for r in (4, 8)]


def test_a_map_that_the_stride_does_not_divide_is_padded_with_zeros() -> None:
    cell = ReductionCell(4, 8, 2, hidden=4, kernel=3, dilations=(1, 2), heads=2, window=3, groups=1, wide=True).eval()
    x = torch.randn(1, 4, 7, 9)
    torch.testing.assert_close(cell(x), cell(nn.functional.pad(x, (0, 1, 0, 1))))


def test_windows_begin_unmoved() -> None:
    for net in (ViTAEv2(**TINY), SwinVSA(dim=8, depths=(1,), heads=(2,))):
        found = [p for n, p in net.named_parameters() if ".regress." in n]
        assert found and not any(p.any() for p in found)


def test_costs_hardly_more_than_fixed_windows() -> None:
    """Swin-T: 4.5 GFLOPs (arXiv 2103.14030, table 1)."""
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(SwinVSA(), torch.randn(1, 3, 224, 224)) / 2e9
    assert flops == pytest.approx(4.5, abs=0.15)


def test_the_authors_checkpoints_load_by_their_names() -> None:
    with torch.device("meta"):
        net = attnlab.build("vitaev2_vsa_s")
    ours, theirs = net.state_dict(), {}
    for name, p in ours.items():  # the authors' layout, written out backwards
        name = name.replace("stem.", "layers.0.RC.").replace("stages.", "layers.")
        name = name.replace(".blocks.", ".NC.").replace(".downsample.", ".RC.").replace(".convs.", ".PCM.")
        name = name.replace(".positions.", ".pos.").replace(".attention.", ".attn.").replace(".wqkv.", ".qkv.")
        name = name.replace(".wo.", ".proj.").replace(".relative.table", ".relative_position_bias_table")
        if ".views." in name:
            view, kind = name.split(".views.")[1].split(".")
            name = f"{name.split('.views.')[0]}.PRM.convs.{view}.0.{kind}"
        if ".regress." in name:
            for part, which in zip(p.chunk(2), ("offsets", "scales"), strict=True):
                kernel = part[:, :, None, None] if part.ndim == 2 else part
                theirs[name.replace("regress", f"sampling_{which}.2")] = kernel
            continue
        inside = name.endswith((".qkv.weight", ".proj.weight"))
        theirs[name] = p[:, :, None, None] if inside else p
    assert {n: p.shape for n, p in Network.rename(theirs).items()} == {n: p.shape for n, p in ours.items()}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="groups needs one entry per stage"):
        ViTAEv2(**{**TINY, "groups": (1,)})
    with pytest.raises(ValueError, match="heads needs one entry"):
        SwinVSA(heads=(3,))
    with pytest.raises(ValueError, match="stride must be 2, 4 or 8"):
        ViTAEv2(**{**TINY, "strides": (3, 2)})
