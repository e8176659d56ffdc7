"""VL-SAM end to end on models of a few thousand random weights, and on attention that is planted in one."""

from __future__ import annotations

import pytest
import torch

from attnlab.lens import steer
from attnlab.lens.measures.flow import attention_flow, mean_max, object_map
from attnlab.lens.multimodal import ask, image_columns, language_model
from attnlab.lens.segment import Segmenter
from attnlab.lens.steer import Edit
from attnlab.lens.vl_sam import QUESTIONS, VLSAM, nearest_category, object_names, word_map
from lens.tiny_models import llava, louder, picture, sam, tokenizer


def test_names_are_what_an_answer_lists_once_each() -> None:
    assert object_names("1. A dog, two cats and the tree") == ["dog", "two cats", "tree"]
    assert object_names("There is a red car; the car.\n- sky\n* Sky") == ["red car", "car", "sky"]
    assert object_names("sandwich, hand and island") == ["sandwich", "hand", "island"]
    assert object_names("  ") == []
    assert len(set(QUESTIONS)) == 10


def test_the_map_is_the_flow_from_the_words_tokens(transformers) -> None:
    """Against the model's own weights in one pass over prompt and word."""
    model, processor = llava(transformers)
    found = word_map(model, processor, picture(), "red dog", question="what is this ?")
    inputs = ask(model, processor, [picture()], "what is this ?")
    said = processor.tokenizer("red dog", return_tensors="pt")["input_ids"]
    ids = torch.cat([inputs["input_ids"], said], 1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True)
    layers = [mean_max(a[0]) for a in out.attentions]
    n = ids.shape[1]
    flow = attention_flow(layers)[[n - 2, n - 1]]
    torch.testing.assert_close(found, object_map(flow, image_columns(model, ids), (4, 4)), rtol=1e-3, atol=1e-4)
    assert found.shape == (4, 4) and found.min() == 0 and found.max() == 1


class Planted(Edit):
    """Everybody looks at the first image token, and the last token at an object too."""

    def __init__(self, columns, blob) -> None:
        super().__init__()
        self.first, self.blob = columns[0], columns[blob]

    def scores(self, event, scores):
        scores = scores.clamp(max=0.5).where(scores > -torch.inf, scores)
        scores[..., int(self.first) + 1 :, self.first] = 4.0
        scores[..., -1, self.blob] = 3.0
        return scores


def test_the_peak_leaves_the_first_token_for_the_object_when_the_flow_is_regularised(transformers) -> None:
    model, processor = llava(transformers)
    columns = image_columns(model, ask(model, processor, [picture()], "what is this ?")["input_ids"])
    blob = [6, 7, 10, 11]
    with steer(language_model(model), [Planted(columns, blob)]):
        plain, regular = (
            word_map(model, processor, picture(), "dog", question="what is this ?", regularise=r)
            for r in (None, "layers")
        )
    assert plain.argmax() == 0 and int(regular.argmax()) in blob


def test_the_whole_pipeline_gives_masks_of_the_images_size(transformers, tmp_path, monkeypatch) -> None:
    (model, processor), (segmenter, reader) = llava(transformers), sam(transformers)
    model.save_pretrained(tmp_path / "model")
    segmenter.save_pretrained(tmp_path / "sam")
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: processor)
    monkeypatch.setattr(transformers.SamProcessor, "from_pretrained", lambda name: reader)
    vl_sam = VLSAM.from_pretrained(
        str(tmp_path / "model"),
        str(tmp_path / "sam"),
        questions=["list all objects", "what is in this image ?"],
        iou=0.9,
    )
    names = vl_sam.names(picture(), max_new_tokens=4)
    assert names and len(set(names)) == len(names)
    found = vl_sam(picture(), max_new_tokens=4)
    assert found and all(s.mask.shape == (40, 48) and s.mask.any() for s in found)
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)
    assert all(s.labels.tolist()[0] == 1 and set(s.labels.tolist()) <= {0, 1} for s in found)
    assert all((s.points >= 0).all() and (s.points <= torch.tensor([48.0, 40.0])).all() for s in found)
    whole = VLSAM(model, processor, Segmenter(segmenter, reader), quarters=False)(picture(), ["dog", "cat"])
    assert {s.name for s in whole} <= {"dog", "cat"} and len(whole) <= 6


def test_quarters_are_searched_where_they_lie(transformers) -> None:
    model, processor = llava(transformers)
    seen = []

    class Corner:
        def look(self, image):
            self.size = (image.height, image.width)
            seen.append(self.size)

        def mask(self, points, labels):
            mask = torch.zeros(self.size, dtype=torch.bool)
            mask[:2, :2] = True
            return mask, 0.5

    found = VLSAM(model, processor, Corner(), rounds=1)(picture(), ["dog"])  # type: ignore[arg-type]
    assert seen == [(40, 48)] + [(20, 24)] * 4
    corners = sorted(tuple(s.mask.nonzero()[0].tolist()) for s in found)
    assert corners == [(0, 0), (0, 24), (20, 0), (20, 24)]  # the whole's corner is the first quarter's


def test_names_become_the_nearest_categories(transformers) -> None:
    torch.manual_seed(0)
    clip = louder(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=dict(
                    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=16, projection_dim=16, bos_token_id=4, eos_token_id=5, pad_token_id=0,
                ),
                vision_config=dict(
                    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                    patch_size=8, projection_dim=16,
                ),
                projection_dim=16,
            )
        )
    )  # fmt: skip
    words = tokenizer(transformers, cls_token="[CLS]", sep_token="[SEP]")
    categories = ["car", "dog", "small tree"]
    assert nearest_category(["dog", "small tree", "car"], categories, clip, lambda **k: words(**k)) == [
        "dog",
        "small tree",
        "car",
    ]
    with pytest.raises(ValueError, match="must not be empty"):
        nearest_category([], categories, clip, words)


def test_a_word_without_tokens_is_refused(transformers) -> None:
    with pytest.raises(ValueError, match="must hold a token"):
        word_map(*llava(transformers), picture(), "")
