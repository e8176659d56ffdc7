"""The operator: equal to its definition in every corner, and clear about what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import attend, explain, merge
from attnlab.patterns import Causal, Dilated, Documents, Explicit, Neighborhood, PowersOfTwo, Prefix, Sinks, Window
from attnlab.problem import Lookup
from attnlab.weightings import Linear, Relu, Sigmoid, Softmax

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# Half of the queries see nothing.
HALF_DEAD = Window(3) & ~Window(2) & Explicit(torch.arange(12)[:, None].remainder(2).eq(0).expand(12, 12))


def heads(*shape, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def by_hand(q, k, v, seen=None, bias=None, scale=None):
    """softmax(scale·qkᵀ + bias) v, zeros where nothing is seen, one query at a time."""
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = (k[b, h // groups] @ q[b, h, i]) * (q.shape[3] ** -0.5 if scale is None else scale)
                if bias is not None:
                    scores = scores + bias.expand(*q.shape[:3], k.shape[2])[b, h, i]
                keep = torch.ones_like(scores, dtype=torch.bool) if seen is None else seen[i]
                if keep.any():
                    out[b, h, i] = scores[keep].softmax(0) @ v[b, h // groups][keep]
    return out


@pytest.mark.parametrize("backend", ["auto", "dense", "tiles", "reference"])
@pytest.mark.parametrize(("kv_heads", "nq", "nk", "value_dim"), [(4, 9, 9, 8), (2, 5, 11, 8), (1, 11, 5, 3)])
@pytest.mark.parametrize("pattern", [None, Causal(), Window(4)], ids=str)
def test_it_is_its_definition_for_grouped_heads_any_lengths_and_any_value_width(
    pattern, kv_heads, nq, nk, value_dim, backend
):
    q, k, v = heads(2, 4, nq, 8), heads(2, kv_heads, nk, 8), heads(2, kv_heads, nk, value_dim)
    seen = None if pattern is None else pattern.matrix(nq, nk)
    torch.testing.assert_close(attend(q, k, v, pattern=pattern, backend=backend), by_hand(q, k, v, seen))


@pytest.mark.parametrize("backend", ["dense", "tiles", "reference"])
def test_bias_and_scale_enter_before_the_softmax(backend):
    q, k, v = (heads(2, 3, 7, 4) for _ in range(3))
    for shape in ((7, 7), (3, 7, 7), (2, 1, 7, 7), (2, 3, 1, 7), (7,)):
        bias = heads(*shape)
        out = attend(q, k, v, bias=bias, scale=0.3, backend=backend)
        torch.testing.assert_close(out, by_hand(q, k, v, bias=bias.expand(2, 3, 7, 7), scale=0.3))


def test_a_bias_by_index_is_the_same_as_its_tensor():
    q, k, v = (heads(2, 3, 7, 4) for _ in range(3))
    slopes = heads(3)
    tensor = slopes[:, None, None] * (torch.arange(7)[:, None] - torch.arange(7)).abs()
    for pattern in (None, Causal(), Window(2)):
        by_index = attend(q, k, v, pattern=pattern, bias=lambda b, h, i, j: slopes[h] * (i - j).abs())
        torch.testing.assert_close(by_index, attend(q, k, v, pattern=pattern, bias=tensor))


@pytest.mark.parametrize("backend", ["auto", "dense", "tiles", "reference"])
def test_gradients_are_those_of_finite_differences(backend):
    q, k, v = heads(1, 2, 4, 3, grad=True), heads(1, 1, 5, 3, grad=True), heads(1, 1, 5, 2, grad=True)
    bias = heads(2, 4, 5, grad=True)

    def both(q, k, v, bias):
        return attend(q, k, v, pattern=Causal(), bias=bias, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(both, (q, k, v, bias))


def test_a_looked_up_table_and_a_function_that_closes_over_a_parameter_are_trained():
    q, k, v = (heads(1, 2, 12, 4) for _ in range(3))
    table = heads(23, 2, grad=True)

    def row(q, k):
        return k - q + 11

    wanted = None
    for backend in ("reference", "dense", "tiles", "auto"):
        for bias in (Lookup(table, row), lambda b, h, q, k: table[row(q, k), h]):
            out = attend(q, k, v, pattern=Window(5), bias=bias, backend=backend)
            (gradient,) = torch.autograd.grad(out.square().sum(), table)
            wanted = gradient if wanted is None else wanted
            torch.testing.assert_close(gradient, wanted)
    assert wanted.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "dense", "tiles", "reference"])
def test_a_query_without_keys_gives_zeros_and_takes_no_gradient(backend, dtype):
    q, k, v = (heads(2, 2, 12, 8, dtype=dtype, grad=True) for _ in range(3))
    dead = ~HALF_DEAD.matrix(12).any(-1)
    assert dead.any() and not dead.all()
    for keywords in ({}, {"return_lse": True}, {"bias": torch.randn(12, 12, dtype=dtype)}):
        found = attend(q, k, v, pattern=HALF_DEAD, backend=backend, **keywords)
        out, lse = found if "return_lse" in keywords else (found, None)
        assert (out[:, :, dead] == 0).all() and (out[:, :, ~dead] != 0).any()
        loss = out.float().square().sum()
        if lse is not None:
            assert (lse[:, :, dead] == -math.inf).all() and lse[:, :, ~dead].isfinite().all()
            loss = loss + lse[:, :, ~dead].sum()
        grad_q, *others = torch.autograd.grad(loss, (q, k, v))
        assert (grad_q[:, :, dead] == 0).all()
        assert all(bool(g.isfinite().all()) for g in (grad_q, *others))


@pytest.mark.parametrize("backend", ["dense", "tiles", "reference"])
def test_a_bias_of_minus_infinity_hides_a_key_even_every_key(backend):
    q, k, v = (heads(1, 2, 6, 4, grad=True) for _ in range(3))
    bias = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~Window(2).matrix(6), -math.inf)
    bias[3] = -math.inf
    out, lse = attend(q, k, v, bias=bias, return_lse=True, backend=backend)
    torch.testing.assert_close(out.detach(), by_hand(q, k, v, bias > -math.inf).detach())
    torch.testing.assert_close(attend(q, k, v, bias=bias, backend=backend), out)
    assert (lse[:, :, 3] == -math.inf).all()
    gradients = torch.autograd.grad(out.square().sum() + lse[:, :, :3].sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "dense", "tiles"])
def test_each_dtype_stays_within_its_rounding_of_the_oracle(backend, dtype):
    q, k, v = heads(1, 4, 33, 16), heads(1, 2, 33, 16), heads(1, 2, 33, 16)
    low = [x.to(dtype) for x in (q, k, v)]
    for pattern in (None, Causal(), Window(9)):
        out, lse = attend(*low, pattern=pattern, return_lse=True, backend=backend)
        exact, exact_lse = attend(*(x.double() for x in low), pattern=pattern, return_lse=True, backend="reference")
        assert out.dtype is dtype and lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=ROUNDING[dtype])
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=ROUNDING[dtype])


def test_the_fast_path_is_the_slow_one():
    for dtype in DTYPES:
        q, k, v = (heads(2, 3, 20, 8, dtype=dtype) for _ in range(3))
        for pattern in (None, Causal()):
            for scale in (None, 0.2):
                fast = attend(q, k, v, pattern=pattern, scale=scale)
                slow = attend(q, k, v, pattern=pattern, scale=scale, backend="reference")
                torch.testing.assert_close(fast, slow, rtol=0, atol=ROUNDING[dtype])


def test_lse_is_the_log_of_the_denominator():
    q, k, v = (heads(1, 2, 6, 4) for _ in range(3))
    _, lse = attend(q, k, v, scale=1.0, return_lse=True)
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.transpose(-1, -2), -1))


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 19), max_size=4), seed=st.integers(0, 99), window=st.integers(1, 20))
def test_parts_over_disjoint_keys_merge_to_the_whole_with_its_gradient(cuts, seed, window):
    torch.manual_seed(seed)
    q, k, v = (heads(1, 2, 20, 4, grad=True) for _ in range(3))
    pattern = Window(window)
    parts, edges = [], [0, *sorted(cuts), 20]
    for a, b in itertools.pairwise(edges):
        seen = Explicit(pattern.matrix(20)[:, a:b])
        parts.append(attend(q, k[:, :, a:b], v[:, :, a:b], pattern=seen, return_lse=True))
    whole = attend(q, k, v, pattern=pattern, return_lse=True)
    merged = merge(parts)
    weigh = torch.randn_like(whole[0])
    for ours, wanted in zip(merged, whole, strict=True):
        torch.testing.assert_close(ours, wanted)
    losses = [(out * weigh).sum() + (lse * lse).sum() for out, lse in (merged, whole)]
    for ours, wanted in zip(*(torch.autograd.grad(loss, (q, k, v)) for loss in losses), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_merging_parts_in_which_a_query_sees_nothing_leaves_no_nan():
    q, k, v = (heads(1, 2, 12, 4, grad=True) for _ in range(3))
    nothing = Explicit(torch.zeros(12, 12, dtype=torch.bool))
    parts = [attend(q, k, v, pattern=p, return_lse=True) for p in (HALF_DEAD, nothing, HALF_DEAD)]
    out, lse = merge(parts)
    dead = ~HALF_DEAD.matrix(12).any(-1)
    assert (out[:, :, dead] == 0).all() and (lse[:, :, dead] == -math.inf).all()
    # The same keys twice: the same average, and ln 2 more.
    torch.testing.assert_close(out, parts[0][0])
    torch.testing.assert_close(lse[:, :, ~dead], parts[0][1][:, :, ~dead] + math.log(2))
    gradients = torch.autograd.grad(out.square().sum() + lse[:, :, ~dead].sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_merge_names_what_does_not_fit():
    with pytest.raises(ValueError, match="parts must hold at least one"):
        merge([])
    with pytest.raises(ValueError, match=r"lse must have out's shape without the last axis, got \(1, 2, 4\)"):
        merge([(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4))])


@pytest.mark.parametrize("backend", ["dense", "tiles", "reference"])
def test_dropout_drops_weights_and_keeps_their_mean(backend):
    torch.manual_seed(0)
    q, k = (heads(1, 1, 64, 8, dtype=torch.float32) for _ in range(2))
    v = torch.eye(64)[None, None]
    plain = attend(q, k, v, pattern=Window(30), backend=backend)
    dropped = attend(q, k, v, pattern=Window(30), dropout=0.25, backend=backend)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)
    # Of the 1,485 weights, a quarter, give or take five standard deviations.
    seen = Window(30).matrix(64)[None, None]
    assert not kept[~seen].any() and abs(kept[seen].double().mean() - 0.75) < 5 * (0.25 * 0.75 / 1485) ** 0.5


@pytest.mark.parametrize("backend", ["auto", "dense", "tiles", "reference"])
def test_nan_reaches_the_query_that_holds_it_and_those_that_see_it(backend):
    q, k, v = (heads(1, 1, 40, 8, dtype=torch.float32) for _ in range(3))
    q[0, 0, 3, 2] = math.nan
    assert attend(q, k, v, pattern=Causal(), backend=backend)[0, 0, 3].isnan().all()
    v[0, 0, 5] = math.nan
    assert attend(k, k, v, backend=backend).isnan().all()


@pytest.mark.parametrize("weighting", ["sigmoid", "relu", "none", Sigmoid(-2.0), Relu(2), Softmax(1.0)], ids=str)
def test_other_weightings_are_their_definitions(weighting):
    q, k, v = (heads(1, 2, 6, 4) for _ in range(3))
    seen = Causal().matrix(6)
    s = 0.5 * q @ k.transpose(-1, -2)
    masked = s.masked_fill(~seen, -math.inf)
    wanted = {
        "sigmoid": lambda: torch.sigmoid(s - math.log(6)) * seen,
        "relu": lambda: s.relu() / 6 * seen,
        "none": lambda: s * seen,
        Sigmoid(-2.0): lambda: torch.sigmoid(s - 2) * seen,
        Relu(2): lambda: s.relu() ** 2 / 6 * seen,
        Softmax(1.0): lambda: masked.exp() / (masked.exp().sum(-1, keepdim=True) + 1),
    }[weighting]()
    for backend in ("auto", "dense", "tiles", "reference"):
        out = attend(q, k, v, pattern=Causal(), weighting=weighting, backend=backend)
        torch.testing.assert_close(out, wanted @ v)


def test_any_memory_layout_gives_the_same():
    q, k, v = (heads(2, 4, 30, 8) for _ in range(3))
    wanted = attend(q, k, v, pattern=Window(7))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(attend(*turned, pattern=Window(7)), wanted)
    expanded = attend(q, k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1), pattern=Window(7))
    torch.testing.assert_close(expanded, attend(q, k[:, :1], v[:, :1], pattern=Window(7)))


def test_under_autocast_it_takes_mixed_dtypes_and_computes_in_the_lower_one_as_torch_does():
    q, k, v = (heads(1, 2, 30, 8, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for pattern in (None, Causal(), Window(5)):
            out = attend(q, k.bfloat16(), v.bfloat16(), pattern=pattern)
            assert out.dtype is attend(q, k, v, pattern=pattern).dtype is torch.bfloat16
            out, lse = attend(q, k, v, pattern=pattern, return_lse=True)
            exact = attend(*(x.bfloat16().double() for x in (q, k, v)), pattern=pattern, return_lse=True)
            torch.testing.assert_close(out.double(), exact[0], rtol=0, atol=4e-2)
            torch.testing.assert_close(lse.double(), exact[1], rtol=0, atol=4e-2)
        assert attend(*(x.double() for x in (q, k, v)), pattern=Window(5)).dtype is torch.float64


SEEN = [
    None, Causal(), Window(3), Window(2, causal=False), Dilated(3), Sinks(2), Prefix(4), PowersOfTwo(2, 1, 1),
    Neighborhood((12,), 3), Neighborhood((3, 4), (3, 2)), Documents((5, 7)), Explicit(torch.rand(1, 4, 12, 12) < 0.4),
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    left=st.sampled_from(SEEN), right=st.sampled_from(SEEN), how=st.sampled_from(["left", "and", "or", "not"]),
    backend=st.sampled_from(["auto", "dense"]), kv_heads=st.sampled_from([1, 2, 4]), value_dim=st.sampled_from([4, 6]),
    bias=st.sampled_from([None, "tensor", "function"]), weighting=st.sampled_from([None, "sigmoid", Softmax(1.0)]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_random_combinations_equal_the_oracle_with_their_gradients(
    left, right, how, backend, kv_heads, value_dim, bias, weighting, seed
):
    torch.manual_seed(seed)
    pattern = left
    if left is not None and right is not None:
        pattern = {"left": left, "and": left & right, "or": left | right, "not": ~left}[how]
    q, k, v = (heads(2, h, 12, d, grad=True) for h, d in ((4, 4), (kv_heads, 4), (kv_heads, value_dim)))
    table = heads(4, 12, 12, grad=True)
    added = {None: None, "tensor": table, "function": lambda b, h, q, k: table[h, q, k]}[bias]
    inputs = (q, k, v, table) if bias else (q, k, v)
    results = []
    for name in (backend, "reference"):
        out = attend(q, k, v, pattern=pattern, bias=added, weighting=weighting, backend=name)
        results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle)


def test_inputs_are_left_as_they_were():
    q, k, v = (heads(1, 2, 30, 8) for _ in range(3))
    before = [x.clone() for x in (q, k, v)]
    for backend in ("auto", "dense", "tiles", "reference"):
        attend(q, k, v, pattern=Window(5), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_it_is_followed_by_torch_compile_and_export_without_a_break():
    def model(q, k, v):
        return attend(q, k, v, pattern=Window(5)) + attend(q, k, v) + attend(q, k, v, bias=torch.ones(9, 9))

    q, k, v = (heads(1, 2, 9, 8, dtype=torch.float32) for _ in range(3))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), model(q, k, v))

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return model(q, k, v)

    exported = torch.export.export(Module(), (q, k, v)).module()
    torch.testing.assert_close(exported(q, k, v), model(q, k, v))


Q = torch.zeros(2, 4, 6, 8)
BAD = {
    "q is no tensor": (([0.0], Q, Q), {}, TypeError, "q must be a tensor, got list"),
    "k is no tensor": ((Q, None, Q), {}, TypeError, "k must be a tensor, got NoneType"),
    "rank": ((Q[0], Q, Q), {}, ValueError, r"q must have shape \(B, H, Nq, D\), got \(4, 6, 8\)"),
    "rank of all": ((Q[0], Q[0], Q[0]), {}, ValueError, r"q must have shape \(B, H, Nq, D\), got \(4, 6, 8\)"),
    "integers": ((Q.int(), Q.int(), Q.int()), {}, TypeError, "q must be float64, float32, float16 or bfloat16, got"),
    "dtypes": ((Q, Q.double(), Q), {}, TypeError, "k must have q's dtype torch.float32, got torch.float64"),
    "devices": ((Q, Q, Q.to("meta")), {}, ValueError, "v must be on q's device cpu, got meta"),
    "batch": ((Q, Q[:1], Q[:1]), {}, ValueError, "k must have q's batch size 2, got 1"),
    "lengths of k and v": ((Q, Q, Q[:, :, :5]), {}, ValueError, "k and v must agree in batch, heads and length"),
    "head dimension": ((Q, Q[..., :7], Q), {}, ValueError, "k must have q's head dimension 8, got 7"),
    "heads": ((Q, Q[:, :3], Q[:, :3]), {}, ValueError, "k's heads must divide q's heads, got 3 and 4"),
    "empty queries": ((Q[:, :, :0], Q, Q), {}, ValueError, r"q must not be empty, got \(2, 4, 0, 8\)"),
    "empty everything": ((Q[:, :, :0],) * 3, {}, ValueError, r"q must not be empty"),
    "empty keys": ((Q, Q[:, :, :0], Q[:, :, :0]), {}, ValueError, r"k must not be empty"),
    "pattern": ((Q, Q, Q), {"pattern": Q > 0}, TypeError, r"pattern must be a Pattern, got Tensor \(wrap a mask"),
    "grid": ((Q, Q, Q), {"pattern": Neighborhood((3, 3), 3)}, ValueError, "grid 3 × 3 holds 9 tokens, but there are 6"),
    "documents": ((Q, Q, Q), {"pattern": Documents((2, 3))}, ValueError, "lengths sum to 5, but there are 6 queries"),
    "route": ((Q, Q, Q), {"route": "top"}, TypeError, "route must be a Route, got str"),
    "weighting": ((Q, Q, Q), {"weighting": "soft"}, ValueError, "weighting must be a Weighting or one of softmax, sig"),
    "bias shape": ((Q, Q, Q), {"bias": Q[0, 0]}, ValueError, r"bias must be broadcastable .*6, 6\), got \(6, 8"),
    "bias rank": ((Q, Q, Q), {"bias": Q[None]}, ValueError, "bias must be broadcastable"),
    "bias dtype": ((Q, Q, Q), {"bias": torch.ones(6, 6) > 0}, TypeError, "bias must be floating point, got torch.bool"),
    "bias device": ((Q, Q, Q), {"bias": torch.ones(6, 6, device="meta")}, ValueError, "bias must be on q's device cpu"),
    "bias kind": ((Q, Q, Q), {"bias": 1.0}, TypeError, "bias must be a tensor or a function of indices, got float"),
    "bias result": ((Q, Q, Q), {"bias": lambda b, h, q, k: 1.0}, TypeError, "bias must return a tensor, got float"),
    "bias table": ((Q, Q, Q), {"bias": Lookup(torch.ones(3, 2), torch.add)}, ValueError, r"\(rows, H = 4\), got \(3"),
    "dropout": ((Q, Q, Q), {"dropout": 1.0}, ValueError, r"dropout must be a number in \[0, 1\), got 1.0"),
    "scale": ((Q, Q, Q), {"scale": torch.ones(())}, TypeError, "scale must be a number, got a tensor"),
    "lse": ((Q, Q, Q), {"weighting": Linear(), "return_lse": True}, ValueError, "return_lse needs a normalised"),
    "backend": ((Q, Q, Q), {"backend": "fast"}, ValueError, "backend must be auto or one of .*dense.*, got 'fast'"),
    "backend cannot": (
        (Q, Q, Q), {"backend": "flex", "weighting": "relu"}, ValueError, "'flex' does not support this problem: weig"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named_with_what_came_and_what_is_wanted(name):
    arguments, keywords, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        attend(*arguments, **keywords)
    if "backend" not in keywords:
        with pytest.raises(kind, match=message):
            explain(*arguments, **keywords)


def test_torchs_function_is_called_directly_in_the_plain_case(monkeypatch):
    calls = []
    function = F.scaled_dot_product_attention

    def seen(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    monkeypatch.setattr("attnlab.planner.run", None)  # which would make a plan
    attend(Q, Q, Q)
    attend(Q, Q, Q, pattern=Causal())
    assert [c.get("is_causal") for c in calls] == [False, True]


def test_a_function_mode_sees_the_call_as_one():
    calls = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Seen():
        out = attend(Q, Q, Q, pattern=Window(4))
    assert calls == [attend]
    assert torch.equal(out, attend(Q, Q, Q, pattern=Window(4)))
