"""Routing by a graph of tokens: its limits, its equations, causality, and calmer decisions."""

from __future__ import annotations

import pytest
import torch

from attnlab.nn.channel.graph_moe import (
    GraphBlock,
    GraphMoE,
    GraphRouter,
    balance_loss,
    decisions,
    fluctuation,
    routing_entropy,
)
from attnlab.nn.multihead import MultiHead


def tokens(n: int = 10, dim: int = 8) -> torch.Tensor:
    return torch.randn(2, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def router(active: int = 2, **options) -> GraphRouter:
    torch.manual_seed(0)
    made = GraphRouter(8, 4, active, **options).double()
    torch.nn.init.normal_(made.gate.weight)
    return made


def heads() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, 2, 3, 10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))


def alone(r: GraphRouter, x: torch.Tensor) -> torch.Tensor:
    return r.gate(x).softmax(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("similarity", ["bilinear", "dot", "cosine"])
def test_similarity_equals_the_equations_written_out(similarity, causal):
    r, x = router(similarity=similarity, causal=causal), tokens()
    if similarity == "bilinear":
        torch.nn.init.normal_(r.ws)
    found = r(x)
    for b in range(2):
        for i in range(10):
            scores = []
            for j in range(i + 1 if causal else 10):
                u, w = x[b, i], x[b, j]
                if similarity == "cosine":
                    scores.append(u @ w / u.norm() / w.norm() / 0.1)
                else:
                    scores.append(u @ (r.ws if similarity == "bilinear" else torch.eye(8).double() / 8**0.5) @ w)
            share = torch.stack(scores).exp()
            wanted = sum(s * alone(r, x[b, j]) for j, s in enumerate(share / share.sum()))
            torch.testing.assert_close(found.probabilities[b, i], wanted, rtol=1e-10, atol=1e-12)
            best = wanted.topk(2)
            assert torch.equal(found.picked[b, i], best.indices)
            torch.testing.assert_close(found.weights[b, i], best.values / best.values.sum())


@pytest.mark.parametrize("mix", ["prob", "logit"])
def test_a_graph_of_loops_is_the_usual_router(mix):
    x = tokens()
    sharp, usual = router(similarity="cosine", temperature=1e-4, mix=mix), router(aware="none", mix=mix)
    attentive = router(aware="attention", mix=mix)
    wanted = alone(usual, x)
    loops = torch.eye(10, dtype=torch.float64).expand(2, 3, -1, -1)
    for found in (usual(x), sharp(x), attentive(x, attention=loops)):
        torch.testing.assert_close(found.probabilities, wanted)


def test_tokens_that_are_all_alike_share_one_decision():
    r, x = router(), tokens()
    torch.nn.init.zeros_(r.ws)
    found = r(x).probabilities
    torch.testing.assert_close(found, alone(r, x).mean(1, keepdim=True).expand_as(found))


@pytest.mark.parametrize("head_mix", ["mean", "posterior", "min_entropy"])
@pytest.mark.parametrize("mix", ["prob", "logit"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_routes_by_its_own_weights(head_mix, mix, causal):
    r, x, (q, k, v) = router(aware="attention", head_mix=head_mix, mix=mix, causal=causal), tokens(), heads()
    scores = q @ k.mT / 5**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(10, 10, dtype=torch.bool).triu(1), -torch.inf)
    weights = scores.softmax(-1)
    gates = r.gate(x) if mix == "logit" else alone(r, x)
    each = weights @ gates[:, None]
    decided = each.softmax(-1) if mix == "logit" else each
    if head_mix == "mean":
        wanted = each.mean(1).softmax(-1) if mix == "logit" else each.mean(1)
    elif head_mix == "posterior":
        strength = (weights @ v).norm(dim=-1) ** 2
        wanted = (decided * (strength / strength.sum(1, keepdim=True))[..., None]).sum(1)
    else:
        entropy = -(decided * decided.log()).sum(-1)
        wanted = torch.stack(
            [torch.stack([decided[b, int(entropy[b, :, i].argmin()), i] for i in range(10)]) for b in range(2)]
        )
    found = r(x, attention=(q, k, v)).probabilities
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 10, dtype=torch.float64))
    if head_mix != "posterior":
        torch.testing.assert_close(r(x, attention=weights).probabilities, wanted, rtol=1e-9, atol=1e-12)


def test_equal_heads_give_way_to_the_first():
    r = router(aware="attention", head_mix="min_entropy")
    mixed = torch.rand(1, 3, 1, 4).softmax(-1)
    mixed[:, 1:] = torch.tensor([[[1.0, 0, 0, 0]], [[0, 1.0, 0, 0]]])
    assert torch.equal(r._over_heads(mixed, None)[0, 0], mixed[0, 1, 0])


@pytest.mark.parametrize("aware", ["none", "similarity", "attention"])
def test_causal_blocks_do_not_see_the_future(aware):
    torch.manual_seed(0)
    moe = GraphMoE(8, experts=4, hidden=8, aware=aware, causal=True)
    block, x = GraphBlock(MultiHead(8, heads=2, causal=True), moe).double(), tokens()
    other = x.clone()
    other[:, 6:] += 1
    torch.testing.assert_close(block(x)[:, :6], block(other)[:, :6])
    assert not torch.allclose(block(x)[:, 6:], block(other)[:, 6:])


