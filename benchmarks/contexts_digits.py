"""Does longer context help? (arXiv 2302.06218): python benchmarks/contexts_digits.py [--contexts 64,256]

The same small classifier (two blocks of a sequence mixer and an MLP) reads handwritten digits pixel by pixel, of the
8×8 pictures enlarged to as many pixels as the context holds, or, with `--cut`, only the first so many pixels of the
largest. Accuracy on held-out digits, for each mixer and context.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from attnlab.scale.unified import MIXERS, mixer


class Classifier(nn.Module):
    def __init__(self, name: str, dim: int, length: int) -> None:
        super().__init__()
        self.stem, self.places = nn.Linear(1, dim), nn.Parameter(0.02 * torch.randn(length, dim))
        self.mixers = nn.ModuleList(mixer(name, dim, length) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(2)
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels.unsqueeze(-1)) + self.places
        for i, (mix, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            mixed = mix(self.norms[2 * i](x))
            x = x + mixed / mixed.detach().std().clamp_min(1)  # unnormalised transforms grow with the length
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


def accuracy(name: str, context: int, largest: int, steps: int, cut: bool) -> float:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    side = round((largest if cut else context) ** 0.5)
    x = F.interpolate(x, (side, side), mode="bilinear").flatten(1)[:, :context]
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    model = Classifier(name, 32, context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 20, 0.05 + 1.5 * (1 - step / steps))
        some = train[torch.randint(len(train), (32,))]
        loss = F.cross_entropy(model(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = [(model(x[part]).argmax(-1) == y[part]).float().sum() for part in test.split(64)]
    return float(sum(right) / len(test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="16,64,256")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--mixers", default=",".join(MIXERS))
    parser.add_argument("--cut", action="store_true", help="less context is less of the picture")
    arguments = parser.parse_args()
    contexts = [int(n) for n in arguments.contexts.split(",")]
    print(f"accuracy after {arguments.steps} steps of 32 digits" + (", pictures cut" if arguments.cut else ""))
    print(f"{'mixer':18}" + "".join(f"{n:>8}" for n in contexts))
    for name in arguments.mixers.split(","):
        found = [accuracy(name, n, max(contexts), arguments.steps, arguments.cut) for n in contexts]
        print(f"{name:18}" + "".join(f"{a:8.1%}" for a in found), flush=True)


if __name__ == "__main__":
    main()
