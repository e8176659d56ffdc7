"""Number an image's tokens by rings from its border to its centre, and let attention follow (CCA)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import LENS, Card, register
from attnlab.lens.aside import shown
from attnlab.lens.edits.decoder import DecoderEdit, cached, taken
from attnlab.lens.subscriber import Handle
from attnlab.patterns import Pattern


def rings(height: int, width: int, *, device: torch.device | str | None = None) -> Tensor:
    """The ring of each token of a grid, `(height, width)`: 0 at the border, largest in the centre.

        ring(i, j) = min(i, j, height − 1 − i, width − 1 − j)

    Any grid; the paper's is 24 × 24, with 12 rings of 92, 84, … 4 tokens. The centre of an odd square is one token.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    i, j = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.minimum(torch.minimum(i, height - 1 - i)[:, None], torch.minimum(j, width - 1 - j))


def depth(grid: tuple[int, int]) -> int:
    """How many rings a grid has, and so how many positions its tokens take: half its shorter side, rounded up."""
    return (min(grid) + 1) // 2


def ranks(grid: tuple[int, int], order: str = "concentric", *, device: torch.device | str | None = None) -> Tensor:
    """Where each token of a grid comes among the image's, `(height · width)`: its ring, or its place from the end.

    `order="reversed"`, the raster from its last token to its first, is what the paper holds against both.
    """
    if order not in ("concentric", "reversed"):
        raise ValueError(f"order must be 'concentric' or 'reversed', got {order!r}")
    ring = rings(*grid, device=device).flatten()
    return ring if order == "concentric" else torch.arange(len(ring), device=device).flip(0)


def place(at: Tensor, start: int | Tensor, grid: tuple[int, int], order: str = "concentric") -> Tensor:
    """Positions of the tokens that come `at`-th in a text whose image begins at `start`, row-major: the shape of `at`.

        text before: at;  image: start + rank;  text after: at − V + R     V = height · width, R the number of ranks

    So a token decoded after L others stands at L − V + R, not at L.
    """
    size, rank = math.prod(grid), ranks(grid, order, device=at.device)
    within = start + rank[(at - start).clamp(0, size - 1)]
    after = at - size + (depth(grid) if order == "concentric" else size)
    return torch.where(at < start, at, torch.where(at < start + size, within, after))


@dataclass(frozen=True)
class ConcentricCausal(Pattern):
    """Causal over the text; a token of the image (at `start`, `grid` row-major) sees its own ring and those outside it.

    What comes before the image is seen by all of it, and the text after it sees it whole. arXiv 2410.15926.
    """

    start: int
    grid: tuple[int, int]
    order: str = "concentric"

    def __post_init__(self) -> None:
        ranks(self.grid, self.order)
        if self.start < 0 or len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"start must be 0 or more and grid (height, width), got {self.start} and {self.grid}")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        rank = ranks(self.grid, self.order, device=q.device)
        i, j = q - self.start, k - self.start
        inside = (i >= 0) & (i < len(rank)) & (j >= 0) & (j < len(rank))
        last = len(rank) - 1
        return torch.where(inside, rank[j.clamp(0, last)] <= rank[i.clamp(0, last)], k <= q)


_NEVER = 2**40  # a beginning that no prompt reaches


@register(
    Card(
        name="concentric_positions",
        title="Mitigating Object Hallucination via Concentric Causal Attention",
        paper="2410.15926",
        system="cca",
        family="edit",
        kind=LENS,
        cost="a dense mask while the prompt passes",
    )
)
class ConcentricPositions(DecoderEdit):
    """Image tokens at most R positions from the text, and seeing one another ring by ring: for `lens.steer`.

        positions: `place`;  visibility: `ConcentricCausal`             in all layers, R = half the grid's shorter side

    The decoder is called with these `position_ids` and, while the prompt passes, with the mask as an additive
    `(B, 1, T, T)`. It is a scheme to train with (steer the training too); a model trained on raster positions is not
    used to it. One image per prompt, all of it in the first pass; prompts without an image are as they were, padding
    may stand on the left. No parameters, no cost in decoding. Where a model has several axes of positions (Qwen2-VL),
    all of them get these. For attnlab's own decoders there are `ConcentricCausal` and `Rotary.turn_to(x, place(…))`.
    Source: arXiv 2410.15926.

    Args:
        grid: height and width of the image in tokens.
        image: see `DecoderEdit`.
        order: "reversed" for the raster backwards, to compare with.
    """

    def __init__(self, grid: tuple[int, int], image: Tensor | None = None, *, order: str = "concentric") -> None:
        super().__init__(image)
        ranks(grid, order)  # refuses what is no grid, and no order
        self.order = order
        self.grid = (int(grid[0]), int(grid[1]))
        self.begin: Tensor | None = None  # of each prompt's image

    def open(self, model: nn.Module) -> Iterable[Handle]:
        handles = list(super().open(model))
        if "position_ids" not in inspect.signature(self.decoder.forward).parameters:
            for handle in handles:
                handle.remove()
            raise ValueError(f"{type(self.decoder).__name__} takes no position_ids")
        return [*handles, self.decoder.register_forward_pre_hook(self._placed, with_kwargs=True)]

    def _placed(self, decoder: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if not shown(decoder, self):
            return None
        x = taken(decoder, arguments, keywords)
        padding, before = keywords.get("attention_mask"), cached(keywords)
        if padding is not None and (not isinstance(padding, Tensor) or padding.dim() != 2):
            raise ValueError("attention_mask must be (B, T), the padding alone: the rest of the mask is set here")
        batch, new = x.shape[:2]
        total = before + new
        at = torch.arange(total, device=x.device).expand(batch, -1)
        if padding is not None:
            at = (padding.long().cumsum(-1) - 1).clamp_min(0)
        if before == 0:
            self.begin = self._starts(batch, total, x.device)
        elif self.begin is None:
            raise ValueError("the prompt went by before its image was looked for; steer from its start")
        index = torch.arange(total, device=x.device).expand(batch, -1)
        first = self.begin.clamp_max(total - 1)
        start = torch.where(self.begin < total, at.gather(1, first), _NEVER)
        positions = place(at, start, self.grid, self.order)
        changed: dict[str, Any] = {"position_ids": positions[:, before:]}
        if before == 0:
            seen = ConcentricCausal(0, self.grid, self.order).allows(
                x.new_zeros(()), x.new_zeros(()), (index - self.begin)[:, :, None], (index - self.begin)[:, None]
            )
            if padding is not None:
                seen = seen & padding.bool()[:, None]
            closed = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
            changed["attention_mask"] = closed[:, None]
        return arguments, {**keywords, **changed}

    def _starts(self, batch: int, total: int, device: torch.device) -> Tensor:
        """Where the image begins in each prompt, `(B, 1)`; `_NEVER` where there is none."""
        image, size = self.image_keys(total, device), math.prod(self.grid)
        image = image.expand(batch, -1)
        count, start = image.sum(-1, keepdim=True), image.long().argmax(-1, keepdim=True)
        index = torch.arange(total, device=device)
        run = (index >= start) & (index < start + size)
        if bool(((count > 0) & ((count != size) | (run != image).any(-1, keepdim=True))).any()):
            shape = f"{self.grid[0]} × {self.grid[1]} = {size}"
            raise ValueError(f"a prompt must hold one image of {shape} tokens in a row; image marks {count.tolist()}")
        return torch.where(count > 0, start, _NEVER)
