"""Rings number the image's tokens, attention follows them, and the cache goes on from there."""

from __future__ import annotations

import pytest
import torch

from attnlab.lens.edits.concentric import ConcentricCausal, ConcentricPositions, depth, place, rings
from attnlab.lens.steer import steer
from attnlab.lens.toys.grid_recall import GridRecall
from attnlab.patterns import Causal
from attnlab.positions import Rotary
from lens.edits.models import IMAGE, answers, ask, both, likeliest, logits, tiny_llava


@pytest.mark.parametrize("grid", [(24, 24), (4, 4), (4, 6), (5, 5), (3, 7), (1, 4)])
def test_rings_peel_the_border_off_one_after_another(grid):
    left = torch.zeros(grid, dtype=torch.long)
    for ring in range(depth(grid)):
        inner = torch.ones(grid, dtype=torch.long)
        if ring:
            inner = torch.zeros(grid, dtype=torch.long)
            inner[ring:-ring, ring:-ring] = 1
        left += inner
    assert torch.equal(rings(*grid), left - 1)


def test_rings_are_symmetric_and_their_sizes_fall_by_eight():
    grid = rings(24, 24)
    assert torch.equal(grid, grid.rot90()) and torch.equal(grid, grid.flip(0)) and torch.equal(grid, grid.mT)
    assert torch.bincount(grid.flatten()).tolist() == [4 * (23 - 2 * r) for r in range(12)]


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_visibility_equals_a_loop_over_pairs(grid):
    start, after = 3, 4
    ring = rings(*grid).flatten().tolist()
    n = start + len(ring) + after
    allowed = ConcentricCausal(start, grid).matrix(n)
    for q in range(n):
        for k in range(n):
            both = start <= q < start + len(ring) and start <= k < start + len(ring)
            assert allowed[q, k] == (ring[k - start] <= ring[q - start] if both else k <= q)
    counts = torch.bincount(rings(*grid).flatten()).cumsum(0)
    assert torch.equal(allowed[start : start + len(ring)].sum(1), start + counts[ring])


def test_reversed_is_the_raster_backwards():
    at = place(torch.arange(3 + 6 + 2), 3, (2, 3), "reversed")
    assert at.tolist() == [0, 1, 2, 8, 7, 6, 5, 4, 3, 9, 10]
    block = ConcentricCausal(3, (2, 3), "reversed").matrix(11)[3:9, 3:9]
    assert torch.equal(block, torch.ones(6, 6, dtype=torch.bool).triu())


def test_text_goes_on_where_the_rings_end():
    at = place(torch.arange(3 + 16 + 3), 3, (4, 4))
    assert at[:3].tolist() == [0, 1, 2] and at[-3:].tolist() == [5, 6, 7]
    assert torch.equal(at[3:19].view(4, 4), 3 + rings(4, 4))


def test_no_image_is_the_causal_model(transformers):
    assert torch.equal(place(torch.arange(9), 2**40, (4, 4)), torch.arange(9))
    model, text = tiny_llava(transformers), {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    plain, said = logits(model, text), answers(model, text, new=3)
    with steer(model, [ConcentricPositions((4, 4))]):
        torch.testing.assert_close(logits(model, text), plain, atol=1e-5, rtol=1e-5)
        assert torch.equal(answers(model, text, new=3), said)


def test_the_prompt_equals_all_but_its_last_token_and_a_cached_step(transformers):
    for model, inputs, grid in both(transformers):
        ids = inputs["input_ids"]
        cut = {
            n: x[:, :-1] if n in ("input_ids", "attention_mask", "mm_token_type_ids") else x for n, x in inputs.items()
        }
        with steer(model, [ConcentricPositions(grid)]), torch.no_grad():
            whole = model(**inputs).logits[:, -1]
            cache = model(**cut, use_cache=True).past_key_values
            step = model(input_ids=ids[:, -1:], past_key_values=cache, attention_mask=torch.ones_like(ids)).logits[
                :, -1
            ]
        torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)


def test_generation_equals_the_whole_recomputed_at_each_token(transformers):
    model, inputs = tiny_llava(transformers), ask()
    with steer(model, [ConcentricPositions((4, 4))]):
        said, ids = answers(model, inputs), inputs["input_ids"]
        for t in range(said.shape[1]):
            whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            best = likeliest(model, logits(model, whole)[:, -1])
            assert torch.equal(best, said[:, t])
            ids = torch.cat((ids, best[:, None]), 1)


def test_a_prompt_padded_on_the_left_is_placed_alike(transformers):
    model, inputs = tiny_llava(transformers), ask()
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat((pad, inputs["input_ids"]), 1),
        "attention_mask": torch.cat((pad, inputs["attention_mask"]), 1),
        "pixel_values": inputs["pixel_values"],
    }
    with steer(model, [ConcentricPositions((4, 4))]):
        torch.testing.assert_close(logits(model, padded)[:, 3:], logits(model, inputs), atol=1e-4, rtol=1e-4)
        assert torch.equal(answers(model, padded), answers(model, inputs))


