"""How many heads a token needs: python benchmarks/moh_digits.py [--steps 200]

The same small vision transformer learns scikit-learn's digits with all heads, and with mixtures in which each token
uses a part of them (arXiv 2410.11842: 50 to 90 percent of the heads lose nothing). Printed: the share of heads used,
the accuracy on the last third, and how often the most popular routed head is picked, where 100 % is all tokens.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from attnlab.models.skeletons.plain import Plain
from attnlab.nn.softmax.mixture_of_heads import HeadRouter
from attnlab.recipes.moh import balanced

HEADS = 8
VARIANTS: dict[str, tuple[str, dict]] = {
    "all heads": ("multihead", {}),
    "7 of 8": ("mixture_of_heads", dict(shared=4, routed=3)),
    "6 of 8": ("mixture_of_heads", dict(shared=4, routed=2)),
    "4 of 8": ("mixture_of_heads", dict(shared=2, routed=2)),
    "4 of 8, none shared": ("mixture_of_heads", dict(shared=0, routed=4)),
    "2 of 8": ("mixture_of_heads", dict(shared=1, routed=1)),
}


def run(mixer: str, options: dict, steps: int, seed: int) -> tuple[float, float]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels, split = torch.tensor(digits.target), len(digits.target) * 2 // 3
    torch.manual_seed(seed)
    model = Plain(
        dim=48, depth=2, mixer=mixer, mixer_options={"heads": HEADS, **options}, image=8, patch=2, in_channels=1,
        num_classes=10, class_token=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 20, 0.05 + 2 * (1 - step / steps))
        rows = torch.randint(split, (64,))
        with balanced(model) as balance:
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            if balance.losses:
                loss = loss + 0.01 * balance.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    used: list[float] = []

    def count(router: HeadRouter, _: object, gates: torch.Tensor) -> None:
        used.append((gates[..., router.shared :] > 0).float().mean((0, 1)).max().item())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, HeadRouter)]
    with torch.no_grad():
        accuracy = (model(images[split:]).argmax(-1) == labels[split:]).float().mean().item()
    for hook in hooks:
        hook.remove()
    return accuracy, float(np.mean(used)) if used else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{'heads per token':22s}{'share':>8s}{'accuracy':>18s}{'most popular':>14s}")
    for name, (mixer, options) in VARIANTS.items():
        rows = np.array([run(mixer, options, arguments.steps, seed) for seed in range(arguments.seeds)])
        share = (options["shared"] + options["routed"]) / HEADS if options else 1.0
        accuracy = f"{rows[:, 0].mean():.1%} ± {rows[:, 0].std():.1%}"
        print(f"{name:22s}{share:8.0%}{accuracy:>18s}{rows[:, 1].mean():14.0%}", flush=True)


if __name__ == "__main__":
    main()
