"""Stiffness of equations and networks, and steps that follow it: limits, invariances, and the solver's own choice."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlab
from attnlab.models.vision.stepnet import StepNet, SteppingBlock
from attnlab.nn.channel.squeeze_excite import SqueezeExcite
from attnlab.nn.channel.step_size import StepBlock, StepSize
from attnlab.nn.multihead import MultiHead
from attnlab.recipes.stiffness import neural_stiffness, peakiness, profile_distance, stiffest, stiffness


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


@pytest.mark.parametrize("index", ["speed", "spectral", "ratio"])
def test_a_linear_decay_is_as_stiff_as_its_rate(index: str) -> None:
    u = torch.randn(5, 3, dtype=torch.float64)
    found = stiffness(lambda u: -2.5 * u, u, index)
    torch.testing.assert_close(found, torch.full_like(found, 1.0 if index == "ratio" else 2.5))


def test_rates_apart_are_a_ratio() -> None:
    rates = torch.tensor([-1000.0, -2.0], dtype=torch.float64)
    assert stiffness(lambda u: rates * u, torch.ones(1, 2, dtype=torch.float64), "ratio").item() == pytest.approx(500)


def test_an_adaptive_solver_takes_small_steps_where_the_oscillator_is_stiff() -> None:
    integrate, stats = pytest.importorskip("scipy.integrate"), pytest.importorskip("scipy.stats")
    mu = 1000.0
    solved = integrate.solve_ivp(
        lambda _, u: [u[1], mu * (1 - u[0] ** 2) * u[1] - u[0]], [0, 2500], [2.0, 0.0], "Radau", rtol=1e-6, atol=1e-8
    )
    states = torch.tensor(solved.y.T)
    found = stiffness(lambda u: torch.stack((u[1], mu * (1 - u[0] ** 2) * u[1] - u[0])), states)
    assert stats.spearmanr(np.diff(solved.t), found[:-1].numpy()).statistic < -0.5
    slow = torch.tensor(np.interp(np.linspace(0, 2500, 2000), solved.t, found.numpy()))
    assert slow.max() / slow.mean() > 10  # sharp peaks over time


def test_a_network_is_measured_block_by_block_whatever_its_scale() -> None:
    blocks = [Residual(nn.Conv2d(4, 4, 3, padding=1, bias=False)) for _ in range(3)]
    blocks.append(nn.Identity())
    net, x = nn.Sequential(*blocks).double(), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    found = neural_stiffness(net, x, blocks=blocks)
    assert found[3] == 0
    y = blocks[0](x)
    by_hand = torch.stack([(b - a).norm() / a.norm() for a, b in zip(x, y, strict=True)]).mean()
    torch.testing.assert_close(found[0], by_hand)
    scaled = neural_stiffness(net, 7 * x, blocks=blocks)
    torch.testing.assert_close(torch.stack(list(scaled.values())), torch.stack(list(found.values())))
    one = neural_stiffness(net, x, blocks=blocks, norm="l1", per_channel=True)[0]
    torch.testing.assert_close(one, ((y - x).abs().sum((2, 3)) / x.abs().sum((2, 3))).mean(0))


def test_measures_vits_and_leaves_out_blocks_that_shrink_the_map() -> None:
    vit = attnlab.build("vit", dim=16, depth=3, heads=2, image=16, patch=4)
    assert list(neural_stiffness(vit, torch.randn(2, 3, 16, 16))) == [0, 1, 2]
    net = StepNet(depths=(2, 2), dim=8, small=True, num_classes=3)
    assert list(neural_stiffness(net, torch.randn(2, 3, 8, 8))) == [1, 3]
    with pytest.raises(TypeError, match="blocks"):
        neural_stiffness(nn.Linear(2, 2), torch.randn(1, 2))


def test_profiles_are_compared_and_ranked() -> None:
    flat, peaked = torch.ones(7), torch.tensor([1.0, 1, 8, 1, 1])
    assert peakiness(flat) == (1.0, 0.0)
    assert peakiness(peaked)[0] == pytest.approx(8 / 2.4)
    assert profile_distance(flat, 3 * torch.ones(4)) == pytest.approx(0, abs=1e-6)
    assert 0 < profile_distance(flat, peaked) <= 1
    found = {0: torch.tensor(0.1), 2: torch.tensor(0.5), 3: torch.tensor(0.3)}
    assert stiffest(found, 2) == [2, 3]
    with pytest.raises(ValueError, match="k must"):
        stiffest(found, 4)


def test_steps_of_one_are_the_plain_residual_block() -> None:
    x = torch.randn(2, 16, 6, 6)
    stepping = SteppingBlock(16, 16, step=StepSize(16, gate="2sigmoid")).eval()
    plain = SteppingBlock(16, 16, step=None).eval()
    plain.load_state_dict({n: t for n, t in stepping.state_dict().items() if not n.startswith("step.")})
    torch.testing.assert_close(stepping(x), plain(x))


def shaken(step: StepSize) -> StepSize:
    for p in step.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return step


@pytest.mark.parametrize("settings", [{}, {"refine": True}, {"gate": "2sigmoid"}, {"features": ("f", "s")}])
def test_steps_lie_in_their_range_and_hang_on_what_they_are_made_of(settings: dict) -> None:
    step, x = shaken(StepSize(16, **settings)), torch.randn(3, 16, 5, requires_grad=True)
    f = torch.randn(3, 16, 5, requires_grad=True)
    found = step(x, f)
    assert found.shape == (3, 16, 1)
    assert (found > 0).all() and (found < (2 if settings else 1)).all()
    found.pow(2).sum().backward()
    assert f.grad.any() and x.grad.any()
    assert all(p.grad.any() for p in step.parameters())


def test_the_branch_alone_is_squeeze_and_excite() -> None:
    step, x, f = shaken(StepSize(32, reduction=4, features=("f",))), torch.randn(2, 32, 4, 4), torch.randn(2, 32, 4, 4)
    peer = SqueezeExcite(32, 8, activation=nn.ReLU)
    peer.load_state_dict(step.state_dict())
    torch.testing.assert_close(step(x, f) * f, peer(f))


def test_the_module_equals_its_equation() -> None:
    step = shaken(StepSize(32)).double()
    x, f = torch.randn(2, 2, 32, 3, 5, dtype=torch.float64).unbind()
    said = torch.cat((x.mean((2, 3)), f.mean((2, 3)), f.abs().mean((2, 3)) / (x.abs().mean((2, 3)) + 1e-6)), 1)
    hidden = F.layer_norm(said @ step.fc1.weight.T + step.fc1.bias, (4,), step.norm.weight, step.norm.bias)
    wanted = (hidden.clamp(min=0) @ step.fc2.weight.T + step.fc2.bias).sigmoid()
    torch.testing.assert_close(step(x, f)[..., 0, 0], wanted)


def test_a_channel_near_zero_is_as_stiff_as_eps_allows() -> None:
    x, f = torch.zeros(1, 4, 1), torch.ones(1, 4, 1)
    for eps in (1e-6, 0.1):
        step = StepSize(4, features=("s",), eps=eps)
        seen: list[torch.Tensor] = []
        step.fc1.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        step(x, f)
        torch.testing.assert_close(seen[0], torch.full((1, 4), 1 / eps))


def test_wraps_the_attention_of_a_transformer() -> None:
    block = StepBlock(nn.Sequential(nn.LayerNorm(16), MultiHead(16, heads=2)), StepSize(16), tokens=True)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(block(x), x + 0.5 * block.branch(x))  # every step is a half at first


def test_modules_stand_where_they_are_asked_for() -> None:
    net = StepNet(depths=(2, 2), dim=8, small=True, num_classes=3, at=[1, 2])
    assert [block.step is not None for stage in net.stages for block in stage.blocks] == [False, True, True, False]
    plain = StepNet(depths=(2, 2), dim=8, small=True, num_classes=3, attention="none")
    assert all(block.step is None for stage in plain.stages for block in stage.blocks)
    with pytest.raises(ValueError, match="at must"):
        StepNet(depths=(2, 2), at=[4])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="features"):
        StepSize(8, features=("y",))
    with pytest.raises(ValueError, match="gate"):
        StepSize(8, gate="tanh")
    with pytest.raises(ValueError, match="eps must be positive"):
        StepSize(8, eps=0.0)
    with pytest.raises(ValueError, match="x and f"):
        StepSize(8)(torch.randn(2, 8, 3), torch.randn(2, 8, 4))
    with pytest.raises(ValueError, match="index"):
        stiffness(lambda u: u, torch.ones(1, 2), "fast")
