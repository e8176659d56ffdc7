"""Infinite self-attention: time by length of both forms beside softmax, and how near the linear form's vector comes.

    python benchmarks/infsa.py [--lengths 256 512 1024 2048 4096] [--seconds 0.5]

Prints the time of a forward pass of 384 channels and 6 heads; then, for patches of scikit-learn's digits with their
places as tokens, the cosine between the linear form's centrality and the dominant eigenvector of the affinities, and
between that eigenvector and sums of walks of 1, 2 and 4 steps, which a stack of so many layers makes.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.lens.centrality import dominant, walks
from attnlab.nn.linear.infinite import InfiniteAttention, LinearInfiniteAttention, centrality
from attnlab.nn.multihead import MultiHead


def digit_tokens(images: int = 64) -> Tensor:
    """(images, 16, 6): 2×2 patches of digits and where they are, of mean 0 and deviation 1."""
    from sklearn.datasets import load_digits

    pictures = torch.tensor(load_digits().images[:images], dtype=torch.float64)
    patches = pictures.unfold(1, 2, 2).unfold(2, 2, 2).reshape(images, 16, 4)
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).to(patches).expand(images, -1, -1)
    tokens = torch.cat((patches, places), -1)
    return (tokens - tokens.mean((0, 1))) / tokens.std((0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    modules = [kind(384, heads=6, bias=True).eval() for kind in (LinearInfiniteAttention, InfiniteAttention, MultiHead)]
    print(f"{'tokens':>7} {'linear':>9} {'pure':>9} {'softmax':>9}")
    for length in options.lengths:
        x, best, begin = torch.randn(1, length, 384), [float("inf")] * 3, time.perf_counter()
        with torch.inference_mode():
            while time.perf_counter() - begin < options.seconds:
                for i, module in enumerate(modules):
                    start = time.perf_counter()
                    module(x)
                    best[i] = min(best[i], time.perf_counter() - start)
        print(f"{length:>7} " + " ".join(f"{1e3 * t:>6.1f} ms" for t in best), flush=True)
    tokens = digit_tokens()
    affinity = (tokens @ tokens.mT).relu()
    affinity = affinity / affinity.norm(dim=(1, 2), keepdim=True)
    vector = dominant(affinity, left=True)
    near = F.cosine_similarity(centrality(tokens, tokens), vector, -1).mean().item()
    print(f"cosine with the dominant eigenvector: linear form {near:.3f}", end="")
    for hops in (1, 2, 4):
        sums = torch.stack([walks(a, 0.95, hops=hops) for a in affinity]).sum(1)
        print(f", {hops} hops {F.cosine_similarity(sums, vector, -1).mean().item():.3f}", end="")
    print()


if __name__ == "__main__":
    main()
