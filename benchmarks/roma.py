"""RoMA beside a vision transformer of its width as images grow, and which window of a picture it would turn.

    python benchmarks/roma.py [--sizes 256,512,1024] [--seconds 3] [--threads 1]

Prints the shortest time of a forward pass of each on CPU and the transformer's time over RoMA's (above 1, RoMA is
faster), then the score of each patch of a photo (scikit-image's astronaut), with the chosen window in brackets.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

import attnlab
from attnlab.recipes.adaptive_rotation import choose_window, texture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,512,1024")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in map(int, options.sizes.split(",")):
        x = torch.randn(1, 3, size, size)
        nets = [attnlab.build("roma_tiny").eval(), attnlab.build("vit_tiny_patch16_224", image=size).eval()]
        best, begin = [float("inf")] * 2, time.perf_counter()
        with torch.inference_mode():
            while time.perf_counter() - begin < options.seconds:
                for i, net in enumerate(nets):
                    start = time.perf_counter()
                    net(x)
                    best[i] = min(best[i], time.perf_counter() - start)
        print(f"{size}²: RoMA {1e3 * best[0]:.0f} ms, ViT {1e3 * best[1]:.0f} ms, ratio {best[1] / best[0]:.2f}")

    from skimage.data import astronaut

    photo = F.interpolate(torch.tensor(astronaut()).permute(2, 0, 1)[None] / 255, 192, mode="area")[0]
    scores = texture(photo)
    top, left, side = choose_window(scores)
    for row, values in enumerate(scores.tolist()):
        cells = []
        for column, value in enumerate(values):
            inside = top <= row < top + side and left <= column < left + side
            cells.append(f"[{value:.2f}]" if inside else f" {value:.2f} ")
        print("".join(cells))


if __name__ == "__main__":
    main()
