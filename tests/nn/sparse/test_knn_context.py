"""Nearest-key context attention: which keys count, and the mean that all tokens get."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.nn.sparse.knn_context import KNNContext
from attnlab.routing import TopKBlocks

DIM, HEADS = 12, 3


def make(**keywords) -> KNNContext:
    torch.manual_seed(0)
    module = KNNContext(DIM, heads=HEADS, **keywords).double()
    for p in (module.wqkv.weight, module.wqkv.bias, module.wo.bias):
        nn.init.normal_(p, std=0.5)
    return module


def tokens(n: int = 10) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def best(module: KNNContext, x: Tensor, k: int) -> Tensor:
    """Which keys each query keeps, (B, H, N, N), row by row."""
    q, key, _ = module.qkv(x)
    scores = q @ key.mT / 2
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        for j in sorted(range(scores.shape[3]), key=lambda j: -scores[(*at, j)].item())[:k]:
            mask[(*at, j)] = True
    return mask


@pytest.mark.parametrize(("keep", "k"), [(0.9, 9), (0.7, 7), (0.45, 5), (0.01, 1), (3, 3), (99, 10)])
@torch.no_grad()
def test_is_masked_softmax_attention_and_a_share_of_its_mean(keep: float, k: int) -> None:
    module, x = make(keep=keep, alpha=0.3), tokens()
    assert module.count(10) == k
    q, key, v = module.qkv(x)
    mask = best(module, x, k)
    read = F.scaled_dot_product_attention(q, key, v, attn_mask=mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.wo(read + 0.3 * read.mean(1, keepdim=True)))
    weights = make(keep=keep).weights(x)
    assert torch.equal(weights > 0, mask) and (mask.sum(-1) == k).all()


@torch.no_grad()
def test_equals_a_route_over_blocks_of_one_key() -> None:
    module, x = make(keep=4), tokens()
    routed = attend(*module.qkv(x), route=TopKBlocks(4, block=1, query_block=1))
    torch.testing.assert_close(module(x), module.merge(routed))


@torch.no_grad()
def test_one_key_is_a_copy_of_its_value() -> None:
    module, x = make(keep=1), tokens()
    q, k, v = module.qkv(x)
    nearest = (q @ k.mT).argmax(-1, keepdim=True).expand(-1, -1, -1, v.shape[-1])
    torch.testing.assert_close(module(x), module.merge(v.gather(2, nearest)))


def test_keys_that_were_not_chosen_get_no_gradient_and_their_values_do_not_matter() -> None:
    module, x = make(keep=3), tokens()
    q, k, v = (t.detach().requires_grad_() for t in module.qkv(x))
    gone = ~best(module, x, 3)[0, 1, 4]  # of one query of one head
    out = module.mix(q, k, v, x=x)
    for gradient in torch.autograd.grad(out[0, 1, 4].square().sum(), (k, v)):
        assert not gradient[0, 1, gone].any() and gradient[0, 1, ~gone].any(-1).all()
    other = v.detach().clone()
    other[0, 1, gone] += 1
    assert torch.equal(module.mix(q, k, other, x=x)[0, 1, 4], out[0, 1, 4])


@pytest.mark.parametrize("context", ["output", "values", "input"])
@torch.no_grad()
def test_the_context_is_one_vector_for_all_tokens(context: str) -> None:
    x = tokens()
    without, module = make(keep=0.5), make(keep=0.5, alpha=0.7, context=context)
    added = module.mix(*module.qkv(x), x=x) - without.mix(*without.qkv(x), x=x)
    torch.testing.assert_close(added, added[:, :, :1].expand_as(added))
    read = without.mix(*without.qkv(x), x=x)
    wanted = {"output": read.mean(2), "values": without.qkv(x)[2].mean(2), "input": x.mean(1).view(2, HEADS, -1)}
    torch.testing.assert_close(added[:, :, 0], 0.7 * wanted[context])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(keep=0), "keep must be a share in"),
        (lambda: make(keep=1.5), "keep must be a share in"),
        (lambda: make(context="mean"), "context must be 'output', 'input' or 'values'"),
        (lambda: make(causal=True), "causal must be False"),
        (lambda: make()(tokens(), tokens()), "takes no context"),
    ],
)
def test_errors_name_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
