"""The tiles backend: equal to the oracle for every pattern, forward and backward, at a cost that grows less than N²."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab import attend
from attnlab.backends.tiles import Group, Lists, Tiling, tile_attention, tiling
from attnlab.backends.tiles.plan import split
from attnlab.cost import count_flops, fit_growth
from attnlab.patterns import (
    Axial,
    Blocks,
    Causal,
    Dilated,
    Documents,
    Explicit,
    Full,
    Halo,
    Neighborhood,
    PowersOfTwo,
    Prefix,
    Regions,
    Sinks,
    Window,
)
from attnlab.problem import Lookup
from attnlab.weightings import Linear, Relu, Sigmoid, Softmax

N = 77
SQUARE = {
    "window": Window(9),
    "window both ways": Window(5, causal=False),
    "causal": Causal(),
    "full": Full(),
    "sinks and window": Window(9) | Sinks(3) & Causal(),
    "dilated": Dilated(5),
    "dilated, limited": Dilated(4, 3, causal=False),
    "powers of two": PowersOfTwo(4, 2, 1),
    "prefix": Prefix(9),
    "documents": Documents((5, 40, 1, 31)),
    "all but near": ~Window(9, causal=False),
    "nothing": Window(3) & ~Window(3),
    "some queries see nothing": Window(3) & Blocks((N,), 20) & ~Sinks(50),
    "shifted": Window(9).starting_at(20),
    "neighborhood": Neighborhood((7, 11), 3),
    "neighborhood, dilated": Neighborhood((7, 11), (3, 2), dilation=(2, 3)),
    "neighborhood, strided, causal": Neighborhood((7, 11), (4, 5), stride=(2, 3), causal=(True, False)),
    "blocks": Blocks((7, 11), 4, shift=1),
    "halo": Halo((7, 11), (3, 4), 1),
    "axial": Axial((7, 11), 0),
    "neighborhood or axial": Neighborhood((7, 11), 3) | Axial((7, 11), 1),
    "regions": Regions(torch.arange(N) * 7 % 5),
    "regions of each batch": Regions(torch.stack([torch.arange(N) % 3, torch.arange(N) // 20])),
    "a mask": Explicit(torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.05),
    "a mask of each head": Explicit(torch.rand(4, N, N, generator=torch.Generator().manual_seed(0)) < 0.1),
}
CROSS = ("window", "causal", "full", "sinks and window", "dilated", "powers of two", "prefix", "shifted")


@dataclass(frozen=True)
class Difference:
    """A row of a table for each signed distance below `limit`."""

    limit: int

    def __call__(self, q, k):
        return q - k + self.limit


def sample(nq=N, nk=N, *, batch=2, heads=4, kv_heads=2, dim=6, value_dim=6, dtype=torch.float64):
    new = torch.Generator().manual_seed(1)
    shapes = (batch, heads, nq, dim), (batch, kv_heads, nk, dim), (batch, kv_heads, nk, value_dim)
    return [torch.randn(s, generator=new, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def answers(backend, inputs, lse=True, **keywords):
    """Output, lse and the gradients of a random loss over both, with respect to q, k, v and any trained bias."""
    found = attend(*inputs, backend=backend, return_lse=lse, **keywords)
    parts = [x.masked_fill(x == -math.inf, 0.0) for x in (found if lse else (found,))]
    new = torch.Generator().manual_seed(2)
    loss = sum((x * torch.randn(x.shape, generator=new, dtype=torch.float64).to(x.dtype)).sum() for x in parts)
    bias = keywords.get("bias")
    trained = [x for x in (getattr(bias, "table", bias),) if isinstance(x, torch.Tensor) and x.requires_grad]
    return [*parts, *torch.autograd.grad(loss, [*inputs, *trained])]


def assert_equal_to_the_oracle(inputs, tolerance=1e-12, **keywords):
    both = (answers(backend, inputs, **keywords) for backend in ("tiles", "reference"))
    for mine, oracle in zip(*both, strict=True):
        assert mine.dtype == oracle.dtype
        torch.testing.assert_close(mine, oracle, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SQUARE)
def test_every_pattern_equals_the_oracle_with_its_gradients(name):
    assert_equal_to_the_oracle(sample(), pattern=SQUARE[name])


@pytest.mark.parametrize("name", CROSS)
@pytest.mark.parametrize(("nq", "nk"), [(30, 95), (95, 30)])
def test_cross_attention_of_any_lengths_equals_the_oracle(name, nq, nk):
    inputs = sample(nq, nk, batch=1, kv_heads=1, value_dim=3)
    assert_equal_to_the_oracle(inputs, pattern=SQUARE[name], scale=0.7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_lower_precision_stays_within_its_rounding(dtype, tolerance):
    for name in ("sinks and window", "neighborhood", "regions"):
        assert_equal_to_the_oracle(sample(dtype=dtype), tolerance, pattern=SQUARE[name])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, N, N), (N, N), (4, N, 1), (N,), (2, 1, 1, N)])
def test_a_bias_tensor_of_any_broadcast_shape_is_added_and_trained(shape, trained):
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=trained)
    assert_equal_to_the_oracle(sample(), pattern=Window(9), bias=bias)


def test_a_bias_by_index_is_added_and_a_table_that_it_looks_up_trained():
    assert_equal_to_the_oracle(sample(), pattern=Window(9), bias=lambda b, h, q, k: (k - q) * (h + 1.0) * (b + 1))
    table = torch.randn(2 * N, 4, dtype=torch.float64, requires_grad=True)
    for name in ("window", "blocks", "some queries see nothing", "regions of each batch", "a mask of each head"):
        assert_equal_to_the_oracle(sample(), pattern=SQUARE[name], bias=Lookup(table, Difference(N)))


def test_a_trained_table_is_added_and_trained_for_all_kinds_of_heads_and_twice_alike():
    table = torch.randn(2 * N, 3, requires_grad=True)
    for kv_heads in (1, 3):
        inputs = sample(heads=3, kv_heads=kv_heads, value_dim=3, dtype=torch.float32)
        assert_equal_to_the_oracle(inputs, 1e-4, pattern=Window(9), bias=Lookup(table, lambda q, k: q - k + N))
    out = attend(*inputs, pattern=Window(9), bias=Lookup(table, Difference(N)), backend="tiles")
    first, second = (torch.autograd.grad(out.square().sum(), table, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_table_of_minus_infinity_hides_keys():
    table = torch.zeros(2 * N, 4, dtype=torch.float64)
    table[N + 2 :] = -math.inf
    assert_equal_to_the_oracle(sample(), pattern=Window(9), bias=Lookup(table, Difference(N)))
    table[:] = -math.inf
    assert (attend(*sample(), pattern=Window(9), bias=Lookup(table, Difference(N)), backend="tiles") == 0).all()


def test_a_bias_of_minus_infinity_hides_keys_even_all_of_a_query():
    bias = torch.zeros(N, N, dtype=torch.float64)
    bias[:, ::2] = -math.inf
    bias[10] = -math.inf
    assert_equal_to_the_oracle(sample(), pattern=Window(9) & Explicit(bias == 0))
    out, lse = attend(*sample(), pattern=Window(9), bias=bias, backend="tiles", return_lse=True)
    assert (out[:, :, 10] == 0).all() and (lse[:, :, 10] == -math.inf).all() and out.isfinite().all()


@pytest.mark.parametrize("weighting", [Sigmoid(), Relu(2), Linear(), Softmax(1.0)], ids=str)
def test_other_weightings_equal_the_oracle(weighting):
    for name in ("window", "neighborhood, dilated", "some queries see nothing"):
        lse = isinstance(weighting, Softmax)
        assert_equal_to_the_oracle(sample(), pattern=SQUARE[name], weighting=weighting, lse=lse)


def test_dropout_keeps_the_mean_and_the_pattern():
    q, k, v = (x.detach()[:1, :1] for x in sample(heads=1, kv_heads=1))
    mean = torch.stack([attend(q, k, v, pattern=Window(9), dropout=0.5, backend="tiles") for _ in range(300)]).mean(0)
    torch.testing.assert_close(mean, attend(q, k, v, pattern=Window(9)), atol=0.5, rtol=0)
    only_itself = attend(q, k, v, pattern=Window(1), dropout=0.5, backend="tiles")
    assert ((only_itself == 0) | torch.isclose(only_itself, 2 * v)).all()


@pytest.mark.parametrize(("nq", "nk"), [(N, N), (30, 95), (95, 30)])
def test_full_and_causal_attention_with_lse_never_hold_all_pairs(nq, nk):
    for pattern in (Full(), Causal()):
        assert_equal_to_the_oracle(sample(nq, nk), pattern=pattern)
    q, k, v = sample(2048, 2048, batch=1, heads=2, kv_heads=1, dim=4, value_dim=4, dtype=torch.float32)
    with Largest() as largest:
        out, lse = attend(q, k, v, pattern=Causal(), return_lse=True)
        (out.sum() + lse.sum()).backward()
    assert largest.elements <= 2048 * 2048 // 16


@st.composite
def patterns(draw, depth=2):
    if depth and draw(st.booleans()):
        left, right = draw(patterns(depth - 1)), draw(patterns(depth - 1))
        return draw(st.sampled_from([left & right, left | right, ~left, left & Causal()]))
    return draw(st.sampled_from([p for p in SQUARE.values() if not (p.per_batch or p.per_head)]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    pattern=patterns(),
    batch=st.integers(1, 3),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    dims=st.sampled_from([(4, 4), (5, 2), (3, 8)]),
)
def test_random_combinations_equal_the_oracle(pattern, batch, heads, dims):
    inputs = sample(batch=batch, heads=heads[0], kv_heads=heads[1], dim=dims[0], value_dim=dims[1])
    assert_equal_to_the_oracle(inputs, pattern=pattern)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_key_lists_may_differ_for_every_batch_entry_and_head(kv_heads):
    """Blocks of four keys, chosen at random for each tile, batch entry and key head; the first is hidden from some."""
    q, k, v = inputs = sample(24, 40, kv_heads=kv_heads)
    new = torch.Generator().manual_seed(3)
    blocks = torch.rand(2, kv_heads, 4, 10, generator=new).argsort(-1)[..., :3]
    hidden = torch.rand(2, kv_heads, 4, 6, 12, generator=new) < 0.2
    queries = torch.arange(24).view(1, 1, 4, 6)
    plan = Tiling(24, 40, (Group(Lists(queries), Lists(blocks, unit=4), ~hidden),))
    seen = torch.zeros(2, kv_heads, 4, 6, 40, dtype=torch.bool)
    tokens = (blocks[..., None] * 4 + torch.arange(4)).flatten(-2)
    seen.scatter_(-1, tokens[..., None, :].expand(-1, -1, -1, 6, -1), ~hidden)
    mask = Explicit(seen.flatten(2, 3).repeat_interleave(4 // kv_heads, 1))
    expected = answers("reference", inputs, pattern=mask)
    out, lse = tile_attention(q, k, v, plan)
    new = torch.Generator().manual_seed(2)
    parts = out, lse.masked_fill(lse == -math.inf, 0.0)
    loss = sum((x * torch.randn(x.shape, generator=new, dtype=torch.float64)).sum() for x in parts)
    for mine, oracle in zip([*parts, *torch.autograd.grad(loss, inputs)], expected, strict=True):
        torch.testing.assert_close(mine, oracle, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (lambda n: Window(32), 1.02),
        (lambda n: Neighborhood((n // 16, 16), 5), 1.02),
        (lambda n: PowersOfTwo(16, 16, 1), 1.1),
        (lambda n: Dilated(n // 32, causal=False), 1.02),
    ],
    ids=["window", "neighborhood", "powers of two", "dilated by N/32"],
)
def test_counted_flops_grow_with_the_tokens_in_forward_and_backward(pattern, most):
    sizes = (4096, 8192, 16384)

    def flops(n, train):
        q, k, v = sample(n, n, batch=1, heads=1, kv_heads=1, dim=2, value_dim=2, dtype=torch.float32)
        run = lambda: attend(q, k, v, pattern=pattern(n), backend="tiles")  # noqa: E731
        return count_flops(lambda: run().sum().backward() if train else run())

    for train in (False, True):
        assert fit_growth(sizes, [flops(n, train) for n in sizes]) <= most


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor) and x._base is None:
                self.elements = max(self.elements, x.numel())
        return found


@pytest.mark.parametrize("keywords", [{}, {"weighting": Sigmoid()}], ids=["fused", "plain"])
@pytest.mark.parametrize("name", ["window", "neighborhood"])
def test_no_tensor_grows_with_the_pairs(name, keywords):
    n = 4096
    pattern = Window(32) if name == "window" else Neighborhood((64, 64), 5)
    q, k, v = sample(n, n, batch=1, heads=2, kv_heads=2, dim=4, value_dim=4, dtype=torch.float32)
    tiling(pattern, n, n, q.device)
    with Largest() as largest:
        attend(q, k, v, pattern=pattern, backend="tiles", **keywords).sum().backward()
    assert largest.elements <= n * n // 8


def test_plans_that_are_kept_hold_limited_memory(monkeypatch):
    monkeypatch.setattr("attnlab.backends.tiles.plan._KEPT_BYTES", 100_000)
    first = tiling(Window(31), 500, 500)
    assert first is tiling(Window(31), 500, 500) and first.bytes > 10_000
    for size in range(2, 12):
        tiling(Window(size), 500, 500)
    assert first is not tiling(Window(31), 500, 500)


@pytest.mark.parametrize(
    "pattern",
    [
        Axial((32, 32), 0) | Axial((32, 32), 1),
        Window(32) | Dilated(32),
        Neighborhood((32, 32), 3) | (Axial((32, 32), 0) | Axial((32, 32), 1)),
    ],
    ids=["criss-cross", "strided", "three in one"],
)
def test_sides_of_an_or_that_want_other_tiles_are_computed_apart_and_merged(pattern):
    parts = split(pattern, 1024, 1024)
    assert len(parts) > 1
    assert torch.equal(sum(p.matrix(1024).int() for p in parts), pattern.matrix(1024).int())
    assert sum(tiling(p, 1024, 1024).pairs for p in parts) < tiling(pattern, 1024, 1024).pairs / 2
    assert_equal_to_the_oracle(sample(1024, 1024, batch=1, heads=1, kv_heads=1, dim=3, value_dim=2), pattern=pattern)


def test_a_plan_is_made_once_and_asks_about_few_pairs():
    plan = tiling(Window(256), 65536, 65536)
    assert plan is tiling(Window(256), 65536, 65536)
    assert plan.pairs <= 65536 * (256 + 64)
    # All inner tiles share one mask and lie evenly, so nothing is copied for them.
    inner = max(plan.groups, key=lambda g: g.queries.tiles)
    assert inner.queries.tiles >= 1019 and inner.seen.shape[2] == 1 and inner.keys.run and inner.queries.run


def test_a_second_derivative_is_refused_not_wrong():
    q, k, v = sample()
    loss = attend(q, k, v, pattern=Window(9), backend="tiles").square().sum()
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_full_attention_costs_n_squared_on_the_dense_backend():
    def flops(n):
        q, k, v = sample(n, n, batch=1, heads=1, kv_heads=1, dim=2, value_dim=2, dtype=torch.float32)
        return count_flops(lambda: attend(q, k, v, pattern=Full(), backend="dense"))

    sizes = (128, 256, 512)
    assert fit_growth(sizes, [flops(n) for n in sizes]) == pytest.approx(2.0)


def test_nan_reaches_every_query_that_sees_it():
    q, k, v = (x.detach().clone() for x in sample())
    v[:, :, 40] = math.nan
    out = attend(q, k, v, pattern=Blocks((N,), 20), backend="tiles")
    assert out[:, :, 40:60].isnan().all()
