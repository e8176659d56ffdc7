"""The heads are those that two separate passes per layer find, and they stay the same through the answer."""

from __future__ import annotations

import pytest
import torch

from attnlab.lens.edits.decoder import layers_of
from attnlab.lens.edits.emphasise import EmphasiseTokens
from attnlab.lens.edits.redistribute import RedistributeSinks
from attnlab.lens.edits.reinforce import HeadDivergence, ReinforceHeads
from attnlab.lens.measures.divergence import aware_heads, divergence, token_divergence, without_surges
from attnlab.lens.steer import Edit, steer
from lens.edits.models import IMAGE, answers, ask, both, likeliest, logits, tiny_llava


def test_divergence_is_the_distance_between_the_heads_outputs():
    seen, unseen = torch.randn(2, 2, 8, 5, dtype=torch.float64)
    found = divergence(seen, unseen)
    wanted = torch.tensor(
        [[sum((a - b) ** 2) ** 0.5 for a, b in zip(x, y, strict=True)] for x, y in zip(seen, unseen, strict=True)]
    )
    torch.testing.assert_close(found, wanted.double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(divergence(seen, unseen, distance="sq_l2"), found.square())
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    torch.testing.assert_close(divergence(seen @ rotation, unseen @ rotation), found)
    assert torch.equal(divergence(seen.flip(1), unseen.flip(1)), found.flip(1))
    assert torch.equal(divergence(seen, seen), torch.zeros(2, 8, dtype=torch.float64))


def test_token_divergence_sums_each_layers_largest():
    layers = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert token_divergence(layers, 2) == 3 + 2 + 5 + 4
    assert token_divergence([layers[0]], 1) == 3


def test_a_surge_needs_both_conditions():
    divergences = torch.tensor([9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    unseen = torch.ones(8, 4)
    unseen[0] = unseen[2] = 8.0
    kept = without_surges(divergences, unseen)
    assert kept.tolist() == [0, 9, 1, 1, 1, 1, 1, 1]  # 1 does not fire without the image, 2 does not diverge
    assert (kept <= divergences).all()


def test_aware_heads_are_above_the_middle_and_half_of_them_at_most():
    assert aware_heads(torch.tensor([4.0, 1.0, 3.0, 2.0])).tolist() == [True, False, True, False]
    assert aware_heads(torch.tensor([4.0, 1.0, 3.0])).tolist() == [True, False, False]
    assert not aware_heads(torch.full((2, 8), 0.3)).any()
    many = aware_heads(torch.randn(50, 7, dtype=torch.float64))
    assert (many.sum(-1) == 3).all()


class Loud(Edit):
    """Scales given heads of each layer, and keeps the last states of the heads."""

    def __init__(self, model, aware, alpha):
        super().__init__()
        self.depths = {layer.self_attn: i for i, layer in enumerate(layers_of(model.model.language_model))}
        self.aware, self.alpha, self.kept = aware, alpha, {}

    def wants(self, event):
        return event.module in self.depths

    def output(self, event, out):
        depth = self.depths[event.module]
        self.kept[depth] = out[:, :, -1]
        loud = self.aware.get(depth)
        return out if loud is None else torch.where(loud[:, :, None, None], self.alpha * out, out)


def two_passes_per_layer(model, inputs, layers, alpha, filtered=True):
    """The heads by recomputing both prompts from scratch for each layer, all lower layers reinforced."""
    text = {"input_ids": inputs["input_ids"][:, inputs["input_ids"][0] != IMAGE]}
    aware = {}
    for layer in layers:
        outputs = []
        for prompt in (inputs, text):
            edit = Loud(model, aware, alpha)
            with steer(model, [edit]):
                logits(model, prompt)
            outputs.append(edit.kept[layer])
        found = (outputs[0] - outputs[1]).square().sum(-1).sqrt()
        fires = outputs[1].square().sum(-1)
        surge = (found > found.mean(-1, keepdim=True) + found.std(-1, keepdim=True)) & (
            fires > fires.mean(-1, keepdim=True) + fires.std(-1, keepdim=True)
        )
        found = found.masked_fill(surge & filtered, 0.0)
        aware = {**aware, layer: found > found.quantile(0.5, dim=-1, keepdim=True)}
    return aware


@pytest.mark.parametrize("filtered", [True, False])
def test_layer_by_layer_equals_two_passes_per_layer(transformers, filtered):
    model, inputs = tiny_llava(transformers), ask()
    wanted = two_passes_per_layer(model, inputs, [1, 2, 3], 2.0, filtered)
    edit = ReinforceHeads(filtered=filtered)
    with steer(model, [edit]):
        found = logits(model, inputs)
        assert {i: a.tolist() for i, a in edit.aware.items()} == {i: a.tolist() for i, a in wanted.items()}
    with steer(model, [Loud(model, wanted, 2.0)]):
        torch.testing.assert_close(found, logits(model, inputs), atol=1e-5, rtol=1e-5)


def test_each_sample_of_a_batch_has_its_own_heads(transformers):
    model, inputs = tiny_llava(transformers), ask(batch=3)
    edit = ReinforceHeads()
    with steer(model, [edit]):
        together = logits(model, inputs)
        aware = dict(edit.aware)
        for i in range(3):
            alone = logits(model, {n: x[i : i + 1] for n, x in inputs.items()})
            torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=1e-4)
            assert all(torch.equal(edit.aware[layer][0], aware[layer][i]) for layer in aware)
    assert any((a != a[:1]).any() for a in aware.values())


def test_cached_decoding_equals_the_whole_with_the_heads_frozen(transformers):
    model, inputs = tiny_llava(transformers), ask()
    edit = ReinforceHeads()
    with steer(model, [edit]):
        said = answers(model, inputs, new=5)
        aware = dict(edit.aware)
    ids = inputs["input_ids"]
    with steer(model, [Loud(model, aware, 2.0)]):
        for t in range(5):
            whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            best = likeliest(model, logits(model, whole)[:, -1])
            assert torch.equal(best, said[:, t])
            ids = torch.cat((ids, best[:, None]), 1)


def test_models_of_both_shapes_change_and_are_left_as_they_were(transformers):
    for model, inputs, _ in both(transformers):
        plain, before = logits(model, inputs), answers(model, inputs)
        with steer(model, [ReinforceHeads(alpha=1.0)]):
            assert torch.equal(logits(model, inputs), plain)
        with steer(model, [ReinforceHeads()]):
            assert (logits(model, inputs) - plain).abs().max() > 1e-2
            answers(model, inputs)
        assert torch.equal(logits(model, inputs), plain) and torch.equal(answers(model, inputs), before)


def test_without_an_image_nothing_is_reinforced(transformers):
    model = tiny_llava(transformers)
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    plain, edit = logits(model, text), ReinforceHeads()
    with steer(model, [edit]):
        logits(model, ask())
        assert edit.aware
        assert torch.equal(logits(model, text), plain) and not edit.aware


def test_divergence_of_an_answer_is_that_of_its_growing_prompts(transformers):
    model, inputs = tiny_llava(transformers), ask(after=(7, 8, 9, 10, 11))
    whole, last = HeadDivergence(tokens=3), HeadDivergence()
    with steer(model, [whole]):
        logits(model, inputs)
        found = whole.token_divergence(2)
    for t, cut in enumerate((2, 1, None)):
        prompt = {**inputs, **{n: inputs[n][:, : -cut if cut else None] for n in ("input_ids", "attention_mask")}}
        with steer(model, [last]):
            logits(model, prompt)
            torch.testing.assert_close(last.token_divergence(2)[:, 0], found[:, t], atol=1e-4, rtol=1e-4)


def test_others_at_the_tap_do_not_see_the_measurement(transformers):
    model, inputs = tiny_llava(transformers), ask()

    class Seen(Edit):
        calls = 0

        def after(self, event, out):
            self.calls += 1
            assert len(out) == 1 and event.index == 0

    seen = Seen()
    with steer(model, [ReinforceHeads(), seen]):
        logits(model, inputs)
    assert seen.calls == 2 + 4  # the vision layers and the decoder's, once each


@pytest.mark.parametrize(("depth", "layers"), [(32, {1, *range(18, 32)}), (4, {1, 2, 3}), (1, {0})])
def test_the_layers_are_the_second_and_the_last_fourteen_of_thirty_two(depth, layers):
    decoder = torch.nn.Module()
    decoder.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(depth))
    edit = ReinforceHeads(torch.ones(3, dtype=torch.bool))
    with steer(decoder, [edit]):
        assert edit.chosen == layers


def test_edits_of_one_decoder_compose(transformers):
    model, inputs = tiny_llava(transformers), ask()
    plain, said = logits(model, inputs), answers(model, inputs)
    edits = [
        ReinforceHeads(),
        RedistributeSinks((0, 1), tau=0.8, rho=0.9, floor=0.0),
        EmphasiseTokens(inputs["input_ids"][0] == IMAGE),
    ]
    alone = []
    for edit in edits:
        with steer(model, [edit]):
            alone.append(logits(model, inputs)[:, -1])
    with steer(model, edits):
        together = logits(model, inputs)[:, -1]
        answers(model, inputs)
    assert all((together - one).abs().max() > 1e-3 for one in alone)
    assert torch.equal(logits(model, inputs), plain) and torch.equal(answers(model, inputs), said)


def test_bad_arguments_are_named(transformers):
    with pytest.raises(ValueError, match="seen and unseen must both be"):
        divergence(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="distance must be"):
        divergence(torch.ones(2, 3), torch.ones(2, 3), distance="l1")
    with pytest.raises(ValueError, match="k must be 1 to the number of heads, 3"):
        token_divergence(torch.ones(2, 3), 4)
    with pytest.raises(ValueError, match="unseen must be"):
        without_surges(torch.ones(3), torch.ones(4, 5))
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        HeadDivergence(tokens=0)
    model = tiny_llava(transformers)
    with pytest.raises(ValueError, match="layers of the decoder: 9 not there: there are 0 to 3"):
        with steer(model, [ReinforceHeads(layers=[9])]):
            pass
