"""Does credit by attention help a policy learn? Anchored, coupled, random and no multipliers on a task of copying.

python benchmarks/token_credit.py. A decoder of two layers reads six digits with noise between them and writes the
digits alone; its reward is 1 if all six are right. Taught a little by examples, it goes on by GRPO with the clipped
objective, the advantages of its tokens multiplied as its own attention says (arXiv 2510.13554), or by the same
multipliers shuffled over the response, or not at all. Printed is the mean reward over the last updates, for each seed.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.lens.measures.anchors import multipliers, rhythm
from attnlab.lens.tap import Subscriber, join
from attnlab.lens.toys.network import small_decoder
from attnlab.models.skeletons.decoder import Decoder
from attnlab.recipes.token_credit import clipped_loss, group_advantages

DIGITS, NOISE, COUNT, LENGTH = 10, 6, 6, 12
START = DIGITS + NOISE
MODES = ("none", "random", "anchor", "coupled")


def prompts(size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """`(size, LENGTH + 1)`: six digits, in order, among noise, and a sign to start; and the digits `(size, 6)`."""
    places = torch.rand(size, LENGTH, generator=rng).argsort(1)[:, :COUNT].sort(1).values
    digits = torch.rand(size, DIGITS, generator=rng).argsort(1)[:, :COUNT]
    ids = torch.randint(DIGITS, START, (size, LENGTH), generator=rng).scatter(1, places, digits)
    return F.pad(ids, (0, 1), value=START), digits


def taught(steps: int, seed: int) -> Decoder:
    """A policy that has seen some examples."""
    model = small_decoder(START + 1, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        ids, digits = prompts(48, rng)
        logits = model(torch.cat((ids, digits[:, :-1]), 1))[:, LENGTH:]
        loss = F.cross_entropy(logits.flatten(0, 1), digits.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


class Maps(Subscriber):
    """The maps `(B, heads of all layers, N, N)` of a pass."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def after(self, event, out) -> None:
        self.layers.append(event.weights())


def gammas(model: Decoder, ids: Tensor, mode: str, rng: torch.Generator) -> Tensor | None:
    """The multipliers `(B, 6)` of all responses."""
    if mode == "none":
        return None
    leave = join(model, watch := Maps())
    with torch.no_grad():
        model(ids)
    leave()
    found = []
    for maps in torch.cat(watch.layers, 1):
        heard = rhythm(maps, LENGTH + 1, lo=1, hi=COUNT)
        gamma = multipliers(heard.waad, heard.fai, "anchor" if mode == "random" else mode)
        found.append(gamma[torch.randperm(COUNT, generator=rng)] if mode == "random" else gamma)
    return torch.stack(found)


def train(model: Decoder, mode: str, updates: int, seed: int, *, group: int = 8, count: int = 6) -> list[float]:
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    rewards = []
    for _ in range(updates):
        ids, digits = (t.repeat_interleave(group, 0) for t in prompts(count, rng))
        text = model.generate(ids, COUNT, generator=rng)
        answer = text[:, LENGTH + 1 :]
        reward = (answer == digits).all(1).float()
        rewards.append(reward.mean().item())
        gamma = gammas(model, text, mode, rng)
        advantages = group_advantages(reward.view(count, group)).flatten()
        old = None
        for _ in range(2):
            logits = model(text[:, :-1])[:, LENGTH:]
            logp = logits.log_softmax(-1).gather(2, answer[..., None])[..., 0]
            old = logp.detach() if old is None else old
            loss = clipped_loss(logp, old, advantages, torch.ones_like(answer, dtype=torch.bool), multipliers=gamma)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--teach", type=int, default=220)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'':10s}{'reward of the last fifth, per seed':40s}{'mean over all updates':>22s}")
    for mode in MODES:
        last, whole = [], []
        for seed in range(arguments.seeds):
            rewards = train(taught(arguments.teach, seed), mode, arguments.updates, seed)
            last.append(sum(rewards[-len(rewards) // 5 :]) / max(1, len(rewards[-len(rewards) // 5 :])))
            whole.append(sum(rewards) / len(rewards))
        each = ", ".join(f"{r:.2f}" for r in last)
        print(f"{mode:10s}{each:40s}{sum(whole) / len(whole):22.3f}", flush=True)


if __name__ == "__main__":
    main()
