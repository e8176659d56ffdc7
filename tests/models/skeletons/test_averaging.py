"""Averages of all earlier outputs: the formulas, their start, and their number of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnlab.models.skeletons.averaging import Average, AveragedStack, SambaStack, Transposed


def stack(depth: int, kind: str = "paper") -> AveragedStack:
    return AveragedStack(
        [nn.Linear(4, 4) for _ in range(depth)], [Transposed(nn.Linear(3, 3)) for _ in range(depth)], kind=kind
    ).double()


def x() -> torch.Tensor:
    return torch.randn(2, 3, 4, dtype=torch.float64)


def test_starts_as_a_plain_stack_with_2LL_plus_3L_weights() -> None:
    net, tokens = stack(3), x()
    wanted = tokens
    for first, second in zip(net.token_mixers, net.channel_mixers, strict=True):
        wanted = second(first(wanted))
    torch.testing.assert_close(net(tokens), wanted)
    count = sum(p.numel() for m in net.modules() if isinstance(m, Average) for p in m.parameters())
    assert count == 3 * (2 * 3 + 3)


@pytest.mark.parametrize("kind", ["paper", "softmax"])
def test_every_mixer_reads_the_weighted_sums(kind: str) -> None:
    net, tokens = stack(3, kind), x()
    for m in net.modules():
        if isinstance(m, Average):
            nn.init.normal_(m.tokens)
            nn.init.normal_(m.channels)

    def weights(w: torch.Tensor) -> list[float]:
        return (w.softmax(0) if kind == "softmax" else w).tolist()

    y_t, y_c = [tokens], [tokens]
    for i in range(3):
        first, second = net.before_tokens[i], net.before_channels[i]
        read = sum(w * y for w, y in zip(weights(first.tokens), y_t, strict=True))
        read = read + sum(w * y for w, y in zip(weights(first.channels), y_c, strict=True))
        y_t.append(net.token_mixers[i](read))
        read = sum(w * y for w, y in zip(weights(second.tokens), y_t, strict=True))  # the newest included
        read = read + sum(w * y for w, y in zip(weights(second.channels), y_c, strict=True))
        y_c.append(net.channel_mixers[i](read))
    torch.testing.assert_close(net(tokens), y_c[-1])


def test_softmax_starts_uniform() -> None:
    a, b = torch.randn(2, 1, 3, 4)
    torch.testing.assert_close(Average(2, 1, kind="softmax")([a, b], [a]), (a + b) / 2 + a)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Average(1, 1, kind="mean"), "averaging must be one of"),
        (lambda: AveragedStack([nn.Identity()], []), "must be as many, got 1 and 0"),
        (lambda: AveragedStack([], [], kind="samba"), "see SambaStack"),
        (lambda: SambaStack(4, 3, [nn.Identity()], []), "must be as many, got 1 and 0"),
    ],
)
def test_errors_name_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
