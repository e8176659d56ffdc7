"""Attention over ranks equals attention in one place: any pattern, layout and method; outputs, lse and gradients."""

import math

import pytest
import torch
from torch import Tensor

from attnlab import attend as alone
from attnlab import scale
from attnlab.patterns import (
    Causal,
    Dilated,
    Documents,
    Explicit,
    Full,
    Pattern,
    PowersOfTwo,
    Prefix,
    Sinks,
    Window,
)
from attnlab.problem import Lookup
from attnlab.scale import Layout, oracle, simulate
from attnlab.scale.visible import ALL, NONE, needed, pairs, relation

N = 40
PATTERNS: dict[str, Pattern] = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(7),
    "window both ways": Window(5, causal=False),
    "documents": Documents((10, 3, 20, 7)) & Causal(),
    "sinks": Window(6) | (Sinks(2) & Causal()),
    "dilated": Dilated(3),
    "powers": PowersOfTwo(block=4, window=1),
    "prefix": Prefix(9) & Documents((10, 3, 20, 7)),
    "nothing before 5": Causal() & ~Sinks(5),
    "per head": Explicit(torch.rand(4, N, N, generator=torch.Generator().manual_seed(1)) > 0.6),
    "per batch": Explicit(torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(2)) > 0.6),
}


def heads(*, batch=2, queries=4, keys=2, n=N, dim=8, value_dim=8, dtype=torch.float64) -> list[Tensor]:
    shapes = (queries, n, dim), (keys, n, dim), (keys, n, value_dim), (queries, n, value_dim)
    return [*(torch.randn(batch, *s, dtype=dtype) for s in shapes), torch.randn(batch, queries, n, dtype=dtype)]


def losses(out: Tensor, lse: Tensor, w: Tensor, w_lse: Tensor) -> Tensor:
    dead = lse == -math.inf
    return (out * w).sum() + (lse.masked_fill(dead, 0.0) * w_lse).sum()


def in_one_place(q, k, v, w, w_lse, **keywords) -> list[Tensor]:
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = alone(*given, return_lse=True, backend="reference", **keywords)
    losses(out, lse, w, w_lse).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in given)]


def over_ranks(layout: Layout, q, k, v, w, w_lse, **keywords) -> list[Tensor]:
    def rank(wire):
        given = [layout.shard(x, wire.rank).clone().requires_grad_() for x in (q, k, v)]
        out, lse = scale.attend(*given, mesh=wire, layout=layout, return_lse=True, **keywords)
        losses(out, lse, layout.shard(w, wire.rank), layout.shard(w_lse, wire.rank, 2)).backward()
        return [out.detach(), lse.detach(), *(x.grad for x in given)]

    return [layout.whole(parts, 2) for parts in zip(*simulate(layout.ranks, rank), strict=True)]


def assert_same(ours: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert (a - b)[b.isfinite()].abs().max() < tolerance


@pytest.mark.parametrize("name", PATTERNS)
def test_ring_equals_attention_in_one_place(name: str) -> None:
    pattern, data = PATTERNS[name], heads()
    wanted = in_one_place(*data, pattern=pattern)
    for layout in (Layout.zigzag(N, 3), Layout.balanced(pattern, N, 4), Layout.of_lengths([29, 0, 11])):
        assert_same(over_ranks(layout, *data, pattern=pattern), wanted)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("method", ["allgather", "ulysses"])
def test_other_methods_equal_attention_in_one_place(name: str, method: str) -> None:
    pattern, data = PATTERNS[name], heads()
    wanted = in_one_place(*data, pattern=pattern)
    for layout in (Layout.zigzag(N, 2), Layout.of_lengths([30, 5, 3, 2])):
        assert_same(over_ranks(layout, *data, pattern=pattern, method=method), wanted)


def test_keys_in_chunks_equal_keys_at_once() -> None:
    data, layout = heads(), Layout.zigzag(N, 3)
    for method in ("ring", "allgather"):
        wanted = in_one_place(*data, pattern=Causal())
        assert_same(over_ranks(layout, *data, pattern=Causal(), method=method, kv_chunk=3), wanted)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 6, 12])
def test_all_to_all_serves_any_grouping_of_heads(kv_heads: int) -> None:
    data = heads(queries=12, keys=kv_heads)
    layout = Layout.contiguous(N, 4)
    wanted = in_one_place(*data, pattern=Causal())
    assert_same(over_ranks(layout, *data, pattern=Causal(), method="ulysses"), wanted)


