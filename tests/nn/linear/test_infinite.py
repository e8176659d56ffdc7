"""Infinite self-attention: the equations, its norm, what scaling does, the linear form, and putting it into models."""

import copy

import pytest
import torch
from torch import nn

from attnlab.cost import count_flops
from attnlab.nn.linear.infinite import InfiniteAttention, LinearInfiniteAttention, centrality, spectral_attention
from attnlab.nn.multihead import MultiHead
from attnlab.recipes.infinite import InTorch, convert

D = torch.float64


def by_hand(module: InfiniteAttention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Head by head, from the equations."""
    out = []
    wq, wk, wv = module.wqkv.weight.chunk(3)
    bq, bk, bv = module.wqkv.bias.chunk(3)
    rho, d = torch.sigmoid(module.rho_logit), module.head_dim
    for b in range(len(x)):
        heads = []
        for h in range(module.heads):
            of = slice(h * d, (h + 1) * d)
            q, k = (x[b] @ wq[of].T + bq[of]) / d**0.5, (context[b] @ wk[of].T + bk[of]) / d**0.5
            v = context[b] @ wv[of].T + bv[of]
            if isinstance(module, LinearInfiniteAttention):
                energy = q.norm(dim=-1)
                asked = (energy / (energy.sum() + 1e-6)) @ q
                a = (k @ asked).clamp(min=0)
                heads.append((rho * a / (a.sum() + 1e-6) @ v).expand(len(q), -1))
            else:
                a = (q @ k.T).clamp(min=0)
                heads.append(rho * a / (a.square().sum().sqrt() + 1e-6) @ v)
        out.append(torch.cat(heads, -1))
    return module.wo(torch.stack(out))


def shaken(kind: type, dim: int = 8, heads: int = 2, **options) -> InfiniteAttention:
    module = kind(dim, heads=heads, **options).to(D)
    for p in module.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return module


BOTH = [InfiniteAttention, LinearInfiniteAttention]


@pytest.mark.parametrize("kind", BOTH)
def test_equals_the_equations(kind):
    module, x, context = shaken(kind), torch.randn(2, 7, 8, dtype=D), torch.randn(2, 5, 8, dtype=D)
    torch.testing.assert_close(module(x), by_hand(module, x, x))
    torch.testing.assert_close(module(x, context), by_hand(module, x, context))


@pytest.mark.parametrize("kind", BOTH)
def test_weights_are_those_that_mix_the_values(kind):
    module, x = shaken(kind), torch.randn(2, 7, 8, dtype=D)
    v = module.qkv(x)[2]
    torch.testing.assert_close(module.merge((module.weights(x) @ v).expand_as(v)), module(x))


def test_many_rows_at_a_time_are_the_whole_norm():
    q, k, v = (torch.randn(1, 2, 600, 4, dtype=D, requires_grad=True) for _ in range(3))
    whole = spectral_attention(q, k, v, 0.9)
    with torch.no_grad():
        torch.testing.assert_close(spectral_attention(q, k, v, 0.9), whole)


def test_the_matrix_is_of_norm_rho_and_not_negative():
    module, x = shaken(InfiniteAttention), torch.randn(2, 7, 8, dtype=D)
    weights = module.weights(x)
    assert weights.min() >= 0
    norms = weights.square().sum((-2, -1)).sqrt()
    torch.testing.assert_close(norms, module.rho.expand_as(norms), rtol=1e-5, atol=0)
    assert (norms < 1).all()


def test_scaling_values_scales_and_scaling_queries_does_nothing():
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=D) for _ in range(3))
    y = spectral_attention(q, k, v, 0.9)
    torch.testing.assert_close(spectral_attention(q, k, 3 * v, 0.9), 3 * y)
    torch.testing.assert_close(spectral_attention(5 * q, k, v, 0.9), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(centrality(5 * q, k), centrality(q, k), rtol=1e-5, atol=1e-6)


def test_the_linear_form_tells_every_token_the_same_whatever_the_order_of_keys():
    module, x, context = shaken(LinearInfiniteAttention), torch.randn(2, 7, 8, dtype=D), torch.randn(2, 5, 8, dtype=D)
    y = module(x, context)
    assert bool((y == y[:, :1]).all())
    torch.testing.assert_close(module(x, context.flip(1)), y)


def test_where_nothing_is_alike_the_output_is_zero():
    q = torch.ones(1, 1, 3, 4)
    for y in (spectral_attention(q, -q, q, 0.9), centrality(q, -q)):
        assert not y.any()
    grown = q.clone().requires_grad_()
    spectral_attention(grown, -q, q, 0.9).sum().backward()
    assert bool(grown.grad.isfinite().all())


def test_rho_is_learned_or_stays():
    x = torch.randn(2, 5, 8)
    for kind in BOTH:
        learned, kept = kind(8, heads=2), kind(8, heads=2, train_rho=False)
        for module in (learned, kept):
            module(x).pow(2).sum().backward()
        assert learned.rho_logit.grad.abs() > 0 and kept.rho_logit.grad is None
        torch.testing.assert_close(kept.rho.detach(), torch.tensor(0.95))


def test_the_linear_form_does_not_project_every_token():
    x = torch.randn(1, 512, 64)
    with torch.no_grad():
        linear, softmax = (count_flops(kind(64, heads=4), x) for kind in (LinearInfiniteAttention, MultiHead))
    assert linear < 1.4 * 2 * 512 * 64**2 < softmax / 4


class Timms(nn.Module):
    """Attention as timm's, as far as a conversion looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)


@pytest.mark.parametrize("linear", [False, True])
def test_converting_keeps_the_projections(linear):
    layers = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), MultiHead(8, heads=2, bias=True), Timms()
    )
    before, x = copy.deepcopy(layers), torch.randn(2, 5, 8)
    assert convert(layers, linear=linear) == 3
    for qkv, out, new in (
        (before[0].self_attn.in_proj_weight, before[0].self_attn.out_proj.weight, layers[0].self_attn.inner),
        (before[1].wqkv.weight, before[1].wo.weight, layers[1]),
        (before[2].qkv.weight, before[2].proj.weight, layers[2]),
    ):
        assert isinstance(new, LinearInfiniteAttention) is linear
        assert torch.equal(new.wqkv.weight, qkv) and torch.equal(new.wo.weight, out)
    with torch.no_grad():  # where torch would take a way of its own around the module
        found = layers.eval()[0](x)
        y = before[0].norm1(x + layers[0].self_attn.inner(x))
        torch.testing.assert_close(found, before[0].norm2(y + before[0]._ff_block(y)))


def test_torchs_call_takes_three_inputs_in_either_layout_and_no_mask():
    inner = shaken(InfiniteAttention)
    q, k, v = torch.randn(2, 3, 8, dtype=D), torch.randn(2, 5, 8, dtype=D), torch.randn(2, 5, 8, dtype=D)
    y, weights = InTorch(inner, True)(q, k, v, need_weights=True)
    torch.testing.assert_close(weights, inner.weights(q, k).mean(1))
    other, _ = InTorch(inner, False)(*(t.transpose(0, 1) for t in (q, k, v)))
    torch.testing.assert_close(other.transpose(0, 1), y)
    torch.testing.assert_close(InTorch(inner, True)(q, k, k)[0], inner(q, k))
    with pytest.raises(ValueError, match="takes no mask"):
        InTorch(inner, True)(q, k, v, is_causal=True)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"rho must be in \(0, 1\), got 1"):
        InfiniteAttention(8, heads=2, rho=1.0)
    with pytest.raises(ValueError, match="causal must be False"):
        LinearInfiniteAttention(8, heads=2, causal=True)
    with pytest.raises(ValueError, match="model must have some attention to convert"):
        convert(nn.Sequential(nn.Linear(2, 2)))
