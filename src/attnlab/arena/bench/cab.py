"""The Comprehensive Attention Benchmark (arXiv 2210.07661): four patterns of attention, their tasks and indices."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnlab.arena.bench import Grid
from attnlab.arena.bench import cab_index as index
from attnlab.arena.bench.cab_index import METRICS, PATTERNS, Metric
from attnlab.cards import BENCHMARK, Card, register

if TYPE_CHECKING:
    from attnlab.arena.study import Plan
    from attnlab.arena.summary import Summary
    from attnlab.arena.task import Task
    from attnlab.arena.tasks.cab.base import CabTask

TITLE = "efficient attentions on long sequences, in deviations between mechanisms"
SIZES = ("tiny", "medium", "paper")
SHORT = dict(zip(("ns", "cs", "nc", "cc"), PATTERNS, strict=True))
VANILLA = "multihead"
# Vanilla attention, the methods of the benchmark, and some others.
MECHANISMS = (
    VANILLA, "sliding_window", "abc", "nystrom", "performer", "lara", "cosformer", "prob_sparse", "transformer_ls",
    "s4d", "linear", "gated", "kda",
)  # fmt: skip
PEERS = ("peer_torch", "peer_x_transformers", "peer_natten", "peer_fla")
Scores = dict[tuple[str, str], float | None]


@register(
    Card(
        name="cab",
        title="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling",
        paper="2210.07661",
        family="arena",
        kind=BENCHMARK,
    )
)
def plan(
    size: str = "tiny", *, patterns: Sequence[str] = (), tasks: Sequence[str] = (), mechanisms: Sequence[str] = (),
    seeds: int = 1, data: Path | str | None = None, device: str = "", peers: bool = False,
    load: Sequence[Path | str] = (),
) -> Plan:  # fmt: skip
    """The trials of the benchmark: each mechanism on the tasks of every pattern that its card claims, and its costs.

    The four patterns are noncausal and causal self attention (ns, cs) and cross attention (nc, cc). A mechanism stands
    in the same network as all others, with the same parameters, steps and batches; that network without any mechanism
    says what attention is good for. Cost is measured over lengths. Source: arXiv 2210.07661.

    Args:
        size: "tiny" (about a minute for a trial on a CPU) and "medium" (for a GPU) on data that are generated or come
            with installed packages; "paper" on the benchmark's own, at its lengths and sizes.
        patterns: of ns, cs, nc, cc; all if none.
        tasks: names such as cab-lm-cs; all of the patterns if none.
        data: the folder with the benchmark's data, for "paper".
        peers: also attention of other packages, of those that are installed.
        load: Python files that register mechanisms.
    """
    from attnlab.arena import jobs, study

    if size not in SIZES:
        raise ValueError(f"size: {size!r} is not one of {', '.join(SIZES)}")
    if seeds < 1:
        raise ValueError(f"seeds: {seeds} is not a number of seeds; at least 1 is wanted")
    if data is not None and not Path(data).is_dir():
        raise FileNotFoundError(f"data: {data} is not a folder; the one that holds the benchmark's data is wanted")
    if data is None and size == "paper":
        raise ValueError("data: the published size reads the benchmark's own data; give their folder with --data-dir")
    unknown = [name for name in patterns if name not in SHORT]
    if unknown:
        raise ValueError(f"patterns: {', '.join(unknown)} unknown; there are {', '.join(SHORT)}")
    device = study.device_of(device)
    jobs.load_files(load)
    names = study.contestants(mechanisms, MECHANISMS)
    absent: list[list[str]] = []
    if peers:
        file = Path(__file__).parent.with_name("peers.py")
        jobs.load_files([file])
        load = [*load, file]  # in worker processes too
        missing = sys.modules["attnlab_loaded_peers"].ABSENT
        names += [name for name in PEERS if name not in missing]
        absent += [["all", name, reason] for name, reason in missing.items()]
    budget = f"cab-{size}"
    chosen = []
    for cls in _chosen(budget, patterns, tasks):
        try:
            chosen.append(cls(budget, data))
        except ImportError as error:
            if tasks:
                raise
            absent.append([cls.name, "all", str(error)])
    return study.lay_out(
        chosen, names, seeds=seeds, budget=budget, data=data, device=device, load=load, left_out=absent,
        benchmark="cab",
    )  # fmt: skip


def _chosen(budget: str, patterns: Sequence[str], names: Sequence[str]) -> list[type[Task]]:
    """The tasks by name, or all; of these patterns, in the order of the patterns."""
    from attnlab.arena.task import find_task

    every = of_budget(budget)
    wanted = list(dict.fromkeys(find_task(name) for name in names)) or every
    for cls in wanted:
        if cls not in every:
            raise ValueError(f"tasks: {cls.name} has no size {budget}; there are {', '.join(c.name for c in every)}")
    kept = [SHORT[name] for name in patterns] or list(PATTERNS)
    left = [cls for pattern in kept for cls in wanted if _pattern(cls) == pattern]
    if not left:
        raise ValueError(f"tasks: none of {', '.join(names)} belongs to {', '.join(patterns)}")
    return left


def of_budget(budget: str) -> list[type[CabTask]]:
    """The benchmark's tasks that have such a budget."""
    from attnlab.arena.task import tasks
    from attnlab.arena.tasks.cab.base import CabTask

    return [cls for cls in tasks().values() if issubclass(cls, CabTask) and budget in cls.budgets]


