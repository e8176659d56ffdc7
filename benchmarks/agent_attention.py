"""Agent attention beside softmax and linear attention: CPU time against tokens, and what its matrix can be.

    python benchmarks/agent_attention.py [--threads 2] [--repeats 20]

First: inference time at width 192 with 3 heads on grids from 14×14 to 56×56, and softmax's time over agent's. Then, for
the same queries and keys (patches of a photograph), the N×N matrix that agents imply: its rank, and its distance from
softmax's beside that of the best matrix of the same rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from backbones import in_turns
from torch import Tensor, nn

from attnlab.nn.linear.linear_attention import LinearAttention
from attnlab.nn.multihead import MultiHead
from attnlab.nn.tokens.agent import AgentAttention

DIM, HEADS = 192, 3


def infer(module: nn.Module, x: Tensor, **keywords: Any) -> Callable[[], object]:
    def call() -> None:
        with torch.inference_mode():
            module(x, **keywords)

    return call


def times(repeats: int) -> None:
    print(f"{'tokens':>6} {'softmax':>10} {'agent, 49':>10} {'agent, 9':>10} {'linear':>10}   softmax / agent, 49")
    for side in (14, 28, 42, 56):
        x, grid = torch.randn(1, side * side, DIM), (side, side)
        modules = (
            MultiHead(DIM, heads=HEADS, bias=True),
            AgentAttention(DIM, heads=HEADS, agents=49, grid=grid),
            AgentAttention(DIM, heads=HEADS, agents=9, grid=grid),
            LinearAttention(DIM, heads=HEADS),
        )
        found = in_turns([infer(m, x, grid=grid) for m in modules], repeats)
        print(f"{side * side:>6} " + " ".join(f"{t:>7.2f} ms" for t in found) + f"   {found[0] / found[1]:.2f}×")


def patches() -> Tensor:
    """14×14 patches of scikit-image's astronaut as tokens of width 192, normed."""
    from skimage.data import astronaut

    image = torch.tensor(astronaut(), dtype=torch.float64).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, size=(112, 112), mode="area")
    return F.layer_norm(F.unfold(image, 8, stride=8).transpose(1, 2), (DIM,))


def rank(matrix: Tensor) -> int:
    """The largest rank of any head."""
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9).max())


def matrices() -> None:
    x, grid = patches(), (14, 14)
    print("\nagents   rank of the N×N matrix (N = 196)   distance from softmax's   best of that rank")
    for agents in (4, 9, 16, 49, 196):
        torch.manual_seed(0)
        module = AgentAttention(DIM, heads=HEADS, agents=agents, grid=grid).double()
        with torch.no_grad():
            for table in (*module.aggregate.parameters(), *module.broadcast.parameters()):
                table.zero_()
            module.wqkv.weight.mul_(3)  # as sharp as trained attention is
            broadcast, aggregate = module.factors(x, grid=grid)
            q, k, _ = module.wqkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            softmax = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            implied = broadcast @ aggregate
            spectrum = torch.linalg.svdvals(softmax)
        distance = (implied - softmax).norm() / softmax.norm()
        best = spectrum[..., agents:].norm() / spectrum.norm()
        print(f"{agents:>6} {rank(implied):>35} {distance:>25.3f} {best:>19.3f}")
    print(f"softmax {rank(softmax):>34}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times(options.repeats)
    matrices()


if __name__ == "__main__":
    main()
