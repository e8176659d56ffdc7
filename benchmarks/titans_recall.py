"""Does a neural memory recall what lies beyond the window? Pairs early in a text, a gap, then the keys again.

    python benchmarks/titans_recall.py [--steps 300] [--gap 16]

Each mixer sits in the same decoder of one layer with 32 channels. The window of attention is 8 tokens; the pairs lie
further away. Prints the share of values recalled.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnlab.models.skeletons.decoder import Decoder

KEYS = VALUES = 8
PAIRS, WINDOW = 4, 8
FILLER = KEYS + VALUES


def batch(size: int, gap: int) -> tuple[Tensor, Tensor]:
    """Texts k v k v … filler … k v k v …, and where the values asked for stand."""
    keys = torch.rand(size, KEYS).argsort(1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (size, PAIRS))
    pairs = torch.stack([keys, values], 2)
    again = torch.rand(size, PAIRS).argsort(1)
    asked = pairs.gather(1, again.unsqueeze(-1).expand(-1, -1, 2)).flatten(1)
    text = torch.cat([pairs.flatten(1), torch.full((size, gap), FILLER), asked], 1)
    return text, torch.arange(text.shape[1] - 2 * PAIRS, text.shape[1], 2)


def recall(mixer: str, options: dict, steps: int, gap: int, seed: int = 0) -> tuple[float, int]:
    """The share of values that a trained decoder recalls, and its parameters."""
    torch.manual_seed(seed)
    model = Decoder(
        vocabulary=FILLER + 1, dim=32, depth=1, heads=1, hidden=64, mixer=mixer, mixer_options=options, position="none"
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        text, where = batch(32, gap)
        loss = cross_entropy(model(text)[:, where].flatten(0, 1), text[:, where + 1].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        text, where = batch(256, gap)
        hits = model(text)[:, where].argmax(-1) == text[:, where + 1]
    return hits.float().mean().item(), sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--gap", type=int, default=16)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    memory = dict(chunk=4, expansion=1.0)
    cases = {
        "window": ("sliding_window", dict(window=WINDOW, sinks=0)),
        "memory, a matrix": ("neural_memory", dict(chunk=4, depth=1)),
        "memory, two layers": ("neural_memory", memory),
        "memory as context": ("titans_mac", dict(segment=WINDOW, memory=memory)),
        "memory as gate": ("titans_mag", dict(window=WINDOW, memory=memory)),
        "memory as layer": ("titans_mal", dict(window=WINDOW, memory=memory)),
        "mamba2": ("mamba2", dict(states=32, head_dim=32)),
    }
    print(f"chance {1 / VALUES:.2f}; {PAIRS} pairs, then {arguments.gap} tokens of filler; window {WINDOW}")
    for name, (mixer, options) in cases.items():
        if arguments.only in name:
            start = time.perf_counter()
            share, size = recall(mixer, options, arguments.steps, arguments.gap)
            print(
                f"{name:20} {share:6.1%} recalled, {size:,} parameters, {time.perf_counter() - start:.0f} s", flush=True
            )
