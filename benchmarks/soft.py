"""What SOFT gives away and what it saves: Gaussian attention through landmarks beside the full matrix, and its time.

    python benchmarks/soft.py [--sides 32 48 64 96] [--seconds 1]

Prints, on 2×2 patches of scikit-learn's digits, how far the eigenvalues of the factored matrix lie from those of the
full Gaussian matrix, for several numbers of landmarks; then the time of a forward pass of SOFT attention with 64
landmarks beside softmax attention of as many heads, for several lengths.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from torch import Tensor

from attnlab.nn.linear.soft import SoftAttention, gaussian, newton_inverse
from attnlab.nn.multihead import MultiHead


def patches() -> Tensor:
    """The 256 patches of 16 digits, of 4 pixels each, of mean 0 and deviation 1."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images[:16], dtype=torch.float64)
    tokens = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 4)
    return ((tokens - tokens.mean()) / tokens.std())[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64, 96], help="of the map, multiples of 8")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokens = patches()
    whole = gaussian(tokens, tokens)
    values = torch.linalg.eigvalsh(whole)
    print(f"{tokens.shape[1]} patches; error of the eigenvalues, relative to their norm:")
    for m in (4, 16, 64, 128):
        # Landmarks are means of neighbouring tokens, as an untrained convolution makes them.
        marks = tokens.unflatten(1, (m, -1)).mean(2)
        outer = gaussian(tokens, marks)
        found = torch.linalg.eigvalsh(outer @ newton_inverse(gaussian(marks, marks)) @ outer.mT)
        print(f"  m = {m:>3}: {((found - values).norm() / values.norm()).item():.3f}")
    print(f"{'tokens':>7} {'SOFT, m = 64':>13} {'softmax':>10}")
    for side in options.sides:
        length = side * side
        soft, full = SoftAttention(64, heads=2, ratio=side // 8), MultiHead(64, heads=2, bias=True)
        x, best = torch.randn(1, length, 64), [float("inf")] * 2
        calls = (partial(soft, x, grid=(side, side)), partial(full, x))
        begin = time.perf_counter()
        with torch.inference_mode():
            while time.perf_counter() - begin < options.seconds:
                for i, call in enumerate(calls):
                    start = time.perf_counter()
                    call()
                    best[i] = min(best[i], time.perf_counter() - start)
        print(f"{length:>7} {1e3 * best[0]:>10.1f} ms {1e3 * best[1]:>7.1f} ms   {best[1] / best[0]:.1f}×", flush=True)


if __name__ == "__main__":
    main()
