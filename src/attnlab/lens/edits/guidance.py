"""Decode away from what the model would say without the image: classifier-free guidance by the image (PAI)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.lens.aside import aside
from attnlab.lens.edits.agla import SecondView
from attnlab.lens.edits.emphasise import guided


class ImageGuidance(SecondView):
    """A logits processor for `generate`: `guided` by the same model, unedited, on the same prompt without its image.

    `prompt` holds that prompt's inputs (`without_image` makes them), a batch as large as that of `generate`. Edits and
    watchers do not see its stream. One object serves one call of `generate`, sampled, greedy, or with beams: where
    these change places, the stream is computed anew.
    """

    def __init__(self, model: Any, prompt: Mapping[str, Tensor], *, guidance: float = 1.1, cutoff: float = 0.1) -> None:
        super().__init__(model, prompt)
        self.guidance, self.cutoff = guidance, cutoff

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.seen is None:
            beams = max(len(input_ids) // len(self.mask), 1)
            self.mask = self.mask.repeat_interleave(beams, 0)
            self.inputs = {"input_ids": self.inputs["input_ids"].repeat_interleave(beams, 0)}
            self.prompt = self.inputs["input_ids"], self.mask, input_ids.shape[1]
        elif not torch.equal(input_ids[:, :-1], self.seen):
            ids, mask, length = self.prompt
            said = input_ids[:, length:]
            self.inputs = {"input_ids": torch.cat((ids, said), 1)}
            self.mask = torch.cat((mask, torch.ones_like(said)), 1)
            self.cache = self.seen = None
        return super().__call__(input_ids, scores)

    def mix(self, logits: Tensor, others: Tensor) -> Tensor:
        return guided(logits, others, guidance=self.guidance, cutoff=self.cutoff)

    def step(self) -> Tensor:
        with aside(self.model):
            return super().step()


def without_image(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the same prompts without their image tokens: padded on the left where they differ in length."""
    ids = inputs["input_ids"]
    token = getattr(model.config, "image_token_id", None)
    if token is None:
        raise ValueError(f"the config of {type(model).__name__} names no image token")
    kept = (ids != token) & inputs.get("attention_mask", torch.ones_like(ids)).bool()
    order = torch.sort(kept.long(), dim=1, stable=True).indices
    length = int(kept.sum(1).max())
    return {
        "input_ids": ids.gather(1, order)[:, -length:],
        "attention_mask": kept.gather(1, order)[:, -length:].long(),
    }
