"""Rollout and regularised flow: against the products written out, and what a sink does to each."""

from __future__ import annotations

import pytest
import torch

from attnlab.lens.measures.flow import attention_flow, head_weights, mean_max, object_map, rollout, visibility


def causal(*shape: int) -> torch.Tensor:
    scores = torch.randn(*shape, dtype=torch.float64)
    return scores.masked_fill(~torch.ones(shape[-2:], dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def product(layers, regularise) -> torch.Tensor:
    """F_l = (I + S'_l)(I + F_(l-1)) with whole matrices."""
    n = layers.shape[-1]
    factor = torch.tensor([1 - ((n - j) - 1) / n for j in range(n)], dtype=torch.float64)
    layers = layers * factor if regularise == "layers" else layers
    unit = torch.eye(n, dtype=torch.float64)
    flow = layers[0]
    for step in layers[1:]:
        flow = (unit + step) @ (unit + flow)
    return flow * factor if regularise == "end" else flow


@pytest.mark.parametrize("regularise", ["layers", "end", None])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_rows_of_the_flow_equal_the_products_of_matrices(regularise, depth) -> None:
    layers = mean_max(causal(depth, 4, 9, 9))
    wanted = product(layers, regularise)
    torch.testing.assert_close(attention_flow(layers, regularise=regularise), wanted)
    torch.testing.assert_close(attention_flow(layers, [8, 3], regularise=regularise), wanted[[8, 3]])


def test_with_equal_heads_and_no_regularisation_it_is_rollout_of_identity_and_attention() -> None:
    """Identity and average: Π (I + A_l) = I + F_L, and rollout is that over 2^L."""
    layers = causal(3, 4, 7, 7)
    unit = torch.eye(7, dtype=torch.float64)
    means = layers.mean(1)
    flow = attention_flow(means, regularise=None)
    # The flow counts the identity once more in each layer after the first: F_l + I is not a product alone.
    wanted = means[0]
    for step in means[1:]:
        wanted = (unit + step) @ (unit + wanted)
    torch.testing.assert_close(flow, wanted)
    torch.testing.assert_close(rollout(layers) * 8, (unit + means[2]) @ (unit + means[1]) @ (unit + means[0]))
    torch.testing.assert_close(rollout(layers).sum(-1), torch.ones(7, dtype=torch.float64))


def test_heads_weigh_by_the_mean_over_queries_of_the_largest_key() -> None:
    weights = causal(2, 3, 6, 6)
    wanted = torch.tensor([[float(sum(max(row) for row in head) / 6) for head in layer.tolist()] for layer in weights])
    torch.testing.assert_close(head_weights(weights).float(), wanted)
    assert (head_weights(weights) > 0).all() and (head_weights(weights) <= 1).all()
    assert (mean_max(weights).sum(-1) <= 1).all()


def test_rows_of_padding_do_not_weigh() -> None:
    weights = causal(1, 2, 6, 6)
    rows = torch.tensor([False, False, True, True, True, True])
    padded = weights.clone()
    padded[..., :2, :] = 1 / 6
    torch.testing.assert_close(head_weights(weights, rows), head_weights(padded, rows))
    assert not torch.equal(head_weights(weights), head_weights(padded))


def test_the_first_token_counts_one_nth_and_the_last_fully() -> None:
    factor = visibility(10)
    assert factor[0] == pytest.approx(0.1) and factor[-1] == 1.0 and (factor.diff() > 0).all()
    allowed = torch.ones(10, 10).tril()
    assert torch.equal(visibility(10, seen_by=allowed.sum(0)), factor)


@pytest.mark.parametrize("regularise", ["layers", "end"])
def test_of_uniform_causal_attention_less_goes_to_the_first_token(regularise) -> None:
    uniform = torch.ones(12, 12, dtype=torch.float64).tril()
    layers = (uniform / uniform.sum(-1, keepdim=True)).expand(4, 12, 12)
    plain, regular = (attention_flow(layers, [11], regularise=r)[0] for r in (None, regularise))
    assert plain[:-1].argmax() == 0
    assert regular[0] / regular[:-1].sum() < plain[0] / plain[:-1].sum()
    assert regular[:-1].argmax() != 0


def test_a_sink_hides_the_object_until_the_flow_is_regularised() -> None:
    """16 image tokens, an object of four of them, and a word that looks at both the first token and the object."""
    n, blob = 18, [5, 6, 9, 10]
    weights = torch.full((3, 2, n, n), 0.01, dtype=torch.float64).tril()
    weights[..., 0] += 0.5
    weights[..., -1, blob] += 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    layers, columns = mean_max(weights), torch.arange(16)
    plain, regular = (
        object_map(attention_flow(layers, [n - 1], regularise=r), columns, (4, 4)) for r in (None, "layers")
    )
    assert plain.argmax() == 0 and int(regular.argmax()) in blob
    assert regular.min() == 0 and regular.max() == 1


def test_a_word_of_several_tokens_has_the_mean_of_their_rows() -> None:
    flow = attention_flow(mean_max(causal(2, 2, 10, 10)))
    both = object_map(flow[[8, 9]], torch.arange(1, 7), (2, 3))
    mean = flow[[8, 9]].mean(0)[1:7]
    torch.testing.assert_close(both.flatten(), (mean - mean.min()) / (mean.max() - mean.min()))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="of one size"):
        attention_flow([torch.rand(3, 3), torch.rand(4, 4)])
    with pytest.raises(ValueError, match="regularise"):
        attention_flow([torch.rand(3, 3)], regularise="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(…, H, N, N\)"):
        mean_max(torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match="not be empty"):
        rollout([])
    with pytest.raises(ValueError, match="residual"):
        rollout([torch.rand(1, 3, 3)], residual=2.0)
    with pytest.raises(ValueError, match="does not hold 3"):
        object_map(torch.rand(1, 5), torch.arange(3), (2, 2))
