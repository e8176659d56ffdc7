"""Measures of weights: each equal to its definition written out, and sensible where the answer is known."""

import math

import pytest
import torch

from attnlab.lens.measures.weights import (
    entropy,
    head_similarity,
    max_weight,
    mean_distance,
    normalised_entropy,
    received,
    sink_mass,
)


def causal_weights(*shape):
    scores = 3 * torch.randn(*shape, dtype=torch.float64)
    return scores.masked_fill(~torch.ones(shape[-2:], dtype=torch.bool).tril(), -math.inf).softmax(-1)


W = causal_weights(2, 3, 7, 7)


def test_each_is_its_definition():
    for b in range(2):
        for h in range(3):
            for i in range(7):
                row = W[b, h, i].tolist()
                h_i = -sum(w * math.log(w) for w in row if w > 0)
                assert entropy(W)[b, h, i] == pytest.approx(h_i)
                assert normalised_entropy(W)[b, h, i] == pytest.approx(h_i / math.log(i + 1) if i else 0.0)
                assert max_weight(W)[b, h, i] == max(row)
                assert sink_mass(W, 2)[b, h, i] == pytest.approx(row[0] + row[1])
                assert sink_mass(W, [0, 4])[b, h, i] == pytest.approx(row[0] + row[4])
                assert mean_distance(W)[b, h, i] == pytest.approx(sum(w * abs(i - j) for j, w in enumerate(row)))
            for j in range(7):
                assert received(W)[b, h, j] == pytest.approx(sum(W[b, h, i, j].item() for i in range(7)))


def test_distance_on_a_grid_is_euclidean_and_leaves_out_what_is_not_on_it():
    height, width, prefix = 2, 3, 1
    weights = torch.randn(1, 2, 8, 8, dtype=torch.float64).softmax(-1)
    found = mean_distance(weights, grid=(height, width), prefix=prefix)
    for h in range(2):
        for i in range(8):
            total = far = 0.0
            if prefix <= i < prefix + height * width:
                for j in range(prefix, prefix + height * width):
                    (a, b), (c, d) = divmod(i - prefix, width), divmod(j - prefix, width)
                    far += weights[0, h, i, j].item() * math.hypot(a - c, b - d)
                    total += weights[0, h, i, j].item()
            assert found[0, h, i] == pytest.approx(far / total if total else 0.0)


def test_queries_of_a_later_step_stand_where_they_are():
    torch.testing.assert_close(mean_distance(W[..., 5:, :], offset=5), mean_distance(W)[..., 5:])


def test_looking_at_all_keys_alike_is_as_wide_as_can_be_and_at_one_key_as_narrow():
    even, one = torch.full((1, 5, 5), 0.2), torch.eye(5)[None]
    torch.testing.assert_close(entropy(even), torch.full((1, 5), math.log(5)))
    torch.testing.assert_close(normalised_entropy(even), torch.ones(1, 5))
    assert (entropy(one) == 0).all() and (normalised_entropy(one) == 0).all() and (mean_distance(one) == 0).all()
    torch.testing.assert_close(received(even), torch.ones(1, 5))


def test_what_may_be_seen_can_be_said_where_a_weight_underflows():
    weights = torch.tensor([[1.0, 0.0, 0.0]])
    assert normalised_entropy(weights, torch.ones(1, 3, dtype=torch.bool)) == 0
    half = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert normalised_entropy(half) == pytest.approx(1.0)
    assert normalised_entropy(half, torch.ones(4, dtype=torch.bool)) == pytest.approx(0.5)


def test_heads_are_alike_as_far_as_they_put_their_attention_in_the_same_place():
    a = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    b = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    found = head_similarity(torch.stack([a, b, a]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5, 1.0], [0.5, 1.0, 0.5], [1.0, 0.5, 1.0]]))


def test_entropy_has_a_gradient_through_weights_that_are_zero():
    scores = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def spread(scores):
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        return entropy(scores.masked_fill(hidden, -math.inf).softmax(-1))

    assert torch.autograd.gradcheck(spread, (scores,))


def test_what_is_no_matrix_of_weights_is_refused():
    with pytest.raises(ValueError, match=r"weights must be floating point .* got torch.int64"):
        entropy(torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got torch.float32 \(3,\)"):
        received(torch.ones(3))
    with pytest.raises(ValueError, match=r"\(…, H, Nq, Nk\), got \(3, 3\)"):
        head_similarity(torch.eye(3))
    with pytest.raises(ValueError, match=r"grid \(4, 4\) after 0 tokens does not fit 7 keys"):
        mean_distance(W, grid=(4, 4))
