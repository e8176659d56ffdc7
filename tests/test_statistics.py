"""Statistics of attention without its matrix: equal to those of the matrix, in memory that grows with the tokens."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab import attend, statistics
from attnlab.backends import stripes
from attnlab.patterns import Causal, Explicit, Neighborhood, PowersOfTwo, Sinks, Window
from attnlab.problem import Lookup
from attnlab.weightings import Softmax

N = 70
PATTERNS = {
    "full": None,
    "causal": Causal(),
    "window and sinks": Window(9) | (Sinks(2) & Causal()),
    "neighborhood": Neighborhood((7, 10), 3, 2),
    "powers of two": PowersOfTwo(block=4, window=2),
    "some queries see nothing": Window(20) & ~Window(8),
    "per head": Explicit(torch.rand(1, 4, N, N, generator=torch.Generator().manual_seed(1)) < 0.3),
    "per batch": Explicit(torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(2)) < 0.1),
}


def of_the_matrix(q, k, v, pattern, bias, grid, scale=None, mask=None):
    """The definitions, from all weights at once."""
    nq, nk, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    seen = torch.ones(nq, nk, dtype=torch.bool)
    if pattern is not None:
        seen = pattern.matrix(nq, nk, batch=q.shape[0], heads=q.shape[1])
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    elif mask is not None:
        seen = seen & mask
    weights = Softmax().weights(scores, seen.expand(scores.shape), nk)
    at = torch.arange(max(nq, nk))
    places = at[:, None].double() if grid is None else torch.stack(torch.unravel_index(at, grid), -1).double()
    apart = torch.cdist(places[:nq], places[:nk])
    return {
        "entropy": -torch.xlogy(weights, weights).sum(-1),
        "received": weights.sum(-2),
        "max": weights.amax(-1),
        "sink_mass": weights[..., 0],
        "distance": (weights * apart).sum(-1),
        "lse": scores.masked_fill(~seen, -math.inf).logsumexp(-1),
        "out": weights @ v,
    }


@pytest.mark.parametrize("name", PATTERNS)
def test_they_equal_those_of_the_matrix(name):
    pattern = PATTERNS[name]
    q, k, v = (torch.randn(2, h, N, 8, dtype=torch.float64) for h in (4, 2, 2))
    grid = (7, 10) if name == "neighborhood" else None
    found = statistics(q, k, v, pattern=pattern, grid=grid)
    for field, wanted in of_the_matrix(q, k, v, pattern, None, grid).items():
        torch.testing.assert_close(getattr(found, field), wanted, rtol=1e-11, atol=1e-11, msg=lambda m, f=field: f + m)


def test_other_lengths_a_bias_and_a_scale_are_taken_into_account():
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (31, 90, 90))
    bias = torch.randn(2, 31, 90, dtype=torch.float64)
    found = statistics(q, k, v, bias=bias, scale=0.7)
    for field, wanted in of_the_matrix(q, k, v, None, bias, None, 0.7).items():
        torch.testing.assert_close(getattr(found, field), wanted, rtol=1e-11, atol=1e-11)
    table = torch.randn(120, 2, dtype=torch.float64)
    looked_up = statistics(q, k, bias=Lookup(table, lambda q, k: k - q + 30), pattern=Window(40, causal=False))
    plain = statistics(q, k, bias=lambda b, h, q, k: table[k - q + 30, h], pattern=Window(40, causal=False))
    torch.testing.assert_close(looked_up.entropy, plain.entropy)


def mask_of(shape, kind):
    """A mask that hides about a third, all of the row of one query where it has such rows."""
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.3
    if shape[-2] > 1:
        hidden[..., 5, :] = True
    if kind == "bool":
        return ~hidden
    low = -math.inf if kind == "infinite" else torch.finfo(torch.float64).min
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).masked_fill(hidden, low)


@pytest.mark.parametrize("pattern", [None, Causal(), Window(9)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "infinite", "lowest"])
@pytest.mark.parametrize("shape", [(N, N), (2, 1, N, N), (1, 4, N, N), (2, 4, N, N), (2, 1, 1, N)], ids=str)
def test_a_mask_of_any_shape_hides_and_adds_beside_the_pattern(shape, kind, pattern):
    q, k, v = (torch.randn(2, h, N, 8, dtype=torch.float64) for h in (4, 2, 2))
    mask = mask_of(shape, kind)
    found = statistics(q, k, v, mask=mask, pattern=pattern)
    for field, wanted in of_the_matrix(q, k, v, pattern, None, None, mask=mask).items():
        if field == "lse" and kind == "lowest":
            continue  # where all is as low as can be, what is added is lost in rounding
        torch.testing.assert_close(getattr(found, field), wanted, rtol=1e-11, atol=1e-11, msg=lambda m, f=field: f + m)


def test_a_mask_goes_with_a_bias_and_with_patterns_of_their_own_for_each_head():
    q, k, v = (torch.randn(2, h, N, 8, dtype=torch.float64) for h in (4, 2, 2))
    mask, bias = mask_of((2, 1, N, N), "bool"), torch.randn(4, N, N, dtype=torch.float64)
    for name in ("per head", "window and sinks", "causal"):
        found = statistics(q, k, v, mask=mask, bias=bias, pattern=PATTERNS[name])
        for field, wanted in of_the_matrix(q, k, v, PATTERNS[name], bias, None, mask=mask).items():
            torch.testing.assert_close(getattr(found, field), wanted, rtol=1e-11, atol=1e-11)


def test_the_mass_of_the_sinks_is_that_of_the_first_keys():
    q = torch.randn(1, 2, N, 8, dtype=torch.float64)
    for pattern in (Causal(), Window(9)):
        weights = (q @ q.mT / 8**0.5).masked_fill(~pattern.matrix(N), -math.inf).softmax(-1)
        torch.testing.assert_close(statistics(q, q, pattern=pattern, sinks=3).sink_mass, weights[..., :3].sum(-1))


def test_tokens_before_and_after_the_grid_have_no_place_on_it():
    q = torch.randn(1, 2, N, 8, dtype=torch.float64)
    weights = (q @ q.mT / 8**0.5).softmax(-1)
    at = torch.stack(torch.unravel_index(torch.arange(60), (6, 10)), -1).double()
    wanted = torch.zeros(1, 2, N, dtype=torch.float64)
    on = weights[..., 4:64, 4:64]
    wanted[..., 4:64] = (on * torch.cdist(at, at)).sum(-1) / on.sum(-1)
    found = statistics(q, q, grid=(6, 10), prefix=4)
    torch.testing.assert_close(found.distance, wanted)
    local = statistics(q, q, grid=(6, 10), prefix=4, pattern=Window(9))
    assert local.distance[..., :4].abs().max() == 0 and local.distance[..., 64:].abs().max() == 0
    assert 0 < local.distance[..., 4:64].max() < 10


def test_a_head_that_looks_everywhere_has_the_entropy_of_all_keys_and_one_that_looks_at_itself_none():
    q = torch.zeros(1, 1, 50, 4)
    same = statistics(q, q)
    torch.testing.assert_close(same.entropy, torch.full((1, 1, 50), math.log(50)))
    torch.testing.assert_close(same.received, torch.ones(1, 1, 50))
    alone = statistics(q, q, pattern=Window(1))
    assert alone.entropy.abs().max() == 0 and (alone.max == 1).all() and alone.distance.abs().max() == 0


def test_the_share_of_the_sink_is_what_the_first_keys_receive():
    q = torch.zeros(1, 1, 4, 4)
    # Causal and alike: query i gives key 0 the weight 1/(i+1); 25/12 of 4.
    torch.testing.assert_close(statistics(q, q, pattern=Causal()).sink(), torch.full((1, 1), 25 / 48))


def test_a_query_that_sees_nothing_counts_as_nothing():
    q = torch.randn(1, 1, 6, 4)
    found = statistics(q, q, q, pattern=Causal() & ~Window(1))
    for field in ("entropy", "max", "distance"):
        assert getattr(found, field)[0, 0, 0] == 0
    assert found.lse[0, 0, 0] == -math.inf and (found.out[0, 0, 0] == 0).all()
    assert all(bool(getattr(found, f)[..., 1:].isfinite().all()) for f in ("entropy", "max", "distance", "lse"))


def test_queries_of_a_later_piece_are_measured_from_where_they_stand():
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    whole = statistics(q, k, pattern=Causal())
    piece = statistics(q[:, :, 25:], k, pattern=Causal().starting_at(25), offset=25)
    torch.testing.assert_close(piece.distance, whole.distance[:, :, 25:])


def test_half_precision_is_summed_in_float32():
    q = torch.randn(1, 2, 64, 16).bfloat16()
    found = statistics(q, q, q, pattern=Window(9))
    exact = statistics(q.double(), q.double(), pattern=Window(9))
    assert found.entropy.dtype is torch.float32 and found.out.dtype is torch.bfloat16
    torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return made


def test_no_tensor_grows_with_the_pairs():
    largest = []
    for n in (2048, 4096, 8192):
        q = torch.randn(1, 2, n, 8)
        with Largest() as mode:
            statistics(q, q, pattern=Window(64))
        largest.append(mode.elements)
    # Linear growth at most: the pairs would grow by four with each doubling.
    assert largest[2] <= 2.2 * largest[1] <= 4.9 * largest[0], largest
    assert largest[2] < 8192 * 8192 / 8


@pytest.mark.parametrize("pattern", [None, Causal(), ~Window(8)], ids=str)
def test_dense_attention_holds_no_more_than_a_stripe_of_scores(pattern, monkeypatch):
    monkeypatch.setattr(stripes, "_HERE", 2**16)
    n = 3000
    q = torch.randn(1, 1, n, 4)
    padding = torch.arange(n) < n - 10
    with Largest() as mode:
        statistics(q, q, q, pattern=pattern, mask=padding)
    assert mode.elements < n * n / 60, mode.elements


def test_it_agrees_with_attend_about_the_output_and_the_denominator():
    q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    found = statistics(q, k, v, pattern=Window(17))
    out, lse = attend(q, k, v, pattern=Window(17), return_lse=True)
    torch.testing.assert_close(found.out, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.lse, lse, rtol=1e-5, atol=1e-6)


def test_what_it_cannot_do_is_refused_by_name():
    q = torch.randn(1, 1, 6, 4)
    with pytest.raises(TypeError, match="pattern, route, bias and scale, got dropout"):
        statistics(q, q, dropout=0.1)
    with pytest.raises(ValueError, match=r"grid \(2, 2\) holds 4 tokens, got 6"):
        statistics(q, q, grid=(2, 2))
    with pytest.raises(ValueError, match=r"mask must be broadcastable to .* \(1, 1, 6, 6\), got \(5, 6\)"):
        statistics(q, q, mask=torch.ones(5, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be bool .*got torch.int64"):
        statistics(q, q, mask=torch.ones(6, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="k must have q's head dimension"):
        statistics(q, torch.randn(1, 1, 6, 5))
