"""The codes of head outputs: what the scores must do, and that they find the heads of a known circuit."""

import pytest
import torch
from torch import nn

from attnlab.lens.circuits.autoencoder import (
    SparseAutoencoder,
    best_f1,
    edge_scores,
    fit_autoencoder,
    node_scores,
    roc_auc,
    roc_curve,
    unique_codes,
    unique_pairs,
)
from attnlab.lens.circuits.contributions import head_contributions
from attnlab.lens.toys import recall
from attnlab.lens.watch import watch
from attnlab.models.skeletons.decoder import Decoder

IDS = torch.arange(14).view(2, 7) % 11


def test_codes_of_ten_prompts_find_the_retrieval_heads(recalling) -> None:
    positive = recall.batch(50, seed=5)
    negative = recall.unanswerable(recall.batch(50, seed=6))
    with watch(recalling, keep="weights") as record:
        recalling(positive.ids)
    hits = [(record[i][:, :, -1].argmax(-1) == positive.places[:, None]).double().mean(0) for i in (0, 1)]
    truth = torch.cat(hits) > 0.5
    assert truth.sum() == 8
    heads = head_contributions(recalling, torch.cat((positive.ids, negative)))
    codes = fit_autoencoder(heads).codes(heads)
    scores = node_scores(codes[:50], codes[50:])
    assert roc_auc(scores, truth) > 0.8
    assert unique_codes(codes[:50], codes[50:])[truth].mean() > unique_codes(codes[:50], codes[50:]).mean()
    assert roc_auc(edge_scores(codes[:50], codes[50:]), truth) > 0.8


def test_what_heads_contribute_adds_up_to_what_attention_writes() -> None:
    torch.manual_seed(0)
    model = Decoder(vocabulary=11, dim=24, depth=2, heads=4, kv_heads=2, hidden=32).eval()
    written: list = []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda _, __, y: written.append(y))
    found = head_contributions(model, IDS).unflatten(1, (2, 4)).sum(2)
    torch.testing.assert_close(found, torch.stack([y.mean(1) for y in written], 1))
    last = head_contributions(model, IDS, pool="last").unflatten(1, (2, 4)).sum(2)
    torch.testing.assert_close(last, torch.stack([y[:, -1] for y in written[:2]], 1))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    masked = head_contributions(model, IDS, pool="last", mask=mask).unflatten(1, (2, 4)).sum(2)
    torch.testing.assert_close(masked[1], torch.stack([y[1, 3] for y in written[:2]]))
    mean = head_contributions(model, IDS, mask=mask).unflatten(1, (2, 4)).sum(2)
    torch.testing.assert_close(mean[1], torch.stack([y[1, :4].mean(0) for y in written[:2]]))


def test_gpt2s_transposed_projections_are_read_and_biases_are_left_out(transformers) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=13, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    taken: list = []
    for block in model.transformer.h:
        nn.init.normal_(block.attn.c_proj.bias)
        block.attn.c_proj.register_forward_pre_hook(lambda _, x: taken.append(x[0].mean(1)))
    found = head_contributions(model, IDS)
    for layer, block in enumerate(model.transformer.h):
        for head in range(3):
            at = slice(8 * head, 8 * head + 8)
            wanted = taken[layer][:, at] @ block.attn.c_proj.weight[at]
            torch.testing.assert_close(found[:, 3 * layer + head], wanted, atol=1e-6, rtol=1e-5)


def test_torchs_own_attention_is_read_through_its_weight() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    out = model.self_attn(x, x, x, need_weights=False)[0] - model.self_attn.out_proj.bias
    torch.testing.assert_close(head_contributions(model, x).sum(1), out.mean(1), atol=1e-6, rtol=1e-5)


def test_gradients_are_orthogonal_to_the_rows_of_the_weights() -> None:
    torch.manual_seed(0)
    model = SparseAutoencoder(8, 12, seed=0)
    model.loss(torch.randn(5, 6, 8)).backward()
    for weight in (model.encoder, model.decoder):
        assert (weight.grad * weight).sum(-1).abs().max() < 1e-6 < weight.grad.abs().max()
        torch.testing.assert_close(weight.norm(dim=-1), torch.ones(len(weight)))


def test_the_lengths_of_rows_mean_nothing() -> None:
    x, model = torch.randn(5, 6, 8), SparseAutoencoder(8, 12, seed=0)
    before = model(x)
    with torch.no_grad():
        model.encoder.mul_(torch.rand(12, 1) + 0.5)
        model.decoder.mul_(torch.rand(8, 1) + 0.5)
    for one, other in zip(model(x), before, strict=True):
        torch.testing.assert_close(one, other)


