"""The edits that any study of heads begins with: ablate, patch from another run, scale, hide keys, and point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from attnlab.lens.event import Event
from attnlab.lens.steer import Edit
from attnlab.lens.where import Choice, Layers

E = TypeVar("E", bound=Edit)


class Ablate(Edit):
    """Chosen heads say nothing of what they looked at.

        how="zero"      their output is zero
        how="mean"      it is its mean over the batch and the chosen queries, or what `mean` gives by layer
        how="uniform"   it is the plain average of the values that they may see

    Args:
        mean: by layer, `(H, Dv)` of all heads: the mean over a larger set than the batch.
        layers, heads, queries, steps: of `Edit`.
    """

    def __init__(
        self, how: Literal["zero", "mean", "uniform"] = "zero", *, mean: Mapping[int, Tensor] | None = None,
        layers: Layers = None, heads: Choice = None, queries: Choice = None, steps: Choice = None,
    ) -> None:  # fmt: skip
        super().__init__(layers=layers, heads=heads, queries=queries, steps=steps)
        if how not in ("zero", "mean", "uniform"):
            raise ValueError(f"how must be 'zero', 'mean' or 'uniform', got {how!r}")
        if mean is not None and how != "mean":
            raise ValueError(f"mean goes with how='mean', got how={how!r}")
        self.how, self.mean = how, mean

    def output(self, event: Event, out: Tensor) -> Tensor:
        if self.how == "zero":
            return self.put(event, torch.zeros_like(out), out)
        if self.how == "mean":
            return self.put(event, self._mean(event, out).to(out).expand_as(out), out)
        seen = event.allowed().expand(-1, -1, -1, event.k.shape[2])
        v = event.v.repeat_interleave(event.heads // event.v.shape[1], 1)
        return self.put(event, seen.to(out) @ v / seen.sum(-1, keepdim=True).clamp_min(1), out)

    def _mean(self, event: Event, out: Tensor) -> Tensor:
        if self.mean is not None:
            if event.layer not in self.mean:
                raise ValueError(f"mean has no layer {event.layer}, only {sorted(self.mean)}")
            return self.mean[event.layer][:, None]
        chosen = self.where.region(event).any(-1).expand(1, event.heads, out.shape[2])[0, :, :, None].to(out)
        return (out.mean(0) * chosen).sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp_min(1)


class Patch(Edit):
    """Chosen heads say what they said in another run, at the same places.

    Args:
        outputs: of the other run, by layer: a `Record` of `watch(keep="outputs")`, or `{layer: (B, H, N, Dv)}`, with
            a batch of one for all. In generation the run's steps must be as long as the record's passes.
    """

    def __init__(
        self, outputs: Any, *, layers: Layers = None, heads: Choice = None, queries: Choice = None,
        steps: Choice = None,
    ) -> None:  # fmt: skip
        super().__init__(layers=layers, heads=heads, queries=queries, steps=steps)
        self.outputs = outputs

    def wants(self, event: Event) -> bool:
        # Chosen layers must be there; of "all layers", those that are.
        return self.where.layers is not None or not isinstance(self.outputs, Mapping) or event.layer in self.outputs

    def output(self, event: Event, out: Tensor) -> Tensor:
        try:
            other = self.outputs[event.layer]
        except KeyError:
            raise ValueError(f"outputs have no layer {event.layer}: they have {sorted(self.outputs)}") from None
        if other.shape[1:] != out.shape[1:] or len(other) not in (1, len(out)):
            raise ValueError(
                f"outputs of layer {event.layer} must have shape {tuple(out.shape)}, got {tuple(other.shape)}"
            )
        return self.put(event, other.to(out).expand_as(out), out)


class Scale(Edit):
    """Chosen heads speak `factor` times as loud: a number, or one for each of a layer's heads `(H,)`."""

    def __init__(
        self, factor: float | Tensor, *, layers: Layers = None, heads: Choice = None, queries: Choice = None,
        steps: Choice = None,
    ) -> None:  # fmt: skip
        super().__init__(layers=layers, heads=heads, queries=queries, steps=steps)
        if isinstance(factor, Tensor) and factor.dim() not in (0, 1):
            raise ValueError(f"factor must be a number or (H,), got a tensor {tuple(factor.shape)}")
        self.factor = factor

    def output(self, event: Event, out: Tensor) -> Tensor:
        factor = self.factor
        if isinstance(factor, Tensor) and factor.dim():
            if len(factor) != event.heads:
                raise ValueError(f"factor must be one for each of {event.heads} heads, got {len(factor)}")
            factor = factor.to(out)[:, None, None]
        return self.put(event, out * factor, out)


class MaskKeys(Edit):
    """Chosen queries do not see chosen keys, and their weight goes to the others. A query must be left one."""

    def __init__(
        self, keys: Choice, *, layers: Layers = None, heads: Choice = None, queries: Choice = None,
        steps: Choice = None,
    ) -> None:  # fmt: skip
        super().__init__(layers=layers, heads=heads, queries=queries, keys=keys, steps=steps)
        if keys is None:
            raise ValueError("keys must say which keys are hidden: all of them would leave nothing to see")

    def scores(self, event: Event, scores: Tensor) -> Tensor:
        return self.put(event, torch.full_like(scores, -math.inf), scores)


class LookAt(Edit):
    """Chosen heads look at given tokens instead of where they would: evenly at all of these, at nothing else.

    Args:
        targets: bool `(B, N)`, or indices `(B, T)` with −1 for none: what to look at, for each prompt. Tokens that come
            later than the targets were given, in generation, are not looked at.
        queries: the last token if None, as prompts are answered there.
    """

    def __init__(
        self, targets: Tensor, *, layers: Layers = None, heads: Choice = None, queries: Choice = -1,
        steps: Choice = None,
    ) -> None:  # fmt: skip
        super().__init__(layers=layers, heads=heads, queries=queries, steps=steps)
        if targets.dim() != 2:
            raise ValueError(f"targets must have shape (B, N) or (B, T), got {tuple(targets.shape)}")
        if targets.dtype is not torch.bool:
            grid = torch.zeros(len(targets), max(int(targets.max()) + 1, 1) + 1, dtype=torch.bool)
            targets = grid.scatter(1, targets.where(targets >= 0, grid.shape[1] - 1), True)[:, :-1]
        if not bool(targets.any(1).all()):
            raise ValueError("targets must name at least one token of each prompt")
        self.targets = targets

    def weights(self, event: Event, weights: Tensor) -> Tensor:
        keys = weights.shape[-1]
        if self.targets.shape[1] > keys and bool(self.targets[:, keys:].any()):
            raise ValueError(f"targets go up to token {self.targets.shape[1] - 1}, and there are {keys} keys")
        there = self.targets[:, :keys].to(weights)
        there = torch.nn.functional.pad(there, (0, keys - there.shape[1]))
        even = (there / there.sum(1, keepdim=True))[:, None, None]
        return self.put(event, even.expand_as(weights), weights)


def at_heads(edit: Callable[..., E], pairs: Iterable[Sequence[int]], **keywords: Any) -> list[E]:
    """One edit per layer for heads given as pairs (layer, head): `at_heads(Ablate, [(1, 3), (2, 0)], how="mean")`."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in pairs:
        by_layer.setdefault(int(layer), []).append(int(head))
    return [edit(layers=layer, heads=heads, **keywords) for layer, heads in sorted(by_layer.items())]
