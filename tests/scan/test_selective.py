"""The selective scan: the oracle by its formula, the fast form by the oracle, and what a step of zero does."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import attnlab
from attnlab.cost import count_flops
from attnlab.scan.selective import selective_scan

B, N, C, S = 2, 23, 5, 4


def inputs(length: int = N) -> dict[str, Tensor]:
    torch.manual_seed(0)
    given = dict(
        x=torch.randn(B, length, C), delta=torch.rand(B, length, C), a=-4 * torch.rand(C, S),
        b=torch.randn(B, length, S), c=torch.randn(B, length, S), skip=torch.randn(C), state=torch.randn(B, C, S),
    )  # fmt: skip
    return {name: t.double().requires_grad_() for name, t in given.items()}


def run(given: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
    positional = [given[n] for n in ("x", "delta", "a", "b", "c")]
    return selective_scan(*positional, skip=given.get("skip"), state=given.get("state"), backend=backend)


def by_hand(g: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Number by number from the discretised equations, arXiv 2312.00752, equation 2 with its simplified B."""
    y, h = torch.zeros(B, N, C, dtype=torch.float64), g["state"].clone()
    for i in range(B):
        for t in range(N):
            for ch in range(C):
                d = g["delta"][i, t, ch]
                for s in range(S):
                    h[i, ch, s] = torch.exp(d * g["a"][ch, s]) * h[i, ch, s] + d * g["b"][i, t, s] * g["x"][i, t, ch]
                y[i, t, ch] = (g["c"][i, t] * h[i, ch]).sum() + g["skip"][ch] * g["x"][i, t, ch]
    return y, h


@pytest.mark.parametrize("backend", ["recurrent", "blocked"])
def test_equals_the_equations_number_by_number(backend: str):
    with torch.no_grad():
        given = inputs()
        for ours, wanted in zip(run(given, backend), by_hand(given), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens_per_block", [1, 4, 100])
def test_the_blocked_form_has_the_gradients_of_the_oracle(tokens_per_block: int, monkeypatch: pytest.MonkeyPatch):
    module = sys.modules[selective_scan.__module__]
    monkeypatch.setattr(module, "NUMBERS_AT_A_TIME", tokens_per_block * B * C * S)
    found = []
    for backend in ("recurrent", "blocked"):
        given = inputs()
        y, last = run(given, backend)
        torch.manual_seed(1)
        loss = (y * torch.randn(y.shape)).sum() + (last * torch.randn(last.shape)).sum()
        found.append([y, last, *torch.autograd.grad(loss, list(given.values()))])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-11)


def test_pieces_with_the_state_between_equal_the_whole():
    given = {n: t.detach() for n, t in inputs().items()}
    whole, last = run(given, "auto")
    state, out, done = given["state"], [], 0
    for size in (1, 9, 1, 12):
        part = {n: t[:, done : done + size] if n in ("x", "delta", "b", "c") else t for n, t in given.items()}
        y, state = run({**part, "state": state}, "auto")
        out.append(y)
        done += size
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["recurrent", "blocked"])
def test_a_step_of_zero_leaves_the_state_as_it_was(backend: str):
    given = {n: t.detach() for n, t in inputs().items()}
    given["delta"] = torch.zeros_like(given["delta"])
    assert torch.equal(run(given, backend)[1], given["state"])


def test_half_precision_accumulates_in_float32():
    given = {n: t.detach().bfloat16() for n, t in inputs().items()}
    y, state = run(given, "blocked")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(x=torch.zeros(B, N)), ValueError, "x must have shape"),
        (dict(a=torch.zeros(C + 1, S)), ValueError, "one row per channel"),
        (dict(b=torch.zeros(B, N, S + 1)), ValueError, "b must have shape"),
        (dict(state=torch.zeros(B, S, C)), ValueError, "state must have shape"),
        (dict(delta=torch.zeros(B, N, C, dtype=torch.long)), TypeError, "delta must be a floating-point"),
        (dict(c=[1.0]), TypeError, "c must be a tensor"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        run({**inputs(), **change}, "auto")


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend must be"):
        run(inputs(), "fast")


@pytest.mark.parametrize("name", ["mamba", "kda", "linear"])
def test_on_the_meta_device_shapes_and_flops_are_those_of_numbers(name: str):
    module, x = attnlab.build(name, 32, causal=True), torch.randn(1, 80, 32)
    flops = count_flops(module, x)
    assert flops > 0
    assert module.to("meta")(x.to("meta")).shape == x.shape
    assert count_flops(module, x.to("meta")) == flops