def test_its_parameters_are_counted() -> None:
    assert sum(p.numel() for p in SparseAutoencoder(768).parameters()) == 308_168  # 2·200·768 + 200 + 768


def test_a_seed_fits_the_same_autoencoder_twice() -> None:
    x = torch.randn(20, 6, 8)
    one, two = (fit_autoencoder(x, features=16, epochs=20, seed=3) for _ in range(2))
    assert torch.equal(one.encoder, two.encoder)
    assert one.loss(x) < fit_autoencoder(x, features=16, epochs=1, seed=3).loss(x)


def test_the_same_prompts_on_both_sides_tell_nothing() -> None:
    codes = torch.randint(9, (12, 6))
    assert not unique_codes(codes, codes).any() and not unique_pairs(codes, codes).any()
    torch.testing.assert_close(node_scores(codes, codes), torch.full((6,), 1 / 6).double())


def test_scores_follow_their_heads_and_edges_have_no_direction() -> None:
    torch.manual_seed(0)
    positive, negative = torch.randint(9, (12, 6)), torch.randint(9, (12, 6))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for normalise in (False, True):
        nodes = node_scores(positive, negative, normalise=normalise)
        moved = node_scores(positive[:, order], negative[:, order], normalise=normalise)
        assert torch.equal(moved, nodes[order])
        pairs = unique_pairs(positive, negative, normalise=normalise)
        assert torch.equal(pairs, pairs.T) and not pairs.diagonal().any()
        moved = unique_pairs(positive[:, order], negative[:, order], normalise=normalise)
        assert torch.equal(moved, pairs[order][:, order])
    by_layer = node_scores(positive, negative, layers=2)
    torch.testing.assert_close(by_layer.view(2, 3).sum(0), torch.ones(3).double())


def test_codes_seen_in_positives_alone_are_counted_once_each() -> None:
    positive, negative = torch.tensor([[1, 0], [1, 2], [3, 2]]), torch.tensor([[3, 2], [4, 2], [4, 2]])
    assert unique_codes(positive, negative).tolist() == [1, 1]
    assert unique_codes(positive, negative, normalise=True).tolist() == [1 / 3, 1 / 2]
    # Pairs (1, 0), (1, 2), (3, 2) against (3, 2), (4, 2).
    assert unique_pairs(positive, negative)[0, 1] == 2
    assert unique_pairs(positive, negative, normalise=True)[0, 1] == 2 / 5


def test_edges_give_to_the_heads_of_the_best_pairs() -> None:
    positive = torch.tensor([[0, 1, 1], [0, 1, 2], [0, 2, 2]])
    negative = torch.zeros(3, 3, dtype=torch.long)
    # Heads 1 and 2 have three pairs of codes, others two; the first M²/2 = 4 entries are (1, 2) and (2, 1).
    scores = edge_scores(positive, negative)
    assert scores[1] == scores[2] > scores[0]


def test_a_silent_head_has_code_zero() -> None:
    model = SparseAutoencoder(4, 5, seed=0)
    with torch.no_grad():
        model.encoder_bias.fill_(-100.0)
    assert not model.codes(torch.randn(3, 2, 4)).any()


def test_the_curve_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    scores, truth = torch.randint(6, (40,)).double(), torch.rand(40) > 0.6
    fpr, tpr, thresholds = roc_curve(scores, truth)
    theirs = metrics.roc_curve(truth.numpy(), scores.numpy(), drop_intermediate=False)
    for ours, wanted in zip((fpr, tpr, thresholds), theirs, strict=True):
        torch.testing.assert_close(ours.double(), torch.as_tensor(wanted))
    assert roc_auc(scores, truth) == pytest.approx(metrics.roc_auc_score(truth.numpy(), scores.numpy()))
    f1 = max(metrics.f1_score(truth.numpy(), (scores >= t).numpy()) for t in thresholds[1:])
    assert best_f1(scores, truth) == pytest.approx(f1)
    named = max(2 * t * (1 - f) / (t + 1 - f) for f, t in zip(fpr.tolist(), tpr.tolist(), strict=True) if t or f < 1)
    assert best_f1(scores, truth, variant="release") == pytest.approx(named)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: SparseAutoencoder(0), "at least 1"),
        (lambda: fit_autoencoder(torch.randn(3, 4)), "heads must have shape"),
        (lambda: roc_auc(torch.rand(4), torch.ones(4)), "some yes and some no"),
        (lambda: head_contributions(nn.Identity(), IDS, pool="first"), "pool must be"),
    ],
)
def test_what_does_not_fit_is_said(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
