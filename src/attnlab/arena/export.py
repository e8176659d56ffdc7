"""A study as plain data: CSV for spreadsheets, JSON for programs."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict

from attnlab.arena.summary import Summary

_TRIAL = (
    "task", "mechanism", "seed", "status", "reason", "score", "parameters", "width", "hidden", "flops_per_token",
    "tokens_per_second", "seconds",
)  # fmt: skip
_SWEEP = ("mechanism", "layout", "width", "length", "seconds", "memory", "flops", "reason")


def trials_csv(summary: Summary) -> str:
    """One line per trial."""
    rows = [trial for task in summary.rows.values() for row in task for trial in row.trials]
    return _csv(_TRIAL, rows)


def sweeps_csv(summary: Summary) -> str:
    """One line per mechanism and length."""
    rows = [{**sweep, **point} for sweep in summary.sweeps for point in sweep.get("points", ())]
    return _csv(_SWEEP, rows)


def measurements_csv(summary: Summary) -> str:
    """One line per case of a benchmark and length; nested numbers by their path, "forward.seconds"."""
    rows = []
    for record in summary.measurements:
        case = {name: value for name, value in record["case"].items() if not isinstance(value, (list, dict))}
        about = {"benchmark": record["benchmark"], **case, "status": record["status"], "reason": record["reason"]}
        rows += [{**about, **_flat(point)} for point in record.get("points") or [{}]]
    return _csv(tuple(dict.fromkeys(name for row in rows for name in row)), rows)


def _flat(values: dict, prefix: str = "") -> dict:
    found: dict = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def as_json(summary: Summary) -> str:
    """Everything: the study, its trials with curves and details, its sweeps, and the answers."""
    return json.dumps(
        {
            "study": asdict(summary.study),
            "trials": [trial for task in summary.rows.values() for row in task for trial in row.trials],
            "sweeps": summary.sweeps,
            "measurements": summary.measurements,
            "tables": {name: [asdict(grid) for grid in grids] for name, grids in summary.grids.items()},
            "answers": {task: asdict(answer) for task, answer in summary.answers.items()},
        },
        indent=1,
        ensure_ascii=False,
    )


def _csv(fields: tuple[str, ...], rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
