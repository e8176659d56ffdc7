"""Planning and anchoring: double loops in float64, closed forms, and what the multipliers conserve."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab.lens.measures.anchors import (
    MODES,
    changes,
    coupling,
    fai,
    head_groups,
    mean_distances,
    multipliers,
    peaks,
    receiver_scores,
    rhythm,
    top_share,
    waad,
)

N = 40


def maps(*leading: int, size: int = N) -> Tensor:
    scores = 2 * torch.randn(*leading, size, size, dtype=torch.float64)
    return scores.masked_fill(torch.ones(size, size).triu(1).bool(), -math.inf).softmax(-1)


def uniform(size: int = N) -> Tensor:
    return torch.ones(size, size).double().tril() / torch.arange(1, size + 1)[:, None]


def on_first(size: int = N) -> Tensor:
    return torch.nn.functional.one_hot(torch.zeros(size, dtype=torch.long), size).double()


@pytest.mark.parametrize("prompt", [0, 13])
def test_all_three_signals_by_double_loops(prompt: int) -> None:
    a, window, lo, hi = maps(), 4, 5, 20
    distance, near, influence = 0.0, [], []
    for t in range(prompt, N):
        near.append(sum(a[t, s].item() * min(t - s, window) for s in range(t + 1)))
        distance += sum(a[t, s].item() * (t - s) for s in range(t + 1))
    for s in range(N):
        rows = [t for t in range(prompt, N) if s + lo <= t <= min(N - 1, s + hi)]
        influence.append(sum(a[t, s].item() for t in rows) / len(rows) if rows else 0.0)
    assert mean_distances(a, prompt).item() == pytest.approx(distance / (N - prompt))
    torch.testing.assert_close(waad(a, prompt, window=window), torch.tensor(near, dtype=torch.float64))
    torch.testing.assert_close(fai(a, prompt, lo=lo, hi=hi), torch.tensor(influence, dtype=torch.float64))


def test_looking_at_oneself_is_no_distance_and_no_influence() -> None:
    eye = torch.eye(N, dtype=torch.float64)
    assert not waad(eye).any() and not fai(eye).any() and mean_distances(eye) == 0


def test_uniform_attention_has_its_closed_form() -> None:
    t = torch.arange(N)
    wanted = torch.stack([sum(torch.tensor(min(j, 10)) for j in range(n + 1)) / (n + 1) for n in t.tolist()])
    torch.testing.assert_close(waad(uniform()), wanted.double(), check_dtype=False, rtol=1e-6, atol=0)
    assert mean_distances(uniform()).item() == pytest.approx((N - 1) / 4)  # of row t: t/2


def test_all_on_the_first_token_is_its_influence() -> None:
    torch.testing.assert_close(waad(on_first()), torch.arange(N).clamp(max=10).double())
    assert fai(on_first())[0] == 1 and not fai(on_first())[1:].any()


def test_signals_stay_in_their_bounds_and_are_linear_in_the_maps() -> None:
    a = maps(3, 4)
    assert waad(a).max() <= 10 and fai(a).min() >= 0 and fai(a).max() <= 1
    torch.testing.assert_close(waad(a.mean((0, 1))), waad(a).mean((0, 1)))
    torch.testing.assert_close(fai(a.mean((0, 1))), fai(a).mean((0, 1)))


def test_what_the_next_tokens_give_does_not_count() -> None:
    previous = torch.diag(torch.ones(N - 1), -1).double()
    previous[0, 0] = 1
    assert not fai(previous).any()
    assert fai(previous, lo=1, hi=1)[:-1].eq(1).all()


def test_heads_are_grouped_by_how_far_they_look() -> None:
    stack = torch.stack([torch.eye(N).double(), on_first(), uniform(), maps()]).view(2, 2, N, N)
    local, broad = head_groups(mean_distances(stack), 0.3)
    assert local.nonzero().tolist() == [[0, 0]] and broad.nonzero().tolist() == [[0, 1]]
    found = rhythm(stack, 12)
    assert found.waad.shape == found.fai.shape == found.delta.shape == (N - 12,)
    assert not found.waad.any() and not found.fai.any()  # rows look at themselves; the first token is in the prompt
    local, broad = head_groups(torch.arange(20.0), 0.3)
    assert local.sum() == broad.sum() == 6 and local[:6].all() and broad[14:].all()


def test_the_top_share_is_of_the_response() -> None:
    assert top_share(torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3]), 0.4).nonzero().flatten().tolist() == [4, 5, 7, 8]
    assert top_share(torch.zeros(10), 0.4).tolist() == [True] * 4 + [False] * 6
    assert changes(torch.tensor([1.0, 4, 2])).tolist() == [3, 2, 0]


def by_hand(near: Tensor, far: Tensor, gain: float, back: int, a: float) -> list[float]:
    """The coupled multipliers, token by token."""
    n = len(near)
    delta = [abs(near[t] - near[t + 1]).item() for t in range(n - 1)] + [0.0]
    anchors = set(sorted(range(n), key=lambda t: -far[t].item())[: int(0.4 * n)])
    low, turn = near.quantile(0.5).item(), torch.tensor(delta, dtype=near.dtype).quantile(0.6).item()
    led, intro = set(), set()
    for t in anchors:
        before = range(max(0, t - back), t)
        if near[t] <= low and before and max(delta[u] for u in before) >= turn:
            led.add(t)
            intro.add(max(before, key=lambda u: delta[u]))
    bonus = gain - 1
    return [
        1 + bonus * (t in anchors - led) + (1 - a) * bonus * (t in led) + a * bonus * (t in intro) for t in range(n)
    ]


@pytest.mark.parametrize("back", [1, 2, 3])
@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_coupled_multipliers_token_by_token(back: int, a: float) -> None:
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        near, far = (torch.rand(30, generator=rng, dtype=torch.float64) for _ in range(2))
        ours = multipliers(near, far, gain=1.5, back=back, passed_on=a)
        assert ours.tolist() == pytest.approx(by_hand(near, far, 1.5, back, a))


def test_nothing_passed_on_is_the_anchors_alone() -> None:
    near, far = torch.rand(50), torch.rand(50)
    assert torch.equal(multipliers(near, far, passed_on=0.0), multipliers(near, far, "anchor"))
    assert multipliers(near, far, "anchor").sum() == 50 + 0.5 * 20
    local = multipliers(near, far, "local")
    assert torch.equal(local > 1, top_share(changes(near)))


def test_what_is_passed_on_is_not_lost() -> None:
    """Anchors 4 and 9 of ten, each after a turn of its own that is no anchor."""
    near = torch.tensor([5.0, 5, 5, 9, 1, 5, 5, 5, 9, 1])
    far = torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0, 0, 1])
    plain, coupled = multipliers(near, far, "anchor", share=0.2), multipliers(near, far, share=0.2, back=1)
    assert plain.tolist() == [1, 1, 1, 1, 1.5, 1, 1, 1, 1, 1.5]
    assert coupled.tolist() == [1, 1, 1, 1.25, 1.25, 1, 1, 1, 1.25, 1.25]


@pytest.mark.parametrize("mode", MODES)
def test_a_single_token_and_a_gain_of_one(mode: str) -> None:
    assert multipliers(torch.rand(1), torch.rand(1), mode).shape == (1,)
    assert multipliers(torch.rand(9), torch.rand(9), mode, gain=1.0).eq(1).all()


def test_receivers_are_heads_whose_queries_agree() -> None:
    """One key of thirty has it all: kurtosis (n² − 3n + 3)/(n − 1) of one among n; uniform rows are far below."""
    found = receiver_scores(torch.stack((on_first(), uniform(), maps())))
    assert found[0].item() == pytest.approx((30 * 30 - 3 * 30 + 3) / 29)
    assert found[0] > found[2] and found[0] > 10 * found[1]
    influence = fai(maps(), lo=10, hi=N)[:30]
    spread = influence - influence.mean()
    assert (spread**4).mean() / (spread**2).mean() ** 2 < found[0]


def test_peaks_stand_out_from_their_neighbours() -> None:
    values = torch.tensor([0.0, 5, 1, 9, 9, 2, 6, 8, 1, 3])
    assert peaks(values, 0.5).nonzero().flatten().tolist() == [1, 3, 4, 7]
    assert peaks(values, 0.8).nonzero().flatten().tolist() == [3, 4]


def test_couplings_are_ratios_to_chance() -> None:
    rng = torch.Generator().manual_seed(0)
    at = torch.zeros(200, dtype=torch.bool)
    at[::10] = True
    values = torch.ones(200)
    assert coupling(at, values) == pytest.approx(1.0)
    values[at] = 3.0  # of a mean of 1.2
    assert coupling(at, values, generator=rng, shuffles=500) == pytest.approx(3 / 1.2, rel=0.02)
    later = at.roll(2).double()  # a peak two places on: met within 3 places always, by chance in 3 of 10
    assert coupling(at, later) == 0.0
    assert coupling(at, later, ahead=2, generator=rng, shuffles=500) == pytest.approx(10 / 3, rel=0.05)


def test_bad_input_is_named() -> None:
    for call, message in (
        (lambda: waad(maps(), N), "prompt must leave"),
        (lambda: waad(torch.rand(3, 4)), "square"),
        (lambda: fai(maps(), lo=5, hi=4), "lo ≤ hi"),
        (lambda: waad(maps(), window=0), "window"),
        (lambda: head_groups(torch.rand(4), 0.9), "share"),
        (lambda: multipliers(torch.rand(4), torch.rand(5)), "one response"),
        (lambda: multipliers(torch.rand(4), torch.rand(4), "global"), "mode must be one of"),
        (lambda: multipliers(torch.rand(4), torch.rand(4), gain=0.5), "gain"),
        (lambda: coupling(torch.zeros(4, dtype=torch.bool), torch.rand(4)), "somewhere true"),
        (lambda: receiver_scores(maps(size=8)), "more than 11"),
        (lambda: peaks(torch.rand(2, 3)), "one response"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
