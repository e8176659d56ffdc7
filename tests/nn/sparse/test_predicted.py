"""Predicted attention: budgets, the class token's row, dense and sparse agree, and what carries gradients."""

import math

import pytest
import torch

from attnlab.cost import count_flops
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.predicted import PredictedAttention


def attention(keep: float = 0.25, **options) -> PredictedAttention:
    module = PredictedAttention(16, heads=2, tokens=26, keep=keep, reduce=3, **options).double()
    for p in module.predictor.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module.eval()


X = torch.randn(2, 26, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.9])
def test_each_patch_sees_the_ceiling_of_its_share_and_the_class_token_all(keep):
    mask = attention(keep).connect(X).connectivity.mask
    assert (mask[:, :, 1:].sum(-1) == math.ceil(keep * 26)).all()
    assert mask[:, :, 0].all()


def test_all_keys_are_softmax_attention():
    module = attention(1.0)
    plain = MultiHead(16, heads=2, bias=True, out_bias=True).double()
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith("predictor")})
    torch.testing.assert_close(module(X), plain(X))
    torch.testing.assert_close(attention(0.25).connect(X, raw=True).connectivity.mask, None)


def test_sparse_and_masked_dense_agree_and_sparse_costs_less():
    dense, sparse = attention(), attention(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    torch.testing.assert_close(sparse(X), dense(X))
    costs = []
    for flag in (False, True):
        module = PredictedAttention(64, heads=1, tokens=401, sparse=flag).eval()
        plain = MultiHead(64, heads=1, bias=True, out_bias=True)
        x = torch.randn(1, 401, 64)
        with torch.no_grad():
            costs.append(count_flops(module, x) / count_flops(plain, x))
    assert costs[1] < 1 < costs[0]


def test_agrees_with_the_equations_written_out():
    """One head and one row at a time."""
    module = attention(top=3)
    predictor = module.predictor
    q, k, _ = module.qkv(X[:1])
    found = module.connect(X[:1])
    for head in range(2):
        down = (predictor.wk(k[0, head])).mT @ predictor.down
        basis = torch.where(predictor.back.abs() > 0.02, predictor.back.abs(), torch.zeros(())).mT
        for row in (1, 9, 25):
            cheap = (predictor.wq(q[0, head, row]) @ down / 2**0.5).softmax(0)
            cheap = torch.where(cheap >= cheap.sort(descending=True).values[2], cheap, torch.zeros(()).double())
            expected = cheap @ basis
            torch.testing.assert_close(found.connectivity.approximation[0, head, row - 1], expected)
            wanted = sorted(range(26), key=lambda j: -expected[j].item())[:7]
            assert found.connectivity.mask[0, head, row].nonzero().flatten().tolist() == sorted(wanted)


def test_the_predictor_learns_by_its_approximation_alone():
    module = attention().train()
    found = module.connect(X)
    found.y.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in module.predictor.parameters())
    found.connectivity.approximation.sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in module.predictor.named_parameters() if n != "wk.bias")


def test_a_row_without_any_key_above_the_threshold_gives_nothing():
    module = attention(above=1e9, top=None)
    found = module.connect(X)
    assert not found.connectivity.mask[:, :, 1:].any()
    torch.testing.assert_close(found.y[:, 1:], module.wo.bias.expand_as(found.y[:, 1:]))
    found.y.sum().backward()
    assert all(p.grad.isfinite().all() for p in (module.wqkv.weight, module.wo.weight))


def test_dropped_patches_are_not_picked():
    module = attention(0.5)
    alive = torch.ones(2, 26, dtype=torch.bool)
    alive[:, 10:] = False
    mask = module.connect(X, alive, left=9).connectivity.mask
    assert not mask[:, :, 1:, 10:].any()
    assert (mask[:, :, 1:].sum(-1) == 9).all()  # as many as there are patches left, which is less than half of 26
    assert module.predictor.keep == 13  # and the budget of later images is as it was


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="x must have 26 tokens, for which patterns were learned, got 25"):
        attention()(X[:, 1:])
    with pytest.raises(ValueError, match="reduce must lie in 1 to the number of tokens 4, got 6"):
        PredictedAttention(8, heads=2, tokens=4)
    with pytest.raises(ValueError, match="top must be at least 1, or None, got 0"):
        PredictedAttention(8, heads=2, tokens=12, top=0)
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got 0"):
        PredictedAttention(8, heads=2, tokens=12, keep=0)
    with pytest.raises(ValueError, match="alive and left go together"):
        attention().connect(X, torch.ones(2, 26, dtype=torch.bool))
