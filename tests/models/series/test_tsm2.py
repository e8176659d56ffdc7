"""TSM2: causality along time, scaling, further inputs, and what the variate mixer is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab.models.series.tsm2 import TSM2

TINY = {"variates": 3, "length": 24, "horizon": 4, "patch": 4, "stride": 4, "dim": 8, "states": 4}


@torch.no_grad()
@pytest.mark.parametrize("averaging", ["softmax", "paper"])
def test_time_mixers_are_causal_with_norms_per_step(averaging: str) -> None:
    x = torch.randn(1, 3, 24, dtype=torch.float64)
    other = x.clone()
    other[:, 1, 12:] += 1
    for norm, causal in (("step", True), ("grid", False)):
        net = TSM2(**TINY, norm=norm, averaging=averaging).double().eval()
        a, b = net.features(x), net.features(other)
        assert torch.equal(a[:, :, :3], b[:, :, :3]) == causal
        assert not torch.isclose(a[:, 0, 3:], b[:, 0, 3:]).all()  # other variates hear of it


@torch.no_grad()
def test_forecasts_follow_the_level_and_scale_of_each_variate() -> None:
    net, x = TSM2(**TINY).double().eval(), torch.randn(2, 3, 24, dtype=torch.float64)
    level, scale = torch.tensor([1.0, -5.0, 100.0])[:, None], torch.tensor([2.0, 0.5, 30.0])[:, None]
    torch.testing.assert_close(net(x * scale + level), net(x) * scale + level, rtol=1e-3, atol=1e-3)


def test_static_features_and_covariates_are_read() -> None:
    net = TSM2(**TINY, static=2, covariates=5)
    inputs = [torch.randn(2, 3, 24), torch.randn(2, 3, 2), torch.randn(2, 5, 24)]
    y = net(*(t.requires_grad_() for t in inputs))
    assert y.shape == (2, 3, 4)
    y.square().sum().backward()
    assert all(t.grad.any() for t in inputs)
    # The softmax of a single weight is 1 whatever it is.
    idle = [n for n, p in net.named_parameters() if not p.grad.any() and p.shape != (1,)]
    assert idle == []


def delayed(steps: int, rng: torch.Generator) -> Tensor:
    """Noise in four variates, of which the second repeats the first four steps later."""
    s = torch.randn(4, steps + 4, generator=rng)
    s[1, 4:] = s[0, :-4]
    return s[:, 4:]


def windows(series: Tensor, at: list[int]) -> tuple[Tensor, Tensor]:
    cut = torch.stack([series[:, a : a + 20] for a in at])
    return cut[..., :16], cut[..., 16:]


def test_the_variate_mixer_finds_the_series_that_leads_another() -> None:
    rng = torch.Generator().manual_seed(0)
    train, test, errors = delayed(2000, rng), delayed(600, rng), {}
    for mix in (True, False):
        torch.manual_seed(0)
        net = TSM2(
            variates=4, length=16, horizon=4, patch=4, stride=4, dim=16, depth=1, states=4, scale=False,
            mix_variates=mix,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(150):
            x, y = windows(train, torch.randint(1980, (32,), generator=rng).tolist())
            loss = (net(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            x, y = windows(test, list(range(0, 580, 4)))
            errors[mix] = (net(x) - y).square().mean((0, 2))[1].item()
    assert errors[True] < 0.75 < 0.9 < errors[False]  # noise has a variance of 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TSM2(**TINY)(torch.zeros(1, 2, 24)), r"x must have shape \(B, 3, 24\)"),
        (lambda: TSM2(**{**TINY, "patch": 5}), "patch and stride must tile the 24 steps"),
        (lambda: TSM2(**TINY, norm="batch"), "norm must be"),
        (lambda: TSM2(**TINY)(torch.zeros(1, 3, 24), torch.zeros(1, 3, 2)), "static must not be given"),
        (lambda: TSM2(**TINY, static=2)(torch.zeros(1, 3, 24)), "static must be given"),
        (lambda: TSM2(**TINY, covariates=2)(torch.zeros(1, 3, 24), None, torch.zeros(1, 3, 24)), "covariates must hav"),
    ],
)
def test_errors_name_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
