"""The lists of chosen blocks give what the oracle gives, forward and backward, at the promised cost and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab.attend import attend, explain
from attnlab.cost import count_flops, fit_growth
from attnlab.patterns import Window
from attnlab.routing import Clusters, Partition, Routed, ThresholdBlocks, TopKBlocks
from attnlab.weightings import Softmax


def heads(n=40, *, batch=2, h=4, kv=2, dim=8, value_dim=6, dtype=torch.float64, size=1.0, nk=None):
    k_shape = (batch, kv, nk or n)
    q, k = size * torch.randn(batch, h, n, dim, dtype=dtype), size * torch.randn(*k_shape, dim, dtype=dtype)
    return q, k, torch.randn(*k_shape, value_dim, dtype=dtype)


ROUTES = [
    TopKBlocks(2, block=16),
    TopKBlocks(3, block=4),
    TopKBlocks(2, block=7, query_block=16),
    TopKBlocks(2, block=7, query_block=1),
    TopKBlocks(3, block=16, causal=True),
    TopKBlocks(3, block=5, query_block=1, causal=True),
    TopKBlocks(3, block=5, query_block=17, causal=True, per_head=False),
    ThresholdBlocks(0.3, block=16, scope="head"),
    ThresholdBlocks(0.4, block=8, query_block=1, lengths=(13, 37)),
    ThresholdBlocks(0.4, block=20, lengths=(33, 17)),
    Clusters(4),
    Clusters(5, size=13),
    Clusters(3, causal=True),
]


@pytest.mark.parametrize("size", [1.0, 30.0], ids=["", "large scores"])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_the_lists_equal_the_oracle_in_output_lse_and_gradients(route, size):
    tensors = tuple(x.requires_grad_() for x in heads(50, size=size))
    chosen = route.select(*tensors[:2])
    found = []
    for backend in ("routed", "reference"):
        out, lse = attend(*tensors, pattern=chosen, return_lse=True, backend=backend)
        torch.manual_seed(1)
        loss = (out * torch.randn_like(out)).sum() + (lse.masked_fill(lse.isinf(), 0) * torch.randn_like(lse)).sum()
        found.append((out, lse, *torch.autograd.grad(loss, tensors)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9 * size)


@pytest.mark.parametrize("size", [1.0, 30.0], ids=["", "large scores"])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_torchs_fused_backward_of_each_tile_adds_up_to_the_whole(route, size):
    # It is taken where values are as wide as keys and nothing but the output is differentiated.
    tensors = tuple(x.requires_grad_() for x in heads(50, size=size, value_dim=8))
    pattern = route.select(*tensors[:2]) & Window(20, causal=False)
    found = []
    for backend in ("routed", "reference"):
        out = attend(*tensors, pattern=pattern, backend=backend)
        torch.manual_seed(1)
        found.append(torch.autograd.grad((out * torch.randn_like(out)).sum(), tensors))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9 * size)


@pytest.mark.parametrize("weighting", ["sigmoid", "relu", "none", Softmax(off=1.0)], ids=str)
@pytest.mark.parametrize("route", [ROUTES[4], ROUTES[5], ROUTES[-2]], ids=str)
def test_any_weighting_equals_the_oracle(route, weighting):
    tensors = tuple(x.requires_grad_() for x in heads(50))
    chosen = route.select(*tensors[:2])
    found = []
    for backend in ("routed", "reference"):
        out = attend(*tensors, pattern=chosen, weighting=weighting, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
def test_dropout_is_the_same_forward_and_backward_and_keeps_the_mean(weighting):
    q, k, v = heads(48, batch=1, h=2, kv=1)
    chosen = TopKBlocks(2, block=16).select(q, k)

    def dropped(v):
        torch.manual_seed(3)
        return attend(q, k, v, pattern=chosen, weighting=weighting, dropout=0.4, backend="routed")

    # The output is linear in the values, so its gradient gives it back if the same weights were dropped.
    v.requires_grad_()
    out = dropped(v)
    (gradient,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((gradient * v).sum(), out.sum())
    q.requires_grad_()
    slope = torch.autograd.grad(dropped(v).square().sum(), q)[0][0, 1, 20, 3]
    step = torch.zeros_like(q)
    step[0, 1, 20, 3] = 1e-5
    with torch.no_grad():
        q += step
        more = dropped(v).square().sum()
        q -= 2 * step
        less = dropped(v).square().sum()
        q += step
    torch.testing.assert_close((more - less) / 2e-5, slope, rtol=1e-6, atol=1e-6)
    plain = attend(q, k, v, pattern=chosen, weighting=weighting)
    mean = sum(attend(q, k, v, pattern=chosen, weighting=weighting, dropout=0.4, backend="routed") for _ in range(300))
    assert (mean / 300 - plain).abs().mean() < 0.1 * plain.abs().mean()


@pytest.mark.parametrize("query_block", [1, 16])
def test_queries_that_see_nothing_get_zeros_and_no_gradient(query_block):
    q, k, v = (x.requires_grad_() for x in heads(48))
    table = torch.rand(2, 4, 48 // query_block, 6) < 0.3
    table[0, 1, 2] = False
    routed = Routed(table, Partition.of(query_block, 48), Partition.of(8, 48))
    out, lse = attend(q, k, v, pattern=routed, return_lse=True, backend="routed")
    rows = slice(2 * query_block, 3 * query_block)
    assert not out[0, 1, rows].any() and (lse[0, 1, rows] == -torch.inf).all()
    torch.testing.assert_close(out, attend(q, k, v, pattern=routed, backend="reference"))
    grads = torch.autograd.grad(out.square().sum() + lse[0, 0].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and not grads[0][0, 1, rows].any()


@pytest.mark.parametrize("h", [1, 2])
def test_tensors_may_lie_in_memory_in_any_order(h):
    x = torch.randn(1, 48, 3, h, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = x.permute(2, 0, 3, 1, 4)
    for route in (TopKBlocks(2, block=16), TopKBlocks(2, block=5, query_block=1)):
        chosen = route.select(q, k)
        found = []
        for backend in ("routed", "reference"):
            out = attend(q, k, v, pattern=chosen, backend=backend)
            found.append((out, *torch.autograd.grad(out.square().sum(), x, retain_graph=True)))
        for ours, wanted in zip(*found, strict=True):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_lower_precision_is_computed_in_float32(dtype, error):
    q, k, v = heads(64, dtype=dtype)
    chosen = TopKBlocks(2, block=16).select(q, k)
    out = attend(q, k, v, pattern=chosen, backend="routed")
    wanted = attend(q.double(), k.double(), v.double(), pattern=chosen, backend="reference")
    assert out.dtype == dtype
    assert (out - wanted).abs().max() < error * wanted.abs().max()


@pytest.mark.parametrize("seed", range(12))
def test_any_table_of_any_blocks_equals_the_oracle(seed):
    random = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=random))  # noqa: E731
    nq, nk, kv, repeat = draw(1, 70), draw(1, 70), draw(1, 3), draw(1, 3)
    q, k, v = heads(nq, nk=nk, batch=draw(1, 3), h=kv * repeat, kv=kv)
    cuts = [Partition.of(draw(1, 40), nq), Partition.of(draw(1, 40), nk)]
    table = torch.rand(q.shape[0], q.shape[1], *(c.count for c in cuts), generator=random) < 0.4
    pattern = Routed(table, *cuts)
    pattern = pattern & Window(draw(1, 30), causal=False) if seed % 3 else pattern
    out = attend(q, k, v, pattern=pattern, backend="routed")
    torch.testing.assert_close(out, attend(q, k, v, pattern=pattern, backend="reference"))


def test_only_the_chosen_blocks_are_computed():
    n, block, count, h, dim, value_dim = 512, 32, 3, 2, 8, 6
    q, k, v = heads(n, batch=1, h=h, kv=1, dtype=torch.float32)
    route = TopKBlocks(count, block=block)
    gate = 2 * h * (n // block) ** 2 * dim
    attention = 2 * h * n * count * block * (dim + value_dim)
    assert count_flops(lambda: attend(q, k, v, route=route)) == gate + attention
    # Single queries are padded to tiles of 128 per block: at most one tile too many for each block and head.
    single = TopKBlocks(count, block=block, query_block=1)
    gate = 2 * h * n * (n // block) * dim
    extra = count_flops(lambda: attend(q, k, v, route=single)) - gate - attention
    assert 0 <= extra <= 2 * h * (n // block) * 128 * block * (dim + value_dim)
    # One dense product costs 1, and its gradients 2 more; recomputed scores make it 2.5 in all.
    for x in (q, k, v):
        x.requires_grad_()
    train = count_flops(lambda: attend(q, k, v, route=route).sum().backward())
    products = 2 * h * n * count * block
    assert train == 2 * h * (n // block) ** 2 * dim + products * (2 * (dim + value_dim) + 2 * dim + value_dim)


def test_cost_grows_linearly_with_blocks_of_fixed_size():
    route = TopKBlocks(8, block=64)
    sizes = (4096, 8192, 16384)
    costs = [
        count_flops(lambda n=n: attend(*heads(n, batch=1, h=1, kv=1, dtype=torch.float32), route=route)) for n in sizes
    ]
    # 4·512·N·D for the attention and 2·(N/64)²·D for the choice: 3 % of it at 16,384.
    assert 1.0 <= fit_growth(sizes, costs) <= 1.03


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("query_block", [None, 1])
def test_memory_is_that_of_the_tokens_and_one_step(query_block):
    n = 8192
    q, k, v = (x.requires_grad_() for x in heads(n, batch=1, h=2, kv=1, dim=16, value_dim=16, dtype=torch.float32))
    with Largest() as largest:
        attend(q, k, v, route=TopKBlocks(4, block=128, query_block=query_block), backend="routed").sum().backward()
    tokens, step, table = 2 * n * 16, 2**20, 2 * n * (n // 128)
    assert largest.numel <= max(tokens, step, table) + 2**17, f"{largest.numel:,} numbers; n² is {n * n:,}"


def test_the_planner_takes_the_lists_where_they_save_work():
    q, k, v = heads(2048, batch=1, dtype=torch.float32)
    found = explain(q, k, v, route=TopKBlocks(2, block=64))
    assert found.choice == "routed"
    assert "routed" in str(found)