def _pattern(cls: type[Task]) -> str:
    from attnlab.arena.tasks.cab.base import PATTERN_OF

    return PATTERN_OF[cls.layout]


# tables --------------------------------------------------------------------------------------------


def tables(summary: Summary) -> list[Grid]:
    """Indices of each pattern, what attention is good for, how patterns correlate, and efficiency lengths."""
    from attnlab.arena.network import NONE

    scores = collect(summary)
    published = summary.study.settings["budget"] == "cab-paper"
    found, totals = [], {}
    benefit = Grid(f"benefit of attention: indices of {VANILLA}, less those without any", [])
    for pattern, by_mechanism in scores.items():
        metrics = METRICS[pattern] if published else index.scaled(
            {name: s for name, s in by_mechanism.items() if name != NONE}, _signs(pattern)
        )  # fmt: skip
        if not metrics:
            continue
        indices = {
            name: index.compositional_index(metrics, [s.get((m.task, m.name)) for m in metrics])
            for name, s in by_mechanism.items()
        }
        found.append(_indices(pattern, metrics, indices, published))
        totals[pattern] = {name: i.total for name, i in indices.items() if name != NONE}
        if VANILLA in indices and NONE in indices:
            with_it, without = ([by_mechanism[n].get((m.task, m.name)) for m in metrics] for n in (VANILLA, NONE))
            _add_benefit(benefit, pattern, index.benefit_of_attention(metrics, with_it, without))  # type: ignore[arg-type]
    return [grid for grid in (*found, benefit, _correlations(totals), _efficiency(summary)) if grid.rows]


def collect(summary: Summary) -> dict[str, dict[str, Scores]]:
    """pattern → mechanism → (task, metric) of the benchmark → score, the mean over seeds and over the tasks of it."""
    from attnlab.arena.task import find_task
    from attnlab.arena.tasks.cab.base import CabTask

    of_all = of_budget(summary.study.settings["budget"])
    found: dict[str, dict[str, dict[tuple[str, str], list[float]]]] = {}
    parts: dict[tuple[str, str, str], int] = {}  # how many tasks make up a metric
    for cls in of_all if summary.study.settings["budget"] == "cab-paper" else map(find_task, summary.rows):
        if issubclass(cls, CabTask):
            for metric in cls.signs:
                key = (_pattern(cls), cls.about, cls.prefix + metric)
                parts[key] = parts.get(key, 0) + 1
    for name, rows in summary.rows.items():
        cls = find_task(name)
        if not issubclass(cls, CabTask):
            continue
        for row in rows:
            scores = found.setdefault(_pattern(cls), {}).setdefault(row.mechanism, {})
            for metric, value in metrics_of(row.trials).items():
                scores.setdefault((cls.about, cls.prefix + metric), []).append(value)
    complete: dict[str, dict[str, Scores]] = {}
    for pattern in (p for p in PATTERNS if p in found):
        for mechanism, by_key in found[pattern].items():
            every = complete.setdefault(pattern, {}).setdefault(mechanism, {})
            for (of, task, metric), wanted in parts.items():
                if of == pattern:
                    values = by_key.get((task, metric), [])
                    every[task, metric] = sum(values) / wanted if len(values) == wanted else None
    return complete


