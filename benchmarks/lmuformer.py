"""Two tones, one after the other, and the order in which they came: accuracy after each part of the sound.

Without the memory the same network hears which tones there were, but not which was first.

    OMP_NUM_THREADS=1 python benchmarks/lmuformer.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnlab.models.audio.lmuformer import LMUFormer

FRAMES, MELS, TONES = 64, 16, 3
PAIRS = [(a, b) for a in range(TONES) for b in range(TONES) if a != b]


def sounds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spectrograms `(count, FRAMES, MELS)`, a tone in each half with silence between, and which pair it is."""
    which = torch.randint(len(PAIRS), (count,), generator=generator)
    x = 0.5 * torch.randn(count, FRAMES, MELS, generator=generator)
    half = FRAMES // 2
    for part in range(2):
        tones = torch.tensor(PAIRS)[which, part]
        # Far enough from both ends for the convolutions not to see them: they would tell first from second.
        start = 8 + torch.randint(4, (count,), generator=generator) + part * half
        frames = torch.arange(FRAMES)
        sounds = (frames >= start[:, None]) & (frames < start[:, None] + 12)
        channel = 5 * tones[:, None] + (frames - start[:, None]).clamp(0, half) // 4  # each tone rises
        x.scatter_add_(2, channel.clamp(max=MELS - 1)[..., None], 2.0 * sounds[..., None])
    return x, which


def network(spiking: str, *, memory: bool) -> LMUFormer:
    net = LMUFormer(
        mels=MELS, dim=24, mlp_ratio=2, window=FRAMES, memory=16, num_classes=len(PAIRS),
        spiking=spiking,  # type: ignore[arg-type]
    )  # fmt: skip
    if not memory:
        for block in net.blocks:
            block.mixer = nn.Identity()
    return net


def curve(spiking: str, *, memory: bool, steps: int, seed: int = 0) -> list[float]:
    """Accuracy after 1/4, 2/4, 3/4 and all of the sound."""
    torch.manual_seed(seed)
    net, generator = network(spiking, memory=memory), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        x, which = sounds(64, generator)
        optimizer.zero_grad()
        cross_entropy(net(x), which).backward()
        optimizer.step()
        schedule.step()
    x, which = sounds(512, generator)
    with torch.no_grad():
        right = (net.eval().prefixes(x).argmax(-1) == which[:, None]).float().mean(0)
    return [right[FRAMES * part // 4 - 1].item() for part in (1, 2, 3, 4)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    print(f"{'network':22} {'1/4':>6} {'2/4':>6} {'3/4':>6} {'all':>6}   of the sound; chance {1 / len(PAIRS):.2f}")
    for spiking in ("", "spikes", "membrane"):
        for memory in (True, False):
            name = f"{spiking or 'real numbers'}{'' if memory else ', no memory'}"
            print(f"{name:22}", *(f"{a:6.2f}" for a in curve(spiking, memory=memory, steps=steps)), flush=True)


if __name__ == "__main__":
    main()
