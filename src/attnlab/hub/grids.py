"""On which grid the tokens of a vision model lie, as the model itself says: from its patches, latents and maps."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.lens.subscriber import Handle


@dataclass(frozen=True)
class Place:
    """A grid, `(H, W)` as a rule, behind `prefix` tokens that belong to none of its places, and who says so."""

    grid: tuple[int, ...]
    prefix: int
    source: str

    @property
    def tokens(self) -> int:
        return self.prefix + math.prod(self.grid)

    def __str__(self) -> str:
        return f"{' × '.join(map(str, self.grid))} behind {self.prefix} ({self.source})"


# What a module says of its input when it is called: None where it says nothing.
Reader = Callable[[tuple[Any, ...], dict[str, Any]], Place | None]
# Parameters of transformers' embeddings that are tokens, before the patches.
_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


class Grids:
    """The grids of a running model, read where each is made.

    timm: `patch_embed` and `num_prefix_tokens`, at whatever size the image of this call has. diffusers: the latent that
    a transformer cuts into patches, and the map that a block of a U-Net flattens. transformers: the patch embeddings
    and the tokens put before them. attnlab: the `grid` that a mixer is called with. A grid given by hand goes first.
    """

    def __init__(self, model: nn.Module, grid: tuple[int, ...] | None = None, prefix: int | None = None) -> None:
        if grid is None and prefix is not None:
            raise ValueError(f"prefix={prefix} goes with a grid: give grid=(H, W) too")
        self.given = None if grid is None else Place(tuple(int(n) for n in grid), prefix or 0, "given by hand")
        self._model = model
        self._now = threading.local()

    def open(self) -> list[Handle]:
        """Hooks on what makes grids; the caller removes them."""
        handles: list[Handle] = []
        if self.given is None:
            for scope, module, reader in _readers(self._model):
                hook = self._hook(scope, reader)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def _hook(self, scope: str, reader: Reader) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            place = reader(arguments, keywords)
            places = self._now.__dict__.setdefault("places", {})
            if place is None:
                places.pop(scope, None)
            else:
                places[scope] = place

        return hook

    def of(self, layer: str, tokens: int) -> Place:
        """The place of a layer that attends over so many tokens; ValueError, which asks for `grid`, where unknown."""
        found = self.given or self._nearest(layer)
        if found is None:
            raise ValueError(
                f"grid of {layer} is not known: {type(self._model).__name__} does not say how its {tokens} tokens lie; "
                "give grid=(H, W), and prefix= if there are tokens before them"
            )
        if found.tokens != tokens:
            raise ValueError(
                f"{layer} attends over {tokens} tokens, but the grid is {found}: give grid=(H, W) and prefix= for this "
                "layer, or leave it out with layers="
            )
        return found

    def known(self, layer: str) -> dict[str, Any]:
        """What is known of a layer before the model runs, as options of mechanisms on a grid."""
        place = self.given
        if place is None:
            owners = [
                (name, module)
                for name, module in self._model.named_modules()
                if (name == "" or layer.startswith(f"{name}."))
                and hasattr(module, "num_prefix_tokens")
                and getattr(getattr(module, "patch_embed", None), "grid_size", None)
            ]
            if not owners:
                return {}
            owner: Any = max(owners, key=lambda pair: len(pair[0]))[1]
            height, width = owner.patch_embed.grid_size
            place = Place((int(height), int(width)), int(owner.num_prefix_tokens), "its patch_embed")
        return {"grid": place.grid, "class_token": place.prefix == 1}

    def _nearest(self, layer: str) -> Place | None:
        places = getattr(self._now, "places", {})
        over = [s for s in places if s == "" or layer == s or layer.startswith(f"{s}.")]
        return places[max(over, key=len)] if over else None


def _readers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Reader]]:
    """For each module that knows a grid: the name of the part of the model that it speaks for, itself, and how."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name, module in modules.items():
        patches: Any = getattr(module, "patch_embed", None)
        if isinstance(patches, nn.Module) and hasattr(patches, "grid_size") and hasattr(module, "num_prefix_tokens"):
            yield name, patches, _timm(patches, int(module.num_prefix_tokens))
            continue
        home = type(module).__module__.split(".")[0]
        if home == "diffusers":
            patches = getattr(module, "pos_embed", None)
            side = getattr(patches, "patch_size", None)
            if isinstance(patches, nn.Module) and isinstance(side, int):
                yield name, patches, _patches(side, 0, f"{name or 'the model'}'s patches")
            else:
                yield name, module, _map(name)
        elif home == "transformers" and hasattr(module, "patch_size") and hasattr(module, "num_patches"):
            # The tokens before the patches belong to this module, or to the embeddings around it.
            around = name if any(hasattr(module, t) for t in _TOKENS) or _has_positions(module) else _parent(name)
            prefix = sum(_count(getattr(modules[around], t, None)) for t in _TOKENS)
            if _first_in(modules, name, home):
                yield _parent(around), module, _patches(module.patch_size, prefix, f"{name}'s patches")
        elif home == "attnlab":
            yield name, module, _keyword(name)


def _first_in(modules: dict[str, nn.Module], name: str, home: str) -> bool:
    """Whether no module within this one says more about the patches."""
    within = (m for n, m in modules.items() if n.startswith(f"{name}."))
    return not any(hasattr(m, "patch_size") and hasattr(m, "num_patches") for m in within)


def _has_positions(module: nn.Module) -> bool:
    return any(
        isinstance(getattr(module, n, None), nn.Embedding) for n in ("position_embedding", "position_embeddings")
    )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _count(tokens: Any) -> int:
    return 0 if not isinstance(tokens, Tensor) else tokens.shape[-2] if tokens.dim() == 3 else 1


def _timm(patches: nn.Module, prefix: int) -> Reader:
    def read(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Place | None:
        image = _map_of(arguments)
        size = getattr(patches, "dynamic_feat_size", None)
        if image is not None and callable(size):
            height, width = size((image.shape[-2], image.shape[-1]))
        else:
            height, width = patches.grid_size  # type: ignore[misc]
        return Place((int(height), int(width)), prefix, "its patch_embed")

    return read


def _patches(patch: int | tuple[int, int], prefix: int, source: str) -> Reader:
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)

    def read(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Place | None:
        image = _map_of((*arguments, *keywords.values()))
        if image is None:
            return None
        return Place((image.shape[-2] // sides[0], image.shape[-1] // sides[1]), prefix, source)

    return read


def _map(name: str) -> Reader:
    """A module that takes a map and may flatten it."""

    def read(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Place | None:
        image = _map_of((*arguments[:1], keywords.get("hidden_states")))
        return None if image is None else Place((image.shape[-2], image.shape[-1]), 0, f"the map that {name} takes")

    return read


def _keyword(name: str) -> Reader:
    def read(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Place | None:
        grid = keywords.get("grid")
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            return None
        tokens = next((x for x in arguments if isinstance(x, Tensor) and x.dim() == 3), None)
        places = int(grid[0]) * int(grid[1])
        prefix = 0 if tokens is None else max(tokens.shape[1] - places, 0)
        return Place((int(grid[0]), int(grid[1])), prefix, f"the grid that {name} is called with")

    return read


def _map_of(arguments: tuple[Any, ...]) -> torch.Tensor | None:
    return next((x for x in arguments if isinstance(x, Tensor) and x.dim() == 4), None)
