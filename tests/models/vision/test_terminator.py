"""Terminator: the authors' sizes block by block, what a picture's class may depend on, losses, and the optimiser."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import attnlab
from attnlab.hub.official.terminator import TerminatorImage
from attnlab.models.vision.terminator import GroupStandardize, Terminator
from attnlab.nn.spatial.hyperzzw import HyperChannel, HyperInteraction, LocalBranch, SlowFast
from attnlab.nn.spatial.slow_net import LocalSlowNet, SlowNet
from attnlab.recipes.terminator import Kar3, regulariser, slow_loss, terminator_loss, warm_cosine

TINY = {
    "image": 6, "factors": (4, 1, 1, 1, 1), "slow": (4,) * 5, "slow_layers": (2, 1, 1, 1, 1), "local": 4,
    "channel": 4, "interaction": (3, 4), "kernels": (3, 5, 3, 5), "omega": 1.0, "dropout": (0.0,) * 5,
}  # fmt: skip


def test_blocks_have_the_authors_parameters():
    with torch.device("meta"):
        net = attnlab.build("terminator_cifar10")
    counts = [sum(p.numel() for p in block.parameters()) for block in net.blocks]
    assert counts == [53_377, 57_824, 105_188, 253_580, 863_996]
    assert net.channels == (12, 36, 72, 144, 288)


def test_a_pictures_class_does_not_depend_on_the_others_unless_asked():
    x = torch.randn(4, 3, 6, 6)
    for evaluation, alone in (("running", True), ("batch", False)):
        torch.manual_seed(0)
        net = Terminator(**TINY, evaluation=evaluation).eval()
        assert torch.allclose(net(x[:1]), net(x)[:1], atol=1e-5) is alone


def test_training_is_the_same_either_way():
    x, outputs = torch.randn(4, 3, 6, 6), []
    for evaluation in ("running", "batch"):
        torch.manual_seed(0)
        outputs.append(Terminator(**TINY, evaluation=evaluation).train()(x))
    torch.testing.assert_close(*outputs)


def test_what_is_kept_of_batches_becomes_what_they_are():
    branch = LocalBranch(6, 3, hidden=4, layers=2, omega=1.0, running=True)
    x, context = torch.randn(16, 6, 16, 16), torch.randn(16, 6, 16, 16)
    with torch.no_grad():
        for _ in range(100):
            trained = branch(x, context)
        torch.testing.assert_close(branch.eval()(x, context), trained, rtol=1e-3, atol=1e-3)


def test_a_global_kernel_depends_on_no_input_and_a_local_one_on_the_batch():
    net = SlowNet((3, 3), 5, hidden=4, omega=1.0)
    assert net().shape == (5, 3, 3) and torch.equal(net(), net())
    local = LocalSlowNet(3, 5, hidden=4, omega=1.0, running=False)
    x = torch.randn(2, 5, 7, 6)
    assert local(x).shape == (5, 1, 3, 3)
    assert not torch.allclose(local(x), local(x[:1]), atol=1e-4)


def test_the_last_layer_of_a_slow_net_begins_smaller_by_the_root_of_the_places():
    weight = SlowNet((5, 5), 400, hidden=12).out.weight
    bound = (3 / 12) ** 0.5 / 5
    assert 0.99 * bound < weight.abs().max() <= bound


def test_scores_are_quadratic_over_channels_and_quartic_with_places():
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    channel = HyperChannel(4, hidden=3, omega=1.0).double()
    torch.testing.assert_close(channel.score(3 * x), 9 * channel.score(x))
    both = HyperInteraction(4, 5, hidden=3, places_hidden=3, omega=1.0).double()

    def score(y):  # undoes the sigmoid
        gate = both(y, torch.ones_like(y))
        return gate.log() - (1 - gate).log()

    torch.testing.assert_close(score(2 * x), 16 * score(x), rtol=1e-6, atol=1e-9)


def test_the_slow_loss_is_zero_for_tiled_kernels_alone():
    first = torch.randn(3, 4, 4)
    kernels = [first, first.repeat(4, 1, 1), first.repeat(8, 1, 1)]
    assert slow_loss(kernels, (4, 2, 5)) == 0
    assert slow_loss([kernels[0], kernels[1] + 1], (4, 2)) == pytest.approx(1)
    total = slow_loss([first, first.repeat(4, 1, 1)], (4,), form="channel_sum")
    torch.testing.assert_close(total, (3 * first.sum(0)).square().mean())


def test_the_regulariser_takes_what_the_authors_choose_by_name():
    folder = Path(__file__).parents[2] / "goldens" / "terminator"
    params = {n[6:]: t for n, t in load_file(folder / "tiny_net.safetensors").items() if n.startswith("param.")}
    fast = [t for n, t in params.items() if "fast" in n and "Kernel" not in n]
    slow = [t for n, t in params.items() if "Kernel" in n and n.endswith("weight") and t.ndim == 4]
    wanted = sum(t.norm() for t in fast) + 0.01 * sum(t.norm() for t in slow)
    net = TerminatorImage.build({}, params)
    torch.testing.assert_close(regulariser(net, slow_weight=0.01), wanted)


def test_all_parts_of_the_loss_train_the_slow_nets():
    net = Terminator(**TINY).train()
    terminator_loss(net, net(torch.randn(4, 3, 6, 6)), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    slow_loss(net.slow_kernels(), net.factors).backward()
    trained = {n.split(".")[3] for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"slow"}


def test_kar3_steps_by_signs_and_then_remembers():
    p = nn.Parameter(torch.zeros(3))
    optimiser = Kar3([p], 0.1)
    p.grad = torch.tensor([5.0, -0.01, 0.0])
    optimiser.step()
    torch.testing.assert_close(p.data, torch.tensor([-0.1, 0.1, 0.0]))  # nothing remembered yet
    p.grad = torch.tensor([5.0, 0.01, 0.0])
    optimiser.step()
    torch.testing.assert_close(p.data, torch.tensor([-0.4, 0.2, 0.0]))  # three signs, or one against two


def test_the_learning_rate_warms_up_and_falls():
    rate = [warm_cosine(step, steps=100, warm=8) for step in range(101)]
    assert rate[0] == pytest.approx(1e-8) and rate[8] == 1 and rate[54] == pytest.approx(0.5) and rate[100] == 0
    assert rate[:9] == sorted(rate[:9]) and rate[8:] == sorted(rate[8:], reverse=True)


def test_groups_are_standardised_in_turn():
    norm, x = GroupStandardize(12, groups=4, running=False), 3 + 2 * torch.randn(5, 12, 4, 4)
    y = norm(x)
    for channel in range(12):
        over_batch = channel // 3 % 2 == 0
        assert y[:, channel].mean().abs() < 1e-5
        assert bool((y[:, channel].mean((1, 2)).abs() < 1e-5).all()) is not over_batch


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dim must be a multiple of groups = 12, got 15"):
        GroupStandardize(15)
    with pytest.raises(ValueError, match="kernel must be odd"):
        LocalSlowNet(4, 3)
    with pytest.raises(ValueError, match=r"x must be images \(B, 3, 6, 6\)"):
        Terminator(**TINY)(torch.randn(1, 3, 6, 8))
    with pytest.raises(ValueError, match="evaluation must be 'running' or 'batch', got 'ema'"):
        Terminator(evaluation="ema")
    with pytest.raises(ValueError, match="factors must be 5, one per block, got 2"):
        Terminator(factors=(4, 3))
    layer = SlowFast(4, 6, before=1, slow=(4, 1), local=(4, 1), channel=(4, 1), interaction=(3, 3, 1), omega=1.0)
    with pytest.raises(ValueError, match="1 earlier maps must be given, of channels that divide 4"):
        layer(torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6))
    with pytest.raises(ValueError, match="factors must take kernel 0 to 1, got 3 × 2 and 5 channels"):
        slow_loss([torch.randn(3, 2, 2), torch.randn(5, 2, 2)], (2,))
    with pytest.raises(ValueError, match="net must hold SlowFast layers"):
        regulariser(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lr must be at least 0 and betas lie in"):
        Kar3([nn.Parameter(torch.zeros(1))], betas=(1.0, 0.5))
