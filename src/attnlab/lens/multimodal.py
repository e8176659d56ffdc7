"""Asking a vision-language model of transformers about an image: its inputs, where its image tokens lie, its answer.

transformers is imported at first use; any model of its `image-text-to-text` kind with an image token will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.lens.measures.contrast import square_grid


def transformers(purpose: str) -> Any:
    """The package transformers, or an error that says how to get it."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package 'transformers': pip install 'attnlab[hf]'") from error


def load(name: str, **keywords: Any) -> tuple[Any, Any]:
    """(model, processor) of a directory or a name that transformers knows; keywords go to the model (dtype, …)."""
    package = transformers("loading a vision-language model")
    model = package.AutoModelForImageTextToText.from_pretrained(name, **keywords)
    return model.eval(), package.AutoProcessor.from_pretrained(name)


def ask(model: Any, processor: Any, images: Sequence[Any], text: str) -> dict[str, Tensor]:
    """What `model` takes for images (PIL) and a text: by the processor's chat template, or as LLaVA-1.5 was taught."""
    if getattr(processor, "chat_template", None):
        content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        prompt = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    else:
        token = getattr(processor, "image_token", "<image>")
        prompt = f"{token * len(images)}\nUSER: {text}\nASSISTANT:"
    return dict(processor(images=list(images), text=[prompt], return_tensors="pt").to(model.device))


@torch.no_grad()
def answer(model: Any, processor: Any, inputs: Mapping[str, Tensor], **generation: Any) -> str:
    """What the model says: greedily, up to 128 tokens, unless `generation` (keywords of `generate`) says otherwise."""
    said = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 128, **generation})
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return str(processor.batch_decode(said[:, start:], skip_special_tokens=True)[0]).strip()


def image_columns(model: Any, input_ids: Tensor) -> Tensor:
    """Positions (V) of the image tokens in a prompt `(1, N)`."""
    if input_ids.ndim != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids must be (1, N), one prompt, got {tuple(input_ids.shape)}")
    token = next((t for n in ("image_token_id", "image_token_index") if (t := getattr(model.config, n, None))), None)
    if token is None:
        raise ValueError(f"the config of {type(model).__name__} names no image token")
    columns = (input_ids[0] == token).nonzero()[:, 0]
    if not len(columns):
        raise ValueError(f"the prompt holds no image token (id {token})")
    return columns


def image_grid(model: Any, inputs: Mapping[str, Tensor], tokens: int) -> tuple[int, int]:
    """(rows, columns) of the image tokens of the one image in `inputs`: what the processor says, else a square."""
    said = inputs.get("image_grid_thw")
    if said is None:
        return square_grid(tokens)
    if len(said) != 1:
        raise ValueError(f"the inputs hold {len(said)} images; one is wanted")
    merge = getattr(model.config.vision_config, "spatial_merge_size", 1)
    return int(said[0, 1]) // merge, int(said[0, 2]) // merge


def language_model(model: Any) -> nn.Module:
    """The part of a vision-language model that reads the text with the image tokens in it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise ValueError(f"{type(model).__name__} does not say which part of it is the language model")
    return decoder
