"""`attnlab bench`: measures what operators cost, into the same results and report as `attnlab compare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Measure operators and mechanisms on published benchmarks.", no_args_is_help=True, rich_markup_mode="rich"
)
RESULTS = "results.sqlite"
INTERRUPTED = 130

Out = Annotated[Path, typer.Option(help="Folder of the results file and the report.")]
Budget = Annotated[str, typer.Option(help="small, medium or long: how far the lengths go.")]
Peers = Annotated[bool, typer.Option("--peers", help="Also FlexAttention, SDPA, natten, fla, x-transformers.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; the GPU if there is one.")]
Names = Annotated[list[str] | None, typer.Option(help="Comma-separated, or given several times; all if not given.")]
Numbers = Annotated[str | None, typer.Option(help="Comma-separated; the budget's if not given.")]


@app.command()
def longca(
    masks: Names = None, operators: Names = None, lengths: Numbers = None, heads: int = 8,
    kv_heads: int | None = None, head_dim: int = 64, dtype: str = "float32", sparsity: float = 0.9,
    ranks: Annotated[str, typer.Option(help="Also spread over so many processes, such as 2,4.")] = "",
    budget: Budget = "small", peers: Peers = False, device: Device = "", out: Out = Path("runs"),
) -> None:  # fmt: skip
    """Kernels under the masks of long-context training, then context parallelism under them (arXiv 2510.17896)."""
    from attnlab.arena.bench.longca import DYNAMIC, STATIC

    given = dict(lengths=whole_numbers(lengths), heads=heads, head_dim=head_dim, peers=peers)
    plan = planned(
        "longca", budget=budget, device=device, masks=split(masks), operators=split(operators), kv_heads=kv_heads,
        dtype=dtype, sparsity=sparsity, **given,
    )  # fmt: skip
    static = [mask for mask in split(masks) or STATIC if mask not in DYNAMIC]
    if ranks and static:
        plan += planned("scale", budget=budget, device="cpu", masks=static, ranks=whole_numbers(ranks), **given)
    perform(plan, out)


@app.command()
def ops(
    only: Names = None, lengths: Numbers = None, heads: int = 4, head_dim: int = 64, dtype: str = "float32",
    budget: Budget = "small", peers: Peers = False, device: Device = "", out: Out = Path("runs"),
) -> None:  # fmt: skip
    """`attend` and `scan`: the patterns and states that mechanisms stand on."""
    plan = planned(
        "ops", budget=budget, device=device, peers=peers, only=split(only), lengths=whole_numbers(lengths),
        heads=heads, head_dim=head_dim, dtype=dtype,
    )  # fmt: skip
    perform(plan, out)


@app.command()
def scale(
    plan: Annotated[bool, typer.Option("--plan", help="Measure nothing: say which method to use, and why.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="With --plan: how many.")] = 8,
    length: Annotated[str, typer.Option(help="With --plan: tokens, such as 131072, 128K or 2M.")] = "128K",
    machine: Annotated[str, typer.Option(help="With --plan: a100, h100 or h200.")] = "h100",
    linear: Annotated[float, typer.Option(help="With --plan: the share of layers that keep a state.")] = 0.0,
    masks: Names = None, methods: Names = None, ranks: Annotated[str, typer.Option(help="Processes.")] = "2,4",
    lengths: Numbers = None, heads: int = 4, head_dim: int = 64, budget: Budget = "small", peers: Peers = False,
    out: Out = Path("runs"),
) -> None:  # fmt: skip
    """Context parallelism × masks × ranks on processes of this machine, or which method to use on many GPUs."""
    if plan:
        from attnlab.scale import plan as ask
        from attnlab.scale.plan import Model

        new_console().print(str(ask(gpus=gpus, length=length, model=Model(linear=linear), machine=machine)))
        return
    measured = planned(
        "scale", budget=budget, device="cpu", peers=peers, masks=split(masks), methods=split(methods),
        ranks=whole_numbers(ranks), lengths=whole_numbers(lengths), heads=heads, head_dim=head_dim,
    )  # fmt: skip
    perform(measured, out)


@app.command()
def cab(
    size: Annotated[str, typer.Option(help="tiny (a minute a trial), medium (for a GPU), paper (its data).")] = "tiny",
    patterns: Annotated[list[str] | None, typer.Option(help="Of ns, cs, nc, cc: (non)causal self and cross.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Such as cab-lm-cs; those of the patterns if none.")] = None,
    mechanisms: Annotated[list[str] | None, typer.Option(help="Names from attnlab list; 13 if not given.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trials per task and mechanism.")] = 1,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the benchmark's own data.")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Also torch's, x-transformers', natten's, fla's.")] = False,
    load: Annotated[list[Path] | None, typer.Option(help="A Python file that registers mechanisms.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Trials side by side.")] = None,
    ray: Annotated[str | None, typer.Option(help="Spread the trials over a Ray cluster, or 'local'.")] = None,
    device: Device = "", out: Out = Path("runs"),
) -> None:  # fmt: skip
    """Trains mechanisms on four patterns of attention: indices, efficiency lengths, benefit (arXiv 2210.07661)."""
    from attnlab.arena.bench.cab import plan

    trials = plan(
        size, patterns=split(patterns), tasks=split(tasks), mechanisms=split(mechanisms), seeds=seeds, data=data_dir,
        device=device, peers=peers, load=load or (),
    )  # fmt: skip
    perform(trials, out, workers=workers, ray=ray)


def planned(name: str, *, budget: str, device: str, **options: Any) -> Any:
    """The plan of a benchmark."""
    from attnlab.arena import study
    from attnlab.arena.bench import curve

    if budget not in curve.LENGTHS:
        raise ValueError(f"budget: {budget!r} is not one of {', '.join(curve.LENGTHS)}")
    return study.plan_benchmark(name, budget=budget, device=device, **options)


def perform(
    plan: Any, out: Path, *, workers: int | None = None, ray: str | None = None,
    after: Callable[[Any], None] = lambda summary: None,
) -> None:  # fmt: skip
    """Does what a plan lacks, with progress, tables and the report; Ctrl-C stops, the same command goes on."""
    from attnlab.arena import report as pages
    from attnlab.arena import study, tables
    from attnlab.arena.live import Live
    from attnlab.arena.store import Store
    from attnlab.arena.summary import summarise

    console, folder = new_console(), out / "report"
    pages.check(folder, force=pages.is_ours(folder))  # now, not after the last trial
    with Store(out / RESULTS) as store:
        ahead = study.missing(plan.jobs, store)
        already = f", {len(plan.jobs) - len(ahead)} of them done before" if len(ahead) < len(plan.jobs) else ""
        parts = ((plan.trials, "trials"), (plan.sweeps, "cost sweeps"), (plan.measurements, "measurements"))
        count = " and ".join(f"{len(jobs)} {what}" for jobs, what in parts if jobs) + already
        console.print(f"{count}; results in {store.path}. Ctrl-C stops, the same command goes on.", highlight=False)
        try:
            with Live(ahead, workers or study.side_by_side(plan.settings["device"]), console) as live:
                done = study.run(plan, store, command=study.command_line(), workers=workers, ray=ray, watch=live)
        except KeyboardInterrupt:
            left = len(study.missing(plan.jobs, store))
            console.print(
                f"Stopped. {len(plan.jobs) - left} of {len(plan.jobs)} jobs are kept; the same command goes on."
            )
            raise typer.Exit(INTERRUPTED) from None
        summary = summarise(store, done.id)
        tables.show(summary, console)
        after(summary)
        page = pages.write(summary, folder, force=pages.is_ours(folder))
        console.print(f"\nreport: {page}", highlight=False, soft_wrap=True)


def new_console() -> Any:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width: tables are not to be folded into 80 columns
        console.width = 160
    return console


def split(names: list[str] | None) -> list[str]:
    return [name.strip() for given in names or () for name in given.split(",") if name.strip()]


def whole_numbers(text: str | None) -> list[int]:
    try:
        return [int(word) for word in (text or "").split(",") if word.strip()]
    except ValueError:
        raise ValueError(f"lengths must be whole numbers such as 1024,4096, got {text!r}") from None
