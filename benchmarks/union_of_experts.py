"""What choosing heads and slices costs and saves: python benchmarks/union_of_experts.py [--steps 300] [--seeds 2]

Union of Experts (arXiv 2503.02495) reports 2.38 points of perplexity less than the best mixture of experts, at 76 % of
its FLOPs. Trains its language model on the Python library's sources, byte by byte, with all heads and slices for every
token, a half and a quarter of them; and, as controls at the cost of a half, with gates that learn straight through, and
with the same half for all tokens, which is a narrow network. Prints FLOPs of a forward against all, as computed before
training (each head and slice computes as many tokens as the busiest, so uneven choices cost more than their number
says), and perplexity per byte on held-out modules. After 300 steps, one seed: all 10.88, a half 10.40 at 0.88 of the
FLOPs, a quarter 11.77 at 0.62; but the same half for all tokens 8.72, so that at this size what helps is having less
that pulls at each token, not the choice. Where much is to be remembered the choice pays: see the test of `UnionMLP`.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnlab.arena.tasks.text import Text
from attnlab.cost import count_flops
from attnlab.models.language.uoe import UnionLM

SEGMENT, BATCH = 64, 16
# Heads of 8 and slices of 8 that a token chooses; whether gates learn; whether all tokens choose alike.
KINDS: dict[str, tuple[int, bool, bool]] = {
    "all": (8, False, False),
    "a half": (4, False, False),
    "a quarter": (2, False, False),
    "a half, gates learn": (4, True, False),
    "the same half": (4, False, True),
}


def build(kind: str) -> UnionLM:
    active, learned, alike = KINDS[kind]
    model = UnionLM(
        vocabulary=256, dim=128, depth=3, heads=8, hidden=512, active=active, experts=8, active_experts=active,
        reach=2 * SEGMENT, memory=SEGMENT, straight_through=learned,
    )  # fmt: skip
    if alike:
        blocks: list[Any] = list(model.blocks)
        for block in blocks:
            for gate in (block.mixer.gate, block.mlp.gate):
                nn.init.zeros_(gate.linear.weight)
                gate.linear.bias.data = -torch.arange(8.0)
    return model


def streams(source: np.ndarray, count: int, segments: int, seed: int) -> Tensor:
    """Texts side by side, (count, segments, SEGMENT + 1); each segment's last byte is the next one's first."""
    length = segments * SEGMENT
    starts = np.random.default_rng(seed).integers(0, len(source) - length - 1, count)
    texts = torch.from_numpy(source[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    return texts.unfold(1, SEGMENT + 1, SEGMENT)


def perplexity(kind: str, task: Text, steps: int, seed: int) -> float:
    torch.manual_seed(seed)
    model, texts = build(kind), streams(task.train, BATCH, steps, seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, betas=(0.9, 0.95))
    state = model.initial_state(BATCH)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 30, 0.1 + 1.8 * (1 - step / steps))
        ids = texts[:, step]
        loss = model.loss(ids[:, :-1], ids[:, 1:], state).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    held_out = streams(task.held_out, 64, 6, 99)
    with torch.no_grad():
        state, losses = model.initial_state(64), []
        for ids in held_out.unbind(1):
            losses.append(model.loss(ids[:, :-1], ids[:, 1:], state).mean())
    return float(torch.stack(losses[1:]).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    arguments, task = parser.parse_args(), Text()
    ids = streams(task.held_out, BATCH, 1, 0)[:, 0, :-1]
    print(f"{arguments.steps} steps of {BATCH} segments of {SEGMENT} bytes, 3 layers of 128, 8 heads and 8 slices")
    print(f"{'':22}{'FLOPs':>8}{'perplexity':>18}")
    whole = count_flops(build("all").features, ids)
    for kind in KINDS:
        found = [perplexity(kind, task, arguments.steps, seed) for seed in range(arguments.seeds)]
        share = count_flops(build(kind).features, ids) / whole
        print(f"{kind:22}{share:8.2f}{np.mean(found):10.2f} ± {np.std(found):.2f}", flush=True)


if __name__ == "__main__":
    main()
