"""Mamba for picked tokens: by hand, its symmetries, what learns, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.cost import count_flops
from attnlab.nn.sparse.routed_mamba import FlippedMamba, RoutedMamba

PATHS = ["forward", "shuffle", "mean", "gate", "shuffle_mean", "shuffle_gate"]


def shaken(module: nn.Module) -> nn.Module:
    module = module.double().eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def tokens(n: int = 12) -> Tensor:
    return torch.randn(2, n, 6, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_orders_are_undone_and_weighed(path: str) -> None:
    m, x = shaken(FlippedMamba(6, states=3, path=path)), tokens()
    torch.manual_seed(3)
    order = torch.randperm(12)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
    shuffled = torch.empty_like(x)
    shuffled[:, order] = m.mixer(normed[:, order])
    runs = {"f": m.mixer(normed), "r": m.mixer(normed.flip(1)).flip(1), "s": shuffled}
    used = {"forward": "f", "shuffle": "s", "mean": "fr", "gate": "fr"}.get(path, "frs")
    found = torch.stack([runs[name] for name in used])
    if m.gate is None:
        wanted = x + found.mean(0)
    else:
        weights = (torch.cat([y.mean(1) for y in found], -1) @ m.gate.weight.T).softmax(-1)
        wanted = x + torch.einsum("bo,obnc->bnc", weights, found)
    torch.manual_seed(3)
    torch.testing.assert_close(m(x), wanted)


def test_the_mean_of_both_ways_commutes_with_a_flip() -> None:
    m, x = shaken(FlippedMamba(6, states=3)), tokens()
    torch.testing.assert_close(m(x.flip(1)), m(x).flip(1))


@pytest.mark.parametrize("place", ["none", "head", "middle", "ends"])
@pytest.mark.parametrize("weigh_all", [True, False])
@pytest.mark.parametrize("renormalize", [True, False])
def test_picked_tokens_are_scanned_by_rank_and_the_others_weighed(
    place: str, weigh_all: bool, renormalize: bool
) -> None:
    options = {"ratio": 4, "pooled": 3, "place": place, "weigh_all": weigh_all, "renormalize": renormalize}
    m, x = shaken(RoutedMamba(6, states=3, **options)), tokens()
    found = m(x)
    for b in range(2):
        w = (x[b] @ m.router.weight[0]).softmax(0)
        top = sorted(range(12), key=lambda i: -w[i])[:3]
        means, picked = x[b].unflatten(0, (3, 4)).mean(1), x[b, top]
        parts = {
            "none": [picked], "head": [means, picked], "middle": [picked[:1], means, picked[1:]],
            "ends": [means, picked, means],
        }[place]  # fmt: skip
        y = m.block(torch.cat(parts)[None])[0]
        s = {"none": y, "head": y[3:], "middle": torch.cat((y[:1], y[4:])), "ends": y[3:6]}[place]
        share = w[top] / w[top].sum() if renormalize else w[top]
        wanted = w[:, None] * x[b] if weigh_all else torch.zeros_like(x[b])
        wanted[top] = share[:, None] * s
        torch.testing.assert_close(found[b], wanted)


def test_ratio_1_routes_all_tokens_and_ratio_0_none() -> None:
    every, x = shaken(RoutedMamba(6, states=3, place="none", weigh_all=False)), tokens()
    weights, top = every.route(x)
    assert torch.equal(top.sort(1).values, torch.arange(12).expand(2, -1))
    assert (weights.gather(1, top).diff(dim=1) <= 0).all()
    plain = shaken(RoutedMamba(6, states=3, ratio=0, place="none"))
    torch.testing.assert_close(x + plain(x), plain.block(x))


def test_the_release_takes_the_means_from_elsewhere() -> None:
    m, x = shaken(RoutedMamba(6, states=3, pooled=4, place="middle")), tokens()
    wanted = m(x)
    m.variant = "release"
    assert not torch.allclose(m(x), wanted)


def test_noise_disturbs_the_choice_in_training_alone_and_gets_no_gradient() -> None:
    m, x = shaken(RoutedMamba(6, states=3, ratio=4, pooled=2, noise=3.0)), tokens(32)
    assert torch.equal(m(x), m(x))
    m.train()
    choices = {tuple(m.route(x)[1][0].tolist()) for _ in range(8)}
    assert len(choices) > 1
    weights, top = m.route(x)
    torch.testing.assert_close(weights, (x @ m.router.weight[0]).softmax(1))
    assert not top.is_floating_point()  # the router learns through the weights
    m(x).square().sum().backward()
    assert m.router.weight.grad.any()


def test_few_tokens_still_have_one_picked() -> None:
    m = shaken(RoutedMamba(6, states=3, ratio=8, pooled=2))
    assert m.route(tokens(3))[1].shape == (2, 1) and m(tokens(3)).shape == (2, 3, 6)


def test_cost_falls_with_the_ratio() -> None:
    x = torch.randn(1, 256, 16)
    cost = {r: count_flops(RoutedMamba(16, ratio=r, pooled=4, states=4).eval(), x) for r in (1, 4, 8)}
    one = count_flops(FlippedMamba(16, states=4).eval(), x[:, :1])
    for r, flops in cost.items():
        assert flops == pytest.approx((256 / r + 4) * one, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RoutedMamba(6, causal=True), "causal must be False"),
        (lambda: RoutedMamba(6, ratio=-1), "ratio must be 0 or more"),
        (lambda: RoutedMamba(6, pooled=0), "pooled must be at least 1"),
        (lambda: RoutedMamba(6, place="tail"), "place must be one of"),
        (lambda: RoutedMamba(6, variant="code"), "variant must be one of"),
        (lambda: RoutedMamba(6, noise=-1.0), "noise must be 0 or more"),
        (lambda: RoutedMamba(6)(torch.zeros(1, 4, 6)), "grid must be given"),
        (lambda: RoutedMamba(6, ratio=0).route(torch.zeros(1, 4, 6)), "ratio=0 has no router"),
        (lambda: FlippedMamba(6, path="both"), "path must be one of"),
    ],
)
def test_errors_name_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
