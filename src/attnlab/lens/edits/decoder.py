"""What edits of a vision-language model's decoder share: its layers, and where the prompt's image tokens are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.lens.aside import shown
from attnlab.lens.event import Event
from attnlab.lens.steer import Edit
from attnlab.lens.subscriber import Handle
from attnlab.lens.where import Choice, chosen


class DecoderEdit(Edit):
    """An edit of the language model within a vision-language model of transformers, or of a bare decoder.

    Args:
        image: which tokens of the prompt are the image's, bool `(T)` or `(B, T)`. If None, they are where the prompt's
            `input_ids` hold the image token of the model's config: then the whole model must be steered, not its
            decoder.
        layers: ordinals of the decoder's own layers (negative from the end), whatever else attends in the model.
        heads: query heads of these layers.
    """

    def __init__(self, image: Tensor | None = None, *, layers: Choice = None, heads: Choice = None) -> None:
        super().__init__(heads=heads)
        if image is not None and (image.dtype != torch.bool or image.dim() not in (1, 2)):
            raise ValueError(f"image must be bool (T) or (B, T), got {image.dtype} {tuple(image.shape)}")
        self.given, self.image, self.choice = image, image, layers
        self.depths: dict[nn.Module, int] = {}  # which layer a module belongs to
        self.chosen: frozenset[int] = frozenset()

    def open(self, model: nn.Module) -> Iterable[Handle]:
        self.decoder = decoder_of(model)
        self.layers = layers_of(self.decoder)
        self.depths = {module: i for i, layer in enumerate(self.layers) for module in layer.modules()}
        self.chosen = frozenset(chosen(self.choice, len(self.layers), "layers of the decoder:"))
        self.image, self.token = self.given, None
        if self.given is None:
            self.token = next((t for n in _TOKENS if (t := getattr(_config(model), n, None)) is not None), None)
            if self.token is None:
                raise ValueError(f"image must be given: the config of {type(model).__name__} names no image token")
            return [model.register_forward_pre_hook(self._prompted, with_kwargs=True)]
        return []

    def close(self) -> None:
        self.depths, self.layers = {}, []

    def wants(self, event: Event) -> bool:
        return self.depths.get(event.module, -1) in self.chosen

    def depth(self, event: Event) -> int:
        """Which layer of the decoder made the call."""
        return self.depths[event.module]

    def image_keys(self, keys: int, device: torch.device, tokens: Tensor | None = None) -> Tensor:
        """The image's tokens (or others marked in the prompt) among `keys` keys, the prompt's first: `(…, keys)`."""
        mask = self.image if tokens is None else tokens
        if mask is None:
            raise ValueError("the prompt's input_ids have not been seen: pass them by name, or give image")
        if mask.shape[-1] > keys:
            raise ValueError(f"image covers {mask.shape[-1]} tokens, but the prompt has {keys}")
        return torch.nn.functional.pad(mask.to(device), (0, keys - mask.shape[-1]))

    def _prompted(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        if ids is not None and cached(keywords) == 0 and shown(model, self):
            self.image = ids == self.token


_TOKENS = ("image_token_id", "image_token_index")


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def decoder_of(model: Any) -> nn.Module:
    """The language model within `model`, by transformers' own account; else `model` itself."""
    found: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model
    return found if isinstance(found, nn.Module) else model


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a decoder: its longest `nn.ModuleList`, the outermost of equals."""
    lists = [list(m) for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(decoder).__name__} holds no nn.ModuleList of layers")
    return max(lists, key=len)


def taken(decoder: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """The embeddings `(B, T, C)` that a decoder of transformers is called with, or those of its ids."""
    x: Tensor | None = keywords.get("inputs_embeds")
    if x is not None:
        return x
    ids = keywords.get("input_ids", arguments[0] if arguments else None)
    if ids is None:
        raise ValueError(f"{type(decoder).__name__} must be called with input_ids or inputs_embeds by name")
    table: Any = decoder
    found: Tensor = table.get_input_embeddings()(ids)
    return found


def cached(keywords: dict[str, Any]) -> int:
    """How many tokens the cache that a model is called with holds."""
    cache = keywords.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())
