"""Every mixer of maps in one pyramid at equal parameters: accuracy against measured latency and counted FLOPs.

    python benchmarks/mixer_study.py [--steps 150] [--out runs/mixers.json] [--skip-training] [--skip-latency]
                                     [--only focal,neighborhood] [--write docs/mixers.md] [--draw docs/mixers.svg]

The same two-stage pyramid (32 and 64 channels, two blocks each, patches of 4) around each registered mechanism of maps
or of token grids, as its card samples it; the MLPs' width makes up for what the mixer takes, so that all have the same
number of parameters. Learned are scikit-image's textures (noisy views of 64², the right quarter of each photograph held
out) and scikit-learn's digits (enlarged to 64², the last third held out). Latency is inference of one image with all
cores from 32² to 256²; give it a quiet machine. What is in the file of `--out` is not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab import cards
from attnlab.arena.measure import seconds_of
from attnlab.arena.summary import number
from attnlab.arena.task import Budget
from attnlab.arena.tasks.textures import Textures
from attnlab.arena.train import learning_rate
from attnlab.cost import count_flops
from attnlab.models.skeletons.parts import ChannelNorm
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid

DIMS, DEPTHS, SIZE, PARAMETERS = (32, 64), (2, 2), 64, 200_000
SIZES = (32, 64, 128, 256)
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
Batch = Callable[[torch.Generator], tuple[Tensor, Tensor]]


class Nothing(nn.Module):
    """Mixes nothing: what stem, downsampling and MLPs do alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Views(Textures):
    budgets = {"study": Budget(parameters=PARAMETERS, depth=4, steps=150, batch=32, length=(SIZE // 4) ** 2)}


def pyramid(mixer: str, mlp: float, classes: int = 10) -> Pyramid:
    def block(place: Place) -> nn.Module:
        if mixer == "none":
            return Block(place.dim, Nothing(), mlp=mlp)
        card = cards.describe(mixer)
        built = cards.build(mixer, place.dim, **card.sample)
        return Block(place.dim, built, layout="NCHW" if card.kind is cards.FEATURES else "tokens", mlp=mlp)

    return Pyramid(
        dims=DIMS, depths=DEPTHS, strides=(4, 2), block=block, norm=ChannelNorm(DIMS[-1]), in_channels=1,
        num_classes=classes,
    )  # fmt: skip


def parameters(mixer: str, mlp: float) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in pyramid(mixer, mlp).parameters())


def ratio(mixer: str) -> float:
    """The MLPs' ratio with which the pyramid has `PARAMETERS`."""
    lean, each = parameters(mixer, 1 / 32), (parameters(mixer, 2.0) - parameters(mixer, 1.0))
    found = 1 / 32 + (PARAMETERS - lean) / each
    if found < 0.25:
        raise ValueError(f"the mixer alone takes {lean:,} of {PARAMETERS:,} parameters")
    return found


def digits() -> tuple[Batch, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = F.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, SIZE, mode="bilinear")
    labels, split = torch.tensor(data.target), len(data.target) * 2 // 3

    def batch(rng: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(split, (32,), generator=rng)
        return images[rows], labels[rows]

    return batch, images[split:], labels[split:]


def accuracy(mixer: str, task: str, steps: int) -> float:
    torch.manual_seed(0)
    network = pyramid(mixer, ratio(mixer))
    views = Views("study")
    batch, held, labels = digits() if task == "digits" else (views.batch, None, None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images, wanted = batch(rng)
        loss = F.cross_entropy(network(images), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        if held is None or labels is None:
            return views.evaluate(network).value
        said = torch.cat([network(part).argmax(-1) for part in held.split(64)])
    return (said == labels).double().mean().item()


def cost(mixer: str) -> dict[str, dict[str, float]]:
    """Milliseconds and FLOPs of one image by its size."""
    network, found = pyramid(mixer, ratio(mixer)).eval().requires_grad_(False), {}
    for size in SIZES:
        x = torch.randn(1, 1, size, size)
        try:
            flops = count_flops(network, x)
        except (ValueError, MemoryError):  # a size that the mechanism does not take
            continue
        found[str(size)] = {"ms": 1e3 * seconds_of(lambda x=x: network(x), "cpu"), "flops": flops}
    return found


def contestants() -> list[str]:
    found = ["none"]
    for card in (entry.card for entry in cards.entries()):
        if card.kind is cards.FEATURES or (card.kind is cards.TOKENS and card.claims(cards.NONCAUSAL_SELF)):
            try:
                with torch.no_grad():
                    network = pyramid(card.name, ratio(card.name))
                    network(torch.zeros(2, 1, SIZE, SIZE))
            except (ValueError, TypeError) as error:
                print(f"{card.name:<22} takes no part: {str(error)[:110]}", flush=True)
                continue
            found.append(card.name)
    return found


def table(results: dict[str, dict]) -> str:
    head = ["mixer", "textures", "digits", *(f"{size}²" for size in SIZES), "MFLOPs at 64²", "at 256²"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, result in sorted(results.items(), key=lambda item: -item[1].get("textures", 0.0)):
        costs = result.get("cost", {})
        cells = [name, *(f"{100 * result[t]:.1f} %" if t in result else "–" for t in ("textures", "digits"))]
        cells += [f"{number(costs[str(s)]['ms'])} ms" if str(s) in costs else "–" for s in SIZES]
        cells += [number(costs[str(s)]["flops"] / 1e6) if str(s) in costs else "–" for s in (64, 256)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def front(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Those of (cost, accuracy, name) that nothing cheaper reaches, cheapest first."""
    best: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def draw(results: dict[str, dict], file: Path) -> None:
    """Accuracy (the mean of both tasks) against latency and FLOPs at 64²; the best for their cost have their names."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(1, 2, sharey=True), (("ms", "milliseconds of one image"), ("flops", "FLOPs of one image")),
        strict=True,
    ):  # fmt: skip
        points = [
            (r["cost"][str(SIZE)][key], 50 * (r["textures"] + r["digits"]), name)
            for name, r in results.items()
            if "digits" in r and str(SIZE) in r.get("cost", {})
        ]
        axes.scatter(*zip(*[p[:2] for p in points], strict=True), s=14, color="0.7")
        best = front(points)
        axes.plot(*zip(*[p[:2] for p in best], strict=True), "o-", markersize=4)
        for cost, value, name in best:
            axes.annotate(name, (cost, value), textcoords="offset points", xytext=(5, -9), fontsize=7)
        axes.set(xscale="log", xlabel=f"{label} of {SIZE}²")
    figure.axes[0].set_ylabel("accuracy, mean of textures and digits, %")
    with rc_context({"svg.hashsalt": "attnlab"}):
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("runs/mixers.json"))
    parser.add_argument("--only", help="comma-separated mixers")
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--skip-latency", action="store_true")
    parser.add_argument("--write", type=Path, help="a page, whose table is replaced")
    parser.add_argument("--draw", type=Path, help="a picture of accuracy against cost")
    options = parser.parse_args()
    results: dict[str, dict] = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(",") if options.only else contestants():
        done, start = results.setdefault(name, {}), time.perf_counter()
        for task in ("textures", "digits"):
            if task not in done and not options.skip_training:
                done[task] = accuracy(name, task, options.steps)
        if "cost" not in done and not options.skip_latency:
            done["cost"] = cost(name)
        options.out.write_text(json.dumps(results, indent=1))
        shown = "  ".join(f"{task} {done[task]:.3f}" for task in ("textures", "digits") if task in done)
        print(f"{name:<22} {shown}  {time.perf_counter() - start:.0f} s", flush=True)
    text = table(results)
    print("\n" + text)
    if options.draw:
        draw(results, options.draw)
    if options.write:
        page = options.write.read_text()
        options.write.write_text(f"{page.split(BEGIN)[0]}{BEGIN}\n{text}\n{END}{page.split(END)[1]}")


if __name__ == "__main__":
    main()
