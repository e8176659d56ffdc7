"""Every causal mechanism at equal parameters on recall, needle and text, and its cost up to 65,536 tokens.

    python benchmarks/causal_study.py [--seeds 2] [--out runs/causal] [--workers 2] [--skip-curves] [--skip-trials]
                                      [--write docs/causal_study.md]

Trials are those of `attnlab compare` (one network, data and budget for all; one thread each), and so is the store: the
same command goes on where it was stopped. Curves are inference of one mechanism alone, batch 1, width 64, on all cores;
give them a quiet machine. `--write` puts the table between the two marks of a page.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from attnlab import cards
from attnlab.arena import jobs, study
from attnlab.arena.measure import LENGTHS
from attnlab.arena.memory import as_text
from attnlab.arena.network import takes_part
from attnlab.arena.pool import Event
from attnlab.arena.store import Store
from attnlab.arena.summary import Row, number, score
from attnlab.arena.tables import milliseconds
from attnlab.arena.task import CAUSAL, find_task

TASKS = ("recall", "needle", "text")
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"


def causal() -> list[str]:
    """Every mechanism that can take part in all three tasks."""
    return [name for name in cards.names(kind="tokens") if not any(takes_part(name, find_task(t)) for t in TASKS)]


def say(event: Event) -> None:
    if event.record is not None:
        record = event.record
        what = f"{record.get('task') or 'cost':<7} {event.job.mechanism:<18} {record['status']}"
        print(
            f"{what}  {number(record.get('score'))}  {record.get('reason', '')}  {record['seconds']:.0f} s", flush=True
        )


def table(rows: dict[tuple[str, str], Row], curves: dict[str, dict], about: dict[str, dict]) -> str:
    """One row per mechanism, the best at recall first."""
    lengths = LENGTHS["long"][2:]
    head = ["mechanism", *(f"{task}: {about[task]['metric']}" for task in TASKS), *(f"N = {n:,}" for n in lengths)]
    head += ["memory", "time ~ N^", "FLOPs ~ N^", "next token at 4,096"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    names = dict.fromkeys(name for _, name in rows)
    for name in sorted(names, key=lambda n: -(rows[TASKS[0], n].mean or 0.0) if (TASKS[0], n) in rows else 1.0):
        found = [rows.get((task, name)) for task in TASKS]
        cells = [
            name,
            *("–" if row is None else score(row) if row.scores else row.trials[0]["status"] for row in found),
        ]
        curve = curves.get(name, {})
        points = {point["length"]: point for point in curve.get("points", ())}
        peaks = [point["memory"] for point in points.values() if point["memory"]]
        decode = list((curve.get("decode") or {}).values())
        cells += [milliseconds(points.get(n, {}).get("seconds")) for n in lengths]
        cells += [as_text(peaks[-1]) if peaks else "–", number(curve.get("growth")), number(curve.get("flops_growth"))]
        lines.append("| " + " | ".join([*cells, milliseconds(decode[-1]) if decode else "–"]) + " |")
    trivial = [number(about[task]["trivial"][1]) for task in TASKS]
    lines.append("| *without learning* | " + " | ".join(trivial) + " |" + " |" * (len(head) - 4))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/causal"))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--only", help="comma-separated mechanisms")
    parser.add_argument("--skip-curves", action="store_true")
    parser.add_argument("--skip-trials", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    names = options.only.split(",") if options.only else causal()
    plan = study.plan(TASKS, names, seeds=options.seeds)
    plan.sweeps = [jobs.sweep(name, CAUSAL, "long", plan.settings["device"], study.cores()) for name in names]
    todo = replace(
        plan,
        trials=[] if options.skip_trials else plan.trials,
        sweeps=[] if options.skip_curves else plan.sweeps,
    )
    print(f"{len(names)} mechanisms, {len(todo.trials)} trials, {len(todo.sweeps)} cost curves", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with Store(options.out / "results.sqlite") as store:
        study.run(todo, store, workers=options.workers, watch=say)
        held = store.results()
    trials: dict[tuple[str, str], list[dict]] = {}
    for job in plan.trials:
        if job.key in held:
            trials.setdefault((job.task, job.mechanism), []).append(held[job.key])
    rows = {key: Row(*key, found) for key, found in trials.items()}
    curves = {job.mechanism: held[job.key] for job in plan.sweeps if job.key in held}
    text = table(rows, curves, plan.about)
    print("\n" + text)
    if options.write:
        page = options.write.read_text()
        options.write.write_text(f"{page.split(BEGIN)[0]}{BEGIN}\n{text}\n{END}{page.split(END)[1]}")


if __name__ == "__main__":
    main()
