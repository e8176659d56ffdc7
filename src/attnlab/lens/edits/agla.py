"""Ensemble decoding with a view of the image that keeps only what the prompt is about (AGLA)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlab.cards import LENS, Card, register
from attnlab.lens.measures.gradcam import attention_gradcam, heat_map, keep_hottest
from attnlab.lens.multimodal import answer, ask, load, transformers


def assemble(logits: Tensor, masked: Tensor, *, alpha: float = 2.0, beta: float = 0.5) -> Tensor:
    """logits + alpha · masked, with −inf where logits < max logits + log beta: the logits to sample from, (…, K).

    Tokens are struck out by the logits of the full image, before mixing and before any temperature. beta = 0 strikes
    out none.
    """
    if logits.shape != masked.shape:
        raise ValueError(
            f"both views must give logits of one shape, got {tuple(logits.shape)} and {tuple(masked.shape)}"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    least = logits.amax(-1, keepdim=True) + (math.log(beta) if beta else -math.inf)
    return (logits + alpha * masked).masked_fill(logits < least, -math.inf)


class SecondView:
    """A logits processor for `generate`: adds the logits that the same model gives to the same answer on another view.

    `view` holds the model's inputs for the other view (its own input_ids, pixel_values, …), a batch as large as that
    of `generate`; its stream has a cache of its own. One object serves one call of `generate`, sampled or greedy.
    """

    def __init__(self, model: Any, view: Mapping[str, Tensor], *, alpha: float = 2.0, beta: float = 0.5) -> None:
        if "input_ids" not in view:
            raise ValueError(f"view must hold input_ids, got {sorted(view)}")
        self.model, self.alpha, self.beta = model, alpha, beta
        self.inputs = dict(view)
        self.seen: Tensor | None = None  # what the other stream had been given at the last step
        self.mask = self.inputs.get("attention_mask", torch.ones_like(self.inputs["input_ids"]))
        self.cache: Any = None
        self.shift: Any = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.seen is not None and not torch.equal(input_ids[:, :-1], self.seen):
            raise ValueError("the answers at this step do not continue those of the last: beams are not supported")
        if len(input_ids) != len(self.mask):
            raise ValueError(f"view is a batch of {len(self.mask)}, generate has one of {len(input_ids)}")
        if self.seen is not None:
            self.inputs = {"input_ids": input_ids[:, -1:]}
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        self.seen = input_ids
        return self.mix(scores, self.step().to(scores))

    def mix(self, logits: Tensor, others: Tensor) -> Tensor:
        """What to sample from: `(B, K)` of both streams to one."""
        return assemble(logits, others, alpha=self.alpha, beta=self.beta)

    @torch.no_grad()
    def step(self) -> Tensor:
        """The next logits `(B, K)` of the other stream."""
        inner: Any = getattr(self.model, "model", None)
        # Qwen's models shift the text's positions by the image, and keep the shift of the last prompt in themselves.
        shifts = hasattr(inner, "rope_deltas")
        positions = (self.mask.long().cumsum(1) - 1).clamp(min=0)[:, -self.inputs["input_ids"].shape[1] :]
        given = {**self.inputs, "attention_mask": self.mask}
        if not shifts:
            given["position_ids"] = positions
        elif self.cache is not None:
            given["position_ids"] = (positions + self.shift).expand(3, -1, -1)
        before = inner.rope_deltas if shifts else None
        if shifts and self.cache is None:
            inner.rope_deltas = None  # a prompt without an image leaves that of the other stream
        try:
            out = self.model(**given, past_key_values=self.cache, use_cache=True, return_dict=True)
            if shifts and self.cache is None:
                self.shift = 0 if inner.rope_deltas is None else inner.rope_deltas
        finally:
            if shifts:
                inner.rope_deltas = before
        self.cache = out.past_key_values
        return out.logits[:, -1]


@dataclass(frozen=True)
class View:
    """An image (PIL) of which only what the text is about is left, with the map that said so."""

    image: Any
    mask: Tensor  # (H, W) bool, of the matcher's image
    heat: Tensor  # (H, W) in [0, 1]
    similarity: float


def relevant_view(
    matcher: Any, processor: Any, image: Any, text: str, *, layer: int = 6, first_token: int | None = None
) -> View:
    """The view of `image` (PIL) that keeps what an image-text matcher finds relevant to `text`, the rest black.

    The matcher is a `BlipForImageTextRetrieval` with its processor: its match logit is led back to the cross-attention
    of text layer `layer` (`attention_gradcam`), smoothed (`heat_map`), and 1 − similarity / 2 of the image is kept
    (`keep_hottest`). `first_token`: the id that the matcher was taught to find in place of [CLS] when it reads text
    with the image ([ENC], 30523, in the authors' BLIP), if it is not the tokenizer's own.
    """
    layers = matcher.text_encoder.encoder.layer
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer must be in 0..{len(layers) - 1}, the matcher's text layers, got {layer}")
    image = image.convert("RGB")
    inputs = processor(images=image, text=text, return_tensors="pt").to(matcher.device)
    ids, tokens = inputs["input_ids"], inputs["attention_mask"]
    read = ids.clone()
    if first_token is not None:
        read[:, 0] = first_token
    kept: list[Tensor] = []
    hook = layers[layer].crossattention.self.register_forward_hook(lambda _m, _i, out: kept.append(out[1]))
    try:
        with torch.enable_grad():
            # The gradient is wanted of a matcher with frozen weights too.
            pixels = inputs["pixel_values"].detach().requires_grad_()
            out = matcher(input_ids=read, pixel_values=pixels, attention_mask=tokens)
            (gradient,) = torch.autograd.grad(out.itm_score[:, 1].sum(), kept)
    finally:
        hook.remove()
    relevance = attention_gradcam(kept[0].detach()[..., 1:], gradient[..., 1:], tokens)[0]
    vision = matcher.config.vision_config
    side = vision.image_size // vision.patch_size
    heat = heat_map(relevance.float().view(side, side), (vision.image_size, vision.image_size))
    with torch.no_grad():
        similarity = float(
            matcher(
                input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=tokens, use_itm_head=False
            ).itm_score
        )
    mask = keep_hottest(heat, similarity)
    from PIL import Image

    resized = image.resize((vision.image_size, vision.image_size))
    black = Image.new("RGB", resized.size)
    shape = Image.fromarray(mask.byte().mul(255).cpu().numpy())
    return View(Image.composite(resized, black, shape), mask, heat, similarity)


_TITLE = (
    "AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local Attention"
)


@register(
    Card(
        name="agla",
        title=_TITLE,
        paper="2406.12718",
        family="lens",
        kind=LENS,
        system="agla",
        cost="a second stream of decoding, and one pass of the matcher with a gradient",
    )
)
@dataclass
class AGLA:
    """Answers about an image with what is seen in all of it and what is seen in the part that the question is about.

        next token ~ softmax(logits(image) + alpha · logits(relevant view)),  those < max + log beta out

    `AGLA(model, processor, matcher, matcher_processor)(image, question, **generate's keywords)` gives the answer:
    `model` any vision-language model of transformers whose forward takes input_ids, `matcher` a
    `BlipForImageTextRetrieval` (the authors': its large size, 384 pixels), which masks the image once for each question
    (`relevant_view`). alpha = 0 is sampling from the whole image, truncated; equal views sharpen it to a temperature of
    1 / (1 + alpha). Unlike contrastive decoding the second view is added: it helps. Of hallucinated objects, those that
    the language alone suggests go. Source: arXiv 2406.12718 (Lackel/AGLA), which lets the matcher's threshold run over
    its end where the cosine is negative; here all but a pixel is kept then.
    """

    model: Any
    processor: Any
    matcher: Any
    matcher_processor: Any
    alpha: float = 2.0
    beta: float = 0.5
    layer: int = 6
    first_token: int | None = None

    @classmethod
    def from_pretrained(cls, model: str, matcher: str, **keywords: Any) -> AGLA:
        """Both models by their directories or names; keywords as of the class."""
        package = transformers("the matcher")
        return cls(
            *load(model),
            package.BlipForImageTextRetrieval.from_pretrained(matcher).eval(),
            package.AutoProcessor.from_pretrained(matcher),
            **keywords,
        )

    def view(self, image: Any, question: str) -> View:
        """What of the image the question is about."""
        return relevant_view(
            self.matcher, self.matcher_processor, image, question, layer=self.layer, first_token=self.first_token
        )

    def __call__(self, image: Any, question: str, *, view: View | None = None, **generation: Any) -> str:
        view = view or self.view(image, question)
        second = ask(self.model, self.processor, [view.image], question)
        processors = [
            *generation.pop("logits_processor", []),
            SecondView(self.model, second, alpha=self.alpha, beta=self.beta),
        ]
        inputs = ask(self.model, self.processor, [image.convert("RGB")], question)
        return answer(self.model, self.processor, inputs, logits_processor=processors, **generation)
