"""LASP-2's claim of hybrids (arXiv 2502.07563): python benchmarks/linear_llama_text.py [--steps 200]

Trains Linear-Llama3 at toy size on the Python library's sources: softmax attention in all layers, in one of four, in
none. The paper: hybrids reach the loss of softmax attention or better, pure linear ones come close.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from attnlab.arena.tasks.text import Text
from attnlab.models.language.linear_llama import linear_llama

LENGTH, BATCH = 128, 8


def batch(source: np.ndarray, rng: np.random.Generator, count: int = BATCH) -> torch.Tensor:
    starts = rng.integers(0, len(source) - LENGTH - 1, count)
    return torch.from_numpy(source[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int64))


def train(options: dict, steps: int, seed: int, task: Text) -> float:
    """Bits per byte on held-out modules."""
    torch.manual_seed(seed)
    model, rng = linear_llama(vocabulary=256, dim=64, depth=4, heads=4, **options), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=["basic", "retention", "gla"])
    arguments, task = parser.parse_args(), Text()
    print(f"{arguments.steps} steps of {BATCH} × {LENGTH} bytes, 4 layers of 64, {arguments.seeds} seeds")
    variants = {"softmax": dict(hybrid=1)}
    for kind in arguments.kinds:
        variants[kind], variants[f"{kind}, every fourth softmax"] = dict(kind=kind), dict(kind=kind, hybrid=4)
    for name, options in variants.items():
        found = [train(options, arguments.steps, seed, task) for seed in range(arguments.seeds)]
        print(f"{name:32} {np.mean(found):.3f} ± {np.std(found):.3f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
