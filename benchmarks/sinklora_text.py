"""Longer texts by few weights: full, sink-fixed or shifted groups while tuning: python benchmarks/sinklora_text.py

A small model of characters is trained with full attention on short pieces of the standard library's sources. Then
low-rank updates, embeddings and norms are fine-tuned on pieces four times as long, with the attention named, in groups
of a quarter; and all are judged with full attention on other files. Printed is the perplexity per character, of all
tokens and of those past the trained length, and the share of full attention's gain. SinkLoRA (arXiv 2406.05678)
reports on PG19, for a 7B model at 8,192 tokens: 8.64 with sinks and a quarter of the heads moved, 9.09 with S²-Attn,
and 92% of what full attention gains.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.models.skeletons.decoder import Decoder
from attnlab.recipes.sinklora import finetune, finish, next_token_loss, prepare

KINDS: dict[str, dict[str, Any]] = {
    "full": dict(group=2**20),
    "SF: quarter moved, 4 sinks": dict(),
    "S² with 4 sinks": dict(moved=0.5),
    "quarter moved, no sinks": dict(sinks=0),
    "S²": dict(moved=0.5, sinks=0),
    "S² as released (leaks)": dict(moved=0.5, sinks=0, wrap=True, variant="release"),
}


def sources() -> tuple[Tensor, Tensor]:
    """Characters of the standard library, as bytes: files to train on and others to judge by."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    parts = [b"".join(f.read_bytes() for f in files[k::5]) for k in range(5)]
    train, test = b"".join(parts[1:]), parts[0]
    return tuple(torch.frombuffer(bytearray(t), dtype=torch.uint8).long().clamp_max(127) for t in (train, test))  # type: ignore[return-value]


def pieces(text: Tensor, length: int, count: int, rng: torch.Generator) -> Tensor:
    start = torch.randint(len(text) - length, (count, 1), generator=rng)
    return text[start + torch.arange(length)]


@torch.no_grad()
def perplexity(model: Decoder, text: Tensor, length: int, beyond: int) -> tuple[float, float]:
    model.eval()
    losses = []
    for batch in pieces(text, length, 128, torch.Generator().manual_seed(0)).split(16):
        logits = model(batch)[:, :-1].transpose(1, 2)
        losses.append(F.cross_entropy(logits, batch[:, 1:], reduction="none"))
    each = torch.cat(losses)
    return math.exp(each.mean()), math.exp(each[:, beyond:].mean())


def base(train: Tensor, a: argparse.Namespace, seed: int) -> Decoder:
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = Decoder(vocabulary=128, dim=a.dim, depth=a.depth, heads=8, tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(a.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50, 4 * (1 - step / a.steps))
        loss = next_token_loss(model, pieces(train, a.short, 32, rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tune", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--short", type=int, default=64)
    a = parser.parse_args()
    train, test = sources()
    long, found = 4 * a.short, {name: [] for name in ("untuned", *KINDS)}
    for seed in range(a.seeds):
        trained = base(train, a, seed)
        found["untuned"].append(perplexity(finish(prepare(copy.deepcopy(trained), factor=4.0)), test, long, a.short))
        for name, groups in KINDS.items():
            torch.manual_seed(seed)
            rng = torch.Generator().manual_seed(100 + seed)
            model = prepare(copy.deepcopy(trained), factor=4.0, groups=groups)
            finetune(model, (pieces(train, long, 8, rng) for _ in range(a.tune)), rate=1e-3)
            found[name].append(perplexity(finish(model), test, long, a.short))
    mean = {name: torch.tensor(runs).mean(0).tolist() for name, runs in found.items()}
    start, goal = mean["untuned"][0], mean["full"][0]
    print(f"{'while fine-tuning':28s}{'all':>8s}{'beyond':>8s}{'gain':>8s}     at {long}, trained at {a.short}")
    for name, (total, beyond) in mean.items():
        gain = (math.log(start) - math.log(total)) / (math.log(start) - math.log(goal))
        print(f"{name:28s}{total:8.3f}{beyond:8.3f}{gain:8.1%}", flush=True)


if __name__ == "__main__":
    main()
