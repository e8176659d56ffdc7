"""Our image backbones beside the same ones in timm: inference and training on CPU, in one run, in turns.

    python benchmarks/backbones.py [--threads 2] [--seconds 3] [--image 224,448] [--batch 1,8] [--only volo_d1]

Prints the shortest time of each and timm's time over ours (above 1, ours is faster), and the geometric means.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import attnlab
from attnlab.torchvision_schemas import declare


def load_timm() -> Any:
    """timm, or the reason why it is absent, as text.

    timm imports torchvision, whose compiled operators do not load beside a CPU build of torch; the two schemas that its
    import asks for are enough for timm.
    """
    try:
        declare()
        import timm
    except ImportError as error:
        return str(error)
    return timm


def timm_eca_resnet50(timm: Any) -> nn.Module:
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, (3, 4, 6, 3), block_args={"attn_layer": "eca"})


PAIRS: dict[str, Callable[[Any], nn.Module]] = {
    "focalnet_tiny_srf": lambda timm: timm.create_model("focalnet_tiny_srf"),
    "focalnet_tiny_lrf": lambda timm: timm.create_model("focalnet_tiny_lrf"),
    "eca_resnet50": timm_eca_resnet50,
    "deit_small_patch16_224": lambda timm: timm.create_model("deit_small_patch16_224"),
    "volo_d1": lambda timm: timm.create_model("volo_d1_224"),
    "haloregnetz_b": lambda timm: timm.create_model("haloregnetz_b"),
    "convit_small": lambda timm: timm.create_model("convit_small"),
    "shvit_s1": lambda timm: timm.create_model("shvit_s1"),
    "maxvit_tiny": lambda timm: timm.create_model("maxvit_tiny_tf_224"),
    "mambaout_tiny": lambda timm: timm.create_model("mambaout_tiny"),
    "davit_tiny": lambda timm: timm.create_model("davit_tiny"),
    "gcvit_xxtiny": lambda timm: timm.create_model("gcvit_xxtiny"),
}


def in_turns(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """The shortest time of each call in milliseconds; they take turns, so that a busy moment hits all of them."""
    shortest = [float("inf")] * len(calls)
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begin < seconds:  # the first round warms up
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if rounds:
                shortest[i] = min(shortest[i], time.perf_counter() - start)
        rounds += 1
    return [1e3 * s for s in shortest]


def infer(net: nn.Module, batch: int, size: int) -> Callable[[], object]:
    x = torch.randn(batch, 3, size, size)

    def call() -> None:
        net.eval()
        with torch.no_grad():  # what a peer keeps here must still be good for training
            net(x)

    return call


def train(net: nn.Module, batch: int, size: int) -> Callable[[], object]:
    x = torch.randn(batch, 3, size, size)

    def call() -> None:
        net.train()
        net.zero_grad()
        out = net(x)
        logits = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor)]
        torch.stack([o.logsumexp(-1).sum() for o in logits]).sum().backward()

    return call


WORKS = {"inference": infer, "training": train}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison, and three rounds at least")
    parser.add_argument("--image", type=numbers, default=[224])
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--only", help="the name of one backbone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timm = load_timm()
    if isinstance(timm, str):
        print(f"timm is absent ({timm}): only our own times")
    print(f"{'backbone':<24} {'work':<26} {'ours':>9} {'timm':>9}   timm / ours")
    ratios: dict[str, list[float]] = {}
    for (name, peer), size in itertools.product(PAIRS.items(), options.image):
        if options.only not in (None, name):
            continue
        try:
            nets = [attnlab.build(name)] + ([] if isinstance(timm, str) else [peer(timm)])
            for (work, make), batch in itertools.product(WORKS.items(), options.batch):
                times = in_turns([make(net, batch, size) for net in nets], options.seconds)
                theirs = f"{times[1]:>6.0f} ms   {times[1] / times[0]:.2f}×" if len(times) > 1 else "  absent"
                print(f"{name:<24} {f'{work}, {size}², batch {batch}':<26} {times[0]:>6.0f} ms {theirs}", flush=True)
                if len(times) > 1:
                    ratios.setdefault(work, []).append(times[1] / times[0])
        except (ValueError, AssertionError) as error:  # a size that one of the two does not take
            print(f"{name:<24} {size}²: {str(error)[:80]}", flush=True)
    for work, found in ratios.items():
        print(f"{work}: geometric mean {statistics.geometric_mean(found):.2f}×, least {min(found):.2f}×")


if __name__ == "__main__":
    main()
