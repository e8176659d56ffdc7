"""The scan: its forms agree with each other, with independent transcriptions, and in float32 under any decay."""

import itertools
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from attnlab.cost import count_flops, fit_growth
from attnlab.scan import scan

KINDS = {
    "linear attention": (None, False),
    "retention": ("head", False),
    "gated linear attention": ("channel", False),
    "delta rule": (None, True),
    "gated delta rule": ("head", True),
    "kda": ("channel", True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def problem(kind: str, n: int, *, batch=2, heads=4, key_heads=2, dk=5, dv=3, dtype=torch.float64, seed=0) -> dict:
    """Random inputs of `scan` for one of KINDS."""
    random = torch.Generator().manual_seed(seed)
    decay, beta = KINDS[kind]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    inputs = {
        "q": draw(batch, key_heads, n, dk),
        "k": normalize(draw(batch, key_heads, n, dk), dim=-1),
        "v": draw(batch, heads, n, dv),
        "state": draw(batch, heads, dk, dv),
    }
    if decay:
        inputs["decay"] = -draw(batch, heads, n, *([dk] if decay == "channel" else [])).abs()
    if beta:
        inputs["beta"] = draw(batch, heads, n).sigmoid()
    return inputs


def everything(inputs: dict, **keywords) -> dict[str, Tensor]:
    """Output, last state, and the gradient of a random functional of both to every input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out, state = scan(**leaves, **keywords)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in (out, state)]
    grads = torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), list(leaves.values()))
    return {"out": out, "state": state, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, x in wanted.items():
        error = (got[name].double() - x.double()).abs().max() / x.double().abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@kinds
@pytest.mark.parametrize(("n", "chunk"), [(1, 64), (3, 2), (37, 7), (37, 16), (64, 64), (70, 64), (130, 1)])
def test_chunked_equals_recurrent_in_outputs_and_gradients(kind, n, chunk):
    inputs = problem(kind, n)
    wanted = everything(inputs, scale=0.3, backend="recurrent")
    assert_same(everything(inputs, scale=0.3, backend="chunked", chunk=chunk), wanted, 1e-11)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    n=st.integers(1, 80),
    chunk=st.integers(1, 100),
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 2),
    dk=st.integers(1, 9),
    dv=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_chunked_equals_recurrent_for_any_shape(kind, n, chunk, batch, key_heads, groups, dk, dv, seed):
    shape = dict(batch=batch, heads=key_heads * groups, key_heads=key_heads, dk=dk, dv=dv, seed=seed)
    inputs = problem(kind, n, **shape)
    wanted = everything(inputs, backend="recurrent")
    assert_same(everything(inputs, backend="chunked", chunk=chunk), wanted, 1e-9)


def test_kda_equals_the_product_of_its_transition_matrices():
    """o_t = Σ_j q_tᵀ [Π_{l=t…j+1} (I − β_l k_l k_lᵀ) diag(e^g_l)] β_j k_j v_jᵀ, written out pair by pair."""
    x = problem("kda", 12, batch=1, heads=1, key_heads=1)
    q, k, v, g, beta = (x[name][0, 0] for name in ("q", "k", "v", "decay", "beta"))
    step = [(torch.eye(5).double() - beta[t] * torch.outer(k[t], k[t])) @ torch.diag(g[t].exp()) for t in range(12)]
    wanted = torch.zeros(12, 3, dtype=torch.float64)
    for t in range(12):
        carried = torch.eye(5, dtype=torch.float64)
        for j in range(t, -1, -1):
            wanted[t] += q[t] @ carried @ (beta[j] * torch.outer(k[j], v[j]))
            carried = carried @ step[j]
        wanted[t] += q[t] @ carried @ x["state"][0, 0]
    for backend in ("recurrent", "chunked"):
        torch.testing.assert_close(scan(**x, backend=backend, chunk=4)[0][0, 0], wanted, rtol=0, atol=1e-12)


def test_retention_equals_masked_attention():
    x = problem("retention", 20, heads=2)
    total = x["decay"].cumsum(-1)
    weights = (total.unsqueeze(-1) - total.unsqueeze(-2)).exp().tril()
    wanted = (x["q"] @ x["k"].mT * weights) @ x["v"]
    del x["state"]
    torch.testing.assert_close(scan(**x, backend="chunked", chunk=8)[0], wanted, rtol=0, atol=1e-12)


def test_one_decay_for_all_channels_is_the_gated_delta_rule():
    x = problem("gated delta rule", 50)
    same = {**x, "decay": x["decay"].unsqueeze(-1).expand(-1, -1, -1, 5)}
    torch.testing.assert_close(scan(**same, backend="chunked"), scan(**x, backend="chunked"), rtol=0, atol=1e-12)


def test_delta_rule_recalls_orthonormal_keys_exactly_and_overwrites_them():
    keys = torch.eye(16, dtype=torch.float64).view(1, 1, 16, 16)
    old, new = torch.randn(2, 1, 1, 16, 4, dtype=torch.float64)
    k, v = torch.cat([keys, keys], 2), torch.cat([old, new], 2)
    beta, decay = torch.ones(1, 1, 32, dtype=torch.float64), torch.zeros(1, 1, 32, 16, dtype=torch.float64)
    out, state = scan(k, k, v, decay=decay, beta=beta, backend="chunked", chunk=8)
    torch.testing.assert_close(out, v, rtol=0, atol=1e-14)
    torch.testing.assert_close(keys @ state, new, rtol=0, atol=1e-14)


@kinds
@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_states_of_prefixes_compose(kind, backend):
    x = problem(kind, 45)
    state, outs = x.pop("state"), []
    whole, last = scan(**x, state=state, backend=backend, chunk=16)
    for start, stop in itertools.pairwise((0, 1, 17, 33, 45)):
        out, state = scan(**{n: t[:, :, start:stop] for n, t in x.items()}, state=state, backend=backend, chunk=16)
        outs.append(out)
    torch.testing.assert_close((torch.cat(outs, 2), state), (whole, last), rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_packed_sequences_equal_separate_ones(kind, backend):
    bounds = [0, 5, 5, 38, 70]
    x = problem(kind, 70, batch=1)
    x["state"] = torch.randn(4, 4, 5, 3, dtype=torch.float64)
    got = everything(x, cu_seqlens=torch.tensor(bounds), backend=backend, chunk=16)
    pieces = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            torch.testing.assert_close(got["state"][number], x["state"][number])
            continue
        piece = {n: t[:, :, start:stop] for n, t in x.items() if n != "state"}
        out, state = scan(**piece, state=x["state"][number : number + 1], backend="recurrent")
        torch.testing.assert_close(got["state"][number], state[0], rtol=0, atol=1e-12)
        pieces.append(out)
    torch.testing.assert_close(got["out"], torch.cat(pieces, 2), rtol=0, atol=1e-12)
    assert_same(got, everything(x, cu_seqlens=bounds, backend="recurrent"), 1e-11)


def strong(kind: str, n: int) -> Tensor:
    """Log decays from none to complete: −0.001, −3, −40, −10⁴ and −∞ in random order."""
    random = torch.Generator().manual_seed(2)
    shape = (1, 1, n, 8) if KINDS[kind][0] == "channel" else (1, 1, n)
    choice = torch.randint(0, 40, shape, generator=random)
    values = torch.tensor([-1e-3] * 32 + [-3.0] * 5 + [-40.0, -1e4, -torch.inf])
    return values[choice]


@pytest.mark.parametrize("kind", ["retention", "gated linear attention", "gated delta rule", "kda"])
def test_float32_under_any_decay_equals_the_float64_oracle_over_4096_steps(kind):
    x = problem(kind, 4096, batch=1, heads=1, key_heads=1, dk=8, dv=4, dtype=torch.float32)
    x["decay"] = strong(kind, 4096)
    got = everything(x, backend="chunked")
    assert all(t.isfinite().all() for t in got.values())
    wanted = everything({n: t.double() for n, t in x.items()}, backend="recurrent")
    assert_same(got, wanted, 5e-6)


@pytest.mark.parametrize("value", [-1.0, -20.0, -90.0, -1e30])
def test_a_decay_near_zero_at_every_step_stays_finite(value):
    x = problem("kda", 4096, batch=1, heads=1, key_heads=1, dk=8, dv=4, dtype=torch.float32)
    x["decay"] = torch.full_like(x["decay"], value)
    got = everything(x, backend="chunked")
    assert all(t.isfinite().all() for t in got.values())
    wanted = everything({n: t.double() for n, t in x.items()}, backend="chunked", chunk=4)
    for name, x in wanted.items():
        torch.testing.assert_close(got[name].double(), x, rtol=0, atol=5e-6 * max(1.0, x.abs().max().item()))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(kind, dtype):
    x = problem(kind, 300, dtype=dtype)
    out, state = scan(**x, backend="chunked")
    wanted, last = scan(**{n: t.double() for n, t in x.items()}, backend="recurrent")
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    torch.testing.assert_close(state.double(), last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@kinds
def test_autocast_changes_nothing(kind):
    x = problem(kind, 40, dtype=torch.float32)
    wanted = everything(x, backend="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything(x, backend="chunked")
    assert_same(got, wanted, 0.0)


@kinds
def test_gradients_equal_finite_differences(kind):
    x = {n: t.requires_grad_() for n, t in problem(kind, 6, batch=1, heads=2, key_heads=1, dk=2, dv=2).items()}
    names = list(x)
    call = lambda *tensors: scan(**dict(zip(names, tensors, strict=True)), backend="chunked", chunk=4)  # noqa: E731
    assert torch.autograd.gradcheck(call, list(x.values()))


@kinds
def test_many_rows_are_worked_on_in_groups(kind, monkeypatch):
    x = problem(kind, 40)
    wanted = everything(x, backend="chunked", chunk=8)
    monkeypatch.setattr(import_module("attnlab.scan.chunked"), "TOKENS_AT_A_TIME", 24)
    assert_same(everything(x, backend="chunked", chunk=8), wanted, 1e-12)


def test_flops_grow_linearly():
    def cost(n: int) -> int:
        x = problem("kda", n, batch=1)
        return count_flops(lambda: everything(x, backend="chunked", chunk=16))

    lengths = [64, 128, 256, 512]
    assert fit_growth(lengths, [cost(n) for n in lengths]) == pytest.approx(1.0, abs=0.02)


def test_nan_inputs_propagate_forward_only_from_their_chunk_on():
    x = problem("kda", 40)
    x["v"][:, :, 20] = torch.nan
    out, state = scan(**x, backend="chunked", chunk=16)
    assert out[:, :, :16].isfinite().all()
    assert out[:, :, 20:].isnan().all()
    assert state.isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, "q must have 4 dimensions"),
        ({"q": torch.zeros(2, 2, 9, 5)}, TypeError, "share one dtype"),
        ({"q": torch.zeros(2, 2, 8, 5, dtype=torch.float64)}, ValueError, "q and k must have the same shape"),
        ({"v": torch.zeros(2, 3, 9, 3, dtype=torch.float64)}, ValueError, "divide v's 3 heads"),
        ({"v": torch.zeros(2, 4, 8, 3, dtype=torch.float64)}, ValueError, "v must share q's batch and tokens"),
        ({"decay": torch.zeros(2, 4, 9, 4)}, ValueError, "decay must have shape"),
        ({"decay": torch.full((2, 4, 9), 0.5)}, ValueError, "decay is the logarithm"),
        ({"beta": torch.zeros(2, 2, 9)}, ValueError, "beta must have shape"),
        ({"beta": torch.zeros(2, 4, 9, dtype=torch.long)}, TypeError, "beta must be a floating-point tensor"),
        ({"state": torch.zeros(2, 4, 3, 5)}, ValueError, "state must have shape"),
        ({"state": torch.zeros(2, 4, 5, 3, device="meta")}, ValueError, "on meta"),
        ({"chunk": 0}, ValueError, "chunk must be a positive integer"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"cu_seqlens": [0, 9]}, ValueError, "a batch of 2"),
        ({"beta": 0.5}, TypeError, "beta must be a tensor"),
    ],
)
def test_bad_input_is_named(change, error, words):
    with pytest.raises(error, match=words):
        scan(**{**problem("kda", 9), **change})


@pytest.mark.parametrize(
    "bounds", [[0], [1, 9], [0, 8], [0, 6, 4, 9], torch.tensor([[0, 9]]), torch.tensor([0.0, 9.0])]
)
def test_malformed_cu_seqlens_is_named(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        scan(**problem("kda", 9, batch=1), cu_seqlens=bounds)


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        scan(**problem("kda", 0))
