"""The command line, `attnlab list | show | compare | bench | report | explain | lens | scale`, lazily imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnlab.arena.command import RESULTS, new_console, perform, split
from attnlab.arena.command import app as bench

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from attnlab.cards import Card
    from attnlab.patterns import Pattern

app = typer.Typer(
    help="A laboratory for attention: what there is, how it works, and which one to use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

app.add_typer(bench, name="bench")

_SEVERAL = "Comma-separated, or given several times."
_TASKS = "text, textures, photos-x2, series, recall, needle, lookup, causal-lookup, pixels"
Tasks = Annotated[list[str] | None, typer.Option(help=f"{_TASKS}; all of them. {_SEVERAL}")]
Mechanisms = Annotated[list[str] | None, typer.Option(help=f"Names from attnlab list; nine if not given. {_SEVERAL}")]


def main() -> None:
    """Runs the command line; what the user can mend is said in a sentence and ends with code 2."""
    from attnlab.arena.store import StoreError

    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, StoreError) as error:
        if isinstance(error, BrokenPipeError):  # `attnlab list | head`
            sys.exit(0)
        print(f"attnlab: {error}", file=sys.stderr)
        sys.exit(2)


@app.command("list")
def list_(
    family: Annotated[str | None, typer.Option(help="Such as softmax, sparse, linear.")] = None,
    kind: Annotated[str | None, typer.Option(help="Such as tokens, features, backbone, lm.")] = None,
    capability: Annotated[
        list[str] | None, typer.Option(help="Such as causal-self or streaming; several: all.")
    ] = None,
    cost: Annotated[str | None, typer.Option(help="linear, subquadratic, quadratic, or as on the card: 'N²'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What there is: every mechanism, network and recipe, filtered."""
    from attnlab import cards

    _one_of("family", family, {e.card.family for e in cards.entries()})
    _one_of("kind", kind, {k.value for k in cards.Kind})
    for name in capability or ():
        _one_of("capability", name, set(cards.Capability(-1).names()))
    found = [
        entry.card
        for entry in cards.entries()
        if (family is None or entry.card.family == family)
        and (kind is None or entry.card.kind.value == kind)
        and set(capability or ()) <= set(entry.card.capabilities.names())
        and (cost is None or _costs(entry.card, cost))
    ]
    if as_json:
        print(json.dumps([_as_data(card) for card in found], indent=1, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, header_style="dim")
    backbones = kind == cards.Kind.BACKBONE.value
    extra = ("sizes", "parameters, millions", "multiply-adds, billions") if backbones else ("kind", "cost")
    for column in ("name", "family", *extra, "capabilities", "paper"):
        table.add_column(column, overflow="fold")
    for card in found:
        about = _spans(card) if backbones else (card.kind.value, card.cost)
        table.add_row(f"[bold]{card.name}", card.family, *about, ", ".join(card.capabilities.names()), card.paper)
    new_console().print(table)
    print(f"{len(found)} of {len(cards.entries())}; attnlab show NAME says more")


@app.command()
def show(name: str) -> None:
    """What it is: equation, shapes, cost, paper, named sizes, and who sees whom, drawn."""
    import inspect

    from rich.text import Text

    from attnlab import cards

    card, target, console = cards.describe(name), cards.target(name), new_console()
    console.print(f"[bold]{card.name}[/]  {card.title}", highlight=False)
    paper = f"https://arxiv.org/abs/{card.paper}" if card.paper[:4].isdigit() else card.paper
    facts = {
        "paper": paper,
        "family": f"{card.family}, {card.kind.value}",
        "cost": card.cost + (f" (FLOPs grow as N^{card.growth:g})" if card.growth is not None else ""),
        "keeps": card.state.replace(" * ", "·").replace("layers", "Σ layers")
        + " numbers of N tokens" * (card.state != ""),
        "can": ", ".join(card.capabilities.names()),
        "built as": f"{target.__module__}.{target.__name__}",
        "not compiled": card.compiles,
        "not exported": card.exports,
    }
    for fact, text in facts.items():
        if text:
            console.print(Text.assemble((f"{fact:>13}  ", "dim"), text))
    console.print(Text("\n" + (inspect.getdoc(target) or "") + "\n"))
    if card.sizes:
        for size, about in card.sizes.items():
            work = _work(size) if card.kind is cards.Kind.BACKBONE else ""
            keeps = _keeps(card, target, about.arguments)
            console.print(Text(f"  {size}  {about.params:,} parameters{work}{keeps}"))
        return
    if card.kind in (cards.Kind.TOKENS, cards.Kind.FEATURES):
        from attnlab.arena import influence

        layout = influence.layout_of(card)
        where = "causal, 64 tokens" if layout == "causal" else "a grid of 64 tokens, row by row"
        console.print(f"who sees whom ({where}; queries down, keys across; darker for more):", highlight=False)
        console.print(Text(influence.as_text(influence.influence(name, layout))))


@app.command()
def compare(
    tasks: Tasks = None,
    mechanisms: Mechanisms = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trials per task and mechanism.")] = 3,
    budget: Annotated[str, typer.Option(help="small (minutes on a laptop) or medium (hours, or a GPU).")] = "small",
    out: Annotated[Path, typer.Option(help="Folder of the results file and the report.")] = Path("runs"),
    data: Annotated[Path | None, typer.Option(help="Your own: a text file, or a folder of images.")] = None,
    load: Annotated[list[Path] | None, typer.Option(help="A Python file that registers tasks or mechanisms.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; the GPU if there is one.")] = "",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trials side by side; one per core, or one on a GPU.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Spread the trials over the Ray cluster at this address, or 'local'.")
    ] = None,
) -> None:
    """Which one to use: trains all in the same network on the same data, measures, and writes a report.

    The same command goes on where it was stopped. Results are in OUT/results.sqlite, the report in OUT/report.
    """
    from attnlab.arena import study

    plan = study.plan(
        split(tasks), split(mechanisms), seeds=seeds, budget=budget, data=data, device=device, load=load or ()
    )
    perform(plan, out, workers=workers, ray=ray)


