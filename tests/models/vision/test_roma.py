"""RoMA: blocks, positions, the order of reading, and causality."""

import pytest
import torch

from attnlab.hub.official import find
from attnlab.models.vision.roma import RoMA, sincos
from attnlab.nn.linear.selective import Mamba

TINY = {"dim": 16, "depth": 2, "patch": 4, "states": 4, "num_classes": 5}


def test_the_mixer_equals_transformers_with_expand_1(transformers):
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(hidden_size=16, intermediate_size=16, state_size=4, time_step_rank=1)
    config.intermediate_size = 16
    theirs = MambaMixer(config, layer_idx=0).eval()
    arguments, params = {"d_model": 16, "d_state": 4, "expand": 1}, theirs.state_dict()
    ours = find("MiliLab/RoMA", "mamba_simple.Mamba").build(arguments, params)
    assert isinstance(ours, Mamba) and ours.inner == 16
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_positions_are_sines_and_cosines_of_column_then_row():
    table = sincos((3, 5), 8).unflatten(0, (3, 5))
    for row, column in ((0, 0), (2, 3), (1, 4)):
        wanted = [f(at * speed) for at in (column, row) for f in (torch.sin, torch.cos)
                  for speed in (torch.tensor(1.0), torch.tensor(0.01))]  # fmt: skip
        torch.testing.assert_close(table[row, column], torch.stack(wanted))


@torch.no_grad()
@pytest.mark.parametrize("cluster", [None, 2])
def test_a_token_knows_only_what_was_read_before(cluster):
    net, x = RoMA(**TINY, cluster=cluster).double().eval(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    other = x.clone()
    other[..., :4, 8:12] += 1  # the patch in row 0, column 2: third row by row, fifth in clusters
    changed = (net.forward_features(x)[0] != net.forward_features(other)[0]).any(1)[0].flatten().tolist()
    if cluster is None:
        assert changed == [False] * 2 + [True] * 14
    else:
        before = {0, 1, 4, 5}  # the first cluster
        assert changed == [i not in before for i in range(16)]


@torch.no_grad()
def test_maps_of_several_layers_and_the_mean_of_the_last():
    net, x = RoMA(**TINY, cluster=2).eval(), torch.randn(2, 3, 16, 24)
    first, last = net.forward_features(x, layers=(0, -1))
    assert first.shape == last.shape == (2, 16, 4, 6)
    torch.testing.assert_close(net.head(last.mean((2, 3))), net(x))
    torch.testing.assert_close(net.norm(net.blocks[0](net.order((4, 6)).apply(net.embed(x)[0]))),
                               net.order((4, 6)).apply(first.flatten(2).mT))  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RoMA(**{**TINY, "dim": 18}), "dim must be a multiple of 4"),
        (lambda: RoMA(**TINY, cluster=0), "cluster must be at least 1"),
        (lambda: RoMA(**TINY)(torch.zeros(1, 3, 16, 18)), "sides multiples of patch=4"),
        (lambda: RoMA(**TINY, cluster=3)(torch.zeros(1, 3, 16, 16)), "clusters of 3 fill"),
        (lambda: RoMA(**TINY).forward_features(torch.zeros(1, 3, 16, 16), (2,)), r"layers must lie in \[-2, 2\)"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
