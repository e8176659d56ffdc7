"""Self-guided attention: the equations token by token, how many tokens answer, what carries gradients, and windows."""

import pytest
import torch

from attnlab.nn.multihead import MultiHead
from attnlab.nn.tokens.self_guided import GROUPS, EnhancedAttention, GuidedAttention, HybridAttention


@pytest.mark.parametrize(("reduction", "side"), [(8, 56), (4, 28), (2, 14)])
def test_as_many_tokens_answer_as_the_paper_has(reduction, side):
    guided, n = GuidedAttention(8, heads=2, groups=GROUPS[reduction]), side * side
    merged = guided.merge_tokens(torch.randn(1, n, 8), torch.rand(1, side, side))
    wanted = {8: n // 784 + n // 112 + n // 112, 4: n // 196 + n // 28 + n // 28, 2: n // 4 + n // 2}
    assert merged.shape == (1, wanted[reduction], 8)


def test_merging_agrees_with_the_equations_written_out():
    guided = GuidedAttention(4, heads=2, groups=(4, 2, 1)).double()
    x, significance = torch.randn(1, 16, 4, dtype=torch.float64), torch.rand(1, 4, 4)
    order = sorted(range(16), key=lambda i: significance.flatten()[i].item())
    rows = []
    for part, merge in zip((order[:4], order[4:12], order[12:]), guided.merging, strict=True):
        size = merge.in_features
        for start in range(0, len(part), size):
            members = part[start : start + size]
            rows.append(sum(merge.weight[0, j] * x[0, i] for j, i in enumerate(members)) + merge.bias)
    torch.testing.assert_close(guided.merge_tokens(x, significance)[0], torch.stack(rows))


def test_hybrid_attention_agrees_with_the_equations_written_out():
    module = HybridAttention(8, heads=4, reduction=2, window=3).double()
    x = torch.randn(1, 36, 8, dtype=torch.float64)
    y, significance = module.scales(x, grid=(6, 6))
    far_q, near_q, near_k, near_v = module.wx(x[0]).split([4, 4, 4, 4], -1)
    coarse = module.reduce(x.mT.unflatten(2, (6, 6))).flatten(2).mT
    far_k, far_v = module.wcoarse(torch.nn.functional.gelu(module.norm(coarse)))[0].chunk(2, -1)
    heads, seen = torch.zeros(36, 8, dtype=torch.float64), torch.zeros(36, dtype=torch.float64)
    for token in range(36):
        row, column = divmod(token, 6)
        window = [i * 6 + j for i in range(6) for j in range(6) if i // 3 == row // 3 and j // 3 == column // 3]
        for head in range(2):
            at = slice(2 * head, 2 * head + 2)
            far = ((far_k[:, at] @ far_q[token, at]) / 2**0.5).softmax(0)
            near = ((near_k[window, at] @ near_q[token, at]) / 2**0.5).softmax(0)
            heads[token, at] = far @ far_v[:, at]
            heads[token, 4 + 2 * head : 6 + 2 * head] = near @ near_v[window, at]
            for place, weight in zip(window, near, strict=True):
                seen[place] += weight.detach() / (2 * 9)
            for place in range(36):
                seen[place] += far[place // 12 * 3 + place % 6 // 2].detach() / (2 * 36)
    torch.testing.assert_close(significance.flatten(), seen)
    torch.testing.assert_close(y[0], module.wo(heads + module.local(x, (6, 6))[0]))


def test_significance_carries_no_gradient():
    hybrid, guided = HybridAttention(8, heads=2, reduction=2, window=2), GuidedAttention(8, heads=2, groups=(2, 1))
    x = torch.randn(1, 16, 8, requires_grad=True)
    y, significance = hybrid.scales(x, grid=(4, 4))
    assert y.requires_grad and not significance.requires_grad
    learned = significance.clone().requires_grad_()
    guided(y, learned, grid=(4, 4)).sum().backward()
    assert learned.grad is None


def test_keys_do_not_depend_on_the_order_of_the_tokens():
    """Tokens permuted together with their significance are merged as before."""
    guided = GuidedAttention(8, heads=2, groups=(4, 2, 1))
    x, significance, order = torch.randn(2, 16, 8), torch.rand(2, 4, 4), torch.randperm(16)
    moved = significance.flatten(1)[:, order].unflatten(1, (4, 4))
    torch.testing.assert_close(guided.merge_tokens(x[:, order], moved), guided.merge_tokens(x, significance))


def test_the_last_stage_is_softmax_attention_beside_a_convolution():
    module = EnhancedAttention(8, heads=2).double()
    plain = MultiHead(8, heads=2, bias=True, out_bias=True).double()
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith("local")})
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    local = module.local(x, (3, 4)) @ module.wo.weight.mT
    torch.testing.assert_close(module(x, grid=(3, 4)), plain(x) + local)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="heads must be even"):
        HybridAttention(9, heads=3)
    with pytest.raises(ValueError, match="grid must have sides that are multiples of 14"):
        HybridAttention(8, heads=2, reduction=2)(torch.randn(1, 49, 8), grid=(7, 7))
    with pytest.raises(ValueError, match="groups must be two or three sizes"):
        GuidedAttention(8, heads=2, groups=(2,))
    with pytest.raises(
        ValueError, match=r"x must hold a multiple of 4 tokens for a group of 2 in groups=\(2, 1\), got 9"
    ):
        GuidedAttention(8, heads=2, groups=(2, 1))(torch.randn(1, 9, 8), torch.rand(1, 3, 3), grid=(3, 3))
    with pytest.raises(ValueError, match=r"significance must be \(B, H, W\)"):
        GuidedAttention(8, heads=2, groups=(2, 1))(torch.randn(1, 4, 8), torch.rand(1, 4), grid=(2, 2))
