"""GC ViT: timm's network as a peer, cost, any image size, and a far cue that windows alone cannot find."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.gcvit import TimmGCViT
from attnlab.models.vision.gcvit import ContextBlock, ContextStage, GCViT
from attnlab.nn.spatial.global_query import QueryGenerator


def test_costs_what_the_paper_says():
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build("gcvit_xxtiny").eval(), torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(2.1, abs=0.1)  # arXiv 2206.09959 table 1


@pytest.mark.parametrize("scale", [None, 0.3], ids=["plain", "scaled"])
def test_equals_timms_network(timm, scale):
    from timm.models.gcvit import GlobalContextVit as Peer

    arguments = {
        "embed_dim": 32, "depths": (2, 3, 2), "num_heads": (2, 2, 4), "img_size": 64, "window_ratio": (32, 16, 16),
        "num_classes": 5, "layer_scale": scale,
    }  # fmt: skip
    peer = Peer(**arguments).eval()
    for p in peer.parameters():
        nn.init.normal_(p, mean=0.0 if p.ndim > 1 else 0.3, std=0.3)
    net = TimmGCViT.build(arguments, peer.state_dict())
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    ours, theirs = net(x), peer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.pow(2).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("size", [(64, 64), (37, 51), (16, 90)])
def test_takes_any_image_size(size):
    net = GCViT(dim=8, depths=(2, 2), heads=(2, 2), image=64, num_classes=5).eval()
    x = torch.randn(2, 3, *size)
    assert net(x).shape == (2, 5)
    torch.testing.assert_close(net(x)[1:], net(x[1:]), rtol=1e-4, atol=1e-5)


def test_windows_follow_the_image_and_the_third_stage_has_them_twice_as_large():
    with torch.device("meta"):
        net = attnlab.build("gcvit_xxtiny", image=384)
    assert [stage.blocks[0].mixer.window for stage in net.stages] == [12, 12, 24, 12]
    assert [stage.queries.levels for stage in net.stages] == [3, 2, 0, 0]


class FarCue(nn.Module):
    """Two blocks on an 8×8 map with windows of 4; the answer is read off the last window alone."""

    def __init__(self, context: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 1)
        kinds = (True, not context)
        blocks = nn.Sequential(*(ContextBlock(16, heads=2, window=4, local=local, mlp=2.0) for local in kinds))
        self.stage = ContextStage(None, blocks, QueryGenerator(16, heads=2, window=4, levels=1))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.stage(self.embed(x))[:, :, 4:, 4:].mean((2, 3)))


def far_cue(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The brightness of the first window's corner decides which of two colours in the last window is asked for."""
    x, y = torch.randn(batch, 3, 8, 8) * 0.3, torch.randint(2, (batch,))
    x[:, 0, :2, :2] += (4.0 * y - 2.0)[:, None, None]
    x[:, 1, 5, 6] += 3.0
    x[:, 2, 6, 5] += 3.0
    return x, y


@pytest.mark.parametrize("context", [False, True], ids=["windows-alone", "with-global-queries"])
def test_a_far_cue_is_found_by_global_queries_and_not_by_windows(context):
    net = FarCue(context)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(60):
        x, y = far_cue(64)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    x, y = far_cue(512)
    with torch.no_grad():
        accuracy = (net.eval()(x).argmax(-1) == y).float().mean().item()
    assert accuracy > 0.9 if context else accuracy < 0.6


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="depths, heads and windows need one entry per stage, got 4, 4 and 2"):
        GCViT(windows=(7, 7))