def test_turning_the_image_by_ninety_degrees_changes_nothing_after_one_layer(transformers):
    model, inputs = tiny_llava(transformers, layers=1), ask()
    decoder, ids = model.model.language_model, inputs["input_ids"]
    x = torch.randn(1, ids.shape[1], 32)
    turned = x.clone()
    turned[:, 2:18] = x[:, 2:18].view(1, 4, 4, 32).rot90(1, (1, 2)).reshape(1, 16, 32)
    image = ids == IMAGE

    def last(embeddings):
        with torch.no_grad():
            return decoder(inputs_embeds=embeddings).last_hidden_state[:, -1]

    assert (last(turned) - last(x)).abs().max() > 1e-3  # raster positions tell
    with steer(decoder, [ConcentricPositions((4, 4), image)]):
        torch.testing.assert_close(last(turned), last(x), atol=1e-5, rtol=1e-5)


def test_the_text_is_as_near_to_the_top_of_the_image_as_to_its_bottom():
    # Queries and keys that are all the same: what rotary positions alone make of LLaVA's 24 × 24 tokens.
    rotary, same, start, n = Rotary(64), torch.ones(1, 64), 35, 35 + 576 + 1

    def seen(at):
        keys = rotary.turn_to(same.expand(n, -1), at)
        scores = (keys[-1] @ keys.mT / 8)[start : start + 576].view(24, 24)
        return scores[0].mean(), scores[-1].mean(), at[-1] - at[start : start + 576].min()

    top, bottom, far = seen(torch.arange(n))
    assert top < 0.75 * bottom and far == 576
    top, bottom, far = seen(place(torch.arange(n), start, (24, 24)))
    torch.testing.assert_close(top, bottom)
    assert far == 12


@pytest.mark.slow
def test_a_decoder_learns_to_look_everywhere_sooner_than_with_raster_positions(transformers):
    task = GridRecall()
    raster = task.right(task.train(task.reader()))
    reader = task.reader()
    with steer(reader, [ConcentricPositions((12, 12), task.image())]):
        rings = task.right(task.train(reader))
    assert min(rings) > 0.9 and max(rings) - min(rings) < 0.05
    assert max(raster) < 0.8


def test_models_of_both_shapes_change_and_are_left_as_they_were(transformers):
    for model, inputs, grid in both(transformers):
        plain, before = logits(model, inputs), answers(model, inputs)
        with steer(model, [ConcentricPositions(grid)]):
            assert (logits(model, inputs) - plain).abs().max() > 1e-2
        assert torch.equal(logits(model, inputs), plain) and torch.equal(answers(model, inputs), before)


def test_attnlabs_own_attention_takes_the_pattern_and_the_positions(transformers):
    from attnlab.attend import attend

    model, inputs = tiny_llava(transformers, layers=1), ask()
    attention, ids = model.model.language_model.layers[0].self_attn, inputs["input_ids"]
    x, n = torch.randn(1, ids.shape[1], 32), ids.shape[1]
    rotary, at = Rotary(8), place(torch.arange(n), 2, (4, 4))
    q, k, v = (getattr(attention, f"{name}_proj")(x).view(1, n, -1, 8).transpose(1, 2) for name in "qkv")
    ours = attend(rotary.turn_to(q, at), rotary.turn_to(k, at), v, pattern=ConcentricCausal(2, (4, 4)))
    ours = attention.o_proj(ours.transpose(1, 2).flatten(2))
    kept = []
    handle = attention.register_forward_hook(lambda *call: kept.append(call[-1][0]))
    norm, attention_norm = model.model.language_model.layers[0], torch.nn.Identity()
    norm.input_layernorm = attention_norm
    with steer(model.model.language_model, [ConcentricPositions((4, 4), ids == IMAGE)]), torch.no_grad():
        model.model.language_model(inputs_embeds=x)
    handle.remove()
    torch.testing.assert_close(kept[0], ours, atol=1e-5, rtol=1e-5)


def test_bad_arguments_are_named(transformers):
    with pytest.raises(ValueError, match="height and width must be at least 1"):
        rings(0, 4)
    with pytest.raises(ValueError, match="order must be 'concentric' or 'reversed'"):
        ConcentricPositions((4, 4), order="spiral")
    with pytest.raises(ValueError, match="start must be 0 or more"):
        ConcentricCausal(-1, (4, 4))
    model, inputs = tiny_llava(transformers), ask()
    with pytest.raises(ValueError, match="one image of 2 × 4 = 8 tokens in a row"):
        with steer(model, [ConcentricPositions((2, 4))]):
            logits(model, inputs)
    with pytest.raises(ValueError, match="the padding alone"):
        with steer(model, [ConcentricPositions((4, 4))]):
            logits(model, {**inputs, "attention_mask": Causal().matrix(21)[None, None]})
    with pytest.raises(ValueError, match="takes no position_ids"):
        with steer(torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), 1), [
            ConcentricPositions((4, 4), torch.ones(4, dtype=torch.bool))
        ]):  # fmt: skip
            pass
