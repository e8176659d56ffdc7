"""Which properties of attention a small language model needs: python benchmarks/deconstructed.py [--steps 300]

Trains the decoder of arXiv 2510.11602 on the Python library's sources with each variant, in all layers and in every
second one, and prints bits per byte on held-out modules. The paper (500M parameters, perplexity at length 2048): alone,
standard 38 < approximate 48 < static 80, fixed 79, random 85 << mlp 994 << non-approximate 9026; hybrids 38 to 46.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from attnlab.arena.tasks.text import Text
from attnlab.models.language.deconstructed import VARIANTS, Deconstructed

LENGTH, BATCH = 128, 16


def batch(source: np.ndarray, rng: np.random.Generator, count: int = BATCH) -> torch.Tensor:
    starts = rng.integers(0, len(source) - LENGTH - 1, count)
    return torch.from_numpy(source[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int64))


def train(variant: str | None, layout: str, steps: int, task: Text) -> float:
    torch.manual_seed(0)
    fixed = task.train[: LENGTH + 1].tolist() if variant == "fixed_maps" else None
    model = Deconstructed(
        variant=variant, layout=layout, vocabulary=256, dim=96, depth=4, heads=4, length=LENGTH + 1, fixed=fixed
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    rng = np.random.default_rng(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 30, 0.1 + 1.8 * (1 - step / steps))
        ids = batch(task.train, rng)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    held_out = batch(task.held_out, np.random.default_rng(1), 64)
    with torch.no_grad():
        loss = F.cross_entropy(model(held_out[:, :-1]).flatten(0, 1), held_out[:, 1:].flatten())
    return loss.item() / np.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps, task = parser.parse_args().steps, Text()
    standard = train(None, "uniform", steps, task)
    print(f"{'standard':16} {standard:.3f} bits per byte")
    for variant in VARIANTS:
        alone, hybrid = (train(variant, layout, steps, task) for layout in ("uniform", "hybrid"))
        print(
            f"{variant:16} {alone:.3f} alone ({alone / standard:.2f}×)   {hybrid:.3f} in every second layer", flush=True
        )


if __name__ == "__main__":
    main()
