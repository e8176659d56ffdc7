"""The attention sinks of any causal language model, measured on texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnlab.lens.event import Event
from attnlab.lens.measures.sinks import importance, row_shares
from attnlab.lens.tap import Subscriber, join


class Sinks(NamedTuple):
    """Sinks of a model: at each position, means over the texts."""

    rate: Tensor  # (T), per cent of heads and texts that have a sink there
    importance: Tensor  # (L, H, T)
    keys: Tensor  # (L, T), norms of the keys, mean over heads
    values: Tensor  # (L, T)


class SinkWatch(Subscriber):
    """Keeps what each key receives, `(B, H, T)` per causal self-attention call, and the norms of keys and values."""

    def __init__(self, *, shares: bool = False) -> None:
        self.shares = shares
        self.received: dict[int, list[Tensor]] = {}
        self.keys: dict[int, list[Tensor]] = {}  # norms (B, Hkv, T)
        self.values: dict[int, list[Tensor]] = {}

    def wants(self, event: Event) -> bool:
        return event.kind == "self" and event.q.shape[2] == event.k.shape[2] and not event.recomputed

    def after(self, event: Event, out: Tensor) -> None:
        weights = event.weights().detach()
        self.received.setdefault(event.layer, []).append(importance(row_shares(weights) if self.shares else weights))
        self.keys.setdefault(event.layer, []).append(event.k.detach().norm(dim=-1))
        self.values.setdefault(event.layer, []).append(event.v.detach().norm(dim=-1))


@torch.no_grad()
def measure_sinks(
    model: nn.Module, texts: Tensor | Iterable[Tensor], *, epsilon: float = 0.3, shares: bool = False
) -> Sinks:
    """How many of a model's heads have a sink, and where: for any causal language model that is called with token ids.

    Args:
        model: of transformers, attnlab, or anything else that the tap sees.
        texts: ids `(B, T)`, or batches of them, all of one length; the paper takes 100 texts of 64 tokens.
        epsilon: what a key must receive on average to be a sink.
        shares: look at weights as shares of their rows (`row_shares`).

    Where a mechanism adds a slot (`kv_bias`), it is position 0. Source: arXiv 2410.10781.
    """
    watch = SinkWatch(shares=shares)
    leave = join(model, watch)
    try:
        for ids in [texts] if isinstance(texts, Tensor) else texts:
            model(ids)
    finally:
        leave()
    if not watch.received:
        raise ValueError("texts must make the model attend to itself: no self-attention call was seen")
    sizes = {t.shape[-1] for layer in watch.received.values() for t in layer}
    if len(sizes) > 1:
        raise ValueError(f"texts must be of one length, got {sorted(sizes)} tokens")
    layers = sorted(watch.received)
    received = torch.stack([torch.cat(watch.received[n]) for n in layers], 1)  # (S, L, H, T)
    rate = 100 * (received > epsilon).float().flatten(0, -2).mean(0)
    keys, values = (torch.stack([torch.cat(of[n]).mean((0, 1)) for n in layers]) for of in (watch.keys, watch.values))
    return Sinks(rate, received.mean(0), keys, values)
