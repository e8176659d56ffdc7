"""Does a distilled student read better? A masked-letter teacher on the standard library's text, and three students.

    python benchmarks/minilm.py [--steps 300]

Equal students (half the depth, half the width) are fine-tuned on masked letters for a third of the steps: after
distillation by attention and values, after distillation by attention alone, and from scratch.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import statistics
import textwrap
from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy

from attnlab.models.language.bert import Bert
from attnlab.recipes.minilm import distil, warm_then_decay

LENGTH, MASK = 48, 0


def letters() -> torch.Tensor:
    text = "".join(inspect.getsource(module) for module in (argparse, textwrap, statistics, inspect, json))
    return torch.tensor([min(ord(c), 127) for c in text])


def texts(data: torch.Tensor, steps: int, seed: int, batch: int = 32) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(data) - LENGTH, (batch,), generator=generator)
        yield data[starts[:, None] + torch.arange(LENGTH)]


def masked_loss(model: Bert, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    hidden = torch.rand(ids.shape, generator=generator) < 0.15
    return cross_entropy(model(ids.masked_fill(hidden, MASK))[hidden], ids[hidden])


def small(dim: int, depth: int) -> Bert:
    model = Bert(vocabulary=128, dim=dim, depth=depth, heads=4, length=LENGTH, dropout=0.0)
    for module in model.modules():
        # BERT's 0.02 is for its width; so narrow a model would hardly move.
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    return model


def train(model: Bert, data: torch.Tensor, steps: int, seed: int) -> None:
    rate, generator = warm_then_decay(2e-3, steps, warm_up=steps // 10), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()
    for step, ids in enumerate(texts(data, steps, seed)):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        masked_loss(model, ids, generator).backward()
        optimizer.step()


@torch.no_grad()
def test(model: Bert, data: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(99)
    model.eval()
    return sum(masked_loss(model, ids, generator).item() for ids in texts(data, 10, 99)) / 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    data = letters()
    cut = int(0.9 * len(data))
    torch.manual_seed(0)
    teacher = small(64, 4)
    train(teacher, data[:cut], 2 * steps, 0)
    print(f"teacher, 4 × 64               {test(teacher, data[cut:]):.3f} nats per masked letter")
    fresh = small(32, 2)
    for name, relations in (
        ("attention and values", {"qk": 1.0, "vv": 1.0}), ("attention alone", {"qk": 1.0}), ("from scratch", {}),
    ):  # fmt: skip
        student = copy.deepcopy(fresh)
        if relations:
            batches = ({"ids": ids} for ids in texts(data[:cut], steps, 1))
            distil(teacher, student, batches, rate=warm_then_decay(2e-3, steps, warm_up=steps // 10),
                   relations=relations)  # fmt: skip
        train(student, data[:cut], steps // 3, 2)
        print(f"student, 2 × 32, {name:20s} {test(student, data[cut:]):.3f}")


if __name__ == "__main__":
    main()
