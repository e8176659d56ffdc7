"""What papers claim of their attention in language models, on a small one: python benchmarks/language_claims.py

Trains the same decoder on the Python library's sources with each mechanism, and prints
- bits per byte on held-out modules;
- the share of attention that the first token gets (gated attention: far less than without gates);
- the entropy of the attention (affine-scaled attention: higher), over the keys that a query sees;
- bits per byte of the plain decoder on texts 4 times longer than it was trained on, with everything in sight, a window,
  and a window with sinks that stand right before it (StreamingLLM: the sinks keep it from falling apart).
"""

from __future__ import annotations

import argparse
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.arena.tasks.text import Text
from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.sparse.streaming_llm import SlidingWindow

LENGTH, BATCH, DIM, DEPTH = 256, 8, 96, 2
VARIANTS: dict[str, dict] = {
    "multihead": dict(mixer="multihead"),
    "gated, per head": dict(mixer="gated", mixer_options=dict(gate="head")),
    "gated, per element": dict(mixer="gated", mixer_options=dict(gate="element")),
    "affine": dict(mixer="affine"),
    "affine and gated": dict(mixer="affine", mixer_options=dict(gate="head")),
    "sigmoid": dict(mixer="sigmoid", mixer_options=dict(length=LENGTH)),
}


def windows(source: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """Texts of `length` + 1 tokens that begin with a token of their own, 0, which no source code holds."""
    texts = source[starts[:, None] + np.arange(length)].astype(np.int64)
    return F.pad(torch.from_numpy(texts), (1, 0))


def train(variant: dict, data: np.ndarray, steps: int, seed: int) -> Decoder:
    torch.manual_seed(seed)
    model, rng = Decoder(vocabulary=256, dim=DIM, depth=DEPTH, heads=4, **variant), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50, 0.1 + 1.8 * (1 - step / steps))
        ids = windows(data, rng.integers(0, len(data) - LENGTH - 1, BATCH), LENGTH)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def bits(model: Decoder, ids: Tensor) -> Tensor:
    """Bits of each next byte, (texts, length)."""
    parts = [F.cross_entropy(model(p[:, :-1]).mT, p[:, 1:], reduction="none") for p in ids.split(16)]
    return torch.cat(parts) / math.log(2)


@torch.no_grad()
def attention(model: Decoder, ids: Tensor) -> tuple[list[float], list[float]]:
    """Per layer: the share of all attention that goes to the first token, and its entropy in bits."""
    shares, entropies = [], []
    x = model.embedding(ids[:, :-1])
    for block in model.blocks:
        # As positive shares of one: sigmoid rows need not sum to one, and affine weights may be negative.
        weights = block.mixer.weights(block.norm1(x))[:, :, LENGTH // 4 :].abs()
        weights = weights / weights.sum(-1, keepdim=True)
        shares.append(weights[..., 0].mean().item())
        entropies.append(-(weights * weights.clamp_min(1e-12).log2()).sum(-1).mean().item())
        x = block(x)
    return shares, entropies


def with_window(model: Decoder, window: int, sinks: int) -> Decoder:
    """The same weights behind a window, and sinks that stand right before it."""
    changed = copy.deepcopy(model)
    for block in changed.blocks:
        old = block.mixer
        new = SlidingWindow(
            DIM, heads=old.heads, causal=True, position=old.position, window=window, sinks=sinks,
            places="cache" if sinks else "text",
        )  # fmt: skip
        new.load_state_dict(old.state_dict())
        block.mixer = new.eval()
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    arguments = parser.parse_args()
    task = Text()
    held_out = windows(task.held_out, np.linspace(0, len(task.held_out) - LENGTH - 2, 64).astype(int), LENGTH)
    long = windows(task.held_out, np.linspace(0, len(task.held_out) - 4 * LENGTH - 2, 16).astype(int), 4 * LENGTH)
    print(f"{arguments.steps} steps of {BATCH} × {LENGTH} bytes, {DEPTH} layers of {DIM}, {arguments.seeds} seeds")
    print(f"{'':20s} {'bits/byte':>15s}   first token per layer     entropy per layer")
    for name in arguments.only:
        rows, streams = [], []
        for seed in range(arguments.seeds):
            model = train(VARIANTS[name], task.train, arguments.steps, seed)
            shares, entropies = attention(model, held_out[:16])
            rows.append([bits(model, held_out).mean().item(), *shares, *entropies])
            if name == "multihead":
                last = slice(2 * LENGTH, None)
                kinds = [model, with_window(model, LENGTH - 4, 0), with_window(model, LENGTH - 4, 4)]
                streams.append([bits(m, long)[:, last].mean().item() for m in kinds])
        mean, spread = np.mean(rows, 0), np.std(rows, 0)
        text = "  ".join(f"{m:5.1%}" for m in mean[1 : 1 + DEPTH]), "  ".join(f"{m:4.2f}" for m in mean[1 + DEPTH :])
        print(f"{name:20s} {mean[0]:6.3f} ± {spread[0]:5.3f}   {text[0]:22s}   {text[1]}", flush=True)
        if streams:
            full, window, sinks = np.mean(streams, 0)
            print(
                f"  beyond {2 * LENGTH} bytes, {4 * LENGTH} read: all in sight {full:.3f}, "
                f"a window {window:.3f}, a window and 4 sinks {sinks:.3f}"
            )


if __name__ == "__main__":
    main()
