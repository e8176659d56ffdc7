"""Completion of point clouds (noncausal cross): points of the whole look into the part that was seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attnlab.arena.task import CROSS, Budget, Score, task
from attnlab.arena.tasks.cab.base import MEDIUM, PAPER, TINY, CabTask
from attnlab.arena.tasks.cab.parts import Softmax

# Points seen, tokens that they become, tokens of the whole, and points that each of these becomes.
_SIZES = {TINY: (192, 32, 32, 8), MEDIUM: (1024, 96, 128, 16), PAPER: (2048, 128, 224, 64)}
_COUNT = {TINY: (256, 48), MEDIUM: (2000, 100)}
_NEAR = 8  # points around a centre whose shape a token knows
_CLOSE = 0.01  # the F-score's distance


@task
class Completion(CabTask):
    """From the points of one side to those all around.

    Tokens of the part are centres, chosen as far apart as can be, with the shape of their surroundings, encoded by
    softmax attention; tokens of the whole are places guessed from a centre and the part as a whole, which look into
    the part and become points around themselves. Loss and scores are Chamfer distances. Published: PoinTr on PCN.
    """

    name, title, about, layout = "cab-pcc-nc", "the rest of a point cloud", "PCC", CROSS
    metric = "CD-l1"
    signs = {"CD-l1": -1, "CD-l2": -1, "F-score": 1}
    folder = "PCN"
    source = (
        "PCN as PoinTr reads it: PCN.json, and {train,test}/partial/<category>/<model>/<view>.pcd with "
        "{train,test}/complete/<category>/<model>.pcd (https://github.com/yuxumin/PoinTr); .npy and .npz are read too"
    )
    budgets = {
        TINY: Budget(60_000, depth=2, steps=200, batch=16, length=64, learning_rate=4e-3, examples=48),
        MEDIUM: Budget(2_000_000, depth=4, steps=5_000, batch=16, length=224, learning_rate=1e-3, examples=100),
        PAPER: Budget(30_000_000, depth=8, steps=180_000, batch=48, length=352, learning_rate=2e-4, examples=1200),
    }

    def load(self) -> None:
        size = next(name for name, budget in self.budgets.items() if budget is self.budget)
        self.seen, self.context, self.asked, self.each = _SIZES[size]
        self.count = _COUNT.get(size)
        super().load()

    def make(self) -> None:
        if self.count is not None:
            whole = self.asked * self.each
            self.train, self.held_out = (_made(n, self.seen, whole, seed) for seed, n in enumerate(self.count))

    def read(self, root: Path) -> None:
        """Every view of the models to learn from, and the first of those to be scored on."""
        categories = json.loads(self.find(root, "PCN.json").read_text(encoding="utf-8"))
        self.train, self.held_out = (self._part(root, categories, part) for part in ("train", "test"))

    def arrays(self) -> list[np.ndarray | bytes]:
        return [x.numpy() for part in (self.train, self.held_out) for x in part]

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = self.choose(rng, len(self.train[0]))
        return self.train[0][chosen], self.train[1][chosen]

    def stem(self, width: int) -> nn.Module:
        return _PartAndGuess(width, self.context or 0, self.asked)

    def head(self, width: int) -> nn.Module:
        return _Around(width, self.asked, self.each)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Chamfer distance of the points and, half as much, of the guessed places, the last of the outputs."""
        found, places = outputs[:, : self.asked * self.each], outputs[:, self.asked * self.each :]
        return (chamfer(found, targets)[0] + 0.5 * chamfer(places, targets)[0]).mean()

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        parts, wholes = (x[: self.budget.examples] for x in self.held_out)
        found = torch.cat([predict(part) for part in parts.split(16)])[:, : self.asked * self.each]
        return self.scored(*self._metrics(found, wholes))

    def trivial(self) -> tuple[str, float]:
        parts, wholes = (x[: self.budget.examples] for x in self.held_out)
        return "the part alone", self._metrics(parts, wholes)[0]

    def _metrics(self, found: Tensor, truth: Tensor) -> tuple[float, float, float]:
        l1, l2, f = (
            torch.cat(x).mean().item() for x in zip(*map(chamfer, found.split(4), truth.split(4)), strict=True)
        )
        return 1000 * l1, 1000 * l2, f  # distances are published a thousandfold

    def _part(self, root: Path, categories: list[dict], part: str) -> tuple[Tensor, Tensor]:
        partial, complete = [], []
        rng = np.random.default_rng(0)
        for category in categories:
            for model in category[part]:
                inside = f"{category['taxonomy_id']}/{model}"
                views = sorted(self.find(root, f"{part}/partial/{inside}").iterdir())
                whole = self.find(root, *(f"{part}/complete/{inside}{end}" for end in (".pcd", ".npy", ".npz")))
                for view in views if part == "train" else views[:1]:
                    partial.append(_resampled(read_points(view), self.seen, rng))
                    complete.append(read_points(whole))
        if not partial:
            raise ValueError(f"data: {root}/PCN.json names no models to {part} on")
        least = min(map(len, complete))
        return torch.stack(partial), torch.stack([_resampled(points, least, rng) for points in complete])


