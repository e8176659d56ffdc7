"""Union of experts as a language model: its definition over segments, and the adaptive softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.models.language.adaptive import AdaptiveVocabulary
from attnlab.models.language.uoe import UnionLM


def make(**keywords) -> UnionLM:
    torch.manual_seed(0)
    options = dict(vocabulary=30, dim=16, depth=2, heads=4, hidden=24, cutoffs=(8, 20), reach=14, memory=6)
    model = UnionLM(**options | keywords).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def definition(model: UnionLM, segments: list[Tensor]) -> list[Tensor]:
    """Log probabilities segment by segment; mixers and MLPs are taken as they are (their own tests are elsewhere)."""
    memory: list[Tensor | None] = [None] * len(model.blocks)
    out = []
    for ids in segments:
        x = model.embedding.weight[ids] * 4
        for i, block in enumerate(model.blocks):
            old, n = memory[i], ids.shape[1]
            whole = x if old is None else torch.cat((old, x), 1)
            memory[i] = whole[:, -6:]
            placed = whole[:, -14:] + model.places[i][14 - min(14, whole.shape[1]) :]
            before = placed[:, :-n] if placed.shape[1] > n else None
            x = placed[:, -n:]
            x = block.norm1(x + block.mixer(x, memory=before))
            x = block.norm2(x + block.mlp(x))
        out.append(model.embedding.log_probabilities(x))
    return out


def test_equals_the_definition_over_segments():
    model, pieces = make(), [torch.randint(0, 30, (2, n)) for n in (4, 1, 6, 3, 14)]
    state = model.initial_state(2)
    for piece, wanted in zip(pieces, definition(model, pieces), strict=True):
        found, state = model(piece, state)
        torch.testing.assert_close(found, wanted)
    assert state.length == 28


def test_the_loss_is_that_of_the_log_probabilities_and_moves_the_memory_on():
    model, ids = make(), torch.randint(0, 30, (2, 2, 7))
    states = [model.initial_state(2) for _ in range(2)]
    for piece in ids:
        inputs, targets = piece[:, :-1], piece[:, 1:]
        found, states[0] = model(inputs, states[0])
        loss = model.loss(inputs, targets, states[1])
        torch.testing.assert_close(loss, -found.gather(-1, targets[..., None]).squeeze(-1))


def test_a_segment_is_known_by_the_one_before():
    model = make()
    first, second = torch.randint(0, 30, (1, 6)), torch.randint(0, 30, (1, 6))
    results = []
    for before in (first, (first + 1) % 30):
        state = model.initial_state(1)
        _, state = model(before, state)
        results.append(model(second, state)[0])
    assert not torch.allclose(*results)
    assert model.generate(first, 5, temperature=0).shape == (1, 11)


def test_the_released_lists_are_not_causal():
    ids, released = torch.randint(0, 30, (2, 12)), make(variant="release")
    changes = []
    for shift in range(1, 6):
        other = ids.clone()
        other[:, 6:] = (other[:, 6:] + shift) % 30
        changes.append(not torch.allclose(released(other)[:, :6], released(ids)[:, :6]))
    assert any(changes)


def test_the_adaptive_softmax_is_torchs():
    ours = AdaptiveVocabulary(30, 8, (10, 22)).double()
    theirs = nn.AdaptiveLogSoftmaxWithLoss(8, 30, [10, 22], div_value=1.0, head_bias=True).double()
    x, targets = torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 30
    with torch.no_grad():
        ours.bias[10:] = 0  # torch has none in the clusters
        theirs.head.weight.copy_(torch.cat((ours.weight[:10], ours.cluster_weight.flip(0))))
        theirs.head.bias.copy_(torch.cat((ours.bias[:10].normal_(), ours.cluster_bias.normal_().flip(0))))
        for i, tail in enumerate(theirs.tail):
            tail[0].weight.copy_(torch.eye(8))
            tail[1].weight.copy_(ours.weight[(10, 22)[i] : (22, 30)[i]])
    torch.testing.assert_close(ours.log_probabilities(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.loss(x, targets), -theirs(x, targets).output)
    torch.testing.assert_close(ours.log_probabilities(x).exp().sum(-1), torch.ones(40, dtype=torch.float64))


def test_without_cutoffs_it_is_one_softmax():
    ours, x = AdaptiveVocabulary(12, 8), torch.randn(3, 5, 8)
    torch.testing.assert_close(ours.log_probabilities(x), (x @ ours.weight.T + ours.bias).log_softmax(-1))
    torch.testing.assert_close(ours.embed(torch.arange(12)), ours.weight * 8**0.5)


@pytest.mark.parametrize(("keywords", "words"), [
    ({"cutoffs": (20, 8)}, r"cutoffs must rise from above 0 to below words = 30, got \(20, 8\)"),
    ({"cutoffs": (30,)}, r"cutoffs must rise from above 0 to below words = 30, got \(30,\)"),
    ({"memory": 14}, "memory must lie in 0 to reach − 1 = 13, got 14"),
    ({"experts": 5}, "experts must be at least 1 and divide hidden = 24, got 5"),
])  # fmt: skip
def test_bad_arguments_are_named(keywords, words):
    with pytest.raises(ValueError, match=words):
        make(**keywords)


def test_a_segment_beyond_the_places_is_refused():
    with pytest.raises(ValueError, match="ids must be at most reach = 14 tokens long, got 15"):
        make()(torch.zeros(1, 15, dtype=torch.long))
