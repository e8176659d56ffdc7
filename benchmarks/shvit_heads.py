"""Why one head: how alike the heads of a trained transformer look, and what one over a fifth of the channels saves.

    python benchmarks/shvit_heads.py [--steps 400] [--seconds 2]

Prints the mean cosine similarity between the attention maps of different heads in each layer of a small vision
transformer trained on scikit-learn's digits (beside the same before training), then the time of single-head attention
and of attention with many heads on a map of 14×14, forward, in one run and in turns.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.vit import ViT
from attnlab.nn.conv_norm import fold_norms
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.single_head import SingleHeadAttention


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(found.target)


def alike(net: ViT, images: Tensor) -> list[float]:
    """For each layer, the cosine between the attention maps of two of its heads, averaged over pairs and images."""
    tokens, grid = net.embed(images)
    found = []
    for block in net.encoder.blocks:
        maps = F.normalize(block.mixer.weights(block.norm1(tokens)).flatten(2), dim=-1)
        pairs = maps @ maps.mT
        heads = pairs.shape[1]
        found.append(((pairs.sum((1, 2)) - heads) / (heads * (heads - 1))).mean().item())
        tokens = block(tokens, grid=grid)
    return found


def shortest(calls: list[nn.Module], inputs: list[Tensor], seconds: float) -> list[float]:
    best, begin = [float("inf")] * len(calls), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for i, (call, x) in enumerate(zip(calls, inputs, strict=True)):
            start = time.perf_counter()
            call(x)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images, labels = digits()
    net = ViT(dim=48, depth=4, heads=4, image=8, patch=2, in_channels=1, num_classes=10, class_token=False)
    with torch.no_grad():
        before = alike(net, images[:64])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(options.steps):
        at = torch.randint(360, len(images), (64,))
        loss = F.cross_entropy(net(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (net(images[:360]).argmax(-1) == labels[:360]).float().mean().item()
        after = alike(net, images[:64])
        print(f"digits, {accuracy:.1%} right; cosine between heads by layer, untrained → trained:")
        print("  " + "  ".join(f"{b:.2f} → {a:.2f}" for b, a in zip(before, after, strict=True)))
        for batch in (1, 8):
            x = torch.randn(batch, 224, 14, 14).contiguous(memory_format=torch.channels_last)
            single, many = SingleHeadAttention(224, width=48).eval(), MultiHead(224, heads=7).eval()
            fold_norms(single)
            ours, theirs = shortest([single, many], [x, x.permute(0, 2, 3, 1).flatten(1, 2)], options.seconds)
            print(
                f"224 channels, 14×14, batch {batch}: single head {1e3 * ours:.2f} ms, "
                f"7 heads {1e3 * theirs:.2f} ms: {theirs / ours:.1f}×"
            )


if __name__ == "__main__":
    main()
