"""Raise the voice of the heads whose output owes most to the image (VHR)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import LENS, Card, register
from attnlab.lens.aside import aside, shown
from attnlab.lens.edits.decoder import DecoderEdit, cached, taken
from attnlab.lens.event import Event
from attnlab.lens.measures.divergence import aware_heads, divergence, token_divergence, without_surges
from attnlab.lens.subscriber import Handle
from attnlab.lens.where import Choice


class HeadDivergence(DecoderEdit):
    """Changes nothing: measures how far each head's output is from what it is without the image, at the prompt's end.

    Whenever a prompt with an image enters the decoder, the decoder first runs on a batch of twice its size: prompts,
    and prompts without their image tokens, padded on the left so that the ends stand together. `found[layer]` is then
    `(B, H, tokens)`. With an answer behind the prompt, its token t is predicted by the state one before:
    `tokens=n + 1` measures those that predict n tokens and the next.

    Args:
        tokens: how many states from the end.
        distance: see `divergence`.
        image, layers: see `DecoderEdit`.
    """

    def __init__(
        self, image: Tensor | None = None, *, tokens: int = 1, distance: str = "l2", layers: Choice = None
    ) -> None:
        super().__init__(image, layers=layers)
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.tokens, self.distance = tokens, distance
        self.found: dict[int, Tensor] = {}
        self.measuring = False

    def open(self, model: nn.Module) -> Iterable[Handle]:
        handles = list(super().open(model))
        self.found = {}
        return [*handles, self.decoder.register_forward_pre_hook(self._measure, with_kwargs=True)]

    def token_divergence(self, k: int = 4) -> Tensor:
        """Token-VHD `(B, tokens)` over the layers measured: low for tokens that owe little to the image."""
        layers = [self.found[i].mT for i in sorted(self.found)]
        if not layers:
            raise ValueError("nothing has been measured yet: no prompt with an image has passed")
        return token_divergence(layers, k)

    def wants(self, event: Event) -> bool:
        return self.measuring and super().wants(event)

    def output(self, event: Event, out: Tensor) -> Tensor:
        seen, unseen = out[:, :, -self.tokens :].transpose(1, 2).chunk(2)  # (B, tokens, H, D)
        self.found[self.depth(event)] = divergence(seen, unseen, distance=self.distance).mT
        return out

    def _measure(self, decoder: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self.measuring or cached(keywords) or not shown(decoder, self):
            return
        self.found = {}
        x = taken(decoder, arguments, keywords)
        image = self.image_keys(x.shape[1], x.device).expand(len(x), -1)
        if not image.any():
            return
        both = _with_and_without(x, image, keywords.get("attention_mask"), keywords.get("position_ids"))
        self.measuring = True
        try:
            with torch.no_grad(), aside(decoder, self):
                decoder(**both, use_cache=False)
        finally:
            self.measuring = False


@register(
    Card(
        name="reinforce_heads",
        title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence (VHR)",
        paper="2412.13949",
        system="vhr",
        family="edit",
        kind=LENS,
        cost="one pass over the prompt with and without its image",
    )
)
class ReinforceHeads(HeadDivergence):
    """The half of the heads whose output owes most to the image speak `alpha` times as loud: for `lens.steer`.

        VHD_h = ‖A_h(image, text) − A_h(text)‖ at the state that predicts the first token; 0 for heads that fire when
                the image is missing (`without_surges`)
        H     = heads with VHD above the layer's median
        A_h ← alpha · A_h for h in H, before the output projection, at all positions

    Layer by layer: each layer is measured with those below it reinforced, in one pass that carries both contexts. Then
    H is frozen for the answer, until the next prompt: `aware[layer]` is bool `(B, H)`. No parameters; the prompt passes
    three times instead of once. Other edits do not act on the measurement. Source: arXiv 2412.13949.

    Args:
        alpha: the strength; 1 changes nothing, and 4 spoils LLaVA's text.
        layers: of the decoder; the second and the last 14 of 32 (as LLaVA-1.5, of other depths in proportion) if None.
            For InstructBLIP the paper takes the last 18.
        filtered: whether heads that fire without the image are left out.
        image, distance: see `HeadDivergence`.
    """

    def __init__(
        self, image: Tensor | None = None, *, alpha: float = 2.0, layers: Choice = None, distance: str = "l2",
        filtered: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(image, distance=distance, layers=layers)
        self.alpha, self.filtered = alpha, filtered
        self.aware: dict[int, Tensor] = {}

    def open(self, model: nn.Module) -> Iterable[Handle]:
        handles = super().open(model)
        if self.choice is None:
            depth = len(self.layers)
            self.chosen = frozenset({min(1, depth - 1), *range(depth - max(1, round(depth * 14 / 32)), depth)})
        self.aware = {}
        return handles

    def wants(self, event: Event) -> bool:
        return DecoderEdit.wants(self, event) and (self.measuring or self.depth(event) in self.aware)

    def output(self, event: Event, out: Tensor) -> Tensor:
        depth = self.depth(event)
        if self.measuring:
            super().output(event, out)
            found = self.found[depth][..., -1]
            if self.filtered:
                found = without_surges(found, out.chunk(2)[1][:, :, -1])
            self.aware[depth] = aware_heads(found)
        loud = self.aware[depth]
        loud = torch.cat((loud, loud)) if self.measuring else loud
        return torch.where(loud[:, :, None, None], self.alpha * out, out)

    def _measure(self, decoder: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not self.measuring and not cached(keywords) and shown(decoder, self):
            self.aware = {}
        super()._measure(decoder, arguments, keywords)


def _with_and_without(x: Tensor, image: Tensor, padding: Tensor | None, positions: Tensor | None) -> dict[str, Tensor]:
    """What the decoder takes for embeddings `x (B, T, C)` and, behind them, for the same without their image tokens."""
    if padding is not None and padding.dim() != 2:
        raise ValueError(f"attention_mask must be (B, T), the padding alone, got {tuple(padding.shape)}")
    attended = torch.ones_like(image) if padding is None else padding.bool()
    kept = attended & ~image
    # A stable sort by what is kept moves the rest to the left, as padding.
    order = torch.sort(kept.long(), dim=-1, stable=True).indices
    text = x.gather(1, order[..., None].expand_as(x))
    mask = torch.cat((attended, kept.gather(1, order)))
    at = (mask.long().cumsum(-1) - 1).clamp_min(0)
    if positions is not None:
        # Perhaps with several axes in front; those without an image count as texts do.
        texts = at[len(x) :].expand(*positions.shape[:-2], -1, -1)
        at = torch.cat((positions.expand(*positions.shape[:-2], len(x), -1), texts), -2)
    return {"inputs_embeds": torch.cat((x, text)), "attention_mask": mask.long(), "position_ids": at}
