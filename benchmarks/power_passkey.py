"""How far a passkey travels: PowerAttention against a window of the same price: python benchmarks/power_passkey.py

A small decoder of `depth` layers reads filler tokens among which one token, announced by a marker, is the key; at the
end it is asked for the key. PowerAttention with blocks of one token sees keys at distance 0, 1, 2, 4, …; the window
sees as many of the last tokens. Printed is the accuracy by the key's distance. A window of w tokens cannot bring the
key further than depth · (w − 1); powers of two reach every distance D in popcount(D) layers (arXiv 2503.03588).
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.models.skeletons.decoder import Decoder
from attnlab.patterns import PowersOfTwo

KEYS, MARK, ASK, FILL = 16, 16, 17, 18  # keys are 0 to 15
VOCABULARY, BATCH = 22, 32


def texts(count: int, length: int, distance: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts (count, length) that end with the question, and the keys; a key stands `distance` before the question."""
    ids = torch.randint(FILL, VOCABULARY, (count, length), generator=rng)
    keys = torch.randint(0, KEYS, (count,), generator=rng)
    row, at = torch.arange(count), length - 1 - distance
    ids[row, at] = keys
    ids[row, at - 1] = MARK
    ids[:, -1] = ASK
    return ids, keys


def run(name: str, options: dict, *, depth: int, length: int, steps: int, seed: int) -> list[float]:
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = Decoder(vocabulary=VOCABULARY, dim=48, depth=depth, heads=4, mixer=name, mixer_options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50, 4 * (1 - step / steps))
        # Near keys first: the reach grows over the first half of the training.
        reach = max(4, int((length - 2) * min(1.0, 2 * step / steps)))
        distance = torch.randint(1, reach, (BATCH,), generator=rng)
        ids, keys = texts(BATCH, length, distance, rng)
        loss = F.cross_entropy(model(ids, last=True)[:, 0], keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    accuracy = []
    with torch.no_grad():
        for low, high in bands(length):
            distance = torch.randint(low, high, (256,), generator=rng)
            ids, keys = texts(256, length, distance, rng)
            accuracy.append((model(ids, last=True)[:, 0].argmax(-1) == keys).float().mean().item())
    return accuracy


def bands(length: int) -> list[tuple[int, int]]:
    edges = [1, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512]
    kept = [e for e in edges if e < length - 1] + [length - 1]
    return list(pairwise(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    a = parser.parse_args()
    price = int(PowersOfTwo(block=1, window=1, sinks=0).matrix(a.length).sum(-1).max())
    kinds = {
        "power": ("power", dict(block=1, window=1, sinks=0)),
        f"window {price}": ("sliding_window", dict(window=price, sinks=0)),
    }
    print(f"{price} keys a query in both; {a.depth} layers: the window ends at distance {a.depth * (price - 1)}")
    print(f"{'distance':12s}" + "".join(f"{f'{low}-{high - 1}':>10s}" for low, high in bands(a.length)))
    for name, (mixer, options) in kinds.items():
        runs = [
            run(mixer, options, depth=a.depth, length=a.length, steps=a.steps, seed=seed) for seed in range(a.seeds)
        ]
        mean = torch.tensor(runs).mean(0).tolist()
        print(f"{name:12s}" + "".join(f"{m:10.1%}" for m in mean), flush=True)


if __name__ == "__main__":
    main()
