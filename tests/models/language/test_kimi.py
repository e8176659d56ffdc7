"""Kimi Linear: its sizes, its hybrid of layers, decoding from its states, and its parts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from attnlab.cards import build, describe
from attnlab.models.language.kimi import KimiLinear
from attnlab.models.skeletons.decoder import SwiGLU
from attnlab.nn.cache import numbers
from attnlab.nn.channel.moe import MoE
from attnlab.nn.linear.kda import KDAState, KimiDeltaAttention
from attnlab.nn.softmax.mla import LatentAttention
from attnlab.patterns import Causal, Window


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiny() -> KimiLinear:
    torch.manual_seed(0)
    return build("kimi_linear", **describe("kimi_linear").sample).double().eval()


def test_the_48b_model_has_the_authors_sizes():
    """49.12 billion parameters, 39.51 million in a KDA layer and 29.11 million in a latent attention layer."""
    with torch.device("meta"):
        model = build("kimi_linear_48b_a3b")
    assert round(count(model) / 1e9, 2) == 49.12
    kinds = [type(block.mixer) for block in model.blocks]
    assert [i + 1 for i, kind in enumerate(kinds) if kind is LatentAttention] == [4, 8, 12, 16, 20, 24, 27]
    assert kinds.count(KimiDeltaAttention) == 20
    assert round(count(model.blocks[0].mixer) / 1e6, 2) == 39.51
    assert round(count(model.blocks[3].mixer) / 1e6, 2) == 29.11
    assert [type(block.mlp) for block in model.blocks] == [SwiGLU] + [MoE] * 26


def test_about_three_billion_parameters_work_on_a_token():
    with torch.device("meta"):
        model = build("kimi_linear_48b_a3b")
    idle = sum(p.numel() for block in model.blocks[1:] for p in block.mlp.experts.parameters()) * (256 - 8) // 256
    assert 2.9e9 < count(model) - idle - model.embedding.weight.numel() < 3.3e9


def test_decoding_from_the_states_equals_the_whole_text():
    model, ids = tiny(), torch.randint(64, (2, 20))
    with torch.no_grad():
        whole, state, outs = model(ids), model.initial_state(2), []
        for piece in ids.split([7, 1, 1, 4, 7], 1):
            out, state = model(piece, state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=1e-10)


def test_generating_with_the_states_equals_generating_without():
    model, ids = tiny(), torch.randint(64, (2, 5))
    with_states = model.generate(ids, 6, temperature=0)
    assert torch.equal(with_states, model.generate(ids, 6, temperature=0, cached=False))


def test_only_the_latent_layers_keep_something_per_token():
    """rank + shared_dim = 12 float64 numbers for each token in the one latent layer; the others stay as they are."""
    model = tiny()

    def kept(n: int) -> tuple[int, int]:
        with torch.no_grad():
            _, state = model(torch.randint(64, (1, n)), model.initial_state(1))
        return sum(numbers(layer) for layer in state.layers if isinstance(layer, KDAState)), state.layers[
            3
        ].bytes_per_token()

    assert kept(3) == kept(40) == (kept(3)[0], 12 * 8)


def test_the_48b_models_cache_is_a_quarter_of_that_of_latent_attention_in_every_layer():
    """7 of 27 layers keep something per token (the paper: up to 75% less cache), 576 numbers each, where full attention
    of 32 heads of 128 would keep 8,192. The states of the other layers are worth 722 tokens of latent attention in all
    layers, or 51 of full attention."""
    arguments = {**describe("kimi_linear_48b_a3b").sizes["kimi_linear_48b_a3b"].arguments, "experts": 8}
    with torch.device("meta"):
        hybrid = KimiLinear(**arguments)
        latent = KimiLinear(**{**arguments, "full": range(27)})
    card, million = describe("kimi_linear"), 2**20

    def per_token(model: KimiLinear) -> int:
        return card.state_numbers(model, 1) - card.state_numbers(model, 0)

    assert per_token(hybrid) == 7 * 576
    assert per_token(latent) == 27 * 576
    full = 27 * 2 * 32 * 128
    assert card.state_numbers(hybrid, million) < 0.262 * card.state_numbers(latent, million)
    assert card.state_numbers(hybrid, million) < 0.0185 * full * million
    constant = card.state_numbers(hybrid, 0)
    assert round(constant / (27 * 576)) == 722
    assert round(constant / full) == 51


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="full names layers from 0"):
        KimiLinear(**{**describe("kimi_linear").sample, "full": (4,)})


def latent(**keywords) -> LatentAttention:
    torch.manual_seed(0)
    sizes = dict(heads=3, head_dim=5, shared_dim=4, value_dim=6, rank=7)
    return LatentAttention(12, **{**sizes, **keywords}).double().eval()


def test_latent_attention_equals_its_formula_head_by_head():
    m, x = latent(causal=True), torch.randn(2, 9, 12, dtype=torch.float64)
    c, s = (x @ m.wdown.weight.T).split([7, 4], -1)
    c = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    heads = []
    for h in range(3):
        k, v = (c @ m.wup.weight[11 * h : 11 * (h + 1)].T).split([5, 6], -1)
        q, r = (x @ m.wq.weight[9 * h : 9 * (h + 1)].T).split([5, 4], -1)
        scores = (q @ k.mT + r @ s.mT) / 3  # √(5 + 4)
        heads.append(scores.masked_fill(~Causal().matrix(9), -torch.inf).softmax(-1) @ v)
    torch.testing.assert_close(m(x), torch.cat(heads, -1) @ m.wo.weight.T)


@pytest.mark.parametrize("shared_dim", [0, 4])
@pytest.mark.parametrize("pattern", [None, Window(3)])
def test_the_absorbed_form_equals_the_expanded_one(shared_dim: int, pattern: Window | None):
    m, x = latent(causal=True, shared_dim=shared_dim), torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        state, outs = m.initial_state(2), []
        for piece in x.split([4, 1, 3, 1], 1):
            y, state = m(piece, pattern=pattern, state=state)
            outs.append(y)
        torch.testing.assert_close(torch.cat(outs, 1), m(x, pattern=pattern))


def experts_one_by_one(m: MoE, x: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Every token through every expert, weighted by what the router's formula gives."""
    scores = torch.sigmoid(x @ m.router.weight.T)
    choice = scores + m.router.bias
    choice = choice if allowed is None else choice.masked_fill(~allowed, -torch.inf)
    picked = torch.zeros_like(scores).scatter(-1, choice.topk(m.router.active, -1).indices, 1.0)
    weights = scores * picked
    weights = m.router.scaling * weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e, (w13, w2) in enumerate(zip(m.experts.w13, m.experts.w2, strict=True)):
        gate, up = (x @ w13.T).chunk(2, -1)
        y = y + weights[..., e, None] * ((silu(gate) * up) @ w2.T)
    gate, up = (x @ m.shared.w13[0].T).chunk(2, -1)
    return y + (silu(gate) * up) @ m.shared.w2[0].T


