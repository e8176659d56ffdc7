"""The numbers of the Comprehensive Attention Benchmark (arXiv 2210.07661): indices, efficiency length, correlations.

Scores become indices in units of the deviation between methods, with which tasks of any unit can be averaged:

    z = ± (score − μ) / σ          a task's index = mean of its metrics' z, a pattern's = mean of its tasks'

The sign is − where less is better. μ and σ of the benchmark's own metrics are fixed: they are those of the ten methods
that its authors ran. For other tasks, `scaled` takes them from the runs at hand, in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

PATTERNS = ("noncausal_self", "causal_self", "noncausal_cross", "causal_cross")
MISSING = -100.0  # how the authors' score files mark a score that is not there
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)  # at which the authors measure efficiency, with 4 sequences of 512


@dataclass(frozen=True)
class Metric:
    """One number that a run on a task gives, and how it becomes an index: `mean` and `deviation` over methods."""

    task: str
    name: str
    mean: float
    deviation: float
    sign: int = 1  # −1 where less is better

    def index(self, score: float) -> float:
        return self.sign * (score - self.mean) / self.deviation


METRICS: dict[str, tuple[Metric, ...]] = {
    "noncausal_self": (
        Metric("TTS", "FastSpeech 2 MCD", 3.4245, 0.06832, -1),
        Metric("TTS", "FastSpeech 2 MSD", 1.97429, 0.0361768, -1),
        Metric("TTS", "Transformer-TTS MCD", 4.06947, 0.09422, -1),
        Metric("TTS", "Transformer-TTS MSD", 2.19021, 0.03866, -1),
        Metric("Sum", "ROUGE-1", 34.88667, 1.39697),
        Metric("Sum", "ROUGE-2", 6.79333, 1.41078),
        Metric("Sum", "ROUGE-L", 31.96889, 1.31499),
        Metric("SR", "PSNR", 23.208, 0.27499),
        Metric("SR", "SSIM", 0.6758, 0.01557),
        Metric("MLM", "perplexity", 36.292, 62.30827, -1),
    ),
    "causal_self": (
        Metric("TTS", "Transformer-TTS MCD", 4.08325, 0.04529, -1),
        Metric("TTS", "Transformer-TTS MSD", 2.20085, 0.01372, -1),
        Metric("Sum", "ROUGE-1", 32.9575, 1.92754),
        Metric("Sum", "ROUGE-2", 6.0925, 0.41007),
        Metric("Sum", "ROUGE-L", 30.2575, 1.61951),
        Metric("LM", "perplexity", 22.26, 8.29944, -1),
    ),
    "noncausal_cross": (
        Metric("PCC", "CD-l1", 7.7025, 0.64789, -1),
        Metric("PCC", "CD-l2", 0.24775, 0.03366, -1),
        Metric("PCC", "F-score", 0.7625, 0.03906),
        Metric("LSTF", "ETT MSE", 1.18933, 0.05615, -1),
        Metric("LSTF", "ETT MAE", 0.80625, 0.02193, -1),
        Metric("LSTF", "ECL MSE", 0.47575, 0.01057, -1),
        Metric("LSTF", "ECL MAE", 0.511, 0.00601, -1),
        Metric("LSTF", "Weather MSE", 0.62025, 0.18948, -1),
        Metric("LSTF", "Weather MAE", 0.58075, 0.10312, -1),
    ),
    "causal_cross": (
        Metric("TTS", "Transformer-TTS MCD", 5.5037, 1.29239, -1),
        Metric("TTS", "Transformer-TTS MSD", 2.6278, 0.42726, -1),
        Metric("Sum", "ROUGE-1", 31.35, 3.77103),
        Metric("Sum", "ROUGE-2", 5.26, 1.26028),
        Metric("Sum", "ROUGE-L", 28.8, 3.28638),
    ),
}


@dataclass(frozen=True)
class Index:
    """The compositional index of one method on one pattern; None where a score it needs is missing."""

    total: float | None
    tasks: dict[str, float | None]
    metrics: tuple[float | None, ...]


def compositional_index(metrics: Sequence[Metric], scores: Sequence[float | None]) -> Index:
    """The index of a method from its `scores`, one for each of `metrics` (as `METRICS["causal_self"]`) in their order.

    A task without one of its scores (None) has no index, and a pattern without one of its tasks no total, as on the
    authors' leaderboard. Their score files hold -100 there, which their script takes at its word: as a perplexity it
    counts as an index of +14.7. Given as a number it does so here too; `read_scores` turns it into None.
    """
    if len(scores) != len(metrics):
        wanted = ", ".join(f"{m.task} {m.name}" for m in metrics)
        raise ValueError(f"scores must be {len(metrics)} numbers, of {wanted}; got {len(scores)}")
    found = [None if s is None else m.index(s) for m, s in zip(metrics, scores, strict=True)]
    parts: dict[str, list[float | None]] = {}
    for metric, z in zip(metrics, found, strict=True):
        parts.setdefault(metric.task, []).append(z)
    tasks = {task: _mean(values) for task, values in parts.items()}
    return Index(_mean(list(tasks.values())), tasks, tuple(found))


def scaled(runs: Mapping[str, Mapping[tuple[str, str], float | None]], signs: Mapping[str, int]) -> tuple[Metric, ...]:
    """Metrics with μ and σ of the runs at hand, for tasks other than the benchmark's: one pattern's, in order.

    `runs[method][task, metric]` is a score, `signs[metric]` ±1. As for the published constants, σ is the deviation with
    n − 1 over the methods that have a score; metrics that do not tell methods apart are left out.
    """
    keys = dict.fromkeys(key for scores in runs.values() for key in scores)
    metrics = []
    for task, name in keys:
        if signs.get(name) not in (1, -1):
            raise ValueError(f"signs must give 1 or -1 for each metric, got {signs.get(name)!r} for {name!r}")
        given = [scores.get((task, name)) for scores in runs.values()]
        values = np.array([s for s in given if s is not None and math.isfinite(s)])
        deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        if deviation > 1e-12 * max(1.0, float(np.abs(values).max(initial=0.0))):
            metrics.append(Metric(task, name, float(values.mean()), deviation, signs[name]))
    return tuple(metrics)


def read_scores(text: str) -> dict[str, list[float | None]]:
    """The authors' score file: a line of numbers for each of the four patterns, in the order of `METRICS`."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if len(lines) != len(PATTERNS):
        raise ValueError(f"text must have a line for each of {', '.join(PATTERNS)}, got {len(lines)} lines")
    found: dict[str, list[float | None]] = {}
    for pattern, line in zip(PATTERNS, lines, strict=True):
        if len(line) != len(METRICS[pattern]):
            raise ValueError(f"text must have {len(METRICS[pattern])} numbers for {pattern}, got {len(line)}")
        found[pattern] = [None if float(word) == MISSING else float(word) for word in line]
    return found


