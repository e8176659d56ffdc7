"""LongMamba: a trained Mamba reads far longer texts when its slowly forgetting channels skip unimportant tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from attnlab.cards import RECIPE, Card, register
from attnlab.nn.linear.selective import Selective

Method = Literal["threshold", "share", "bound", "rank", "scale", "top", "top_tokens"]

# The lengths for which the authors calibrate, in thousands of tokens.
LENGTHS = tuple(
    1000 * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 30, 36, 44, 54, 64, 80, 96, 120, 144, 168, 192)
)


@dataclass(frozen=True)
class Calibration:
    """What one layer does with texts of the length it was trained at; one number per channel (head, in Mamba-2) each.

    `decay` is what is left of the state after such a text, and `total` the sum of the steps. To keep them for a text of
    n tokens, only a share `alpha[n]` of its steps may be taken: those above `threshold[n]`.
    """

    decay: Tensor
    total: Tensor
    alpha: Mapping[int, Tensor]
    threshold: Mapping[int, Tensor]

    def nearest(self, length: int) -> int:
        """The calibrated length nearest to `length`; the shorter of two."""
        return min(self.alpha, key=lambda n: abs(n - length))


def calibration(
    delta: Tensor, a: Tensor, *, clamp: float = 0.1, trained: int = 2000, lengths: Sequence[int] = LENGTHS
) -> Calibration:
    """Calibrate a layer from the steps delta `(N, channels)` that one text takes, and its rates a `(channels, …) < 0`.

    Each channel's steps are first clamped to the least of its largest `clamp`·N. For a length beyond `trained`, the
    sorted steps are stretched to it, and the threshold lies where their sum passes that of the text. With several rates
    per channel (Mamba) its decay is that of the slowest.
    """
    if delta.dim() != 2 or a.shape[:1] != delta.shape[1:]:
        wanted = f"(N, channels) and (channels, …), got {tuple(delta.shape)} and {tuple(a.shape)}"
        raise ValueError(f"delta and a must have shapes {wanted}")
    if not 0 < clamp <= 1:
        raise ValueError(f"clamp must be in (0, 1], got {clamp}")
    highest = delta.topk(max(1, int(len(delta) * clamp)), dim=0).values[-1]
    steps = torch.minimum(delta, highest).T.contiguous()
    total, slowest = steps.sum(1), a if a.dim() == 1 else a.amax(1)
    order = steps.sort(dim=1, descending=True).values
    alpha, threshold = {}, {}
    for n in lengths:
        if n <= trained:
            alpha[n], threshold[n] = torch.ones_like(total), torch.zeros_like(total)
            continue
        parts = [_cut(o, t, n) for o, t in zip(order.split(64), total.split(64), strict=True)]
        alpha[n], threshold[n] = (torch.cat(p) for p in zip(*parts, strict=True))
    return Calibration((slowest * total).exp(), total, alpha, threshold)


def _cut(order: Tensor, total: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The share of `length` steps, distributed like `order`, that sums to `total`, and the largest one left out."""
    stretched = interpolate(order.unsqueeze(1), size=length, mode="linear", align_corners=False).squeeze(1)
    count = (stretched.cumsum(1) > total.unsqueeze(1)).int().argmax(1) + 1
    left_out = stretched.gather(1, count.clamp(max=length - 1).unsqueeze(1)).squeeze(1)
    return (count / length).clamp(max=1), left_out


def combine(calibrations: Sequence[Calibration], how: Literal["mean", "max"] = "mean") -> Calibration:
    """One calibration from those of several texts: the mean or the largest of every number."""
    if how not in ("mean", "max"):
        raise ValueError(f"how must be 'mean' or 'max', got {how!r}")
    if not calibrations:
        raise ValueError("calibrations must hold at least one")

    def over(tensors: Iterable[Tensor]) -> Tensor:
        stacked = torch.stack(list(tensors))
        return stacked.mean(0) if how == "mean" else stacked.amax(0)

    return Calibration(
        over(c.decay for c in calibrations),
        over(c.total for c in calibrations),
        {n: over(c.alpha[n] for c in calibrations) for n in calibrations[0].alpha},
        {n: over(c.threshold[n] for c in calibrations) for n in calibrations[0].threshold},
    )


