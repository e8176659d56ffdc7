"""What the tap costs: a vision transformer and a Llama, with nothing open, an open tap, and one empty subscriber.

    python benchmarks/tapping.py [--threads 1] [--rounds 15]

An open tap to which nobody subscribes installs nothing. A subscriber that does nothing still has every call made an
event for it, and runs every module's hooks; subscribing and leaving install and remove these. The processor's time,
the least of rounds in turn; the claim is at most 5 % for a tap with nothing subscribed.
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

import attnlab
from attnlab import lens


def seconds(model: nn.Module, x: Tensor, around: AbstractContextManager[object], whole: bool) -> float:
    """Processor seconds of a pass within `around`, and with `whole` of what opens and closes that."""
    start = time.process_time()
    with around:
        begun = time.process_time()
        model(x)
        ended = time.process_time()
    return time.process_time() - start if whole else ended - begun


def in_turns(model: nn.Module, x: Tensor, rounds: int) -> list[float]:
    """The least processor seconds of each case, taken in turns so that a busy machine slows all alike."""
    best = [float("inf")] * 4
    for _ in range(rounds):
        nothing = lens.Subscriber()
        cases = [(nullcontext(), True), (lens.tap(model), True)]
        cases += [(lens.steer(model, nothing), False), (lens.steer(model, nothing), True)]
        for i, (around, whole) in enumerate(cases):
            best[i] = min(best[i], seconds(model, x, around, whole))
    return best


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    llama = attnlab.build("llama", vocabulary=256, dim=256, depth=8, heads=8, kv_heads=2, hidden=1024, length=512)
    models = {
        "vit_small_patch16_224, one image": (attnlab.build("vit_small_patch16_224"), torch.randn(1, 3, 224, 224)),
        "llama of 8 layers, 512 tokens": (llama, torch.randint(0, 256, (1, 512))),
        "the same, 1 token": (llama, torch.randint(0, 256, (1, 1))),
    }
    print(f"{'':<34}{'plain':>10}{'open tap':>17}{'a subscriber':>17}{'and subscribing':>18}")
    for name, (model, x) in models.items():
        plain, *others = in_turns(model.eval(), x, given.rounds)
        columns = "".join(f"{s * 1e3:>7.1f} ms {s / plain - 1:>+6.1%}" for s in others)
        print(f"{name:<34}{plain * 1e3:>7.1f} ms{columns}")


if __name__ == "__main__":
    main()
