"""Credit per token: the clipped objective by hand, and where multipliers act."""

from __future__ import annotations

import pytest
import torch

from attnlab.recipes.token_credit import clipped_loss, group_advantages, shape_advantages


def answers() -> tuple[torch.Tensor, ...]:
    logp, old = (-torch.rand(3, 5, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    return logp, old, torch.tensor([1.0, -0.7, 0.3], dtype=torch.float64), mask


def test_group_advantages_have_mean_zero_and_spread_one() -> None:
    found = group_advantages(torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1]]))
    torch.testing.assert_close(found[0].std(), torch.tensor(1.0), rtol=1e-4, atol=0)
    assert found[0].sum() == 0 and not found[1].any()


def test_the_loss_token_by_token() -> None:
    logp, old, advantages, mask = answers()
    gamma = 1 + torch.rand(3, 5, dtype=torch.float64)
    wanted = 0.0
    for b in range(3):
        total = 0.0
        for t in range(5):
            if mask[b, t]:
                a = advantages[b] * (gamma[b, t] if advantages[b] >= 0 else 1)
                ratio = (logp[b, t] - old[b, t]).exp()
                total += min(ratio * a, ratio.clamp(0.8, 1.2) * a)
        wanted -= total / mask[b].sum() / 3
    torch.testing.assert_close(clipped_loss(logp, old, advantages, mask, multipliers=gamma), wanted)


def test_multipliers_of_one_change_no_bit() -> None:
    logp, old, advantages, mask = answers()
    plain, ones = logp.float().requires_grad_(), logp.float().requires_grad_()
    a = clipped_loss(plain, old.float(), advantages, mask)
    b = clipped_loss(ones, old.float(), advantages, mask, multipliers=torch.ones(3, 5))
    assert torch.equal(a, b)
    assert torch.equal(*(torch.autograd.grad(x, y)[0] for x, y in ((a, plain), (b, ones))))


def test_blame_is_not_shaped_and_no_signal_is_trained() -> None:
    gamma = torch.full((3, 5), 1.5, requires_grad=True)
    shaped = shape_advantages(torch.tensor([1.0, -1.0, 0.0], requires_grad=True), gamma)
    assert shaped[:, 0].tolist() == [1.5, -1.0, 0.0] and not shaped.requires_grad


def test_what_is_no_token_has_no_say() -> None:
    logp, old, advantages, mask = answers()
    wild = torch.where(mask, logp, torch.inf).requires_grad_()
    loss = clipped_loss(wild, old, advantages, mask)
    torch.testing.assert_close(loss, clipped_loss(logp, old, advantages, mask))
    (gradient,) = torch.autograd.grad(loss, wild)
    assert not gradient[~mask].any() and gradient.isfinite().all()


def test_bad_input_is_named() -> None:
    logp, old, advantages, mask = answers()
    for call, message in (
        (lambda: clipped_loss(logp, old[:, :4], advantages, mask), "must be"),
        (lambda: clipped_loss(logp, old, advantages, mask & False), "mask must leave"),
        (lambda: clipped_loss(logp, old, advantages, mask, clip=0.0), "clip"),
        (lambda: group_advantages(torch.rand(3, 1)), "two answers"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
