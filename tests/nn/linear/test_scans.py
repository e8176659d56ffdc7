"""Mamba in two directions and in four: each scan by hand, and how they are put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.nn.linear.scans import S6, BidirectionalMamba, CrossScan
from attnlab.nn.linear.selective import Mamba


def shaken(module: nn.Module) -> nn.Module:
    module = module.double().eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def s6_by_hand(m: S6, x: Tensor) -> Tensor:
    """One sequence (N, E), token by token."""
    if m.conv is not None:
        taps = m.conv.taps
        seen = torch.cat((x.new_zeros(taps - 1, x.shape[1]), x))
        x = silu(torch.stack([(seen[t : t + taps].T * m.conv.weight).sum(1) for t in range(len(x))]) + m.conv.bias)
    h, y = torch.zeros(x.shape[1], m.states, dtype=torch.float64), []
    for token in x:
        low, b, c = (m.wx.weight @ token).split([m.rank, m.states, m.states])
        delta = (1 + (m.wdelta.weight @ low + m.wdelta.bias).exp()).log()
        h = torch.exp(delta[:, None] * -m.a_log.exp()) * h + torch.outer(delta * token, b)
        y.append(h @ c + m.skip * token)
    return torch.stack(y)


@pytest.mark.parametrize("conv", [0, 3])
def test_one_scan_is_the_recurrence(conv: int) -> None:
    m = shaken(S6(6, states=3, rank=2, conv=conv))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(m(x), torch.stack([s6_by_hand(m, sequence) for sequence in x]))


def test_both_ways_is_mamba_and_mamba_of_the_flipped_with_shared_projections() -> None:
    m, x = shaken(BidirectionalMamba(6, states=3)), torch.randn(2, 9, 6, dtype=torch.float64)
    found = 0
    for flip, scan in ((False, m.scans[0]), (True, m.scans[1])):
        one = Mamba(6, states=3).double()
        one.load_state_dict({**{f"{n}.weight": getattr(m, n).weight for n in ("wi", "wo")}, **scan.state_dict()})
        found = found + (one(x.flip(1)).flip(1) if flip else one(x))
    torch.testing.assert_close(m(x), found)
    two = shaken(BidirectionalMamba(6, states=3, shared=False))
    torch.testing.assert_close(two(x), two.scans[0](x) + two.scans[1](x.flip(1)).flip(1))


@pytest.mark.parametrize("shared", [True, False])
def test_equal_directions_commute_with_a_flip(shared: bool) -> None:
    m, x = shaken(BidirectionalMamba(6, states=3, shared=shared)), torch.randn(2, 9, 6, dtype=torch.float64)
    assert not torch.allclose(m(x.flip(1)), m(x).flip(1))
    m.scans[1].load_state_dict(m.scans[0].state_dict())
    torch.testing.assert_close(m(x.flip(1)), m(x).flip(1))


def test_a_grid_is_scanned_along_rows_and_columns_both_ways() -> None:
    m, x = shaken(CrossScan(4, states=2)), torch.randn(1, 15, 4, dtype=torch.float64)
    with torch.no_grad():
        values, gate = m.wi(x).chunk(2, -1)
        values = silu(m.conv(values.mT.unflatten(2, (3, 5)))).flatten(2)[0].T
        places = [(i, j) for i in range(3) for j in range(5)]
        orders = [places, places[::-1], sorted(places, key=lambda p: p[::-1])]
        orders.append(orders[2][::-1])
        found = torch.zeros_like(values)
        for scan, order in zip(m.scans, orders, strict=True):
            at = [5 * i + j for i, j in order]
            found[at] += s6_by_hand(scan, values[at])
        torch.testing.assert_close(m(x, grid=(3, 5)), m.wo(found * silu(gate[0]))[None])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BidirectionalMamba(4, causal=True), "causal must be False"),
        (lambda: BidirectionalMamba(4, states=0), "states must be at least 1"),
        (lambda: BidirectionalMamba(4, inner=0), "inner must be at least 1"),
        (lambda: BidirectionalMamba(4, inner=8, shared=False), "inner goes with shared=True"),
        (lambda: CrossScan(4, kernel=2), "kernel must be odd"),
        (lambda: CrossScan(4)(torch.zeros(1, 6, 4)), "grid must be given"),
        (lambda: CrossScan(4)(torch.zeros(1, 6, 4), torch.zeros(1, 6, 4), grid=(2, 3)), "takes no context"),
    ],
)
def test_errors_name_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
