"""What makes an attention sink and what unmakes it, on a task that leaves attention idle.

python benchmarks/sink_emergence.py. The task is `attnlab.lens.toys.backcopy`: attention is needed after three of 32
symbols, and a text may begin with a token of its own. A model of one layer and one head (64 wide, no feed-forward)
learns it with softmax attention, with a learned slot, and with other weights, normalised or not (arXiv 2410.10781).
Printed are the loss, the mean importance of the first token and of the slot, on raw weights and on shares of rows, the
rate of heads with a sink, and the norm of the first token's value beside the average.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from attnlab.lens.sinks import measure_sinks
from attnlab.lens.toys.backcopy import Backcopy
from attnlab.models.language.sinks import SinkLM

VARIANTS: dict[str, dict] = {
    "softmax": dict(),
    "K bias": dict(mixer="kv_bias", mixer_options=dict(value=False)),
    "KV bias": dict(mixer="kv_bias"),
    "V bias": dict(mixer="kv_bias", mixer_options=dict(key=False)),
    "sigmoid, normalised": dict(mixer="similarity", mixer_options=dict(normalise=True)),
    "sigmoid": dict(mixer="similarity"),
    "elu": dict(mixer="similarity", mixer_options=dict(similarity="elu")),
}


def train(task: Backcopy, variant: dict, *, steps: int, seed: int = 0, lr: float = 1e-2) -> tuple[SinkLM, float]:
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    # No feed-forward: it would undo what an idle head writes.
    model = SinkLM(vocabulary=task.vocabulary, dim=64, depth=1, heads=1, ffn="none", **variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    last = []
    for step in range(steps):
        ids, _ = task.batch(32, rng)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 0.95 * steps:
            last.append(loss.item())
    return model.eval(), sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    print(f"{'':40s}{'loss':>8s}{'raw first':>11s}{'raw slot':>10s}{'share first':>13s}{'sinks':>8s}{'|v| first':>11s}")
    for first in (True, False):
        task = Backcopy(first=first)
        for name in arguments.variants:
            model, loss = train(task, VARIANTS[name], steps=arguments.steps)
            ids, _ = task.batch(128, torch.Generator().manual_seed(99))
            raw, shares = (measure_sinks(model, ids[:, :-1], shares=s) for s in (False, True))
            at = raw.importance.shape[-1] - task.length  # where the slot is in the way
            slot = f"{raw.importance[0, 0, 0].item():10.3f}" if at else f"{'':10s}"
            value = (raw.values[0, at] / raw.values[0, at:].mean()).item()
            one, other = (s.importance[0, 0, at].item() for s in (raw, shares))
            title = name + (", first token fixed" if first else "")
            print(
                f"{title:40s}{loss:8.3f}{one:11.3f}{slot}{other:13.3f}{raw.rate[at].item():7.0f}%{value:11.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
