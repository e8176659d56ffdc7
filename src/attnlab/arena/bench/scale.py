"""Context parallelism × masks × ranks, on processes of this machine: time, bytes sent, how even the work is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from attnlab.arena.bench import Grid, Progress, pivot
from attnlab.arena.bench.longca import DYNAMIC, MASKS
from attnlab.arena.bench.ranks import LASP2, TORCHS

TITLE = "sequences spread over ranks, forward and backward"
METHODS = ("ring", "double ring", "allgather", "ulysses", "usp", LASP2)
ALONE = "one process"
STATE = "state"
LENGTHS = {"small": (1024, 4096), "medium": (4096, 16_384), "long": (16_384, 65_536)}
_MASKS = ("causal", "full", "sliding_window_causal", "causal_document", "share_question", STATE)
_PATIENCE = 600.0  # seconds for all lengths of a case


def cases(
    budget: str = "small", *, peers: bool = False, masks: Sequence[str] = (), methods: Sequence[str] = (),
    ranks: Sequence[int] = (2, 4), lengths: Sequence[int] = (), heads: int = 4, head_dim: int = 64, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """One case per mask, method and number of ranks, and one process of each mask to compare with.

    The mask "state" is no mask: it is the scan of a linear attention, which lasp2 spreads.
    """
    known = [name for name in (*MASKS, STATE) if name not in DYNAMIC]
    for name, given, there in (("masks", masks, known), ("methods", methods, (*METHODS, TORCHS))):
        unknown = [x for x in given if x not in there]
        if unknown:
            raise ValueError(f"{name}: {', '.join(unknown)} unknown; there are {', '.join(there)}")
    if not ranks or min(ranks) < 2:
        raise ValueError(f"ranks must be 2 or more, got {list(ranks)}")
    asked = list(methods) or [*METHODS, *([TORCHS] if peers else [])]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = dict(
        lengths=list(lengths) or list(LENGTHS[budget]), heads=heads, head_dim=head_dim, seed=seed, threads=cores
    )
    found = []
    for mask in masks or _MASKS:
        found.append({"mask": mask, "method": ALONE, "ranks": 1, "operator": ALONE, **shared})
        for method in asked:
            if (method == LASP2) != (mask == STATE):
                continue
            for count in ranks:
                if method in ("usp", "double ring") and (count < 4 or count % 2):  # two groups of two at the least
                    continue
                name = f"{method} × {count}"
                found.append({"mask": mask, "method": method, "ranks": count, "operator": name, **shared})
    return found


def measure(case: dict, device: str, progress: Progress) -> dict:
    """Runs the case in processes of its own, so that a rank that hangs or dies costs no more than the case."""
    record = {"mechanism": case["operator"], "case": case, "status": "done", "reason": "", "points": []}
    try:
        run = subprocess.run(
            [sys.executable, "-m", "attnlab.arena.bench.ranks"], input=json.dumps(case), capture_output=True,
            text=True, timeout=_PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {**record, "status": "failed", "reason": f"no end after {_PATIENCE:.0f} s"}
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no word"])[-1]
        return {**record, "status": "failed", "reason": last[:300]}
    progress(1.0)
    return {**record, "points": json.loads(run.stdout.strip().splitlines()[-1])}


def grids(records: Sequence[dict]) -> list[Grid]:
    alone = {
        (r["case"]["mask"], p["length"]): p.get("seconds")
        for r in records if r["case"]["method"] == ALONE for p in r.get("points") or ()
    }  # fmt: skip
    spread = [r for r in records if r["case"]["method"] != ALONE]

    def milliseconds(record: dict, point: dict) -> float | None:
        return None if point.get("seconds") is None else 1e3 * point["seconds"]

    def times(record: dict, point: dict) -> float | None:
        one = alone.get((record["case"]["mask"], point["length"]))
        return one / point["seconds"] if one and point.get("seconds") else None

    def sent(record: dict, point: dict) -> float | None:
        return None if point.get("sent") is None else point["sent"] / 2**20

    return [
        pivot("forward and backward, ms", records, "mask", milliseconds, best="low"),
        pivot("time of one process over it (processes share this machine's cores)", spread, "mask", times, best="high"),
        pivot("sent by the rank that sends most, MiB", spread, "mask", sent, best="low"),
        pivot("pairs of the busiest rank over the mean", spread, "mask", lambda r, p: p.get("balance"), best="low"),
    ]