def mixture(**keywords) -> MoE:
    torch.manual_seed(0)
    m = MoE(8, 6, experts=8, active=2, scaling=2.446, **keywords).double()
    nn.init.normal_(m.router.bias, std=0.2)
    return m


def test_the_mixture_equals_its_experts_one_by_one_with_gradients():
    m, x = mixture(shared=2), torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 5, 8, dtype=torch.float64)
    everything = [x, *m.parameters()]
    got, wanted = m(x), experts_one_by_one(m, x)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad((got * w).sum(), everything), torch.autograd.grad((wanted * w).sum(), everything)
    )


def test_the_bias_moves_the_choice_but_not_the_weights():
    m, x = mixture(), torch.randn(20, 8, dtype=torch.float64)
    m.router.bias.fill_(0.0)
    m.router.bias[[1, 6]] = 10.0
    weights, picked = m.router(x)
    assert set(picked.unique().tolist()) == {1, 6}
    scores = torch.sigmoid(x @ m.router.weight.T).gather(-1, picked)
    torch.testing.assert_close(weights, 2.446 * scores / scores.sum(-1, keepdim=True))


def test_with_groups_only_experts_of_the_strongest_groups_are_chosen():
    m, x = mixture(groups=4, active_groups=1), torch.randn(20, 8, dtype=torch.float64)
    choice = torch.sigmoid(x @ m.router.weight.T) + m.router.bias
    best = choice.view(20, 4, 2).sum(-1).argmax(-1)
    allowed = torch.arange(8) // 2 == best.unsqueeze(-1)
    assert (m.router(x)[1] // 2 == best.unsqueeze(-1)).all()
    torch.testing.assert_close(m(x), experts_one_by_one(m, x, allowed))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [(dict(active=0), "active must be"), (dict(active=9), "active must be"), (dict(active=2, groups=3), "must divide"),
     (dict(active=3, groups=4), "hold the 3 active")],
)  # fmt: skip
def test_routing_that_cannot_be_is_named(keywords: dict, words: str):
    with pytest.raises(ValueError, match=words):
        MoE(8, 6, experts=8, **keywords)