@dataclass(frozen=True)
class EfficiencyLength:
    """From where on a method costs less than vanilla attention: `length`, and the curves whose crossing it is.

        vanilla  a N² + b N + c        efficient  d N + e        (coefficients, highest first), each with its R²

    `length` is 0 where the method costs less at every length, and None where the curves do not tell: vanilla's does not
    bend upwards, so that it need never be overtaken.
    """

    length: float | None
    vanilla: tuple[float, float, float]
    efficient: tuple[float, float]
    vanilla_fit: float
    efficient_fit: float


def efficiency_length(
    lengths: Sequence[float], vanilla: Sequence[float], efficient: Sequence[float], *, skip: int = 0
) -> EfficiencyLength:
    """Where the cost of an efficient method, linear in the length, falls below vanilla's, quadratic in it.

    Least squares through the measured costs (seconds or bytes, in any unit), then the larger crossing. The first `skip`
    lengths are left out of the line: the authors drop one for times, where constant costs rule, and none for memory.
    """
    n, v, e = (np.asarray(x, dtype=float) for x in (lengths, vanilla, efficient))
    if not len(n) == len(v) == len(e):
        raise ValueError(f"lengths, vanilla and efficient must be equally long, got {len(n)}, {len(v)} and {len(e)}")
    if len(set(n)) < 3 or len(set(n[skip:])) < 2:
        raise ValueError(f"lengths must be at least 3, and 2 after skip={skip}, to fit both curves; got {len(n)}")
    if not (np.isfinite(v).all() and np.isfinite(e).all()):
        raise ValueError("vanilla and efficient must be finite: leave out the lengths that were not measured")
    (a, b, c), (d, f) = np.polyfit(n, v, 2), np.polyfit(n[skip:], e[skip:], 1)
    length: float | None = None
    if a > 0:
        root = (b - d) ** 2 - 4 * a * (c - f)
        length = 0.0 if root < 0 else max(0.0, float((d - b + math.sqrt(root)) / (2 * a)))
    fits = _explained(v, np.polyval((a, b, c), n)), _explained(e[skip:], np.polyval((d, f), n[skip:]))
    return EfficiencyLength(length, (float(a), float(b), float(c)), (float(d), float(f)), *fits)


