"""Sinks are found where they were planted, and only rows that look at the image change."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab.lens.edits.redistribute import (
    RedistributeSinks,
    image_heads,
    massive_dimensions,
    massiveness,
    redistribute,
    sink_tokens,
)
from attnlab.lens.steer import steer
from lens.edits.models import answers, ask, both, logits, tiny_llava


def case(batch=2, heads=3, n=12):
    weights = torch.randn(batch, heads, n, n, dtype=torch.float64).mul(2).softmax(-1)
    image = torch.zeros(n, dtype=torch.bool)
    image[3:9] = True
    sinks = torch.zeros(batch, n, dtype=torch.bool)
    sinks[:, 0] = sinks[0, 4] = sinks[1, 5] = sinks[1, 7] = True
    return weights, sinks, image


def test_redistribution_equals_a_loop_over_rows():
    weights, sinks, image = case()
    chosen = image_heads(weights, sinks, image, rho=0.4, floor=0.3)
    new = redistribute(weights, sinks, image, chosen, keep=0.6)
    wanted = weights.clone()
    for b, h, q in torch.cartesian_prod(*map(torch.arange, weights.shape[:3])):
        row, sunk = weights[b, h, q], sinks[b]
        share = row[image & sunk].sum() / (row[image] + 1e-6).sum()
        looks = bool(share <= 0.4 and row[image].sum() >= 0.3)
        assert bool(chosen[b, h, q]) == looks
        if looks:
            budget, rest = 0.4 * row[sunk].sum(), image & ~sunk
            wanted[b, h, q, sunk] = 0.6 * row[sunk]
            wanted[b, h, q, rest] = row[rest] + budget * row[rest] / row[rest].sum()
    torch.testing.assert_close(new, wanted)
    assert 0 < chosen.sum() < chosen.numel()


def test_rows_keep_their_sum_and_the_rest_of_the_image_gains_in_proportion():
    weights, sinks, image = case()
    chosen = image_heads(weights, sinks, image, floor=0.3)
    new = redistribute(weights, sinks, image, chosen)
    torch.testing.assert_close(new.sum(-1), weights.sum(-1))
    assert torch.equal(new[~chosen], weights[~chosen])
    for b in range(2):
        rest = image & ~sinks[b]
        gain = (new[b] / weights[b])[..., rest]
        assert (gain >= 1).all()
        torch.testing.assert_close(gain, gain[..., :1].expand_as(gain))
    text = ~image & ~sinks[0]
    assert torch.equal(new[0, :, :, text], weights[0, :, :, text])


def test_keeping_all_is_the_identity_and_rho_zero_chooses_nothing():
    weights, sinks, image = case()
    everywhere = torch.ones(weights.shape[:3], dtype=torch.bool)
    assert torch.equal(redistribute(weights, sinks, image, everywhere, keep=1.0), weights)
    assert not image_heads(weights, sinks, image, rho=0.0, floor=0.0).any()
    assert not image_heads(weights, sinks & ~image, image, rho=1.0, floor=0.0).any()  # no sink in the image


def plant(model, tokens, dimensions=(3, 11), layer=2):
    """Massive activations of `tokens` in what enters a layer of the decoder."""

    def add(module, arguments, keywords):
        hidden = (arguments[0] if arguments else keywords["hidden_states"]).clone()
        if hidden.shape[1] > max(tokens):
            hidden[:, list(tokens), dimensions[0]] += 50
            hidden[:, list(tokens), dimensions[1]] -= 50
        return (hidden, *arguments[1:]), keywords

    return model.model.language_model.layers[layer].register_forward_pre_hook(add, with_kwargs=True)


def test_the_sinks_that_were_planted_are_found_and_serve_every_step(transformers):
    model, inputs = tiny_llava(transformers), ask()
    tokens = [0, 5, 9, 14]
    handle = plant(model, tokens)
    edit = RedistributeSinks((3, 11), tau=3.0, rho=0.9, floor=0.0, layers=[1, 2])
    before = answers(model, inputs)
    with steer(model, [edit]):
        answers(model, inputs)
        found = {layer: sinks[0].nonzero()[:, 0].tolist() for layer, sinks in edit.sinks.items()}
    assert found == {2: tokens}  # layer 1 comes before any sink has formed
    assert torch.equal(answers(model, inputs), before)
    handle.remove()


def test_the_massive_dimensions_that_were_planted_are_found():
    hidden = torch.randn(1, 20, 32)
    hidden[0, [0, 7], 5] += 40
    hidden[0, [0, 7], 30] -= 40
    assert massive_dimensions(hidden) == (5, 30)
    assert sink_tokens(hidden, (5, 30), tau=3.0)[0].nonzero()[:, 0].tolist() == [0, 7]


def test_massiveness_divides_by_the_root_mean_square_without_a_gain():
    hidden = torch.tensor([3.0, -4.0, 0.0, 0.0])
    expected = 4 / math.sqrt(25 / 4 + 1e-6)
    torch.testing.assert_close(massiveness(hidden, (0, 1)), torch.tensor(expected))


def test_models_of_both_shapes_change_and_are_left_as_they_were(transformers):
    for model, inputs, _ in both(transformers):
        handle = plant(model, [0, 4, 6])
        plain = logits(model, inputs)
        with steer(model, [RedistributeSinks((3, 11), tau=3.0, floor=0.0, rho=0.95, keep=1.0)]):
            torch.testing.assert_close(logits(model, inputs), plain, atol=1e-5, rtol=1e-5)
        with steer(model, [RedistributeSinks((3, 11), tau=3.0, floor=0.0, rho=0.95, keep=0.2)]):
            assert (logits(model, inputs) - plain).abs().max() > 1e-3
        assert torch.equal(logits(model, inputs), plain)
        handle.remove()


def test_a_cached_step_is_the_last_row_of_the_whole(transformers):
    model = tiny_llava(transformers)
    with steer(model, [RedistributeSinks((0, 1), tau=0.8, rho=0.9, floor=0.0)]):
        said = answers(model, ask(), new=5)
    ids = torch.cat((ask()["input_ids"], said[:, :4]), 1)
    whole = {**ask(), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    handle = plant(model, [0, 5, 9, 14])  # sinks that do not depend on the answer
    prompt = {**whole, "input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    edit = RedistributeSinks((3, 11), tau=3.0, rho=0.9, floor=0.0)
    with steer(model, [edit]), torch.no_grad():
        at_once = model(**whole).logits[:, -1]
        cache = model(**prompt, use_cache=True).past_key_values
        step = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, at_once, atol=1e-5, rtol=1e-5)
    handle.remove()


def test_a_prompt_padded_on_the_left_is_edited_alike(transformers):
    model, inputs = tiny_llava(transformers), ask()
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat((pad, inputs["input_ids"]), 1),
        "attention_mask": torch.cat((pad, inputs["attention_mask"]), 1),
        "pixel_values": inputs["pixel_values"],
    }
    edit = RedistributeSinks((0, 1), tau=0.8, rho=0.9, floor=0.0)
    with steer(model, [edit]):
        assert torch.equal(answers(model, padded), answers(model, inputs))
        last = logits(model, inputs)[:, -1]
        torch.testing.assert_close(logits(model, padded)[:, -1], last, atol=1e-4, rtol=1e-4)


def test_bad_arguments_are_named(transformers):
    model = tiny_llava(transformers, layers=2)
    with pytest.raises(ValueError, match="keep must lie in 0 to 1"):
        RedistributeSinks((0,), keep=1.5)
    with pytest.raises(ValueError, match="layers of the decoder: 7 not there: there are 0 to 1"):
        with steer(model, [RedistributeSinks((0,), layers=7)]):
            pass
    with pytest.raises(ValueError, match=r"dimensions must be some of the 32 channels"):
        with steer(model, [RedistributeSinks((99,), first=0)]):
            logits(model, ask())
    with pytest.raises(ValueError, match="image must be bool"):
        RedistributeSinks((0,), torch.ones(4))
    with pytest.raises(ValueError, match="image covers 99 tokens"):
        with steer(model, [RedistributeSinks((0,), torch.ones(99, dtype=torch.bool), first=0)]):
            logits(model, ask())
    with pytest.raises(ValueError, match="names no image token"):
        with steer(model.model.language_model, [RedistributeSinks((0,))]):
            pass
    weights, sinks, image = case()
    with pytest.raises(ValueError, match="sinks and image must be bool"):
        image_heads(weights, sinks[:, :4], image[:4])
