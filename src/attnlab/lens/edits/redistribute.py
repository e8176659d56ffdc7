"""Take attention away from tokens that only soak it up, and give it to the image (VAR)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import LENS, Card, register
from attnlab.lens.aside import shown
from attnlab.lens.edits.decoder import DecoderEdit
from attnlab.lens.event import Event
from attnlab.lens.subscriber import Handle
from attnlab.lens.where import Choice

# The massive dimensions of the language models on which the paper works.
SINK_DIMENSIONS = {"llama-2-7b": (1415, 2533), "llama-2-13b": (2100, 4743)}


def massiveness(hidden: Tensor, dimensions: Sequence[int]) -> Tensor:
    """The largest normed activation in `dimensions` of the hidden states `(…, T, C)` entering a layer: `(…, T)`.

    max over d of |x_d| / √(mean x² + 1e-6)                in float32, without the gain of the layer's norm
    """
    channels = hidden.shape[-1]
    if not dimensions or not all(-channels <= d < channels for d in dimensions):
        raise ValueError(f"dimensions must be some of the {channels} channels, got {list(dimensions)}")
    x = hidden.float()
    scale = torch.rsqrt(x.square().mean(-1) + 1e-6)
    return x[..., list(dimensions)].abs().amax(-1) * scale


def massive_dimensions(hidden: Tensor, count: int = 2) -> tuple[int, ...]:
    """The `count` channels in which hidden states `(…, T, C)` of a middle layer come largest for their token's norm.

    The paper reads them off the first token; they are the model's own, whatever the prompt.
    """
    x = hidden.float().flatten(0, -2)
    normed = x.abs() * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    if not 1 <= count <= x.shape[-1]:
        raise ValueError(f"count must be 1 to {x.shape[-1]} channels, got {count}")
    return tuple(sorted(normed.amax(0).topk(count).indices.tolist()))


def sink_tokens(hidden: Tensor, dimensions: Sequence[int], tau: float = 20.0) -> Tensor:
    """Which tokens of the prompt are sinks, of text and image alike: bool `(…, T)`, where `massiveness` > `tau`."""
    return massiveness(hidden, dimensions) > tau


def image_heads(weights: Tensor, sinks: Tensor, image: Tensor, *, rho: float = 0.5, floor: float = 0.2) -> Tensor:
    """Which rows `(B, H, Nq)` of `weights (B, H, Nq, Nk)` look at what the image shows, not at sinks in it.

        Σ_{image sinks} a / Σ_image (a + 1e-6) ≤ rho, and Σ_image a ≥ floor

    `sinks` and `image` are bool `(Nk)` or `(B, Nk)`. Without a sink in the image there is nothing to redistribute, and
    no row is chosen.
    """
    image, inside = _keys(image, weights), _keys(sinks & image, weights)
    looked = (weights * image).sum(-1)
    portion = (weights * inside).sum(-1) / ((weights + 1e-6) * image).sum(-1)
    return (portion <= rho) & (looked >= floor) & inside.any(-1)


def redistribute(weights: Tensor, sinks: Tensor, image: Tensor, rows: Tensor, *, keep: float = 0.6) -> Tensor:
    """`weights (B, H, Nq, Nk)` in which the chosen `rows (B, H, Nq)` keep a part of what they gave to sinks.

        a_s ← keep · a_s for every sink s;  a_j ← a_j + (1 − keep) · Σ_s a_s · a_j / Σ_image without sinks a

    for tokens j of the image that are no sinks. Rows sum to what they did; other keys and rows stay as they are.
    """
    image, sinks = _keys(image, weights), _keys(sinks, weights)
    rest = weights.masked_fill(~image | sinks, 0.0)
    total = rest.sum(-1, keepdim=True)
    budget = (1 - keep) * weights.masked_fill(~sinks, 0.0).sum(-1, keepdim=True)
    # A row with nothing to give its sinks' share to stays as it is.
    rows = rows[..., None] & (total > 0)
    edited = torch.where(
        sinks, keep * weights, weights + budget * (rest / total.clamp_min(torch.finfo(rest.dtype).tiny))
    )
    return torch.where(rows, edited, weights)


def _keys(mask: Tensor, weights: Tensor) -> Tensor:
    """`(Nk)` or `(B, Nk)` as something that broadcasts over `(B, H, Nq, Nk)`."""
    batch, keys = weights.shape[0], weights.shape[-1]
    if mask.dtype != torch.bool or mask.shape[-1] != keys or mask.dim() > 2 or mask.numel() not in (keys, batch * keys):
        wanted = f"bool ({keys}) or ({batch}, {keys})"
        raise ValueError(f"sinks and image must be {wanted}, got {mask.dtype} {tuple(mask.shape)}")
    return mask.reshape(-1, 1, 1, keys)


@register(
    Card(
        name="redistribute_sinks",
        title="See What You Are Told: Visual Attention Sink in Large Multimodal Models (VAR)",
        paper="2503.03321",
        system="var",
        family="edit",
        kind=LENS,
        cost="N² weights by hand in the edited layers",
    )
)
class RedistributeSinks(DecoderEdit):
    """Heads that look at the image give what they gave to sinks to the image's other tokens: for `lens.steer`.

        sinks   = tokens of the prompt with `massiveness` > tau in what enters the layer (`sink_tokens`)
        rows    = heads and queries that look at the image and not at sinks in it (`image_heads`)
        weights = each sink keeps `keep` of its weight; the rest goes to the image's other tokens, in proportion

    Sinks are found once, when the prompt passes (all of it at once), and serve each new token. Of the prompt only the
    queries after the image change, and the layers before `first` never do, which have no sinks yet. No parameters, no
    extra pass; the weights `(B, H, Nq, Nk)` of the edited layers are computed by hand. Source: arXiv 2503.03321.

    Args:
        dimensions: the language model's massive channels: `SINK_DIMENSIONS` has those of the paper's models, and
            `massive_dimensions` finds them.
        tau, rho, floor, keep: the paper's τ, ρ, the least attention to the image that counts, and p.
        first: the first layer that changes.
        image, layers, heads: see `DecoderEdit`.
    """

    def __init__(
        self, dimensions: Sequence[int], image: Tensor | None = None, *, tau: float = 20.0, rho: float = 0.5,
        floor: float = 0.2, keep: float = 0.6, first: int = 2, layers: Choice = None, heads: Choice = None,
    ) -> None:  # fmt: skip
        super().__init__(image, layers=layers, heads=heads)
        for name, value in (("rho", rho), ("floor", floor), ("keep", keep)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in 0 to 1, got {value}")
        if not tau > 0:
            raise ValueError(f"tau must be positive, got {tau}")
        self.dimensions, self.tau, self.rho, self.floor, self.keep, self.first = (
            tuple(dimensions), tau, rho, floor, keep, first,
        )  # fmt: skip
        self.sinks: dict[int, Tensor] = {}  # of each layer, for the prompt that last passed: (B, T)
        self._entered: dict[int, Tensor] = {}

    def open(self, model: nn.Module) -> Iterable[Handle]:
        handles = list(super().open(model))
        self.chosen = frozenset(i for i in self.chosen if i >= self.first)
        self.sinks, self._entered = {}, {}
        for i in self.chosen:
            handles.append(self.layers[i].register_forward_pre_hook(self._watch(i), with_kwargs=True))
        return handles

    def close(self) -> None:
        super().close()
        self._entered = {}

    def _watch(self, depth: int) -> Any:
        def watch(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if shown(layer, self):
                self._entered[depth] = (arguments[0] if arguments else keywords["hidden_states"]).detach()

        return watch

    def weights(self, event: Event, weights: Tensor) -> Tensor:
        depth, (queries, keys) = self.depth(event), weights.shape[-2:]
        hidden = self._entered.pop(depth, None)
        if queries == keys and hidden is not None:
            self.sinks[depth] = sink_tokens(hidden, self.dimensions, self.tau)
        if depth not in self.sinks:
            raise ValueError(f"{event.name}: the prompt went by before the sinks were looked for; steer from its start")
        device = weights.device
        sinks, image = self.image_keys(keys, device, self.sinks[depth]), self.image_keys(keys, device)
        rows = image_heads(weights, sinks, image, rho=self.rho, floor=self.floor)
        # Queries after the last token of the image.
        after = ~image.flip(-1).cummax(-1).values.flip(-1) if image.any() else image
        rows = rows & after[..., keys - queries :].reshape(-1, 1, queries)
        return self.put(event, redistribute(weights, sinks, image, rows, keep=self.keep), weights)