def chamfer(found: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CD-l1, CD-l2 and F-score of clouds (B, N, 3) and (B, M, 3), each (B,), as PoinTr defines them.

    l1 = ½ (mean min |x − y| both ways)   l2 = the same sum of squares   F = harmonic mean of both shares below 0.01
    """
    to_truth = _nearest(found, truth)
    to_found = _nearest(truth, found)
    l1 = (to_truth.mean(1) + to_found.mean(1)) / 2
    l2 = to_truth.square().mean(1) + to_found.square().mean(1)
    precision, recall = ((d < _CLOSE).to(d.dtype).mean(1) for d in (to_truth, to_found))
    return l1, l2, 2 * precision * recall / (precision + recall).clamp_min(1e-12)


def _nearest(points: Tensor, others: Tensor) -> Tensor:
    """Distance of each point to the nearest of the others; gathered, so that gradients go to this one alone."""
    with torch.no_grad():
        nearest = torch.cdist(points, others).argmin(2)
    there = others.gather(1, nearest[..., None].expand(-1, -1, 3))
    return ((points - there).square().sum(-1) + 1e-12).sqrt()


def farthest(points: Tensor, count: int) -> Tensor:
    """Indices (B, count) of points that lie far apart: the first, then always the farthest from all chosen."""
    chosen = torch.zeros(len(points), count, dtype=torch.long, device=points.device)
    distance = torch.full(points.shape[:2], torch.inf, device=points.device, dtype=points.dtype)
    rows = torch.arange(len(points), device=points.device)
    for i in range(1, count):
        last = points[rows, chosen[:, i - 1]]
        distance = torch.minimum(distance, (points - last[:, None]).square().sum(-1))
        chosen[:, i] = distance.argmax(1)
    return chosen


class _PartAndGuess(nn.Module):
    """Tokens of centres, encoded, and of places guessed from them (B, M + N, C); beside them the places (B, N, 3)."""

    def __init__(self, width: int, centres: int, asked: int):
        super().__init__()
        self.centres, self.asked = centres, asked
        self.shape = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, width))
        self.encoder, self.guess = Softmax(width), nn.Linear(2 * width, 3 * -(-asked // centres))
        self.place = nn.Sequential(nn.Linear(3 + width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(points), device=points.device)[:, None]
        centres = points[rows, farthest(points, self.centres)]
        near = torch.cdist(centres, points).topk(_NEAR, largest=False).indices
        around = points[rows[..., None], near]
        offsets = torch.cat((centres[:, :, None].expand_as(around), around - centres[:, :, None]), -1)
        part = self.encoder(self.shape(offsets).amax(2))
        whole = part.amax(1)
        known = torch.cat((part, whole[:, None].expand_as(part)), -1)
        moves = self.guess(known).unflatten(2, (-1, 3))
        places = (centres[:, :, None] + moves).flatten(1, 2)[:, : self.asked]
        queries = self.place(torch.cat((places, whole[:, None].expand(-1, self.asked, -1)), -1))
        return torch.cat((part, queries), 1), places


class _Around(nn.Module):
    """Points around the places (B, N · each, 3), and behind them the places themselves."""

    def __init__(self, width: int, asked: int, each: int):
        super().__init__()
        self.asked, self.out = asked, nn.Linear(width, 3 * each)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        offsets = self.out(tokens[:, -self.asked :]).unflatten(2, (-1, 3))
        return torch.cat(((places[:, :, None] + offsets).flatten(1, 2), places), 1)


# Data --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _made(count: int, seen: int, whole: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bodies of two or three boxes, balls, tubes and rings, and of each the points that face one side."""
    rng = np.random.default_rng(100 + seed)
    partial, complete = [], []
    for _ in range(count):
        pieces = [_surface(rng, 3 * whole) for _ in range(int(rng.integers(2, 4)))]
        points = np.concatenate(pieces)
        points = points - (points.max(0) + points.min(0)) / 2
        points = points / (2 * np.abs(points).max())
        side = rng.normal(size=3)
        facing = points[np.argsort(points @ side)[-len(points) // 2 :]]
        partial.append(facing[rng.choice(len(facing), seen, replace=False)])
        complete.append(points[rng.choice(len(points), whole, replace=False)])
    return torch.from_numpy(np.stack(partial)).float(), torch.from_numpy(np.stack(complete)).float()


def _surface(rng: np.random.Generator, count: int) -> np.ndarray:
    """Points on a box, ball, tube or ring, somewhere, of some size, along some axis."""
    kind, u, v = int(rng.integers(4)), rng.uniform(size=count), rng.uniform(size=count)
    turn = 2 * np.pi * u
    if kind == 0:  # each face by its number
        points = rng.uniform(-1, 1, (count, 3))
        points[np.arange(count), rng.integers(3, size=count)] = rng.choice([-1.0, 1.0], count)
    elif kind == 1:
        points = rng.normal(size=(count, 3))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    elif kind == 2:
        points = np.stack((np.cos(turn), np.sin(turn), 2 * v - 1), 1)
    else:
        out = 0.75 + 0.25 * np.cos(2 * np.pi * v)
        points = np.stack((out * np.cos(turn), out * np.sin(turn), 0.25 * np.sin(2 * np.pi * v)), 1)
    points = points[:, rng.permutation(3)] * rng.uniform(0.2, 0.6, 3)
    return points + rng.uniform(-0.5, 0.5, 3)


def _resampled(points: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """As many points, all of them as often as goes round."""
    order = np.concatenate([rng.permutation(len(points)) for _ in range(-(-count // len(points)))])
    return points[torch.from_numpy(order[:count])]


def read_points(path: Path) -> Tensor:
    """The points (N, 3) of a .pcd file (ascii or binary), or of an array in .npy or .npz."""
    if path.suffix in (".npy", ".npz"):
        read = np.load(path, allow_pickle=False)
        array = read if isinstance(read, np.ndarray) else read[read.files[0]]
        return torch.from_numpy(np.ascontiguousarray(array[:, :3], np.float32))
    raw = path.read_bytes()
    header: dict[str, list[str]] = {}
    at = 0
    while "DATA" not in header:
        end = raw.find(b"\n", at)
        if end < 0:
            raise ValueError(f"data: {path} is not a .pcd file: it has no line DATA")
        name, *words = raw[at:end].decode("ascii", "replace").split() or ["#"]
        header[name], at = words, end + 1
    fields, count = header["FIELDS"], int(header["POINTS"][0])
    if header["DATA"] == ["ascii"]:
        array = np.array(raw[at:].split(), np.float32).reshape(count, -1)
    elif header["DATA"] == ["binary"]:
        codes = {"F": "f", "U": "u", "I": "i"}
        kinds = [f"<{codes[kind]}{size}" for kind, size in zip(header["TYPE"], header["SIZE"], strict=True)]
        wide = [int(n) for n in header.get("COUNT", ["1"] * len(fields))]
        row = np.dtype([(name, kind, (n,)) for name, kind, n in zip(fields, kinds, wide, strict=True)])
        table = np.frombuffer(raw, row, count, at)
        return torch.from_numpy(np.concatenate([table[axis] for axis in "xyz"], 1).astype(np.float32))
    else:
        raise ValueError(f"data: {path} must hold ascii or binary points, got DATA {' '.join(header['DATA'])}")
    return torch.from_numpy(np.ascontiguousarray(array[:, [fields.index(axis) for axis in "xyz"]]))