def test_every_expert_is_asked_for_its_share():
    torch.manual_seed(0)
    moe, x = GraphMoE(8, experts=4, active=3, hidden=6).double(), tokens()
    decision, y = moe.router(x), moe(x)
    for b, i in ((0, 0), (1, 7)):
        wanted = torch.zeros(8, dtype=torch.float64)
        for weight, e in zip(decision.weights[b, i], decision.picked[b, i], strict=True):
            gate, up = (moe.experts.w13[e] @ x[b, i]).chunk(2)
            wanted = wanted + weight * (moe.experts.w2[e] @ (gate * gate.sigmoid() * up))
        torch.testing.assert_close(y[b, i], wanted)


def test_gradients_reach_the_similarity():
    moe = GraphMoE(8, experts=4, hidden=6).double()
    moe(tokens()).square().sum().backward()
    assert moe.router.ws.grad.abs().max() > 0


def test_routing_by_attention_needs_no_dropout_and_no_parameters():
    attention = MultiHead(8, heads=2, dropout=0.9)
    block = GraphBlock(attention, GraphMoE(8, experts=4, hidden=6, aware="attention")).double().train()
    assert not any(n.startswith("moe.router.w") for n, _ in block.named_parameters())
    x = tokens()
    normed = block.norm1(x)
    with decisions(block) as seen:
        block(x)
    # The block's own tokens carry dropout; the weights that mixed their gates do not.
    q, k, _ = attention.project(normed)
    weights = (q @ k.mT / 4**0.5).softmax(-1).mean(1)
    inside = []
    hook = block.moe.router.register_forward_pre_hook(lambda m, args: inside.append(args[0]))
    with decisions(block) as again:
        block(x)
    hook.remove()
    wanted = weights @ block.moe.router.gate(inside[0]).softmax(-1)
    torch.testing.assert_close(again[0].probabilities, wanted)
    assert len(seen) == 1


def clusters(noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(5, 16, generator=generator)
    clean = centres[torch.arange(100) % 5] + 0.3 * torch.randn(100, 16, generator=generator)
    return clean[None], (clean + noise * torch.randn(100, 16, generator=generator))[None]


@pytest.mark.parametrize("similarity", ["bilinear", "cosine"])
def test_noise_flips_fewer_decisions_of_similar_tokens(similarity):
    flips = {"none": 0.0, "similarity": 0.0}
    for seed in range(10):
        clean, noisy = clusters(0.5, seed)
        for aware in flips:
            torch.manual_seed(seed)
            r = GraphRouter(16, 8, 1, aware=aware, similarity=similarity)
            flips[aware] += float(fluctuation(r(clean).picked, r(noisy).picked)) / 10
    assert flips["similarity"] < 0.6 * flips["none"]


def test_deciding_by_a_known_neighbour_has_no_more_entropy_than_the_mean_decision():
    r, x = router(similarity="dot"), tokens(50)
    share = (x @ x.mT / 8**0.5).softmax(-1)
    gates = alone(r, x)
    conditional = (share @ torch.special.entr(gates).sum(-1, keepdim=True)).mean()
    assert conditional < routing_entropy(r(x).probabilities)


def test_entropy_fluctuation_and_balance_count_what_they_say():
    assert routing_entropy(torch.full((3, 4), 0.25)).item() == pytest.approx(torch.tensor(4.0).log().item())
    before, after = torch.tensor([[0, 1], [2, 3], [0, 2]]), torch.tensor([[1, 0], [2, 0], [0, 2]])
    assert fluctuation(before, after).item() == pytest.approx(1 / 3)
    even, x = GraphMoE(8, experts=4, hidden=4, aware="none").double(), tokens()
    with decisions(even) as seen:
        even(x)
    r = seen[0].probabilities.detach().flatten(0, 1)
    wanted = sum(float((r.argmax(1) == e).double().mean() * r[:, e].mean()) for e in range(4))
    assert balance_loss(seen, 1.0).item() == pytest.approx(4 * wanted)


def test_bad_input_is_named():
    x = tokens()
    for options in (dict(aware="x"), dict(similarity="x"), dict(mix="x"), dict(head_mix="x")):
        with pytest.raises(ValueError, match=next(iter(options))):
            GraphMoE(8, **options)
    with pytest.raises(ValueError, match="active"):
        GraphMoE(8, experts=2, active=3)
    with pytest.raises(ValueError, match="temperature"):
        GraphMoE(8, temperature=0.0)
    with pytest.raises(ValueError, match="aware='attention'"):
        router()(x, attention=heads())
    with pytest.raises(ValueError, match="aware='attention'"):
        router(aware="attention")(x)
    with pytest.raises(ValueError, match=r"weights \(2, H, 10, 10\)"):
        router(aware="attention")(x, attention=torch.rand(2, 3, 9, 9))
    with pytest.raises(ValueError, match="posterior"):
        router(aware="attention", head_mix="posterior")(x, attention=torch.rand(2, 3, 10, 10))
    with pytest.raises(ValueError, match="streaming"):
        GraphMoE(8).initial_state(1)
    with pytest.raises(ValueError, match="one shape"):
        fluctuation(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="at least one"):
        balance_loss([])
    with pytest.raises(ValueError, match="same dim and causal"):
        GraphBlock(MultiHead(8, heads=2, causal=True), GraphMoE(8))
