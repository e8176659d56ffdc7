"""CARVE on a LLaVA and a Qwen2.5-VL of a few thousand random weights: what it records, and what it then looks at."""

from __future__ import annotations

import pytest
import torch

from attnlab.lens import steer, watch
from attnlab.lens.edits.carve import CARVE, SUFFIX, generated_maps, last_row, refine
from attnlab.lens.multimodal import answer, ask, image_columns, image_grid, language_model
from attnlab.lens.steer import Edit
from lens.tiny_models import llava, picture, qwen, qwen_inputs

QUESTION = "what colour is the dog ?"


def full_attention(model, inputs, steps):
    """The last rows by a new pass over everything at each step, without a cache, from the model's own weights."""
    model.set_attn_implementation("eager")
    ids, rows = inputs["input_ids"], []
    columns = image_columns(model, ids)
    for _ in range(steps):
        extra = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        if "mm_token_type_ids" in inputs:
            extra["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True, **extra)
        rows.append(torch.stack([a[0, :, -1, columns].mean(0) for a in out.attentions]))
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
    model.set_attn_implementation("sdpa")
    return torch.stack(rows)


def test_maps_are_the_last_rows_of_passes_over_everything(transformers) -> None:
    model, processor = llava(transformers)
    found, grid = CARVE(model, processor, layers=[0, 1, 2], tokens=4).maps(picture(), QUESTION)
    inputs = ask(model, processor, [picture()], f"{QUESTION} {SUFFIX}")
    assert grid == (4, 4) and found.shape == (4, 3, 16)
    torch.testing.assert_close(found, full_attention(model, inputs, 4), rtol=1e-4, atol=1e-6)
    assert (found.sum(-1) <= 1).all()


def test_of_a_qwen_the_grid_comes_with_the_inputs(transformers) -> None:
    model, inputs = qwen(transformers), qwen_inputs(4, 6, [5, 9, 11])
    columns = image_columns(model, inputs["input_ids"])
    assert columns.tolist() == [1, 2, 3, 4, 5, 6] and image_grid(model, inputs, 6) == (2, 3)
    with torch.no_grad(), watch(language_model(model), keep=lambda e, _: last_row(e)[0][:, columns].mean(0)) as record:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(generated_maps(record), full_attention(model, inputs, 3), rtol=1e-4, atol=1e-6)


def test_the_model_is_as_it_was(transformers) -> None:
    model, processor = llava(transformers)
    inputs = ask(model, processor, [picture()], QUESTION)
    with torch.no_grad():
        before = model(**inputs).logits
        CARVE(model, processor, layers=[1], tokens=2)(picture(), QUESTION, max_new_tokens=2)
        assert torch.equal(model(**inputs).logits, before)


class Planted(Edit):
    """Every prompt looks at bright cells; a prompt of `length` tokens looks at one more."""

    def __init__(self, columns, bright, asked, length) -> None:
        super().__init__()
        self.bright, self.asked, self.length = columns[bright], columns[asked], length
        self.about = False

    def scores(self, event, scores):
        if event.q.shape[2] > 1:
            self.about = event.q.shape[2] == self.length
        scores = scores.clamp(max=1.0) * 0.1
        scores[..., -1, self.bright] += 4.0
        if self.about:
            scores[..., -1, self.asked] += 3.0
        return scores


def test_it_looks_where_the_question_is_not_where_everything_does(transformers) -> None:
    model, processor = llava(transformers)
    image = picture(width=64, height=64)
    asked = 9
    inputs = ask(model, processor, [image], f"{QUESTION} {SUFFIX}")
    columns = image_columns(model, inputs["input_ids"])
    planted = Planted(columns, [0, 2, 7, 12], asked, inputs["input_ids"].shape[1])
    carve = CARVE(model, processor, layers=[1, 2], tokens=3, fraction=0.08, least=1)
    with steer(language_model(model), [planted]):
        focus = carve.focus(image, QUESTION)
        plain, _ = carve.maps(image, QUESTION)
    cell = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.tensor(asked), True).view(4, 4)
    at = cell.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert (focus.mask & at).sum() > 0.9 * at.sum() and int(focus.mask.sum()) <= 0.08 * 64 * 64 + 1
    assert asked not in plain.sum((0, 1)).topk(4).indices
    assert focus.refined.size == (64, 64)


def test_the_answer_is_the_models_on_both_images(transformers) -> None:
    model, processor = llava(transformers)
    carve = CARVE(model, processor, layers=[1, 2], tokens=3)
    refined = carve.focus(picture(), QUESTION).refined
    both = ask(model, processor, [picture(), refined], f"{QUESTION} {SUFFIX}")
    assert int((both["input_ids"] == 3).sum()) == 32
    wanted = answer(model, processor, both, max_new_tokens=4)
    assert carve(picture(), QUESTION, max_new_tokens=4) == wanted


def test_refined_is_black_outside_and_as_large_as_the_image() -> None:
    image = picture(width=40, height=30)
    mask = torch.zeros(30, 40, dtype=torch.bool)
    mask[10:20, 5:15] = True
    mask[10, 5] = False
    refined = refine(image, mask, (5, 10, 15, 20))
    assert refined.size == (40, 40)
    assert max(refined.getpixel((0, 0))) < 40  # Lanczos reaches a little over the corner


def test_models_and_processors_load_from_a_directory(transformers, tmp_path, monkeypatch) -> None:
    model, processor = llava(transformers)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: processor)
    loaded = CARVE.from_pretrained(str(tmp_path), layers=[0, 1], tokens=2)
    wanted = CARVE(model, processor, layers=[0, 1], tokens=2)(picture(), QUESTION, max_new_tokens=3)
    assert loaded(picture(), QUESTION, max_new_tokens=3) == wanted


def test_layers_and_grids_that_are_not_there_are_named(transformers) -> None:
    model, processor = llava(transformers)
    with pytest.raises(ValueError, match=r"those that do: 0 layers\.0\.self_attn, 1"):
        CARVE(model, processor).maps(picture(), QUESTION)
    with pytest.raises(ValueError, match="holds no image token"):
        image_columns(model, torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="one prompt"):
        image_columns(model, torch.tensor([[5, 3], [5, 3]]))
    with pytest.raises(ValueError, match=r"grid \(3, 4\)"):
        CARVE(model, processor, layers=[1], tokens=1, grid=(3, 4)).focus(picture(), QUESTION)
