"""Answering from the image and from the part of it that the question's attention singles out (CARVE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnlab.cards import LENS, Card, register
from attnlab.lens.event import Event
from attnlab.lens.measures.contrast import fuse, keep_regions
from attnlab.lens.multimodal import answer, ask, image_columns, image_grid, language_model, load
from attnlab.lens.record import Record
from attnlab.lens.regions import bounding_box
from attnlab.lens.watch import watch

GENERAL = "Write a general description of the image."
SUFFIX = "Answer the question using a single word or phrase."


def last_row(event: Event) -> Tensor:
    """How the last query of a call looks at the keys, `(B, H, Nk)`, without the other rows where that can be."""
    nq, nk = event.q.shape[2], event.k.shape[2]
    plain = event.pattern is None and event.route is None and event.bias is None and event.source != "scan"
    if event.computed is not None or nq == 1 or not plain or (event.is_causal and nq != nk):
        return event.weights()[:, :, -1]
    mask = event.mask
    if mask is not None and mask.dim() > 1:
        mask = mask[..., -1:, :]
    return replace(event, q=event.q[:, :, -1:], mask=mask, is_causal=False, native=None).weights()[:, :, -1]


def generated_maps(record: Record) -> Tensor:
    """(T, L, V) of a record of vectors (V), kept at each of T steps in L layers."""
    layers = [torch.stack([e.kept[""] for e in record.of(name)]) for name in record.layers]
    return torch.stack(layers, 1)


@dataclass(frozen=True)
class Focus:
    """Where the question's attention is: the map, the mask and box of its best regions, and that part enlarged."""

    scores: Tensor  # (H, W) float64
    mask: Tensor  # (H, W) bool
    box: tuple[int, int, int, int]  # left, top, right, bottom
    refined: Any  # PIL


def refine(image: Any, mask: Tensor, box: tuple[int, int, int, int]) -> Any:
    """The `box` of `image` (PIL), black outside `mask`, enlarged until one side is at least the image's (Lanczos)."""
    from PIL import Image

    shape = Image.fromarray(mask.byte().mul(255).cpu().numpy())
    crop = Image.composite(image, Image.new(image.mode, image.size), shape).crop(box)
    scale = max(image.width / crop.width, image.height / crop.height)
    return crop.resize((int(crop.width * scale), int(crop.height * scale)), Image.Resampling.LANCZOS)


@register(
    Card(
        name="carve",
        title="Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning",
        paper="2509.06461",
        family="lens",
        kind=LENS,
        system="carve",
        cost="three generations in place of one",
    )
)
@dataclass
class CARVE:
    """Lets a vision-language model look again, larger, at what a question is about, without training.

        S = enlarge( Σ_t t Σ_layers a_question / (a_general + eps) )      → the best regions of its largest `fraction`
          → the image, black elsewhere, cropped to them and enlarged → the answer from both images

    `CARVE(model, processor)(image, question, **generate's keywords)` gives the answer; `focus` what it looks at.
    a (T, L, V): at each of at most `tokens` steps of greedy generation, in each of `layers`, the last row of attention
    to the image, mean over heads: for the question, and for a general instruction, which draws what is noise in it.
    `layers` are those of the language model, from 0 (the authors' 20 to 25, of 28 to 36). The authors' versions: v4 as
    it is; v3 steps="first"; v2 rank="area" beside; v1 rank="specks". `grid` (rows, columns) is that of image tokens,
    for models that lay them out otherwise than as a square or as `image_grid_thw` says. Here a grid that the processor
    gives comes first; the authors take 256, 576, 1024, 1600 and 1681 tokens for squares before they ask it, and pass
    over layers that are not there.
    Source: arXiv 2509.06461 (YuyaoGe/CARVE).
    """

    model: Any
    processor: Any
    layers: Sequence[int] = range(20, 26)
    steps: Literal["all", "first"] = "all"
    rank: Literal["sum", "area", "specks"] = "sum"
    fraction: float = 0.2
    least: int = 3
    specks: float = 0.1
    eps: float = 1e-8
    tokens: int = 32
    grid: tuple[int, int] | None = None
    general: str = GENERAL
    suffix: str = SUFFIX

    @classmethod
    def from_pretrained(cls, model: str, *, dtype: Any = "auto", **keywords: Any) -> CARVE:
        """The model by its directory or name; other keywords as of the class."""
        return cls(*load(model, dtype=dtype), **keywords)

    def maps(self, image: Any, text: str) -> tuple[Tensor, tuple[int, int]]:
        """Attention `(T, L, V)` to the image while the model answers `text`, and the grid of the V tokens."""
        inputs = ask(self.model, self.processor, [image], f"{text} {self.suffix}")
        columns = image_columns(self.model, inputs["input_ids"])
        grid = self.grid or image_grid(self.model, inputs, len(columns))

        def to_image(event: Event, _: Tensor) -> Tensor:
            return last_row(event)[0][:, columns].float().mean(0)

        with watch(language_model(self.model), layers=list(self.layers), keep=to_image) as record:
            tokens = 1 if self.steps == "first" else self.tokens
            answer(self.model, self.processor, inputs, max_new_tokens=tokens)
        return generated_maps(record), grid

    def focus(self, image: Any, question: str) -> Focus:
        """What of `image` (PIL) the question is about."""
        image = image.convert("RGB")
        query, grid = self.maps(image, question)
        general, _ = self.maps(image, self.general)
        scores = fuse(query, general, grid, (image.height, image.width), eps=self.eps, steps=self.steps)
        mask = keep_regions(scores, fraction=self.fraction, rank=self.rank, least=self.least, specks=self.specks)
        box = bounding_box(mask)
        return Focus(scores, mask, box, refine(image, mask, box))

    def __call__(self, image: Any, question: str, **generation: Any) -> str:
        image = image.convert("RGB")
        refined = self.focus(image, question).refined
        inputs = ask(self.model, self.processor, [image, refined], f"{question} {self.suffix}")
        return answer(self.model, self.processor, inputs, **{"max_new_tokens": self.tokens, **generation})
