"""Do gates prevent attention sinks? On a task that mostly leaves a head idle: python benchmarks/attention_sinks.py

Texts follow the byte pairs of the Python library's sources, but for one rule: after a trigger byte the byte before it
comes again ("bigram backcopy", arXiv 2410.13835). Attention is needed at triggers only. Elsewhere softmax must look
somewhere, and learns to look at the first token; a gate lets the head say nothing instead (arXiv 2505.06708).
Printed per mechanism, for a decoder of one layer without an MLP that could undo what idle heads write: the loss above
the best possible, the share of attention that the first token gets from queries that need none, and the share that
triggers give to the byte which they must copy.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.arena.tasks.text import Text
from attnlab.models.skeletons.decoder import Decoder

LENGTH, BATCH, DIM, BYTES, TRIGGERS = 64, 32, 64, 48, 3
VARIANTS: dict[str, dict] = {
    "multihead": dict(mixer="multihead"),
    "gated, per head": dict(mixer="gated", mixer_options=dict(gate="head")),
    "gated, per element": dict(mixer="gated", mixer_options=dict(gate="element")),
    "affine": dict(mixer="affine"),
    "sigmoid": dict(mixer="sigmoid", mixer_options=dict(length=LENGTH)),
}


def pairs() -> Tensor:
    """Probability of each next byte, among the most frequent ones; row and column 0 stand for the first token."""
    data = Text().train
    kept = np.bincount(data, minlength=256).argsort()[::-1][:BYTES]
    rank = np.full(256, -1)
    rank[kept] = np.arange(BYTES)
    text = rank[data[:2_000_000]]
    both = (text[:-1] >= 0) & (text[1:] >= 0)
    table = np.full((BYTES, BYTES), 0.1)
    np.add.at(table, (text[:-1][both], text[1:][both]), 1)
    full = np.zeros((BYTES + 1, BYTES + 1))
    full[1:, 1:] = table / table.sum(1, keepdims=True)
    full[0, 1:] = 1 / BYTES
    return torch.from_numpy(full).float()


def texts(table: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Texts (count, LENGTH + 1), where a trigger stands (count, LENGTH), and the best possible loss at each place."""
    ids = torch.zeros(count, LENGTH + 1, dtype=torch.long)
    row = torch.arange(count)
    trigger = torch.zeros(count, LENGTH, dtype=torch.bool)
    best = torch.zeros(count, LENGTH)
    for n in range(LENGTH):
        chances = table[ids[:, n]]
        drawn = torch.multinomial(chances, 1, generator=rng)[:, 0]
        # The most frequent bytes but the very first are triggers, where there is a byte before them to copy.
        trigger[:, n] = (ids[:, n] >= 2) & (ids[:, n] < 2 + TRIGGERS) & (n >= 2)
        ids[:, n + 1] = torch.where(trigger[:, n], ids[:, max(n - 1, 0)], drawn)
        best[:, n] = torch.where(trigger[:, n], 0.0, -chances[row, drawn].log())
    return ids, trigger, best


def run(variant: dict, table: Tensor, steps: int, seed: int) -> list[float]:
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = Decoder(vocabulary=BYTES + 1, dim=DIM, depth=1, heads=2, mlp=lambda layer: None, **variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50, 0.05 + 2 * (1 - step / steps))
        ids, *_ = texts(table, BATCH, rng)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        ids, trigger, best = texts(table, 256, rng)
        excess = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:]) - best.mean()
        block = model.blocks[0]
        weights = block.mixer.weights(block.norm1(model.embedding(ids[:, :-1]))).abs()
        weights = weights / weights.sum(-1, keepdim=True)
        late = torch.arange(LENGTH) >= LENGTH // 4
        first = weights[..., 0].mean(1)[~trigger & late].mean()
        before = weights.diagonal(-1, 2, 3).amax(1)[trigger[:, 1:] & late[1:]].mean()
    return [excess.item(), first.item(), before.item()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    table = pairs()
    print(f"{'':20s}{'excess loss':>14s}{'first token, idle':>20s}{'byte to copy, trigger':>24s}")
    base = None
    for name, variant in VARIANTS.items():
        excess, first, before = np.mean(
            [run(variant, table, arguments.steps, seed) for seed in range(arguments.seeds)], 0
        )
        base = first if base is None else base
        print(f"{name:20s}{excess:14.4f}{first:13.1%}  ({first / base:4.2f}×){before:18.1%}", flush=True)


if __name__ == "__main__":
    main()