@app.command()
def report(
    out: Annotated[
        Path, typer.Argument(help="Where the results are: the folder given to compare, or the file.")
    ] = Path("runs"),
    to: Annotated[Path | None, typer.Option(help="Folder to write; OUT/report if not given.")] = None,
    study: Annotated[int | None, typer.Option(help="Number of the study; the last if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a report that is there.")] = False,
) -> None:
    """Write the report again: one HTML page that opens offline, with CSV and JSON beside it."""
    from attnlab.arena import report as pages
    from attnlab.arena.store import Store
    from attnlab.arena.summary import summarise

    results = out / RESULTS if out.is_dir() or not out.exists() else out
    with Store(results, must_exist=True) as store:
        page = pages.write(summarise(store, study), to or results.parent / "report", force=force)
    print(page)


@app.command()
def explain(
    pattern: Annotated[
        str, typer.Argument(help="Such as 'Causal()' or 'Window(256) | Sinks(4) & Causal()'.")
    ] = "Full()",
    length: Annotated[int, typer.Option(min=1, help="Queries.")] = 4096,
    keys: Annotated[int | None, typer.Option(min=1, help="Keys; as many as queries if not given.")] = None,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Key and value heads; as many as heads if not given.")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="float64, float32, float16 or bfloat16.")] = "float32",
    weighting: Annotated[str | None, typer.Option(help="softmax, sigmoid, relu, ….")] = None,
    train: Annotated[bool, typer.Option("--train", help="With gradients.")] = False,
    device: str = "cpu",
) -> None:
    """Which backend `attend` would use and why: supported or not, predicted FLOPs, bytes and time."""
    import torch

    from attnlab import explain as ask

    _one_of("dtype", dtype, {"float64", "float32", "float16", "bfloat16"})
    kind = getattr(torch, dtype)
    nk = keys or length

    def tensor(h: int, n: int) -> torch.Tensor:
        return torch.zeros(batch, h, n, head_dim, dtype=kind, device=device, requires_grad=train)

    q, k, v = tensor(heads, length), tensor(kv_heads or heads, nk), tensor(kv_heads or heads, nk)
    new_console().print(ask(q, k, v, pattern=parse_pattern(pattern), weighting=weighting))


