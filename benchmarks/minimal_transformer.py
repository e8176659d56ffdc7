"""How much of a transformer does a small task need? Handwritten digits, one part after the other left out.

    python benchmarks/minimal_transformer.py [--epochs 40] [--depth 4]

scikit-learn's 1,797 digits (8 × 8, patches of 2 × 2), 1,297 to train; Q is the over-determination ratio.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from attnlab.models.vision.minimal import MinimalTransformer, overdetermination

VARIANTS = {
    "full": dict(mlp=True, similarity="full", values="full"),
    "full, 4 heads": dict(mlp=True, similarity="full", values="full", heads=4),
    "no MLP": dict(similarity="full", values="full"),
    "no MLP, shared Wq = Wk": dict(similarity="shared", values="full"),
    "no MLP, collapsed Wqk": dict(similarity="collapsed", values="full"),
    "minimum": dict(similarity="collapsed", values="none"),
    "minimum, symmetric": dict(similarity="cholesky", values="none"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--dim", type=int, default=32)
    given = parser.parse_args()
    digits = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1) / 8 - 1
    y = torch.tensor(digits.target)[order]
    train, test = slice(0, 1297), slice(1297, None)
    print(f"{'':24s} parameters     Q   loss: train   test   gap   accuracy: train   test")
    for name, switches in VARIANTS.items():
        torch.manual_seed(0)
        net = MinimalTransformer(
            dim=given.dim, depth=given.depth, image=8, patch=2, in_channels=1, num_classes=10, **switches
        )
        count = sum(p.numel() for p in net.parameters())
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for epoch in range(given.epochs):
            for batch in torch.randperm(1297, generator=torch.Generator().manual_seed(epoch)).split(64):
                optimizer.zero_grad()
                cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            logits = net(x)
        losses = [cross_entropy(logits[part], y[part]).item() for part in (train, test)]
        right = [(logits[part].argmax(1) == y[part]).float().mean().item() for part in (train, test)]
        ratio = overdetermination(1297, 10, count)
        print(
            f"{name:24s} {count:10,d} {ratio:5.2f}   {losses[0]:11.3f} {losses[1]:6.3f} {losses[1] - losses[0]:5.3f}   "
            f"{right[0]:15.1%} {right[1]:6.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
