"""What two papers claim of positions, on a small language model: python benchmarks/positions_text.py [--steps 300]

Trains the same decoder on the Python library's sources with each mechanism and prints bits per byte on held-out
modules. RCMHA (arXiv 2308.03429): relative positions with a convolution beat those without, and plain attention.
ComplexFormer (2505.10222): learned angles are no worse than RoPE; how far heads' frequencies moved apart is printed.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from attnlab.arena.tasks.text import Text
from attnlab.models.skeletons.decoder import Decoder

LENGTH, BATCH = 128, 16
VARIANTS: dict[str, dict] = {
    "rotary": dict(mixer="multihead"),
    "rcmha": dict(mixer="rcmha", mixer_options=dict(reach=LENGTH), position="none"),
    "rcmha, no convolution": dict(mixer="rcmha", mixer_options=dict(reach=LENGTH, taps=1), position="none"),
    "complexformer": dict(mixer="complexformer", position="none"),
    "complexformer, fixed places": dict(mixer="complexformer", mixer_options=dict(delta="fixed"), position="none"),
}


def batch(source: np.ndarray, rng: np.random.Generator, count: int = BATCH) -> torch.Tensor:
    starts = rng.integers(0, len(source) - LENGTH - 1, count)
    return torch.from_numpy(source[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int64))


def train(variant: dict, steps: int, seed: int, task: Text) -> tuple[Decoder, float]:
    torch.manual_seed(seed)
    model, rng = Decoder(vocabulary=256, dim=96, depth=2, heads=4, **variant), np.random.default_rng(seed)
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
    return model, loss.item() / np.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    arguments, task = parser.parse_args(), Text()
    print(f"{arguments.steps} steps of {BATCH} × {LENGTH} bytes, 2 layers of 96, {arguments.seeds} seeds")
    for name in arguments.only:
        runs = [train(VARIANTS[name], arguments.steps, seed, task) for seed in range(arguments.seeds)]
        found = [loss for _, loss in runs]
        print(f"{name:28} {np.mean(found):.3f} ± {np.std(found):.3f} bits per byte", flush=True)
        if name == "complexformer":
            mixer = runs[0][0].blocks[0].mixer
            apart = (mixer.frequency.std(0) / mixer.frequency.abs().mean(0)).mean()
            print(f"  frequencies of heads differ by {apart:.1%}, scales by {mixer.angle_scale.std(0).mean():.3f}")


if __name__ == "__main__":
    main()
