"""The three networks with agents: sizes, grids, where agents stand, and cost. (Equality with the authors': goldens.)"""

import pytest
import torch

from attnlab.cost import count_flops, fit_growth
from attnlab.models.vision.agent_vit import AgentDeiT, AgentPVT, AgentSwin, PatchMerging
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.shifted_window import ShiftedWindow
from attnlab.nn.tokens.agent import AgentAttention

SWIN = {
    "dim": 16, "depths": (1, 3), "heads": (2, 2), "agents": (4, 4), "agent_depths": (1, 1), "image": 64,
    "num_classes": 5,
}  # fmt: skip


def test_agents_stand_in_the_first_layers_and_plain_attention_after_them() -> None:
    net = AgentDeiT(dim=16, depth=3, heads=2, agents=(4, 9), agent_depth=2, image=32, patch=8, num_classes=5)
    mixers = [block.mixer for block in net.encoder.blocks]
    assert [type(m) for m in mixers] == [AgentAttention, AgentAttention, MultiHead]
    assert [m.agents for m in mixers[:2]] == [4, 9]


def test_windows_are_shifted_in_every_other_block_after_the_agents() -> None:
    net = AgentSwin(**SWIN, window=4)
    mixers = [block.mixer for block in net.stages[1].blocks]
    assert [type(m) for m in mixers] == [AgentAttention, ShiftedWindow, ShiftedWindow]
    assert [m.shift for m in mixers[1:]] == [2, 0]


@pytest.mark.parametrize("size", [(64, 64), (40, 56)])
def test_pyramids_take_other_sizes_than_their_own(size: tuple[int, int]) -> None:
    x = torch.randn(1, 3, *size)
    assert AgentSwin(**SWIN)(x).shape == (1, 5)
    pvt = AgentPVT(
        dims=(8, 8), depths=(1, 1), heads=(2, 2), mlp_ratios=(2, 2), agents=(4, 4), key_reductions=(2, 1), image=64,
        num_classes=5,
    )  # fmt: skip
    assert [tuple(m.shape[2:]) for m in pvt.forward_features(x)] == [(size[0] // r, size[1] // r) for r in (4, 8)]


def test_plain_agents_cost_linear_in_patches() -> None:
    net = AgentDeiT(dim=16, depth=1, heads=2, agents=4, image=64, patch=4, num_classes=5).eval()
    sides = (128, 192, 256)
    with torch.no_grad():
        counts = [count_flops(net, torch.randn(1, 3, side, side)) for side in sides]
    assert fit_growth([side**2 for side in sides], counts) == pytest.approx(1.0, abs=0.01)


def test_patch_merging_sets_columns_outermost_and_pads_odd_sides() -> None:
    merge = PatchMerging(1, 4)
    merge.norm, merge.reduction = torch.nn.Identity(), torch.nn.Identity()
    x = torch.arange(15.0).view(1, 1, 3, 5)
    y = merge(x)
    assert y.shape == (1, 4, 2, 3)
    assert y[0, :, 0, 0].tolist() == [0.0, 5.0, 1.0, 6.0]
    assert y[0, :, 1, 2].tolist() == [14.0, 0.0, 0.0, 0.0]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="agents"):
        AgentDeiT(dim=16, depth=3, heads=2, agents=(4, 4))
    with pytest.raises(ValueError, match="agent_depths"):
        AgentSwin(**{**SWIN, "agent_depths": (1,)})
    with pytest.raises(ValueError, match="key_reductions"):
        AgentPVT(key_reductions=(1, 1))
