"""A study in the terminal: a table per task, one of costs, and the answer to which one to use."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnlab.arena.bench import Grid
from attnlab.arena.memory import as_text
from attnlab.arena.summary import Summary, number, score, sign, whole


def show(summary: Summary, console: Console) -> None:
    for task, rows in summary.rows.items():
        console.print(task_table(summary, task))
        _trouble(console, {row.mechanism: row.trouble for row in rows})
    if summary.sweeps:
        console.print(cost_table(summary))
        _trouble(console, {sweep["mechanism"]: sweep["reason"] for sweep in summary.sweeps})
    for name, grids in summary.grids.items():
        for grid in grids:
            # Not as the table's own title, which is folded into the width of a narrow table.
            console.print(f"\n[bold]{name}[/]: {escape(grid.title)}", highlight=False, soft_wrap=True)
            console.print(grid_table(grid))
        _trouble(console, dict(reasons(summary, name)))
    if summary.study.left_out:
        console.print(left_out(summary))
    if not summary.rows:
        return
    console.print(answer_table(summary))
    for task, answer in summary.answers.items():
        rest = escape(answer.sentence.removeprefix(answer.use))
        console.print(f"  [bold]{task}[/]: use [bold green]{answer.use}[/]{rest}", highlight=False, soft_wrap=True)


def task_table(summary: Summary, task: str) -> Table:
    about, answer = summary.study.about[task], summary.answers[task]
    better = "↓" if about["better"] == "lower" else "↑"
    table = _table(f"[bold]{task}[/]: {about['title']}")
    table.add_column("mechanism")
    for name in (f"{about['metric']} {better}", "parameters", "width/MLP", "FLOPs/token", "tokens/s"):
        table.add_column(name, justify="right")
    for row in summary.rows[task]:
        table.add_row(
            _name(row.mechanism, answer.tied),
            score(row) if row.mean is not None else f"[red]{row.trials[0]['status']}",
            whole(row.first("parameters")),
            f"{row.first('width') or '–'}/{row.first('hidden') or '–'}",
            number(row.first("flops_per_token")),
            number(row.median("tokens_per_second")),
        )
    name, value = about["trivial"]
    table.add_row(f"[dim]{name}", f"[dim]{number(value)}")
    return table


def cost_table(summary: Summary) -> Table:
    """Inference of the mechanism alone over lengths."""
    lengths = sorted({point["length"] for sweep in summary.sweeps for point in sweep["points"]})
    width = summary.sweeps[0].get("width", "–")
    table = _table(f"[bold]cost[/]: one call of one mechanism alone, batch 1, width {width}")
    table.add_column("mechanism")
    table.add_column("as")
    for name in (*(f"N={length:,}" for length in lengths), "memory", "time ~ N^", "FLOPs ~ N^", "decode step"):
        table.add_column(name, justify="right")
    for sweep in summary.sweeps:
        points = {point["length"]: point for point in sweep["points"]}
        peaks = [point["memory"] for point in sweep["points"] if point["memory"]]
        table.add_row(
            sweep["mechanism"],
            sweep["layout"],
            *(milliseconds(points.get(length, {}).get("seconds")) for length in lengths),
            as_text(peaks[-1]) if peaks else "–",
            number(sweep.get("growth")),
            number(sweep.get("flops_growth")),
            milliseconds(list(sweep["decode"].values())[-1]) if sweep.get("decode") else "–",
        )
    return table


def grid_table(grid: Grid) -> Table:
    """A benchmark's table; the best of each row and length stands out where there are several."""
    table = Table(header_style="dim", show_edge=False, pad_edge=False)
    table.add_column("")
    for column in grid.columns:
        table.add_column(column, justify="right")
    for name, values in grid.rows:
        best = grid.best_of(values)
        table.add_row(
            name, *(f"[green]{number(v)}" if i in best else number(v) for i, v in enumerate(values))
        )  # fmt: skip
    return table


def reasons(summary: Summary, benchmark: str) -> list[tuple[str, str]]:
    """What could not be measured, and why: each reason once, with the cases that it holds for."""
    why: dict[str, dict[str, None]] = {}
    for record in summary.measurements:
        if record["benchmark"] != benchmark:
            continue
        label = f"{next(iter(record['case'].values()))} · {record['mechanism']}"
        found = [record["reason"], *(p.get("reason", "") for p in record.get("points") or ())]
        found += [
            (p.get(n) or {}).get("reason", "") for p in record.get("points") or () for n in ("forward", "train")
        ]  # fmt: skip
        for reason in filter(None, found):
            why.setdefault(reason, {})[label] = None
    return [(_few(list(labels)), reason) for reason, labels in why.items()]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def left_out(summary: Summary) -> Table:
    table = _table("[bold]not in it[/], and why")
    table.add_column("mechanism")
    table.add_column("task")
    table.add_column("reason")
    reasons: dict[tuple[str, str], list[str]] = {}
    for task, mechanism, reason in summary.study.left_out:
        reasons.setdefault((mechanism, reason), []).append(task)
    for (mechanism, reason), tasks in reasons.items():
        table.add_row(mechanism, ", ".join(tasks), escape(reason))
    return table


def answer_table(summary: Summary) -> Table:
    """Mechanisms by tasks; the best and those as good within the spread stand out."""
    table = Table(title="\n[bold]Which one should I use here?", title_justify="left", title_style="")
    table.caption = "◀ what to use: the fastest to train of those within the best one's spread (green)"
    table.caption_justify = "left"
    table.add_column("mechanism")
    for task in summary.rows:
        about = summary.study.about[task]
        table.add_column(f"{task}\n[dim]{about['metric']} {'↓' if sign(about) > 0 else '↑'}", justify="right")
    answers = summary.answers
    for mechanism in summary.mechanisms:
        cells = []
        for task in summary.rows:
            row = summary.row(task, mechanism)
            text = "·" if row is None else score(row) if row.mean is not None else f"[red]{row.trials[0]['status']}"
            strong = row is not None and mechanism in answers[task].tied
            chosen = mechanism == answers[task].use
            cells.append(f"[bold green]{text} ◀" if chosen else f"[green]{text}" if strong else text)
        table.add_row(mechanism, *cells)
    table.add_section()
    table.add_row("[dim]without learning", *(f"[dim]{number(a['trivial'][1])}" for a in summary.study.about.values()))
    return table


def _table(title: str) -> Table:
    return Table(
        title=f"\n{title}", title_justify="left", title_style="", header_style="dim", show_edge=False, pad_edge=False
    )


def _trouble(console: Console, reasons: dict[str, str]) -> None:
    for mechanism, reason in reasons.items():
        if reason:
            console.print(f"  [red]{mechanism}: {escape(reason)}", highlight=False, soft_wrap=True)


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{number(1000 * seconds)} ms"


def _name(mechanism: str, tied: list[str]) -> str:
    return f"[green]{mechanism}" if mechanism in tied else mechanism
