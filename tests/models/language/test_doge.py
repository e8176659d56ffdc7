"""Doge: its blocks' learned residuals, the retrieval of experts, and decoding with what is kept."""

import pytest
import torch
from torch.nn.functional import silu

from attnlab.cards import describe
from attnlab.models.language.doge import Doge, DomainExperts


def tiny(**keywords) -> Doge:
    torch.manual_seed(0)
    model = Doge(**{**describe("doge").sample, **keywords}).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def test_residuals_are_scaled_by_channel():
    block, x = tiny().blocks[0], torch.randn(2, 9, 32, dtype=torch.float64)
    y = block.scale1 * x + block.mixer(block.norm1(x))
    torch.testing.assert_close(block(x), block.scale2 * y + block.mlp(block.norm2(y)))


def experts_one_by_one(m: DomainExperts, x: torch.Tensor) -> torch.Tensor:
    """Every pair of keys scored, the best experts applied one after the other."""
    y = m.w2(silu(m.w1(x)) * m.w3(x))
    for at in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])):
        token = x[at[0], at[1]]
        a, b = m.router.weight.view(2, m.keys, -1) @ token
        scores = (a[:, None] + b).flatten()
        best = scores.topk(m.active)
        for weight, e in zip(best.values.softmax(0), best.indices, strict=True):
            y[at[0], at[1]] += weight * silu(m.down.weight[e] @ token) * m.up.weight[e]
    return y


@pytest.mark.parametrize(("experts", "active"), [(49, 5), (16, 16), (50, 9)])
def test_experts_equal_their_formula_one_by_one(experts, active):
    m = DomainExperts(8, 12, experts=experts, active=active).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(m(x), experts_one_by_one(m, x))


def test_released_experts_route_by_other_tokens_and_those_of_the_paper_do_not():
    x = torch.randn(1, 12, 8)
    later = torch.cat((x[:, :6], torch.randn(1, 6, 8)), 1)
    paper = DomainExperts(8, 12, experts=49, active=5)
    released = DomainExperts(8, 12, experts=49, active=5, variant="release")
    with torch.no_grad():
        torch.testing.assert_close(paper(x)[:, :6], paper(later)[:, :6])
        assert not torch.allclose(released(x)[:, :6], released(later)[:, :6])


@pytest.mark.parametrize("experts", [0, 49])
def test_generating_with_what_is_kept_equals_reading_all_again(experts):
    model = tiny(experts=experts, active=5)
    ids = torch.randint(64, (2, 20))
    kept = model.generate(ids, 12, temperature=0)
    assert torch.equal(kept, model.generate(ids, 12, temperature=0, cached=False))
    _, state = model(ids, model.initial_state(2))
    assert all(layer.k.shape[2] == 5 for layer in state.layers)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="active must be between 1 and experts = 4, got 5"):
        DomainExperts(8, 12, experts=4, active=5)
    with pytest.raises(ValueError, match="variant must be 'paper' or 'release'"):
        DomainExperts(8, 12, experts=4, active=2, variant="mine")
