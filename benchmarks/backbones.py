"""Our image backbones beside timm's or the authors' own, with the same weights: inference and training on CPU.

    python benchmarks/backbones.py [--official DIR] [--threads 2] [--seconds 3] [--image 224,448] [--batch 1,8]
        [--work inference,training] [--fuse] [--only volo_d1,van_b1] [--busy] [--out FILE] [--write docs/backbones.md]

Prints the shortest time of each, theirs over ours (above 1, ours is faster), how far the outputs differ relative to the
largest, and the geometric means. The two take turns. Peers are timm where it has the network, and else the authors'
repositories: DIR holds checkouts of them, each under the repository's name (DIR/TransNeXt of DaiShiResearch/TransNeXt,
say). A peer that is not there is named with the reason. The packages that such a repository imports and does not need
here may be absent. Neither network drops paths or units, so that both train the same computation. `--fuse` adds rows
of inference after our `fuse()`, and after theirs where they have one. `--out` keeps the rows of what is finished, as
JSON, which the next run with that file does not measure again; `--write` puts the table of its rows into a document.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from backbone_pairs import Pair, Peer, difference, has_fuse, logits, own_fuse, pair
from backbone_peers import PAIRS, WITHOUT_PEER
from torch import nn

Row = dict[str, Any]
Clock = Callable[[], float]
BEGIN, END = "<!-- table -->", "<!-- /table -->"
FUSED = "inference, fused"


def in_turns(calls: list[Callable[[], object]], seconds: float, clock: Clock) -> list[float]:
    """The shortest time of each call in milliseconds.

    They take turns, so that a busy moment hits all of them, and the first of a round is the last of the next: which of
    two equal calls goes first is worth two per cent.
    """
    shortest = [math.inf] * len(calls)
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begin < seconds:  # the first round warms up
        for i in range(len(calls)) if rounds % 2 else reversed(range(len(calls))):
            start = clock()
            calls[i]()
            if rounds:
                shortest[i] = min(shortest[i], clock() - start)
        rounds += 1
    return [1e3 * s for s in shortest]


def infer(net: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    net.eval()

    def call() -> None:
        with torch.no_grad():  # what a peer keeps here must still be good for training
            net(x)

    return call


def train(net: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    net.train()

    def call() -> None:
        net.zero_grad()
        torch.stack([out.logsumexp(-1).sum() for out in logits(net(x))]).sum().backward()

    return call


def fused(net: nn.Module, how: Callable[[nn.Module], Any] | None) -> nn.Module:
    net = copy.deepcopy(net).eval()
    with contextlib.redirect_stdout(io.StringIO()):
        result = how(net) if how else None
    return result if isinstance(result, nn.Module) else net


def measure(found: Pair, peer: Peer, work: str, x: torch.Tensor, seconds: float, clock: Clock) -> Row:
    """The times of ours and of theirs, and how far their outputs differ."""
    nets, off = [found.ours, found.theirs], found.off
    if work == FUSED:
        nets = [fused(found.ours, own_fuse), fused(found.theirs, peer.fuse)]
        off = None if off is None else difference(nets[0], nets[1], x)
    make = train if work == "training" else infer
    ours, theirs = in_turns([make(net, x) for net in nets], seconds, clock)
    for net in nets:
        net.zero_grad()
    return dict(ours=ours, theirs=theirs, off=off)


def means(rows: list[Row]) -> list[str]:
    """The geometric means of all rows that have a ratio, by work and kind of peer."""
    lines = []
    for work in ("inference", FUSED, "training"):
        for kind in ("timm", "the authors", None):
            ratios = [r["theirs"] / r["ours"] for r in rows if r["work"] == work and kind in (None, r["kind"])]
            if ratios:
                mean, behind = statistics.geometric_mean(ratios), sum(ratio < 1 for ratio in ratios)
                lines.append(
                    f"{work}, {kind or 'all'}: geometric mean {mean:.2f}×, least {min(ratios):.2f}×, "
                    f"{behind} of {len(ratios)} rows below 1"
                )
    return lines


def cells(row: Row | None) -> str:
    return f"{row['ours']:.0f} | {row['theirs']:.0f} | {row['theirs'] / row['ours']:.2f}×" if row else " | | "


def table(rows: list[Row], reasons: dict[str, str]) -> str:
    """A line for each network, image and batch."""
    by = {(r["name"], r["image"], r["batch"], r["work"]): r for r in rows}
    works = [w for w in ("inference", FUSED, "training") if any(r["work"] == w for r in rows)]
    text = ["| backbone | peer | image | batch | " + " | ".join(f"{w}: ours, ms | theirs | ratio" for w in works)]
    text[0] += " | outputs differ by |"
    text.append("|---|---|---:|---:|" + "---:|" * (3 * len(works) + 1))
    order = list(PAIRS)
    places = sorted({key[:3] for key in by}, key=lambda key: (order.index(key[0]), key[1:]))
    for name, image, batch in places:
        found = [by.get((name, image, batch, work)) for work in works]
        any_row = next(row for row in found if row)
        off = "other weights" if any_row["off"] is None else f"{any_row['off']:.0e}"
        peer = "timm" if any_row["kind"] == "timm" else any_row["repository"]
        line = [name, peer, f"{image}²", str(batch), *map(cells, found), off]
        text.append(f"| {' | '.join(line)} |")
    text += ["", *(f"- {line}" for line in means(rows))]
    notes = {r["name"]: r["note"] for r in rows if r["note"]}
    text += ["", *(f"- {name}: {note}." for name, note in notes.items())] if notes else []
    text += ["", *(f"- {name}: no row, {reason}." for name, reason in reasons.items())]
    return "\n".join(text)


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="folder of the authors' checkouts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison, and three rounds at least")
    parser.add_argument("--image", type=integers, default=[224])
    parser.add_argument("--batch", type=integers, default=[1, 8])
    parser.add_argument("--work", default="inference,training", help="one or both, separated by a comma")
    parser.add_argument("--fuse", action="store_true", help="inference after exact re-parameterisation as well")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--busy", action="store_true", help="the process's own time, of one thread: on a busy machine")
    parser.add_argument("--out", type=Path, help="a JSON file that keeps the rows")
    parser.add_argument("--write", type=Path, help="a document whose table is written anew from the rows")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(PAIRS)
    if unknown := set(chosen) - set(PAIRS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not among {', '.join(PAIRS)}")
    works = options.work.split(",")
    if unknown := set(works) - {"inference", "training"}:
        parser.error(f"--work: {', '.join(sorted(unknown))} is not among inference, training")
    works[:0] = [FUSED] * options.fuse  # first: a training that fails half-way leaves two different batch norms behind
    torch.set_num_threads(1 if options.busy else options.threads)
    clock = time.process_time if options.busy else time.perf_counter
    rows: list[Row] = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    done = {(r["name"], r["image"], r["batch"], r["work"]) for r in rows}
    reasons = dict(WITHOUT_PEER) if not options.only else {}
    print(f"{'backbone':<27} {'peer':<12} {'work':<32} {'ours':>9} {'theirs':>9} theirs/ours   off by")
    for name, size in [(n, s) for n in chosen for s in ([PAIRS[n].side] if PAIRS[n].side else options.image)]:
        peer = PAIRS[name]
        wanted = [w for w in itertools.product(works, options.batch) if (name, size, w[1], w[0]) not in done]
        if not wanted:
            continue
        found: Pair | None = None
        try:
            found = pair(name, peer, size, options.official)
        except Exception as error:  # whatever a checkout says to packages of today
            reasons[name] = in_words(error)
            print(f"{name:<27} {size}²: {reasons[name]}", flush=True)
            continue
        for work, batch in wanted:
            if work == FUSED and not has_fuse(found.ours):
                continue
            what = f"{work}, {size}², batch {batch}"
            try:
                x = torch.randn(batch, 3, size, size)
                row: Row = dict(
                    name=name, kind=peer.kind, repository=peer.repository, work=work, image=size, batch=batch
                )
                row |= measure(found, peer, work, x, options.seconds, clock) | {"note": found.note}
            except Exception as error:  # a size that one of the two does not take
                print(f"{name:<27} {peer.kind:<12} {what:<32} {in_words(error)}", flush=True)
                continue
            rows.append(row)
            off = "other weights" if row["off"] is None else f"{row['off']:.0e}"
            ratio = row["theirs"] / row["ours"]
            timed = f"{row['ours']:>6.0f} ms {row['theirs']:>6.0f} ms {ratio:>9.2f}×   {off}"
            print(f"{name:<27} {peer.kind:<12} {what:<32} {timed}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=0))
        del found
        gc.collect()
    for name, reason in WITHOUT_PEER.items() if not options.only else ():
        print(f"{name:<27} {reason}")
    print("\n".join(means([r for r in rows if r["name"] in chosen])))
    if options.write:
        begin, rest = options.write.read_text().split(BEGIN)
        reasons = {name: reason for name, reason in reasons.items() if name not in {r["name"] for r in rows}}
        options.write.write_text(f"{begin}{BEGIN}\n\n{table(rows, reasons)}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