def test_the_plain_oracle_is_attention_in_one_place() -> None:
    for pattern in PATTERNS.values():
        q, k, v, *_ = data = heads()
        layout = Layout.of_lengths([11, 0, 9, 20])
        shards = [[layout.shard(x, r) for r in range(4)] for x in (q, k, v)]
        outs, lses = oracle.ring(*shards, layout, pattern)
        assert_same([layout.whole(outs), layout.whole(lses, 2)], in_one_place(*data, pattern=pattern)[:2])


def test_values_may_have_another_width_and_scores_another_scale() -> None:
    data = heads(value_dim=5)
    wanted = in_one_place(*data, pattern=Causal(), scale=0.3)
    for method in ("ring", "ulysses"):
        assert_same(over_ranks(Layout.zigzag(N, 2), *data, pattern=Causal(), scale=0.3, method=method), wanted)


def test_float32_is_equal_to_rounding() -> None:
    data = heads(dtype=torch.float32)
    wanted = in_one_place(*data, pattern=Causal())
    assert_same(over_ranks(Layout.zigzag(N, 4), *data, pattern=Causal()), wanted, 2e-5)


class Slope:
    """ALiBi of four heads, asked at positions."""

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return -(2.0 ** -(h + 1.0)) * (q - k).abs()


class Row:
    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).clamp(-5, 5) + 5


def test_a_bias_is_asked_at_positions_of_the_whole_sequence() -> None:
    data = heads()
    wanted = in_one_place(*data, pattern=Causal(), bias=Slope())
    for layout in (Layout.zigzag(N, 4), Layout.contiguous(N, 3)):
        assert_same(over_ranks(layout, *data, pattern=Causal(), bias=Slope()), wanted)
    assert_same(over_ranks(Layout.zigzag(N, 4), *data, pattern=Causal(), bias=Slope(), method="ulysses"), wanted)


def test_the_gradients_of_a_table_add_up_over_the_ranks() -> None:
    q, k, v, w, _ = heads()
    whole = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    (alone(q, k, v, pattern=Causal(), bias=Lookup(whole, Row()), backend="reference") * w).sum().backward()
    layout = Layout.zigzag(N, 4)

    def rank(wire, method):
        table = whole.detach().clone().requires_grad_()
        parts = [layout.shard(x, wire.rank) for x in (q, k, v, w)]
        out = scale.attend(
            *parts[:3], mesh=wire, layout=layout, pattern=Causal(), bias=Lookup(table, Row()), method=method
        )
        (out * parts[3]).sum().backward()
        return table.grad

    for method in ("ring", "ulysses"):
        found = torch.stack(simulate(4, lambda wire, method=method: rank(wire, method))).sum(0)
        assert (found - whole.grad).abs().max() < 1e-10


def test_a_tensor_of_biases_holds_the_ranks_own_rows() -> None:
    q, k, v, w, _ = heads()
    layout = Layout.zigzag(N, 3)
    for shape in ((4, N, N), (1, N), (2, 1, N, 1)):
        whole = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        out = alone(q, k, v, pattern=Causal(), bias=whole, backend="reference")
        (out * w).sum().backward()
        rows = 0 if shape[-2] == 1 else 1

        def rank(wire, whole=whole, rows=rows):
            mine = layout.shard(whole.detach(), wire.rank) if rows else whole.detach()
            mine = mine.clone().requires_grad_()
            parts = [layout.shard(x, wire.rank) for x in (q, k, v, w)]
            found = scale.attend(*parts[:3], mesh=wire, layout=layout, pattern=Causal(), bias=mine)
            (found * parts[3]).sum().backward()
            return found.detach(), mine.grad

        found, grads = zip(*simulate(3, rank), strict=True)
        total = layout.whole(grads) if rows else torch.stack(grads).sum(0)
        assert_same([layout.whole(found), total], [out.detach(), whole.grad])


