"""Hulls and sorting by pointing: against a decoder with a fixed dictionary, and at more points than were trained.

    python benchmarks/ptrnet.py [--problem sort] [--steps 2500]

Both networks are trained on sets of 5 to 8 points, or numbers, and asked at 5, 8 and 10 (the dictionary's positions).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from attnlab.models.pointing.problems import convex_hull, judge_hulls, random_points
from attnlab.models.pointing.ptrnet import PointerNetwork, permutation, unused

MOST = 10


class Dictionary(PointerNetwork):
    """The same LSTMs with a linear layer to `MOST` positions and the end in the pointer's place."""

    def __init__(self, dim: int, in_channels: int) -> None:
        super().__init__(dim=dim, in_channels=in_channels)
        self.words = nn.Linear(dim, MOST + 1)

    def encode(self, points: Tensor):
        inputs, keys, state = super().encode(points)
        self.n = points.shape[1]
        return inputs, keys, state

    def _log_p(self, out: Tensor) -> Tensor:
        scores = self.words(out)
        return scores[..., [*range(self.n), MOST]].log_softmax(-1)

    def step(self, given, state, keys, allowed):
        out, (h, c) = self.decoder(given.unsqueeze(1), (state.h, state.c))
        log_p = self._log_p(out.squeeze(1))
        log_p = log_p if allowed is None else log_p.masked_fill(~allowed, -torch.inf)
        return log_p, type(state)(h, c)

    def forward(self, points, targets, *, allowed=None):
        inputs, _, state = self.encode(points)
        given = torch.cat((self.start.expand(len(points), 1, -1), self._given(inputs, targets[:, :-1])), 1)
        return self._log_p(self.decoder(given, (state.h, state.c))[0])


def sort(numbers: Tensor) -> Tensor:
    """The positions of the numbers (B, N, 1) in rising order, and the end."""
    order = numbers.squeeze(-1).argsort(1)
    return torch.cat((order, torch.full_like(order[:, :1], order.shape[1])), 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--problem", choices=("hull", "sort"), default="hull")
    given = parser.parse_args()
    hull = given.problem == "hull"
    axes, label, allowed = (2, convex_hull, unused) if hull else (1, sort, permutation)
    print(f"{'':12s} points  accuracy" + "  crossing  area of the hull" * hull)
    networks = {
        "pointer": lambda: PointerNetwork(dim=given.dim, in_channels=axes),
        "dictionary": lambda: Dictionary(given.dim, axes),
    }
    for name, build in networks.items():
        torch.manual_seed(0)
        net, generator = build(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=given.steps)
        for step in range(given.steps):
            points = random_points(128, 5 + step % 4, generator)[..., :axes]
            optimizer.zero_grad()
            net.loss(points, label(points)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 2.0)
            optimizer.step()
            schedule.step()
        for n in (5, 8, 10):
            points = random_points(300, n, torch.Generator().manual_seed(7))[..., :axes]
            found, wanted = net.decode(points, beam=2, allowed=allowed).positions, label(points)
            if not hull:
                print(f"{name:12s} {n:6d}  {(found == wanted).all(1).float().mean():8.1%}", flush=True)
                continue
            scores = judge_hulls(points, found, wanted)
            print(f"{name:12s} {n:6d}  {scores.accuracy:8.1%}  {scores.crossing:8.1%}  {scores.area:8.1%}", flush=True)


if __name__ == "__main__":
    main()