@torch.no_grad()
def calibrate(
    model: nn.Module,
    texts: Iterable[Tensor],
    *,
    clamp: float = 0.1,
    how: Literal["mean", "max"] = "mean",
    lengths: Sequence[int] = LENGTHS,
) -> dict[str, Calibration]:
    """Run `model` over texts, each what it takes for a batch of one, and calibrate each of its selective layers.

    The texts have the length that the model was trained at: the authors take 100 of 2,000 tokens, or 4,000 for Zamba2.
    """
    layers = selective_layers(model)
    found: dict[str, list[Calibration]] = {name: [] for name in layers}

    def record(delta: Tensor, name: str, layer: Selective) -> Tensor:
        if len(delta) != 1:
            raise ValueError(f"texts must come one at a time, got a batch of {len(delta)}")
        steps, a = delta[0], layer.rates()
        found[name].append(calibration(steps, a, clamp=clamp, trained=len(steps), lengths=lengths))
        return delta

    with _filters(layers, {name: partial(record, name=name, layer=layer) for name, layer in layers.items()}):
        for text in texts:
            model(text)
    return {name: combine(c, how) for name, c in found.items()}


def selective_layers(model: nn.Module) -> dict[str, Selective]:
    """The Mamba and Mamba-2 layers of a model by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Selective)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Mamba or Mamba-2 layers")
    return layers


@contextmanager
def _filters(layers: Mapping[str, Selective], filters: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    before = {name: layer.step_filter for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.step_filter = filters[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.step_filter = before[name]


# Which steps of delta (B, N, C) are kept, by method: masks of its shape. The last `response` tokens always are.


def above(delta: Tensor, threshold: Tensor, response: int = 0) -> Tensor:
    """Steps above their channel's threshold `(C,)`."""
    return _with_response(delta > threshold, response)


def share(delta: Tensor, alpha: Tensor, response: int = 0) -> Tensor:
    """The largest alpha · N steps of each channel, alpha `(C,)`."""
    length = delta.shape[1] - response
    places = delta[:, :length].argsort(dim=1, descending=True).argsort(dim=1)
    kept = places < (alpha * length).clamp(max=length)
    return torch.cat([kept, torch.ones_like(delta[:, length:], dtype=torch.bool)], 1)


def bound(delta: Tensor, total: Tensor, response: int = 0) -> Tensor:
    """The largest steps of each channel as long as their sum is at most total `(C,)`; the response is counted too."""
    order, indices = delta.sort(dim=1, descending=True)
    count = (order.cumsum(1) <= total).sum(1, keepdim=True)
    places = torch.arange(delta.shape[1], device=delta.device).view(1, -1, 1)
    return _with_response(torch.zeros_like(delta, dtype=torch.bool).scatter(1, indices, places < count), response)


def rank(delta: Tensor, alpha: Tensor, response: int = 0) -> Tensor:
    """Steps no smaller than the one of rank alpha · N, counted from 0, of their channel."""
    length = delta.shape[1] - response
    index = (alpha * length).clamp(max=length).long().clamp(max=delta.shape[1] - 1)
    order = delta.sort(dim=1, descending=True).values
    return _with_response(delta >= order.gather(1, index.view(1, 1, -1).expand(len(delta), 1, -1)), response)


def top(delta: Tensor, k: int = 2000, response: int = 0) -> Tensor:
    """Steps above the quantile of their channel that leaves about k."""
    length = delta.shape[1] - response
    k = min(k, length)
    order = delta[:, :length].sort(dim=1).values
    place = (1 - k / length) * (length - 1)
    low = int(place)
    limit = order[:, low].lerp(order[:, min(low + 1, length - 1)], place - low)
    return _with_response(delta > limit.unsqueeze(1), response)


def top_tokens(delta: Tensor, k: int = 2000, response: int = 0) -> Tensor:
    """Indices `(B, k + response)`, rising, of the tokens whose steps over all channels have the largest norm."""
    length = delta.shape[1] - response
    best = delta[:, :length].norm(dim=2).topk(min(k, length), dim=1).indices.sort(dim=1).values
    last = torch.arange(length, delta.shape[1], device=delta.device).expand(len(delta), -1)
    return torch.cat([best, last], 1)


