"""Scans over ranks equal scans in one place: every mechanism and layout; outputs and gradients, by one all-gather."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from attnlab import scale
from attnlab import scan as alone
from attnlab.scale import Layout, oracle, simulate

N = 40
MECHANISMS = {
    "additive": (None, False),
    "retention": (1, False),
    "gated linear attention": (2, False),
    "delta rule": (None, True),
    "gated delta rule": (1, True),
    "KDA": (2, True),
}
LAYOUTS = (Layout.zigzag(N, 3), Layout.of_lengths([27, 2, 11]), Layout.contiguous(N, 1))


def inputs(name: str, *, batch: int = 2, heads: int = 4, key_heads: int = 2, n: int = N, dim: int = 6, value_dim=5):
    """q, k, v, decay, beta of a mechanism in float64."""
    axes, rule = MECHANISMS[name]

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    q, k, v = random(batch, key_heads, n, dim), random(batch, key_heads, n, dim), random(batch, heads, n, value_dim)
    decay = None
    if axes:
        decay = -0.3 * torch.rand(*((batch, heads, n) if axes == 1 else (batch, heads, n, dim)), dtype=torch.float64)
    beta = torch.rand(batch, heads, n, dtype=torch.float64) if rule else None
    return [q, normalize(k, dim=-1), v, decay, beta]


def copies(given):
    return [None if x is None else x.clone().requires_grad_() for x in given]


def compare(layout: Layout, given, *, state=None, weigh_state=None, cu_seqlens=None) -> list[str]:
    """Assert that ranks find what one place finds; what each has sent."""
    v = given[2]
    w = torch.randn_like(v)
    whole, start = copies(given), None if state is None else state.clone().requires_grad_()
    out, last = alone(
        *whole[:3], decay=whole[3], beta=whole[4], state=start, cu_seqlens=cu_seqlens, scale=0.5, backend="recurrent"
    )
    loss = (out * w).sum()
    if weigh_state is not None:  # every rank uses it in its own loss
        loss = loss + layout.ranks * (last * weigh_state).sum()
    loss.backward()

    def rank(wire):
        mine = [None if x is None else layout.shard(x, wire.rank, 2).clone().requires_grad_() for x in given]
        begin = None if state is None else state.clone().requires_grad_()
        found = scale.scan(
            *mine[:3], decay=mine[3], beta=mine[4], state=begin, mesh=wire, layout=layout, scale=0.5,
            cu_seqlens=cu_seqlens, return_state=weigh_state is not None,
        )  # fmt: skip
        o, s = found if isinstance(found, tuple) else (found, None)
        loss = (o * layout.shard(w, wire.rank, 2)).sum()
        if s is not None:
            assert (s - last).abs().max() < 1e-10
            loss = loss + (s * weigh_state).sum()
        loss.backward()
        return o.detach(), [None if x is None else x.grad for x in mine], None if begin is None else begin.grad, wire

    found = simulate(layout.ranks, rank)
    assert (layout.whole([o for o, *_ in found], 2) - out).abs().max() < 1e-10
    for i, x in enumerate(whole):
        if x is not None:
            assert (layout.whole([grads[i] for _, grads, *_ in found], 2) - x.grad).abs().max() < 1e-10
    if start is not None:
        assert (sum(g for *_, g, _ in found) - start.grad).abs().max() < 1e-10
    return [wire.traffic for *_, wire in found]


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_equals_the_scan_in_one_place(name: str) -> None:
    for layout in LAYOUTS:
        compare(layout, inputs(name))


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_first_and_the_last_state_have_their_gradients(name: str) -> None:
    state, weights = torch.randn(2, 2, 4, 6, 5, dtype=torch.float64)
    for layout in LAYOUTS[:2]:
        compare(layout, inputs(name), state=state, weigh_state=weights)


@pytest.mark.parametrize("name", MECHANISMS)
def test_packed_sequences_begin_empty_wherever_ranks_are_cut(name: str) -> None:
    for bounds in ([0, 3, 10, 20, 21, N], [0, N], [0, 14, N]):
        for layout in LAYOUTS[:2]:
            compare(layout, inputs(name, batch=1), cu_seqlens=bounds)


@pytest.mark.parametrize("name", MECHANISMS)
def test_one_gather_forward_and_one_backward_whatever_the_length(name: str) -> None:
    sent = []
    for n in (32, 128):
        layout = Layout.contiguous(n, 4)
        traffic = compare(layout, inputs(name, n=n))
        assert all(t.calls["all_gather"] == 2 and set(t.calls) == {"agreement", "all_gather"} for t in traffic)
        sent.append({t.sent for t in traffic})
    assert sent[0] == sent[1]
    axes, rule = MECHANISMS[name]
    dim, values, maps = 6, 5, 6 if rule else 1 if axes else 0
    number = 3 * 2 * 4 * 8  # to three others; batch, heads, bytes
    assert sent[0] == {number * dim * (values + maps) + number * dim * values}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_the_papers_formulas(ranks: int, causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 3, N, 5, dtype=torch.float64)
    grad, layout = torch.randn_like(v), Layout.contiguous(N, ranks)

    def cut(x):
        return [layout.shard(x, r) for r in range(ranks)]

    outs = oracle.lasp2(cut(q), cut(k), cut(v), causal=causal)
    grads = oracle.lasp2_gradients(cut(q), cut(k), cut(v), cut(grad), causal=causal)

    def rank(wire):
        mine = [layout.shard(x, wire.rank).clone().requires_grad_() for x in (q, k, v)]
        out = scale.scan(*mine, mesh=wire, causal=causal)
        out.backward(layout.shard(grad, wire.rank))
        return out.detach(), [x.grad for x in mine]

    for r, (out, found) in enumerate(simulate(ranks, rank)):
        assert (out - outs[r]).abs().max() < 1e-10
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(found, grads[r], strict=True))
    scores = q @ k.mT
    whole = (scores.tril() if causal else scores) @ v
    assert (layout.whole(outs) - whole).abs().max() < 1e-10


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_give_what_the_authors_code_gives(ranks: int) -> None:
    case = load_file(Path(__file__).parents[1] / "goldens/lasp2/linear_attn.safetensors")
    layout = Layout.contiguous(case["in.q"].shape[1], ranks)

    def rank(wire):
        mine = [layout.shard(case[f"in.{n}"], wire.rank, 1).requires_grad_() for n in "qkv"]
        out = scale.scan(*(x.transpose(1, 2) for x in mine), mesh=wire).transpose(1, 2)
        (out * layout.shard(case["w.y"], wire.rank, 1)).sum().backward()
        return [out.detach(), *(x.grad for x in mine)]

    found = [layout.whole(parts, 1) for parts in zip(*simulate(ranks, rank), strict=True)]
    for ours, name in zip(found, ("out.y", "grad_in.q", "grad_in.k", "grad_in.v"), strict=True):
        assert (ours - case[name]).abs().max() <= 2e-5 * case[name].abs().max()


def test_what_has_no_meaning_is_refused() -> None:
    q, k, v, decay, _ = inputs("retention")

    def error(**keywords):
        with pytest.raises(ValueError) as caught:
            simulate(1, lambda wire: scale.scan(q, k, v, mesh=wire, **keywords))
        return str(caught.value)

    assert "causal=False" in error(causal=False, decay=decay)
    assert "cu_seqlens" in error(cu_seqlens=[0, N])
    assert "whole length" in error(cu_seqlens=[0, N - 1])