@app.command()
def lens(
    model: Annotated[
        str,
        typer.Argument(help="Folder of a transformers or timm model, or a name: attnlab list, timm. Never downloaded."),
    ],
    given: Annotated[
        str, typer.Argument(metavar="INPUT", help="A text or text file; an image or a folder of them; a tensor file.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("lens.html"),
    layers: Annotated[str | None, typer.Option(help="Such as 0,2,5-7, -1 or '*self_attn'; all if not given.")] = None,
    heads: Annotated[str | None, typer.Option(help="Such as 0,3,5-8; all if not given.")] = None,
    prompt: Annotated[str, typer.Option(help="What is asked beside an image.")] = "",
    tokens: Annotated[int | None, typer.Option(min=1, help="Cut a text after so many tokens.")] = None,
    labels: Annotated[str | None, typer.Option(help="True classes of the inputs, such as 207 or 3,1,7.")] = None,
    weights: Annotated[Path | None, typer.Option(help="File of weights for a model given by name.")] = None,
    importance: Annotated[
        bool | None, typer.Option("--importance/--no-importance", help="A pass for each head; done if it is quick.")
    ] = None,
    metric: Annotated[str, typer.Option(help="jsd, abs_d_pred or cls_cos; with labels d_prob and acc_drop.")] = "jsd",
    mode: Annotated[str, typer.Option(help="leave_one_out, or keep_one of its layer.")] = "leave_one_out",
    ablate: Annotated[str, typer.Option(help="What a pruned head says: zero, or its mean.")] = "zero",
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
) -> None:
    """What its heads do: a summary here, and a page to look into every one of them."""
    from attnlab.lens import command

    command.run(
        model, given, out=out, layers=layers, heads=heads, prompt=prompt, tokens=tokens, labels=labels,
        weights=weights, importance=importance, metric=metric, mode=mode, ablate=ablate, seed=seed,
    )  # fmt: skip


@app.command(
    "scale", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def scale_(context: typer.Context) -> None:
    """Trains over ranks: torchrun --nproc-per-node 4 -m attnlab scale --length 4096 (--help says more)."""
    from attnlab.scale.__main__ import main as train

    train(context.args)


def parse_pattern(text: str) -> Pattern:
    """The pattern that an expression names: patterns with literal arguments, joined by & | ~ and brackets."""
    import ast

    from attnlab import patterns

    known = {name: cls for name in dir(patterns) if isinstance(cls := getattr(patterns, name), type)}
    known = {name: cls for name, cls in known.items() if issubclass(cls, patterns.Pattern)}

    def value(node: ast.expr) -> Pattern:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            _one_of("pattern", node.func.id, set(known))
            arguments = [ast.literal_eval(argument) for argument in node.args]
            return known[node.func.id](*arguments, **{k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg})
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
            return value(node.left) & value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return value(node.left) | value(node.right)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~value(node.operand)
        raise ValueError(f"pattern: {ast.unparse(node)!r} is not a pattern such as Window(256) or Sinks(4) & Causal()")

    try:
        return value(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"pattern: {text!r} cannot be read ({error.msg}); such as 'Window(256) | Sinks(4)'") from None


def _keeps(card: Card, target: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """How much a network of this size keeps of a text, if its card says so."""
    if not card.state:
        return ""
    import torch

    with torch.device("meta"):
        network = target(**arguments)
    longest = getattr(network, "length", None) or 65536
    return f", keeps {card.state_numbers(network, longest):,} numbers of {longest:,} tokens"


def _one_of(argument: str, name: str | None, known: set[str]) -> None:
    import difflib

    if name is None or name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    raise ValueError(f"{argument}: {name!r} is unknown; {hint}")


def _costs(card: Card, cost: str) -> bool:
    """Whether a card's cost is what was asked for: a word for its growth, or the card's own formula."""
    growth = card.growth
    words = {
        "linear": growth is not None and growth <= 1.15,
        "subquadratic": growth is not None and growth < 1.9,
        "quadratic": growth is not None and growth >= 1.9,
    }
    return words.get(cost, cost.replace(" ", "").lower() == card.cost.replace(" ", "").lower())


def _spans(card: Card) -> tuple[str, str, str]:
    """How many sizes a backbone has, and from where to where their parameters and multiply-adds go."""
    from attnlab.arena.summary import number
    from attnlab.models.flops import counted

    params = [size.params / 1e6 for size in card.sizes.values()]
    work = [counted()[name].flops / 2e9 for name in card.sizes if name in counted()]
    spans = [" – ".join(dict.fromkeys(map(number, (min(x), max(x))))) if x else "" for x in (params, work)]
    return str(len(params) or ""), spans[0], spans[1]


def _work(size: str) -> str:
    """The multiply-adds of a backbone's named size, as a phrase."""
    from attnlab.models.flops import counted

    found = counted().get(size)
    return f", {found.flops / 2e9:.2f} G multiply-adds at {found.size[0]}×{found.size[1]}" if found else ""


def _as_data(card: Card) -> dict:
    from attnlab.models.flops import counted

    return {
        "name": card.name,
        "title": card.title,
        "paper": card.paper,
        "system": card.system,
        "family": card.family,
        "kind": card.kind.value,
        "capabilities": card.capabilities.names(),
        "cost": card.cost,
        "growth": card.growth,
        "state": card.state,
        "sizes": {name: size.params for name, size in card.sizes.items()},
        "flops": {name: counted()[name].flops for name in card.sizes if name in counted()},
    }


if __name__ == "__main__":
    main()