def scaled(delta: Tensor, total: Tensor, response: int = 0) -> Tensor:
    """Not a mask but the steps, scaled to sum to total `(C,)`."""
    factor = (total / delta.sum(1, keepdim=True)).expand_as(delta)
    length = delta.shape[1] - response
    return delta * torch.cat([factor[:, :length], torch.ones_like(factor[:, length:])], 1)


def _with_response(mask: Tensor, response: int) -> Tensor:
    if response:
        mask = torch.cat([mask[:, : mask.shape[1] - response], torch.ones_like(mask[:, -response:])], 1)
    return mask


@register(
    Card(
        name="longmamba",
        system="longmamba",
        title="LongMamba: Enhancing Mamba's Long Context Capabilities via Training-Free Receptive Field Enlargement",
        paper="2504.16053",
        family="linear",
        kind=RECIPE,
    )
)
@contextmanager
def longmamba(
    model: nn.Module,
    calibrations: Mapping[str, Calibration],
    *,
    cutoff: float,
    strength: float = 1.0,
    method: Method = "threshold",
    k: int = 2000,
    response: int = 0,
    shortest: int = 3000,
) -> Iterator[nn.Module]:
    """Within this context, `model` reads long texts as if they were as long as those that it was trained on.

        Δ ← Δ where Δ > strength · threshold[n], else 0          for channels with decay > cutoff

    A channel whose state outlives a training text is global: on a longer text its state would decay to nothing that
    training ever saw. Skipping its small steps keeps the whole decay what it was, and the tokens that matter. Channels
    that forget sooner are local and stay as they are. Nothing is trained. Only calls with at least `shortest` tokens
    are changed, so that single decoding steps never are. Source: arXiv 2504.16053.

    Args:
        model: has `Mamba` or `Mamba2` layers, as `mamba_lm` and `zamba2` do.
        calibrations: of its layers by name, from `calibrate`.
        cutoff: the paper's c, tuned for each model; at 1 or above no channel is global.
        strength: the paper's b; a factor of thresholds, shares or sums, by method.
        method: which steps stay: above the "threshold" of the nearest calibrated length; the largest "share" α; the
            largest within the "bound" of the training text's sum; those of "rank" α · N and up; the "top" k of each
            channel; those of the "top_tokens", k for all global channels together. "scale" scales all steps instead.
        response: how many tokens at the end are always taken.
    """
    methods = ("threshold", "share", "bound", "rank", "scale", "top", "top_tokens")
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")
    layers = selective_layers(model)
    if missing := sorted(set(layers) - set(calibrations)):
        raise ValueError(f"calibrations lack the layers {', '.join(missing)}")
    for name, layer in layers.items():
        if calibrations[name].decay.shape != (layer.steps,):
            got = tuple(calibrations[name].decay.shape)
            raise ValueError(
                f"calibrations of {name} are for {got} channels, but it has {layer.steps}: another model's"
            )

    def change(delta: Tensor, to: Calibration) -> Tensor:
        length = delta.shape[1]
        chosen = (to.decay > cutoff).to(delta.device)
        if length < shortest or not bool(chosen.any()):
            return delta

        def of(x: Tensor) -> Tensor:
            return strength * x.to(delta)[chosen]

        steps, near = delta[:, :, chosen], to.nearest(length)
        if method == "scale":
            kept = scaled(steps, of(to.total), response)
        else:
            if method == "threshold":
                mask = above(steps, of(to.threshold[near]), response)
            elif method == "share":
                mask = share(steps, of(to.alpha[near]), response)
            elif method == "bound":
                mask = bound(steps, of(to.total), response)
            elif method == "rank":
                mask = rank(steps, of(to.alpha[near]), response)
            elif method == "top":
                mask = top(steps, k, response)
            else:
                tokens = top_tokens(steps, k, response)
                mask = torch.zeros(delta.shape[:2], dtype=torch.bool, device=delta.device)
                mask = mask.scatter(1, tokens, True).unsqueeze(-1)
            kept = steps * mask
        changed = delta.clone()
        changed[:, :, chosen] = kept
        return changed

    with _filters(layers, {name: partial(change, to=calibrations[name]) for name in layers}):
        yield model