def benefit_of_attention(metrics: Sequence[Metric], with_it: Sequence[float], without: Sequence[float]) -> Index:
    """How much a backbone loses when its attention is taken out (tokens pass it unmixed): indices with, less without.

    μ cancels, so that this is the difference of scores in deviations, positive where attention helps.
    """
    ours, theirs = compositional_index(metrics, with_it), compositional_index(metrics, without)
    tasks = {task: _less(value, theirs.tasks[task]) for task, value in ours.tasks.items()}
    steps = tuple(_less(x, y) for x, y in zip(ours.metrics, theirs.metrics, strict=True))
    return Index(_less(ours.total, theirs.total), tasks, steps)


def correlations(
    indices: Mapping[str, Mapping[str, float | None]], *, least: int = 3
) -> dict[tuple[str, str], float | None]:
    """Pearson's correlation of each two patterns' (or tasks') indices, over the methods that have both.

    `indices[pattern][method]`. None where fewer than `least` methods are shared (two always correlate perfectly), or
    where one of the two does not vary.
    """
    found: dict[tuple[str, str], float | None] = {}
    for first, second in combinations(indices, 2):
        theirs = indices[second]
        pairs = np.array(
            [(x, y) for m, x in indices[first].items() if x is not None and (y := theirs.get(m)) is not None]
        )
        enough = len(pairs) >= max(2, least)
        centred = pairs - pairs.mean(0) if enough else pairs
        norms = np.linalg.norm(centred, axis=0) if enough else np.zeros(2)
        found[first, second] = float(centred[:, 0] @ centred[:, 1] / norms.prod()) if norms.all() else None
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if not known or any(v is None for v in known) else float(np.mean(known))  # type: ignore[arg-type]


def _less(x: float | None, y: float | None) -> float | None:
    return None if x is None or y is None else x - y


def _explained(values: np.ndarray, fitted: np.ndarray) -> float:
    total = float(((values - values.mean()) ** 2).sum())
    return 1.0 - float(((values - fitted) ** 2).sum()) / total if total else 1.0


# The authors' leaderboard of 2022-11-16: indices of tasks, in the order in which `METRICS` has them.
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "noncausal_self": {
        "local": (0.362, 2.617, 0.421, 0.515),
        "cosFormer": (0.516, -0.190, 1.042, 0.498),
        "LongShort": (0.572, -0.322, 0.298, 0.528),
        "vanilla": (-0.301, -0.246, -0.077, 0.527),
        "LARA": (-0.639, -0.522, 0.554, 0.479),
        "Performer": (-0.282, -0.088, 0.439, -1.211),
        "Nyströmformer": (-2.011, -0.321, 0.088, 0.481),
        "ProbSparse": (0.705, -0.246, -0.697, -2.408),
        "ABC": (0.043, -0.678, -2.525, 0.414),
        "FlashAttention": (-0.383, -0.201, -5.503, 0.530),
        "S4D": (1.035, None, 0.457, 0.176),
    },
    "causal_self": {
        "S4D": (1.030, 1.143, 0.780),
        "LongShort": (0.701, 0.340, 0.812),
        "FlashAttention": (-0.033, 0.562, 0.751),
        "local": (-1.361, 0.337, 0.305),
        "ABC": (0.707, -1.461, -1.117),
        "vanilla": (-0.047, 0.784, None),
    },
    "noncausal_cross": {
        "vanilla": (0.449, 0.744),
        "ABC": (0.573, -0.164),
        "Performer": (0.473, -0.445),
        "cosFormer": (-1.496, -0.135),
    },
    "causal_cross": {"vanilla": (1.047, 0.867), "ABC": (-0.112, 0.228), "Performer": (-0.935, -1.094)},
}
