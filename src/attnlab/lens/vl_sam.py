"""Finding every object of an image without being told which: the names from a language model, the places from where it
looked, the masks from SAM (VL-SAM)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnlab.cards import LENS, Card, register
from attnlab.lens.measures.flow import Regularise, attention_flow, mean_max, object_map
from attnlab.lens.multimodal import answer, ask, image_columns, image_grid, language_model, load
from attnlab.lens.segment import Segment, Segmenter, placed, segment_map, suppress
from attnlab.lens.watch import watch

QUESTIONS = (
    "List all objects in this image.",
    "Which objects can be seen in this image?",
    "Name every object that you see, separated by commas.",
    "What are all the things in this picture?",
    "Enumerate the objects in the scene.",
    "What objects are in the foreground and in the background?",
    "List the people, animals, vehicles and things in this image.",
    "Which small objects are in this image?",
    "What is unusual or rare in this image? List the objects.",
    "Give the names of all objects that could be outlined in this image.",
)


def object_names(text: str) -> list[str]:
    """The things that an answer lists, once each: "1. A dog, two cats and the tree" gives dog, two cats, tree."""
    names: list[str] = []
    for part in re.split(r"[,;.\n:*•]|\band\b|\d+[.)]", text.lower()):
        name = re.sub(r"^(there (is|are)|a|an|the|some)\s+", "", part.strip(" -\t")).strip(" -\t\"'")
        name = re.sub(r"^(a|an|the|some)\s+", "", name)
        if name and name not in names:
            names.append(name)
    return names


def word_map(
    model: Any,
    processor: Any,
    image: Any,
    word: str,
    *,
    question: str = "What is in this image?",
    regularise: Regularise = "layers",
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Where a vision-language model looked in `image` (PIL) for the `word` that it answers `question` with: (h, w).

    The word is put into its mouth, and one pass over prompt and word gives all weights; per layer one matrix (N, N) is
    kept, the heads by `mean_max`. The map is the flow from the word's tokens to the image's, in [0, 1].
    """
    inputs = ask(model, processor, [image], question)
    ids = inputs["input_ids"]
    said = processor.tokenizer(word, add_special_tokens=False, return_tensors="pt")["input_ids"].to(ids)
    if not said.shape[1]:
        raise ValueError(f"word must hold a token, got {word!r}")
    columns = image_columns(model, ids)
    grid = grid or image_grid(model, inputs, len(columns))
    whole = {**inputs, "input_ids": torch.cat([ids, said], 1)}
    for name, filler in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in whole:
            whole[name] = torch.cat([whole[name], torch.full_like(said, filler)], 1)
    part = language_model(model)
    with torch.no_grad(), watch(part, keep=lambda event, _: mean_max(event.weights()[0]), device=None) as record:
        model(**whole, use_cache=False)
    layers = [record[name] for name in record.layers]
    rows = torch.arange(ids.shape[1], whole["input_ids"].shape[1])
    return object_map(attention_flow(layers, rows, regularise=regularise), columns.to(layers[0].device), grid)


@torch.no_grad()
def nearest_category(names: Sequence[str], categories: Sequence[str], clip: Any, processor: Any) -> list[str]:
    """Of each name the category whose "a {category}" CLIP's text encoder finds most like "a {name}"."""
    if not names or not categories:
        raise ValueError(f"names and categories must not be empty, got {len(names)} and {len(categories)}")

    def embedded(words: Sequence[str]) -> Tensor:
        given = processor(text=[f"a {w}" for w in words], padding=True, return_tensors="pt").to(clip.device)
        found = clip.get_text_features(**given)
        return torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)

    return [categories[i] for i in (embedded(names) @ embedded(categories).T).argmax(1).tolist()]


@register(
    Card(
        name="vl_sam",
        title="Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts",
        paper="2410.05963",
        family="lens",
        kind=LENS,
        system="vl_sam",
        cost="per view: a generation for each question, a pass for each object, three of SAM's decoder for each point",
    )
)
@dataclass
class VLSAM:
    """Detects and segments what is in an image, with no list of categories and no training.

        names   = what the vision-language model lists, over all `questions`
        S'_l    = mean_heads (mean_i max_j S_ij) S              S the attention of one layer while it says the name
        F_l     = (I + S'_l)(I + F_(l−1)),                      columns of S'_l times 1 − (L_j − 1) / N
        map     = F_L[name, image];  points = its peak and its lowest;  mask = SAM(points), twice more with the mask;
                  again without what was found, `rounds` times

    `VLSAM(model, processor, Segmenter(sam, sam_processor))(image)` gives `Segment`s, the surest first. With `quarters`,
    the image's four quarters are searched too, and masks of one name that overlap more than `iou` are merged to the
    surest. `threshold` of the map is its mean if None. Generation is greedy; the authors sample (temperature 0.8,
    top_p 0.1): give these keywords to the call. Without the factor on columns, the causal mask makes the flow end in
    the first tokens, and the map has its peak in the image's left top corner. Source: arXiv 2410.05963; no code of the
    authors is published.
    """

    model: Any
    processor: Any
    segmenter: Segmenter
    questions: Sequence[str] = QUESTIONS
    asked: str = "What is in this image?"
    regularise: Regularise = "layers"
    threshold: float | None = None
    rounds: int = 3
    iou: float = 0.5
    quarters: bool = True
    grid: tuple[int, int] | None = None

    @classmethod
    def from_pretrained(cls, model: str, sam: str, **keywords: Any) -> VLSAM:
        """Both models by their directories or names; keywords as of the class."""
        return cls(*load(model), Segmenter.from_pretrained(sam), **keywords)

    def names(self, image: Any, **generation: Any) -> list[str]:
        """Everything that the model lists, over all questions, once each."""
        listed: list[str] = []
        for question in self.questions:
            inputs = ask(self.model, self.processor, [image], question)
            said = answer(self.model, self.processor, inputs, **generation)
            listed += [n for n in object_names(said) if n not in listed]
        return listed

    def find(self, image: Any, names: Sequence[str]) -> list[Segment]:
        """Segments of the things named, in one view of the image."""
        self.segmenter.look(image)
        found = []
        for name in names:
            heat = word_map(
                self.model, self.processor, image, name, question=self.asked, regularise=self.regularise, grid=self.grid
            )
            found += segment_map(self.segmenter, heat, name, rounds=self.rounds, threshold=self.threshold)
        return found

    def __call__(self, image: Any, names: Sequence[str] | None = None, **generation: Any) -> list[Segment]:
        """All segments of `image` (PIL): of what the model lists in each view, or of `names` if they are given."""
        image = image.convert("RGB")
        x, y = image.width // 2, image.height // 2
        boxes = [(0, 0, image.width, image.height)]
        if self.quarters:
            boxes += [(left, top, left + x, top + y) for top in (0, image.height - y) for left in (0, image.width - x)]
        found = []
        for box in boxes:
            view = image.crop(box)
            wanted = self.names(view, **generation) if names is None else names
            size = (image.height, image.width)
            found += [placed(s, size, (box[0], box[1])) for s in self.find(view, wanted)]
        return suppress(found, iou=self.iou)

    def classified(
        self, segments: Sequence[Segment], categories: Sequence[str], clip: Any, processor: Any
    ) -> list[Segment]:
        """The same segments by the names of a data set's categories (`nearest_category`)."""
        if not segments:
            return []
        names = nearest_category([s.name for s in segments], categories, clip, processor)
        return [replace(s, name=n) for s, n in zip(segments, names, strict=True)]
