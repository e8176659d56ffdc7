"""The network whose weights are the state: chunks of matrix products equal gradient descent one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.nn.memory.deep import DeepMemory, course, spans

B, H, T, D = 2, 2, 7, 4
VARIANTS = {
    "matrix": dict(depth=1),
    "two layers": dict(depth=2),
    "three layers of gelu": dict(depth=3, activation="gelu", expansion=1.5),
    "residual": dict(depth=2, residual=True),
    "residual matrix": dict(depth=1, residual=True),
    "bounded": dict(depth=2, residual=True, max_grad_norm=0.7),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str) -> DeepMemory:
    torch.manual_seed(0)
    memory = DeepMemory(H, D, **VARIANTS[variant]).double()
    for p in memory.parameters():
        nn.init.normal_(p, std=0.5)
    return memory


def inputs(size: int = T) -> dict[str, Tensor]:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, B, H, size, D, dtype=torch.float64)
    rate, keep, push = torch.rand(3, B, H, size, dtype=torch.float64)
    return dict(q=q, k=k, v=v, rate=0.1 * rate, keep=keep, push=push)


def one_by_one(memory: DeepMemory, g: dict[str, Tensor], writes: Tensor | None = None, momentum=None) -> tuple:
    """M and S token by token, with autograd's gradients of the loss at the first weights."""
    anchor = memory.initial(B, torch.float64)
    weights, out = anchor, []
    momentum = tuple(map(torch.zeros_like, weights)) if momentum is None else momentum
    for t in range(g["q"].shape[2]):
        q, k, v = (g[n][:, :, t : t + 1] for n in "qkv")
        at = tuple(w.detach().clone().requires_grad_() for w in anchor)
        gradients = torch.autograd.grad((memory.read(k, at) - v).square().sum(), at)
        length = sum(u.square().sum((-1, -2), keepdim=True) for u in gradients).sqrt()
        rate, keep, push = (g[n][:, :, t, None, None] for n in ("rate", "keep", "push"))
        rate = rate / (1 + (length / memory.max_grad_norm) ** 2).sqrt()
        momentum = tuple(push * s - rate * u for s, u in zip(momentum, gradients, strict=True))
        write = 1.0 if writes is None else writes[t]
        weights = tuple(keep * w + write * s for w, s in zip(weights, momentum, strict=True))
        out.append(memory.read(q, weights))
    return torch.cat(out, 2), weights, momentum


def in_one_step(memory: DeepMemory, g: dict[str, Tensor], writes: Tensor | None = None, momentum=None) -> tuple:
    anchor = memory.initial(B, torch.float64)
    way = course(g["keep"].log(), g["push"].log(), writes)
    return memory.step(g["q"], g["k"], g["v"], g["rate"].unsqueeze(-1), way, anchor, anchor, momentum)


def same(ours: tuple, wanted: tuple) -> None:
    torch.testing.assert_close(ours[0], wanted[0], rtol=0, atol=1e-11)
    for mine, theirs in zip((*ours[1], *ours[2]), (*wanted[1], *wanted[2]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@variants
def test_a_step_of_many_tokens_equals_descent_token_by_token(variant: str):
    memory, given = make(variant), inputs()
    momentum = tuple(torch.randn_like(w) for w in memory.initial(B, torch.float64))
    with torch.no_grad():
        ours = in_one_step(memory, given, momentum=momentum)
    same(ours, one_by_one(memory, given, momentum=momentum))


@variants
def test_updates_that_wait_for_the_end_of_a_chunk(variant: str):
    memory, given = make(variant), inputs()
    writes = torch.tensor([0.0, 0, 1, 0, 0, 1, 0], dtype=torch.float64)
    with torch.no_grad():
        ours = in_one_step(memory, given, writes)
    same(ours, one_by_one(memory, given, writes))


def test_forgetting_everything_is_exact():
    """α = 1 and η = 0: a logarithm of −inf, after which W_t is the last update alone."""
    memory, given = make("two layers"), inputs()
    given["keep"], given["push"] = torch.zeros_like(given["keep"]), torch.zeros_like(given["push"])
    with torch.no_grad():
        ours = in_one_step(memory, given)
    same(ours, one_by_one(memory, given))


def test_gradients_stay_finite_where_everything_is_forgotten():
    log = torch.tensor([-0.5, -torch.inf, -0.1, 0.0], requires_grad=True)
    spans(log).sum().backward()
    assert log.grad.isfinite().all()


def test_spans_are_products_between_two_tokens():
    factors = torch.tensor([0.5, 0.25, 0.0, 2.0])
    wanted = torch.tensor([[1, 0, 0, 0], [0.25, 1, 0, 0], [0, 0, 1, 0], [0, 0, 2, 1.0]])
    torch.testing.assert_close(spans(factors.log()), wanted)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_slopes_are_the_derivatives_of_the_activations(activation: str):
    memory = DeepMemory(1, 2, activation=activation)
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(memory.act(x).sum(), x)
    torch.testing.assert_close(memory.slope(x), wanted)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        (dict(depth=0), "depth must be"),
        (dict(activation="relu"), "activation must be"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be"),
        (dict(expansion=0.1), "expansion"),
    ],
)
def test_bad_arguments_are_named(keywords: dict, words: str):
    with pytest.raises(ValueError, match=words):
        DeepMemory(1, 4, **keywords)