@pytest.mark.parametrize("name", PATTERNS)
def test_a_ring_of_all_to_all_groups_equals_attention_in_one_place(name: str) -> None:
    q, k, v, w, w_lse = data = heads()
    wanted = in_one_place(*data, pattern=PATTERNS[name])
    for layout in (Layout.zigzag(N, 4), Layout.of_lengths([29, 0, 6, 5])):

        def rank(wire, layout=layout):
            r = wire.rank
            mesh = wire.part([r % 2, r % 2 + 2]), wire.part([r // 2 * 2, r // 2 * 2 + 1])
            given = [layout.shard(x, r).clone().requires_grad_() for x in (q, k, v)]
            out, lse = scale.attend(
                *given, mesh=mesh, method="usp", layout=layout, pattern=PATTERNS[name], return_lse=True
            )
            losses(out, lse, layout.shard(w, r), layout.shard(w_lse, r, 2)).backward()
            return [out.detach(), lse.detach(), *(x.grad for x in given)]

        found = [layout.whole(parts, 2) for parts in zip(*simulate(4, rank), strict=True)]
        assert_same(found, wanted)


def test_a_double_ring_equals_attention_in_one_place_and_stays_among_neighbours() -> None:
    q, k, v, w, w_lse = data = heads()
    wanted = in_one_place(*data, pattern=Causal())
    layout = Layout.zigzag(N, 6)
    met: dict[int, list[int]] = {}

    def rank(wire):
        exchange = wire._exchange

        def seen(sends, receives):
            met.setdefault(wire.rank, []).extend(to for to, _ in sends)
            return exchange(sends, receives)

        wire._exchange = seen
        given = [layout.shard(x, wire.rank).clone().requires_grad_() for x in (q, k, v)]
        out, lse = scale.attend(*given, mesh=wire, layout=layout, pattern=Causal(), return_lse=True, window=3)
        losses(out, lse, layout.shard(w, wire.rank), layout.shard(w_lse, wire.rank, 2)).backward()
        return [out.detach(), lse.detach(), *(x.grad for x in given)]

    assert_same([layout.whole(parts, 2) for parts in zip(*simulate(6, rank), strict=True)], wanted)
    # Forward: round the inner ring of 0, 1, 2, then what the ranks of the other one are to see, one after the other.
    assert met[1][:5] == [0, 2, 4, 3, 5]
    for wrong, method in ((4, "ring"), (0, "ring"), (3, "ulysses")):
        with pytest.raises(ValueError, match="window must divide the 6 ranks"):
            simulate(6, lambda wire, n=wrong, m=method: scale.attend(
                *(layout.shard(x, wire.rank) for x in (q, k, v)), mesh=wire, method=m, window=n, layout=layout
            ))  # fmt: skip


def test_every_rank_may_compute_some_heads_of_all_rows() -> None:
    q, k, v, w, w_lse = data = heads()
    wanted = in_one_place(*data, pattern=PATTERNS["per head"])
    layout = Layout.contiguous(N, 2)

    def rank(wire):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = scale.attend(*given, mesh=wire, method="heads", pattern=PATTERNS["per head"], return_lse=True)
        mine = layout.positions(wire.rank)
        losses(out[:, :, mine], lse[:, :, mine], w[:, :, mine], w_lse[:, :, mine]).backward()
        return [out.detach(), lse.detach()], [x.grad for x in given]

    found = simulate(2, rank)
    for outputs, _ in found:
        assert_same(outputs, wanted[:2])
    assert_same([torch.stack(g).sum(0) for g in zip(*(grads for _, grads in found), strict=True)], wanted[2:])


def test_cross_attention_has_a_layout_for_keys() -> None:
    q, _, _, w, w_lse = heads()
    k, v = torch.randn(2, 2, 2, 30, 8, dtype=torch.float64)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = alone(*given, return_lse=True, backend="reference")
    losses(out, lse, w, w_lse).backward()
    rows, columns = Layout.contiguous(N, 3), Layout.of_lengths([3, 20, 7])

    def rank(wire, method):
        mine = [rows.shard(q, wire.rank), columns.shard(k, wire.rank), columns.shard(v, wire.rank)]
        mine = [x.clone().requires_grad_() for x in mine]
        return scale.attend(*mine, mesh=wire, layout=rows, kv_layout=columns, method=method).detach()

    found = simulate(3, lambda wire: rank(wire, "ring"))
    assert (rows.whole(found) - out).abs().max() < 1e-10


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_said_of_ranges_is_true_of_their_pairs(name: str) -> None:
    pattern = PATTERNS[name]
    matrix = pattern.matrix(N, batch=2, heads=4).expand(2, 4, N, N).any(0).any(0)
    every = pattern.matrix(N, batch=2, heads=4).expand(2, 4, N, N).all(0).all(0)
    for q in ((0, 7), (5, 17), (30, 40)):
        for k in ((0, 1), (3, 9), (8, 29), (33, 40)):
            part, whole = matrix[slice(*q), slice(*k)], every[slice(*q), slice(*k)]
            said = relation(pattern, q, k)
            assert said != NONE or not part.any()
            assert said != ALL or whole.all()
            if not (pattern.per_head or pattern.per_batch):
                assert pairs(pattern, q, k) == part.sum()
        seen = matrix[slice(*q)].any(0)
        sent = torch.zeros(N, dtype=torch.bool)
        for a, b in needed(pattern, (q,), ((0, N),)):
            sent[a:b] = True
        assert not (seen & ~sent).any()


def test_ranks_that_see_nothing_of_each_other_exchange_nothing() -> None:
    q, k, v, *_ = heads()
    layout = Layout.contiguous(N, 4)

    def rank(wire, pattern):
        given = [layout.shard(x, wire.rank).clone().requires_grad_() for x in (q, k, v)]
        scale.attend(*given, mesh=wire, pattern=pattern).sum().backward()
        return wire.traffic.sent, wire.traffic.calls["exchange"]

    assert simulate(4, lambda wire: rank(wire, Documents((10, 10, 10, 10)))) == [(0, 0)] * 4
    windows = simulate(4, lambda wire: rank(wire, Window(5)))
    token = 2 * 2 * (8 + 8) * 8  # batch, key heads, widths of key and value, bytes
    # The last four keys go to the next rank, forward and again backward, and their gradients come back.
    assert [sent for sent, _ in windows] == [8 * token, 12 * token, 12 * token, 4 * token]


def test_zigzag_and_what_is_computed_from_the_pattern_balance_the_work() -> None:
    n, ranks = 2048, 8
    assert max(Layout.zigzag(n, ranks).work(Causal())) == min(Layout.zigzag(n, ranks).work(Causal()))
    assert sum(Layout.zigzag(n, ranks).work(Causal())) == n * (n + 1) / 2
    for pattern in (
        Causal(),
        Window(300),
        Causal() & Documents((100, 1500, 448)),
        PowersOfTwo(block=32, window=2),
        Prefix(1000),
        Window(200) | (Sinks(64) & Causal()),
    ):
        layout = Layout.balanced(pattern, n, ranks)
        work = layout.work(pattern)
        assert max(work) <= 1.06 * sum(work) / ranks, (pattern, work)
        assert max(layout.lengths) - min(layout.lengths) <= n // 64
    assert Layout.balanced(Causal(), n, ranks) == Layout.zigzag(n, ranks)
    assert Layout.balanced(Window(8), n, ranks) == Layout.contiguous(n, ranks)


def test_a_layout_holds_every_token_once() -> None:
    x = torch.arange(2 * 23).view(2, 23)
    for layout in (Layout.contiguous(23, 5), Layout.zigzag(23, 5), Layout.balanced(Causal(), 23, 3, chunks=3)):
        shards = [layout.shard(x, r, 1) for r in range(layout.ranks)]
        assert torch.equal(layout.whole(shards, 1), x)
    assert Layout.contiguous(9, 4).lengths == (3, 3, 3, 0)
    with pytest.raises(ValueError, match="every token once"):
        Layout((((0, 4),), ((5, 8),)))
    with pytest.raises(ValueError, match="length must be at least one token"):
        Layout.zigzag(3, 4)


def wrong(ranks: int, call) -> str:
    """The message with which `call(wire)` fails on the ranks; nothing large has been sent."""
    seen = []

    def rank(wire):
        try:
            call(wire)
        except (ValueError, TypeError) as error:
            seen.append((str(error), wire.traffic.sent))
            return
        raise AssertionError("no error")

    simulate(ranks, rank)
    assert len(seen) == ranks and all(sent == 0 for _, sent in seen)
    return seen[0][0]


def test_what_does_not_fit_together_is_said_on_every_rank_before_anything_is_sent() -> None:
    def some(n=8, h=4, kv=2, dtype=torch.float32):
        return [torch.randn(1, x, n, 8, dtype=dtype) for x in (h, kv, kv)]

    unequal = wrong(2, lambda w: scale.attend(*some(8 + w.rank), mesh=w))
    assert "equally many tokens" in unequal and "[8, 9]" in unequal
    assert "3 ranks" in wrong(3, lambda w: scale.attend(*some(), mesh=w, method="ulysses"))
    dtypes = wrong(2, lambda w: scale.attend(*some(dtype=(torch.float32, torch.float64)[w.rank]), mesh=w))
    assert "one dtype on all ranks" in dtypes and "float64" in dtypes
    assert "one shape on all ranks" in wrong(2, lambda w: scale.attend(*some(h=4 + 2 * w.rank), mesh=w))
    assert "same" in wrong(2, lambda w: scale.attend(*some(), mesh=w, pattern=(Causal(), Full())[w.rank]))
    assert "shards of [4, 4]" in wrong(2, lambda w: scale.attend(*some(), mesh=w, layout=Layout.contiguous(8, 2)))
    assert "3 ranks" in wrong(2, lambda w: scale.attend(*some(), mesh=w, layout=Layout.contiguous(16, 3)))
    assert "method" in wrong(1, lambda w: scale.attend(*some(), mesh=w, method="star"))
    assert "Documents" in wrong(2, lambda w: scale.attend(*some(), mesh=w, pattern=Documents((9, 8))))
    assert "mesh" in wrong(1, lambda w: scale.attend(*some(), mesh=3))
