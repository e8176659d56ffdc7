"""Windows, channels, or both? DaViT of as many blocks each, on a question that no window can answer alone.

    python benchmarks/davit_marks.py [--steps 300]

Two marks of random sign, one in each half of an image, anywhere: are they alike? Prints the accuracy on new images
after training on `steps` batches of 64 (a minute for each network on one thread).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.models.vision.davit import DaViT


def marks(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 32, 32) of noise: a mark of 4×4 pixels above, in another channel one below; the labels."""
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    signs = [torch.randint(0, 2, (count,), generator=generator) * 2 - 1 for _ in range(2)]
    for channel, sign in enumerate(signs):
        rows = 4 * (torch.randint(0, 4, (count, 2), generator=generator)[:, 0] + 4 * channel)
        columns = 4 * torch.randint(0, 8, (count,), generator=generator)
        for i in range(count):
            images[i, channel, rows[i] : rows[i] + 4, columns[i] : columns[i] + 4] += 2.0 * sign[i]
    return images, (signs[0] == signs[1]).long()


def accuracy(mixers: tuple[str, ...], steps: int) -> float:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = DaViT(
        dim=(32,), depths=(4 // len(mixers),), heads=(2,), window=2, mixers=mixers, mlp_ratio=2.0, num_classes=2
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        images, labels = marks(64, generator)
        optimiser.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimiser.step()
    images, labels = marks(512, generator)
    with torch.inference_mode():
        return (net.eval()(images).argmax(-1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    for mixers in (("spatial",), ("channel",), ("spatial", "channel")):
        print(f"{' and '.join(mixers):<20} {accuracy(mixers, options.steps):.3f}", flush=True)


if __name__ == "__main__":
    main()
