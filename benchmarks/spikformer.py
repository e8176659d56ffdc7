"""Digits by spikes: accuracy, how often neurons fire, and what event-driven hardware would add, beside ReLU.

The twin is the same network with ReLU in place of every neuron and one step. Its layers' multiply-adds are compared
with the additions that spikes make: each layer's multiply-adds times the share of its inputs that is not 0. Then the
same spiking network, pre-trained by masked patches for one step, and trained with a part of the labels.

    OMP_NUM_THREADS=1 python benchmarks/spikformer.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from attnlab.models.vision.spikformer import Spikformer
from attnlab.nn.spiking.activity import watched
from attnlab.nn.spiking.lif import LIF
from attnlab.recipes.masked_spikes import MaskedSpikes

TRAIN = 1400


def digits(size: int = 32) -> tuple[Tensor, Tensor]:
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    x = interpolate(x, (size, size), mode="bilinear")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], torch.tensor(data.target)[order]


def network(*, steps: int, dim: int = 64) -> Spikformer:
    return Spikformer(dim=dim, depth=2, heads=4, mlp_ratio=2, steps=steps, in_channels=1, num_classes=10)


def twin(net: nn.Module) -> nn.Module:
    """`net` with ReLU in place of its neurons, in place."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, LIF):
                setattr(module, name, nn.ReLU())
    return net


def train(net: nn.Module, x: Tensor, y: Tensor, *, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    net.train()
    for _ in range(steps):
        batch = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    net.eval()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (net(x).argmax(-1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=250)
    steps = parser.parse_args().steps
    x, y = digits()
    seen, held = (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])
    print(f"{'network':24} {'accuracy':>9} {'firing':>7} {'additions':>10} {'multiply-adds':>14}   per image")
    for name, shown, relu in (("spikes, T = 4", 4, False), ("spikes, T = 1", 1, False), ("ReLU", 1, True)):
        torch.manual_seed(0)
        net: nn.Module = network(steps=shown)
        net = twin(net) if relu else net
        train(net, *seen, steps=steps)
        with watched(net) as work:
            right = accuracy(net, *held)
        # What ReLU's layers do are multiplications, whether their inputs are sparse or not.
        adds = "" if relu else f"{work.synaptic / len(held[0]):,.0f}"
        rate = "" if relu else f"{work.rate:.3f}"
        print(f"{name:24} {right:9.3f} {rate:>7} {adds:>10} {work.dense / len(held[0]):14,.0f}", flush=True)
    few = slice(0, 100)
    for pretrained in (False, True):
        torch.manual_seed(0)
        net = network(steps=1)
        if pretrained:
            module = MaskedSpikes(net, ratio=0.5, image=32, dim=32, depth=1, heads=4)
            optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
            generator = torch.Generator().manual_seed(0)
            for _ in range(steps):
                batch = torch.randint(TRAIN, (32,), generator=generator)
                optimizer.zero_grad()
                module(x[batch], generator=generator).loss.backward()
                optimizer.step()
        train(net, x[few], y[few], steps=steps // 2)
        name = f"100 labels, {'masked first' if pretrained else 'from scratch'}"
        print(f"{name:24} {accuracy(net, *held):9.3f}", flush=True)


if __name__ == "__main__":
    main()