def metrics_of(trials: Sequence[Mapping]) -> dict[str, float]:
    """The benchmark's metrics of the trials that came to a score, averaged."""
    from attnlab.arena.tasks.cab.base import METRICS as NAME

    done = [trial["details"][NAME] for trial in trials if trial["status"] == "done" and NAME in trial["details"]]
    return {name: sum(d[name] for d in done) / len(done) for name in done[0]} if done else {}


def _signs(pattern: str) -> dict[str, int]:
    return {
        cls.prefix + metric: sign
        for budget in ("cab-tiny", "cab-medium", "cab-paper")
        for cls in of_budget(budget)
        if _pattern(cls) == pattern
        for metric, sign in cls.signs.items()
    }


def _indices(pattern: str, metrics: Sequence[Metric], indices: Mapping[str, index.Index], published: bool) -> Grid:
    tasks = list(dict.fromkeys(m.task for m in metrics))
    scale = "μ and σ as published" if published else "μ and σ of these runs"
    grid = Grid(f"compositional index, {_words(pattern)} ({scale}, more is better)", ["index", *tasks])
    ordered = sorted(indices.items(), key=lambda item: -(-1e9 if item[1].total is None else item[1].total))
    grid.rows = [(name, [i.total, *(i.tasks.get(task) for task in tasks)]) for name, i in ordered]
    return grid


def _add_benefit(grid: Grid, pattern: str, benefit: index.Index) -> None:
    grid.columns = ["deviations"]
    grid.rows.append((_words(pattern), [benefit.total]))
    grid.rows += [(f"{_words(pattern)} · {task}", [value]) for task, value in benefit.tasks.items()]


def _correlations(totals: Mapping[str, Mapping[str, float | None]]) -> Grid:
    found = index.correlations(totals)
    grid = Grid("correlation of the patterns' indices over mechanisms", [_words(p) for p in totals])
    for a in totals:
        row = [1.0 if a == b else found.get((a, b), found.get((b, a))) for b in totals]
        grid.rows.append((_words(a), row))
    return grid if any(v is not None for v in found.values()) else Grid("", [])


def _efficiency(summary: Summary) -> Grid:
    """From where on each mechanism costs less than vanilla attention, of the layout that both were measured in."""
    grid = Grid(f"efficiency length: tokens from which on it costs less than {VANILLA}", ["time", "memory"])
    vanilla = {s["layout"]: s for s in summary.sweeps if s["mechanism"] == VANILLA}
    seen = set()
    for sweep in sorted(summary.sweeps, key=lambda s: s["layout"] != "self"):  # as measured by the authors, if it can
        name, other = sweep["mechanism"], vanilla.get(sweep["layout"])
        if name == VANILLA or other is None or name in seen:
            continue
        seen.add(name)
        # The authors leave the shortest length out of the line through times.
        kinds = (("seconds", 1), ("memory", 0))
        cells = [_crossing(other["points"], sweep["points"], quantity, skip) for quantity, skip in kinds]
        grid.rows.append((name if sweep["layout"] == "self" else f"{name} ({sweep['layout']})", cells))
    return grid if any(v is not None for _, row in grid.rows for v in row) else Grid("", [])


def _crossing(vanilla: Sequence[Mapping], efficient: Sequence[Mapping], quantity: str, skip: int) -> float | None:
    costs = [{p["length"]: p[quantity] for p in points if p[quantity]} for points in (vanilla, efficient)]
    lengths = [n for n in costs[0] if n in costs[1]]
    if len(lengths) < max(3, 2 + skip):
        return None
    return index.efficiency_length(lengths, *([c[n] for n in lengths] for c in costs), skip=skip).length


def _words(pattern: str) -> str:
    return pattern.replace("_", " ")
