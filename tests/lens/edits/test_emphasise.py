"""The last query alone looks harder at the chosen patches, with or without a cache."""

from __future__ import annotations

import numpy
import pytest
import torch

from attnlab import lens
from attnlab.lens.edits.emphasise import (
    EmphasiseTokens,
    ImageAttention,
    emphasise,
    guided,
    informative_patches,
    modulation,
    placed,
)
from attnlab.lens.edits.guidance import ImageGuidance, without_image
from attnlab.lens.steer import Edit, steer
from lens.edits.models import IMAGE, answers, ask, both, likeliest, logits, tiny_llava


class Weights(Edit):
    """Keeps the weights of each layer's last call."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def after(self, event, out):
        if event.name.startswith("model.language_model"):
            self.kept[event.name] = event.weights()


def scores():
    e = torch.randn(2, 3, 5, 8, dtype=torch.float64).masked_fill(torch.ones(5, 8, dtype=torch.bool).triu(4), -torch.inf)
    top, bottom = torch.zeros(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)
    top[[2, 3, 7]] = bottom[5] = True
    return e, top, bottom


def test_only_the_last_row_changes_by_the_formula():
    e, top, bottom = scores()
    new = emphasise(e, top, bottom, alpha=0.7, beta=0.4)
    assert torch.equal(new[:, :, :-1], e[:, :, :-1])
    for j in range(8):
        strength = 0.7 if top[j] else 0.4 if bottom[j] else 0.0
        torch.testing.assert_close(new[..., -1, j], e[..., -1, j] + strength * e[..., -1, j].abs())
    assert torch.equal(emphasise(e, top, bottom, alpha=0.0, beta=0.0), e)


@pytest.mark.parametrize("closed", [-torch.inf, torch.finfo(torch.float64).min])
def test_a_masked_key_stays_masked_whatever_the_strength(closed):
    e, top, bottom = scores()
    e[..., -1, 7] = closed
    assert (emphasise(e, top, bottom, alpha=50.0)[..., -1, 7] == closed).all()
    assert (emphasise(e, top, alpha=50.0).softmax(-1)[..., -1, 7] == 0).all()


def test_below_one_the_order_among_top_tokens_is_kept():
    e, top, bottom = scores()
    new = emphasise(e, top, bottom, alpha=0.9)[:, :, -1, top]
    assert torch.equal(new.argsort(-1), e[:, :, -1, top].argsort(-1))


def test_strengths_by_head_have_the_mean_that_was_asked_for():
    e, top, _ = scores()
    sensitivity = torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64)
    strengths = modulation(sensitivity)
    torch.testing.assert_close(strengths, sensitivity / 0.3)
    new = emphasise(e, top, alpha=0.5 * strengths)
    for h in range(3):
        torch.testing.assert_close(new[:, h], emphasise(e[:, h : h + 1], top, alpha=0.5 * float(strengths[h]))[:, 0])


def test_patches_are_those_of_a_sort_and_numpys_percentiles():
    maps = torch.rand(2, 4, 26, 26).pow(6)
    maps[1, :, 0, [3, 9, 20]] += 3
    found = informative_patches(*maps, local=0.3)
    first, late = maps[0, :, 0, 1:].sum(0).numpy(), maps[1, :, 0, 1:].sum(0).numpy()
    low, high = numpy.percentile(late, [25, 75])
    share = (late > high + 1.5 * (high - low)).mean()
    bottom = set(numpy.argsort(late)[::-1][: int(25 * share)].tolist())
    top = set(numpy.argsort(first)[::-1][:7].tolist()) - bottom
    assert set(found.bottom.nonzero()[:, 0].tolist()) == bottom and {2, 8, 19} <= bottom
    assert set(found.top.nonzero()[:, 0].tolist()) == top
    assert found.outliers == pytest.approx(share)


def test_the_spatial_stream_takes_the_patches_that_patches_look_at():
    maps = torch.full((2, 3, 10, 10), 0.1)
    maps[0, :, 1:, 6] = 0.5
    found = informative_patches(*maps, local=0.0, spatial=0.12)
    assert found.top.nonzero()[:, 0].tolist() == [5]  # the class token is none of the patches


def test_guidance_one_keeps_the_likely_tokens_as_they_are():
    conditional, other = torch.randn(2, 9).mul(3), torch.randn(2, 9)
    same = guided(conditional, other, guidance=1.0)
    s = conditional.log_softmax(-1)
    likely = s >= s.amax(-1, keepdim=True) + torch.tensor(0.1).log()
    torch.testing.assert_close(same[likely], s[likely])
    assert (same[~likely] == -torch.inf).all() and not likely.all()
    more = guided(conditional, other, guidance=1.5)
    torch.testing.assert_close(more[likely], (1.5 * s - 0.5 * other.log_softmax(-1))[likely])


def test_models_of_both_shapes_change_and_are_left_as_they_were(transformers):
    for model, inputs, _ in both(transformers):
        image = inputs["input_ids"][0] == model.config.image_token_id
        plain = logits(model, inputs)
        with steer(model, [EmphasiseTokens(image, alpha=0.0)]):
            torch.testing.assert_close(logits(model, inputs), plain, atol=1e-5, rtol=1e-5)
        with steer(model, [EmphasiseTokens(image, alpha=0.9)]):
            new = logits(model, inputs)
        torch.testing.assert_close(new[:, :-1], plain[:, :-1], atol=1e-5, rtol=1e-5)
        assert (new[:, -1] - plain[:, -1]).abs().max() > 1e-3
        assert torch.equal(logits(model, inputs), plain)


def test_a_cached_step_edits_one_row_and_it_is_the_last_of_the_whole(transformers):
    model = tiny_llava(transformers, layers=3)
    inputs = ask(after=(7, 8, 9, 10))
    ids = inputs["input_ids"]
    patches = torch.rand(16) < 0.4
    edit = EmphasiseTokens(placed(patches, ids[0] == IMAGE), alpha=0.8, layers=2)
    with torch.no_grad():
        prompt = {"input_ids": ids[:, :-1], "pixel_values": inputs["pixel_values"]}
        cache = model(**prompt, use_cache=True).past_key_values  # unedited, as is every row but the last
        plain, seen = Weights(), Weights()
        with steer(model, [plain]):
            whole = model(**inputs)
        with steer(model, [edit, seen]):
            whole = model(**inputs).logits[:, -1]
            full = dict(seen.kept)
            step = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)
    last = max(full)
    assert seen.kept[last].shape[2] == 1
    torch.testing.assert_close(seen.kept[last][:, :, 0], full[last][:, :, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full[last][:, :, :-1], plain.kept[last][:, :, :-1], atol=1e-6, rtol=1e-5)
    assert (full[last] - plain.kept[last]).abs().max() > 1e-3


def test_patches_are_chosen_from_what_the_encoder_was_seen_to_do(transformers):
    model, inputs = tiny_llava(transformers), ask()
    with lens.watch(model, layers="*vision_tower*") as record:
        logits(model, inputs)
    first, late = record[0][0], record[-2][0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    torch.testing.assert_close(first, maps[0][0], atol=1e-5, rtol=1e-5)
    found, wanted = informative_patches(first, late), informative_patches(maps[0][0], maps[-2][0])
    assert torch.equal(found.top, wanted.top) and torch.equal(found.bottom, wanted.bottom)
    assert found.top.any() and not (found.top & found.bottom).any()
    image = inputs["input_ids"][0] == IMAGE
    assert torch.equal(placed(found.top, image)[2:18], found.top) and placed(found.top, image).sum() == found.top.sum()


def test_sensitive_heads_get_more_of_the_strength(transformers):
    model, inputs = tiny_llava(transformers, layers=3), ask()
    image = inputs["input_ids"][0] == IMAGE
    measure = ImageAttention()
    with steer(model, [measure]):
        logits(model, inputs)
    sensitivity = measure.sensitivity()
    assert sensitivity.shape == (3, 4) and ((0 < sensitivity) & (sensitivity < 1)).all()
    uneven = torch.zeros(3, 4)
    uneven[:, 1] = 1.0
    one = EmphasiseTokens(image, alpha=0.2, sensitivity=uneven)
    plain, seen = Weights(), Weights()
    with steer(model, [plain]):
        logits(model, inputs)
    with steer(model, [one, seen]):
        logits(model, inputs)
    last = max(plain.kept)
    moved = (plain.kept[last] - seen.kept[last])[0, :, -1].abs().amax(-1)
    assert moved[1] > 1e-3 and (moved[[0, 2, 3]] < 1e-6).all()


def test_guided_generation_equals_two_streams_recomputed_at_each_step(transformers):
    for model, inputs, _ in list(both(transformers))[:2]:
        prompt = without_image(model, inputs)
        said = answers(model, inputs, logits_processor=[ImageGuidance(model, prompt, guidance=3.0)])
        ids, text, token = inputs["input_ids"], prompt["input_ids"], model.config.image_token_id
        assert not (text == token).any() and text.shape[1] == (ids != token).sum()
        for t in range(said.shape[1]):
            whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "mm_token_type_ids" in inputs:
                whole["mm_token_type_ids"] = (ids == token).long()
            pair = logits(model, whole)[:, -1], logits(model, {"input_ids": text})[:, -1]
            best = likeliest(model, guided(*pair, guidance=3.0))
            assert torch.equal(said[:, t], best)
            ids, text = torch.cat((ids, best[:, None]), 1), torch.cat((text, best[:, None]), 1)


def test_beams_that_change_places_are_guided_by_their_own_words(transformers):
    model, inputs = tiny_llava(transformers, layers=2), ask(batch=2)
    prompt = without_image(model, inputs)
    text, length = prompt["input_ids"].repeat_interleave(3, 0), inputs["input_ids"].shape[1]

    def from_scratch(ids, scores):
        whole = torch.cat((text, ids[:, length:]), 1)
        return guided(scores, logits(model, {"input_ids": whole})[:, -1], guidance=3.0)

    said = answers(model, inputs, new=6, num_beams=3, logits_processor=[ImageGuidance(model, prompt, guidance=3.0)])
    assert torch.equal(said, answers(model, inputs, new=6, num_beams=3, logits_processor=[from_scratch]))
    assert not torch.equal(said, answers(model, inputs, new=6, num_beams=3))


def test_the_stream_without_the_image_is_neither_edited_nor_seen(transformers):
    model, inputs = tiny_llava(transformers, layers=3), ask()
    prompt = without_image(model, inputs)
    seen = Weights()
    with steer(model, [EmphasiseTokens(inputs["input_ids"][0] == IMAGE, alpha=0.9), seen]):
        stream = ImageGuidance(model, prompt).step()
    assert torch.equal(stream, logits(model, prompt)[:, -1]) and not seen.kept


def test_bad_arguments_are_named(transformers):
    e, top, _ = scores()
    with pytest.raises(ValueError, match="top and bottom must be bool"):
        emphasise(e, top.float())
    with pytest.raises(ValueError, match="alpha and beta must be a number or"):
        emphasise(e, top, alpha=torch.ones(4))
    with pytest.raises(ValueError, match="must not share a token"):
        EmphasiseTokens(top, top)
    with pytest.raises(ValueError, match="one size"):
        informative_patches(torch.ones(1, 5, 5), torch.ones(1, 6, 6))
    with pytest.raises(ValueError, match="image must be bool"):
        placed(torch.ones(3, dtype=torch.bool), top[:2])
    with pytest.raises(ValueError, match="cutoff must lie in 0 to 1"):
        guided(e, e, cutoff=0.0)
    model = tiny_llava(transformers, layers=3)
    with pytest.raises(ValueError, match=r"sensitivity must be \(L, H\) for 3 layers"):
        with steer(model, [EmphasiseTokens(top, sensitivity=torch.ones(2, 4))]):
            pass
    with pytest.raises(ValueError, match="nothing has been measured"):
        ImageAttention(top).sensitivity()
