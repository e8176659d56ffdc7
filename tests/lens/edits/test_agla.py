"""AGLA: mixing logits, the second stream with its own cache, and the view that a BLIP of random weights asks for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnlab.lens.edits.agla import AGLA, SecondView, assemble, relevant_view
from attnlab.lens.measures.gradcam import attention_gradcam, heat_map
from attnlab.lens.multimodal import answer, ask
from lens.tiny_models import blip, llava, picture, qwen, qwen_inputs

QUESTION = "what colour is the dog ?"


def test_alpha_zero_is_the_whole_image_truncated() -> None:
    full, masked = torch.randn(2, 5, 9, dtype=torch.float64)
    mixed = assemble(full, masked, alpha=0.0, beta=0.5)
    kept = full.softmax(-1) >= 0.5 * full.softmax(-1).amax(-1, keepdim=True)
    assert torch.equal(mixed > -math.inf, kept)
    torch.testing.assert_close(mixed.softmax(-1), (full.softmax(-1) * kept) / (full.softmax(-1) * kept).sum(-1, True))


def test_beta_zero_strikes_out_none() -> None:
    full, masked = torch.randn(2, 5, 9)
    torch.testing.assert_close(assemble(full, masked, beta=0.0), full + 2 * masked)


def test_equal_views_are_a_lower_temperature() -> None:
    full = torch.randn(5, 9, dtype=torch.float64)
    mixed = assemble(full, full, alpha=2.0, beta=0.0)
    torch.testing.assert_close(mixed.softmax(-1), (full / (1 / 3)).softmax(-1))


def test_tokens_are_struck_out_by_the_whole_image_alone() -> None:
    full, masked = torch.tensor([4.0, 3.9, 0.0]), torch.tensor([0.0, 1.0, 9.0])
    assert assemble(full, masked).tolist() == pytest.approx([4.0, 5.9, -math.inf])


def naive(model, first, second, steps):
    """Both streams passed whole at every step."""
    ids, others, said = first["input_ids"], second["input_ids"], []

    def logits(ids, inputs):
        extra = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in extra:
            extra["mm_token_type_ids"] = (ids == 70).long()
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[:, -1]

    for _ in range(steps):
        mixed = assemble(logits(ids, first), logits(others, second))
        said.append(mixed)
        new = mixed.argmax(-1, keepdim=True)
        ids, others = torch.cat([ids, new], 1), torch.cat([others, new], 1)
    return torch.stack(said, 1)


def generated(model, first, second, steps):
    with torch.no_grad():
        out = model.generate(
            **first, logits_processor=[SecondView(model, second)], max_new_tokens=steps, min_new_tokens=steps,
            do_sample=False, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(out.scores, 1)


def same(found, wanted) -> None:
    assert torch.equal(found > -math.inf, wanted > -math.inf)
    kept = found > -math.inf
    torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-4)


def test_two_caches_equal_two_whole_passes(transformers) -> None:
    model, processor = llava(transformers)
    model.generation_config.eos_token_id = None
    first, second = (ask(model, processor, [picture(s)], QUESTION) for s in (0, 1))
    same(generated(model, first, second, 5), naive(model, first, second, 5))


def test_views_of_a_qwen_may_differ_in_size(transformers) -> None:
    model = qwen(transformers)
    model.generation_config.eos_token_id = None
    first, second = qwen_inputs(4, 6, [5, 9, 11]), qwen_inputs(8, 4, [5, 9, 11], seed=1)
    found = generated(model, first, second, 4)
    same(found, naive(model, first, second, 4))
    with torch.no_grad():  # one generation more: the second view leaves nothing behind in the model
        plain = [model.generate(**first, max_new_tokens=4, do_sample=False) for _ in range(2)]
    assert torch.equal(*plain)


def test_padded_batches_have_the_positions_of_single_ones(transformers) -> None:
    model, processor = llava(transformers)
    short, long = (ask(model, processor, [picture(1)], t) for t in ("dog ?", QUESTION))
    pad = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    batch = {k: torch.cat([F.pad(short[k], (pad, 0)), long[k]]) for k in ("input_ids", "attention_mask")}
    batch["pixel_values"] = torch.cat([short["pixel_values"], long["pixel_values"]])
    together = SecondView(model, batch).step()
    apart = torch.cat([SecondView(model, one).step() for one in (short, long)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_the_map_is_that_of_the_match_logits_gradient(transformers) -> None:
    """Finite differences: the cross-attention of one layer is moved, and the match logit with it."""
    matcher, processor = blip(transformers)
    matcher.requires_grad_(False)  # frozen weights do not hide the gradient
    view = relevant_view(matcher, processor, picture(), QUESTION, layer=1)
    assert view.image.size == (32, 32) and view.mask.shape == (32, 32)
    assert abs(float(view.mask.float().mean()) - (1 - view.similarity / 2)) < 2 / 1024

    matcher.double()
    inputs = processor(images=picture(), text=QUESTION, return_tensors="pt")
    given = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    module = matcher.text_encoder.encoder.layer[1].crossattention.self
    seen = {}

    def moved(where):
        def hook(_module, args, keywords, out):
            states = keywords["encoder_hidden_states"]
            value = module.value(states).unflatten(-1, (2, -1)).transpose(1, 2)
            weights = out[1].clone()
            seen.setdefault("weights", out[1])
            if where is not None:
                weights[where] += 1e-4
            return (weights @ value).transpose(1, 2).flatten(2), weights

        return hook

    def match(where=None):
        handle = module.register_forward_hook(moved(where), with_kwargs=True)
        with torch.no_grad():
            score = matcher(**given).itm_score[0, 1]
        handle.remove()
        return score

    base = match()
    gradient = torch.zeros_like(seen["weights"])
    for h in range(2):
        for t in range(1, gradient.shape[2] - 1):
            for patch in range(1, 17):
                gradient[0, h, t, patch] = (match((0, h, t, patch)) - base) / 1e-4
    relevance = attention_gradcam(seen["weights"][..., 1:], gradient[..., 1:])
    torch.testing.assert_close(view.heat, heat_map(relevance.view(4, 4), (32, 32)), rtol=0, atol=2e-3)


def test_the_view_is_black_where_the_mask_is_not(transformers) -> None:
    matcher, processor = blip(transformers)
    view = relevant_view(matcher, processor, picture(), QUESTION, layer=1)
    pixels = torch.from_numpy(np.array(view.image))
    resized = torch.from_numpy(np.array(picture().resize((32, 32))))
    assert not pixels[~view.mask].any() and torch.equal(pixels[view.mask], resized[view.mask])
    assert all(p.grad is None for p in matcher.parameters())


def test_answers_with_both_views_from_loaded_models(transformers, tmp_path, monkeypatch) -> None:
    (model, processor), (matcher, reader) = llava(transformers), blip(transformers)
    model.save_pretrained(tmp_path / "model")
    matcher.save_pretrained(tmp_path / "matcher")
    readers = {"model": processor, "matcher": reader}
    monkeypatch.setattr(
        transformers.AutoProcessor, "from_pretrained", lambda name: readers[str(name).rsplit("/", 1)[-1]]
    )
    agla = AGLA.from_pretrained(str(tmp_path / "model"), str(tmp_path / "matcher"), layer=1)
    view = agla.view(picture(), QUESTION)
    said = agla(picture(), QUESTION, view=view, max_new_tokens=4)
    second = SecondView(model, ask(model, processor, [view.image], QUESTION))
    first = ask(model, processor, [picture()], QUESTION)
    assert said == answer(model, processor, first, logits_processor=[second], max_new_tokens=4)


def test_what_does_not_fit_is_refused(transformers) -> None:
    model, processor = llava(transformers)
    first = ask(model, processor, [picture()], QUESTION)
    with pytest.raises(ValueError, match="a batch of 1, generate has one of 3"):
        model.generate(**first, logits_processor=[SecondView(model, first)], num_beams=3, max_new_tokens=6)
    three = {k: v.repeat(3, *[1] * (v.ndim - 1)) for k, v in first.items()}
    with pytest.raises(ValueError, match="beams are not supported"):
        model.generate(**first, logits_processor=[SecondView(model, three)], num_beams=3, max_new_tokens=6)
    with pytest.raises(ValueError, match="input_ids"):
        SecondView(model, {"pixel_values": torch.zeros(1)})
    with pytest.raises(ValueError, match="one shape"):
        assemble(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="beta"):
        assemble(torch.zeros(3), torch.zeros(3), beta=2.0)
    matcher, reader = blip(transformers)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.2"):
        relevant_view(matcher, reader, picture(), QUESTION)
