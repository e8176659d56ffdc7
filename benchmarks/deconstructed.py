"""Which properties of attention a small language model needs: python benchmarks/deconstructed.py [--steps 300]

Trains the decoder of arXiv 2510.11602 on the Python library's sources with each variant, in all layers and in every
second one, and prints bits per byte on held-out modules; in the last column the variant's layers are left out of the
trained hybrid. The paper (500M parameters, perplexity at length 2048): alone, standard 38 < approximate 48 < fixed 79,
static 80, random 85 << mlp 994 << non-approximate 9026; hybrids 38 to 46; without the variant's layers above 20,000.
With norms of queries and keys non-approximate trains alone, too (1.7B parameters: 67, standard 28).

Found (300 steps, 1 seed; alone, every second layer, left out; standard 3.10):
fixed maps 3.10 3.11 7.0, static 3.15 3.05 7.8, random 3.38 3.19 5.1, true series 3.36 3.27 5.8, approximate 3.60 3.44
6.1, as printed 4.71 4.62 4.9, mlp 3.69 2.93 6.9, non-approximate 3.74 3.65 5.2, with norms 3.78 3.70 6.2. As in the
paper hybrids are better than variants alone (all but fixed maps) and nothing works without the variant's layers. Unlike
there the maps beat the approximations, and non-approximate trains alone as well as an mlp does.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from attnlab.arena.tasks.text import Text
from attnlab.models.language.deconstructed import Deconstructed

LENGTH, BATCH = 96, 16
VARIANTS: dict[str, dict] = {
    "standard": dict(variant=None),
    "approximate": dict(variant="approximate", form="paper"),
    "  as printed": dict(variant="approximate", form="paper", floor=0.0),
    "  as a true series": dict(variant="approximate", form="taylor"),
    "static maps": dict(variant="static_maps"),
    "fixed maps": dict(variant="fixed_maps"),
    "random maps": dict(variant="random_maps"),
    "mlp": dict(variant="mlp"),
    "non-approximate": dict(variant="non_approximate"),
    "  with q, k norms": dict(variant="non_approximate", qk_norm=True),
}


def batch(source: np.ndarray, rng: np.random.Generator, count: int = BATCH) -> torch.Tensor:
    starts = rng.integers(0, len(source) - LENGTH - 1, count)
    return torch.from_numpy(source[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int64))


def train(options: dict, layout: str, steps: int, seed: int, task: Text) -> Deconstructed:
    torch.manual_seed(seed)
    fixed = task.train[:LENGTH].tolist() if options["variant"] == "fixed_maps" else None
    model = Deconstructed(
        layout=layout, vocabulary=256, dim=64, hidden=128, depth=4, heads=4, length=LENGTH, fixed=fixed, **options
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 30, 0.1 + 1.8 * (1 - step / steps))
        ids = batch(task.train, rng)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def bits(model: Deconstructed, task: Text) -> float:
    ids = batch(task.held_out, np.random.default_rng(99), 64)
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item() / np.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    arguments, task = parser.parse_args(), Text()
    steps = arguments.steps
    torch.set_flush_denormal(True)
    print(f"{steps} steps of {BATCH} × {LENGTH} bytes, 4 layers of 64, {arguments.seeds} seeds; bits per byte")
    print(f"{'':20}{'everywhere':>12} {'every second':>14} {'left out':>10}", flush=True)
    for name in arguments.only:
        options, rows = VARIANTS[name], []
        for seed in range(arguments.seeds):
            row = [bits(train(options, "uniform", steps, seed, task), task)]
            if options["variant"] is not None:
                hybrid = train(options, "hybrid", steps, seed, task)
                row += [bits(hybrid, task), bits(hybrid.skip(), task)]
            rows.append(row)
        print(f"{name:20}" + " ".join(f"{m:12.3f}" for m in np.mean(rows, 0)), flush=True)


if __name__ == "__main__":
    main()
