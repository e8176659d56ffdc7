"""L²ViT: its window block is DaViT's, concentration, gradients of single images, any image size, turns of blocks."""

import pytest
import torch
from torch import nn

from attnlab.hub.official.l2vit import L2ViT as Official
from attnlab.hub.official.l2vit import LWABlock
from attnlab.models.vision.l2vit import FilledPatches, GlobalBlock, L2ViT, Stem
from attnlab.nn.linear.clamped import ClampedLinearAttention
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.local_concentration import LocalConcentration
from attnlab.nn.spatial.multi_axis import BlockAttention

TINY = {"dims": (16, 16), "depths": (2, 2), "heads": (2, 2), "window": 3, "num_classes": 5}


def shaken(net: nn.Module) -> nn.Module:
    for name, t in net.state_dict().items():
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5) if "running_var" in name else t.add_(0.1 * torch.randn_like(t))
    return net.eval()


def test_the_window_block_is_timms_davit_block(timm):
    from timm.models.davit import SpatialBlock

    peer = shaken(SpatialBlock(8, num_heads=2, window_size=3))
    params = {n.replace("cpe1.", "cpe.0.").replace("cpe2.", "cpe.1."): t for n, t in peer.state_dict().items()}
    block, _ = LWABlock.build({"dim": 8, "num_heads": 2, "window_size": 3, "call": "(4, 7)"}, params)
    x = torch.randn(2, 8, 4, 7)
    torch.testing.assert_close(block(x), peer(x), rtol=1e-4, atol=1e-5)


def test_a_window_as_large_as_the_map_is_full_attention():
    mixer = BlockAttention(8, heads=2, window=4, biased=False, see_filling=True)
    full = MultiHead(8, heads=2, bias=True)
    full.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 16, 8)
    torch.testing.assert_close(mixer(x, grid=(4, 4)), full(x))


def test_the_gradient_of_one_image_is_that_of_the_same_in_a_batch():
    net, x = shaken(L2ViT(**TINY)).double(), torch.randn(2, 3, 24, 32, dtype=torch.float64, requires_grad=True)
    together = torch.autograd.grad(net(x).pow(2)[0].sum(), x)[0]
    alone = torch.autograd.grad(net(x[:1]).pow(2).sum(), x)[0]
    torch.testing.assert_close(alone, together)


def test_blocks_take_turns_in_every_stage():
    kinds = [[type(b.mixer) for b in stage.blocks] for stage in L2ViT(**TINY).stages]
    assert kinds == [[BlockAttention, ClampedLinearAttention]] * 2
    only = L2ViT(**{**TINY, "blocks": ("global",), "concentrate": False})
    assert not any(isinstance(m, (BlockAttention, LocalConcentration)) for m in only.modules())


@pytest.mark.parametrize("size", [(24, 32), (37, 51), (9, 70)])
@pytest.mark.parametrize("convolutional", [True, False])
def test_takes_any_image_size(size, convolutional):
    net = L2ViT(**TINY, convolutional=convolutional).eval()
    assert net(torch.randn(1, 3, *size)).shape == (1, 5)


def test_images_are_filled_up_to_multiples_of_four():
    x = torch.randn(1, 3, 6, 9)
    for stem in (Stem(3, 8).eval(), FilledPatches(3, 8, 4)):
        torch.testing.assert_close(stem(x), stem(nn.functional.pad(x, (0, 3, 0, 2))))


def test_concentration_reaches_six_places_and_no_further():
    module = LocalConcentration(2).double().eval()
    x = torch.zeros(1, 2, 1, 21, dtype=torch.float64)
    other = x.clone()
    other[..., 10] = 1
    changed = (module(other) - module(x)).abs().amax((0, 1, 2)) > 0
    assert changed.nonzero().flatten().tolist() == list(range(4, 17))


def test_without_concentration_nothing_but_attention_reaches_far():
    block, x = shaken(GlobalBlock(8, heads=2, concentrate=False)), torch.randn(1, 8, 3, 3)
    assert not any("concentrate" in n for n, _ in block.named_parameters())
    assert block(x).shape == x.shape


def test_unknown_arguments_are_named():
    with pytest.raises(ValueError, match="blocks must be of 'local' and 'global', got"):
        L2ViT(blocks=("far",))
    with pytest.raises(ValueError, match="dims, depths, heads and mlp_ratio need one entry per stage, got 4, 4, 2"):
        L2ViT(heads=(2, 4))
    with pytest.raises(ValueError, match="kernel must be odd, got 4"):
        LocalConcentration(8, kernel=4)
    with pytest.raises(ValueError, match="block_type must be one of local"):
        Official.build({"block_type": "convnext"}, {})
    with pytest.raises(ValueError, match="conv_stem_type must be '2L'"):
        Official.build({"conv_stem_type": "4L"}, {})
