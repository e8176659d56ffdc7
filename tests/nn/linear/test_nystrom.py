"""Nyströmformer: its equations by hand, transformers' layer, the pseudo-inverse, uneven segments, padding."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnlab.nn.linear.nystrom import NystromAttention, pseudo_inverse, segment_means

D = torch.float64


def by_hand(m: NystromAttention, x: Tensor) -> Tensor:
    """Head by head, with a true pseudo-inverse, segments one by one and the convolution tap by tap."""
    q, k, v = (t / (m.head_dim**0.25 if i < 2 else 1) for i, t in enumerate(m.qkv(x)))
    heads, tokens = torch.zeros_like(q), x.shape[1]
    size, longer = divmod(tokens, m.landmarks)
    sizes = [size] * (m.landmarks - longer) + [size + 1] * longer
    for b in range(len(x)):
        for h in range(m.heads):
            marks_q, marks_k = (torch.stack([part.mean(0) for part in t[b, h].split(sizes)]) for t in (q, k))
            among = torch.linalg.pinv((marks_q @ marks_k.T).softmax(-1))
            far = (marks_q @ k[b, h].T).softmax(-1) @ v[b, h]
            heads[b, h] = (q[b, h] @ marks_k.T).softmax(-1) @ among @ far
            if m.conv is not None:
                taps = m.conv.weight[h, 0, :, 0]
                for n in range(tokens):
                    for t, tap in enumerate(taps):
                        if 0 <= (at := n + t - len(taps) // 2) < tokens:
                            heads[b, h, n] += tap * v[b, h, at]
    return m.merge(heads)


@pytest.mark.parametrize(("tokens", "conv"), [(24, 0), (29, 3)])
def test_equals_its_equations(tokens: int, conv: int) -> None:
    m = NystromAttention(16, heads=2, landmarks=5, conv=conv, iterations=40).double()
    torch.nn.init.normal_(m.wqkv.weight, std=0.8)
    x = torch.randn(2, tokens, 16, dtype=D)
    torch.testing.assert_close(m(x), by_hand(m, x), atol=1e-7, rtol=1e-6)


def test_equals_the_layer_of_transformers(transformers) -> None:
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = transformers.NystromformerConfig(
        hidden_size=16, num_attention_heads=2, num_landmarks=4, segment_means_seq_len=20, conv_kernel_size=5
    )
    theirs = NystromformerSelfAttention(config).eval()
    theirs.init_option = "exact"  # each matrix begins by itself
    ours = NystromAttention(16, heads=2, landmarks=4, conv=5).eval()
    with torch.no_grad():
        ours.wqkv.weight.copy_(torch.cat([getattr(theirs, n).weight for n in ("query", "key", "value")]))
        ours.wqkv.bias.copy_(torch.cat([getattr(theirs, n).bias for n in ("query", "key", "value")]))
        ours.conv.weight.copy_(theirs.conv.weight)
    ours.wo = torch.nn.Identity()
    x = torch.randn(3, 20, 16)
    torch.testing.assert_close(ours(x), theirs(x)[0], atol=2e-6, rtol=2e-5)


def test_the_iteration_finds_the_inverse_of_row_stochastic_matrices() -> None:
    a = (2 * torch.randn(3, 6, 6, dtype=D) + 3 * torch.eye(6, dtype=D)).softmax(-1)
    errors = [(pseudo_inverse(a, iterations=n) @ a - torch.eye(6, dtype=D)).abs().max().item() for n in (2, 6, 30)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-9


def test_more_landmarks_come_closer_to_softmax_attention() -> None:
    torch.manual_seed(0)
    x, errors = torch.randn(1, 96, 16, dtype=D).cumsum(1) / 4, []  # neighbours are alike, as means of runs want it
    for landmarks in (4, 16, 48):
        torch.manual_seed(1)
        m = NystromAttention(16, heads=2, landmarks=landmarks, iterations=20).double()
        q, k, v = m.qkv(x)
        wanted = m.merge(scaled_dot_product_attention(q, k, v))
        errors.append(((m(x) - wanted).norm() / wanted.norm()).item())
    assert errors[0] > errors[1] > errors[2]


def test_uneven_segments_put_the_longer_ones_last() -> None:
    x = torch.arange(7.0)[:, None]
    assert segment_means(x, 3)[:, 0].tolist() == [0.5, 2.5, 5.0]
    assert segment_means(x, 7)[:, 0].tolist() == list(range(7))
    with pytest.raises(ValueError, match="segments must lie in 1 to"):
        segment_means(x, 8)


@pytest.mark.parametrize("landmarks", [4, 30])
def test_padding_has_no_influence(landmarks: int) -> None:
    m, x = NystromAttention(16, heads=2, landmarks=landmarks, conv=3).double(), torch.randn(2, 20, 16, dtype=D)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, :3], keep[1, 13:] = False, False
    other = torch.where(keep[..., None], x, 5 * torch.randn_like(x))
    torch.testing.assert_close(m(other, keep=keep)[keep], m(x, keep=keep)[keep])


def test_in_the_release_a_sample_depends_on_the_others_and_here_it_does_not() -> None:
    x = torch.randn(4, 30, 16, dtype=D) * torch.tensor([1.0, 4.0, 8.0, 20.0], dtype=D)[:, None, None]
    for variant, alone in (("paper", True), ("release", False)):
        m = NystromAttention(16, heads=2, landmarks=6, variant=variant).double()
        assert torch.allclose(m(x)[:1], m(x[:1]), rtol=1e-9, atol=0) is alone
