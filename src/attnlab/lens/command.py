"""What `attnlab lens` does: a summary in the terminal, and the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnlab.arena.command import new_console
from attnlab.lens import inputs, subject
from attnlab.lens.survey import Survey, survey


def run(
    model: str,
    given: str,
    *,
    out: Path,
    layers: str | None = None,
    heads: str | None = None,
    prompt: str = "",
    tokens: int | None = None,
    labels: str | None = None,
    weights: Path | None = None,
    importance: bool | None = None,
    metric: str = "jsd",
    mode: str = "leave_one_out",
    ablate: str = "zero",
    seed: int = 0,
) -> Survey:
    """Loads, looks, prints, writes; returns what was found."""
    console = new_console()
    if out.is_dir():
        raise IsADirectoryError(f"out: {out} is a folder; a file such as lens.html is wanted")
    chosen_layers, chosen_heads, truth = choice("layers", layers), numbers("heads", heads), numbers("labels", labels)
    looked_at = subject.load(model, weights=weights, seed=seed)
    shown = inputs.read(looked_at, given, prompt=prompt, most=tokens, labels=truth or ())
    params = sum(p.numel() for p in looked_at.model.parameters())
    console.print(
        f"[bold]{type(looked_at.model).__name__}[/] {model} ({looked_at.home}), {params:,} parameters; {shown.what}"
    )
    with console.status("looking") as status:
        found = survey(
            looked_at, shown, layers=chosen_layers, heads=chosen_heads, importance=importance, metric=metric,
            mode=mode, ablate=ablate, seed=seed, say=status.update,
            progress=lambda done, total: status.update(f"importance: {done} of {total} heads"),
        )  # fmt: skip
    found.view.title = f"{looked_at.name}: {shown.what}"
    found.view.facts = {
        "model": f"{type(looked_at.model).__name__} ({looked_at.home})",
        "parameters": f"{params:,}",
        "weights": f"random, seed {seed}" if looked_at.random else str(weights or model),
        "input": shown.what,
    }
    for note in found.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)
    summarise(found, console)
    page = found.view.write(out)
    console.print(f"\npage: {page} ({page.stat().st_size / 1e6:.1f} MB)", highlight=False, soft_wrap=True)
    return found


def choice(argument: str, text: str | None) -> list[int | str] | None:
    """'0,2,5-7' as numbers; what is no number stays, as the name or glob of a layer."""
    if text is None:
        return None
    found: list[int | str] = []
    for part in (p.strip() for p in text.split(",")):
        span = re.fullmatch(r"(\d+)-(\d+)", part)
        if span and int(span[1]) <= int(span[2]):
            found += range(int(span[1]), int(span[2]) + 1)
        elif re.fullmatch(r"-?\d+", part):
            found.append(int(part))
        elif part and not span:
            found.append(part)
        else:
            raise ValueError(f"{argument}: {text!r} cannot be read; such as 0,2,5-7")
    return found


def numbers(argument: str, text: str | None) -> list[int] | None:
    """`choice` where names make no sense."""
    found = choice(argument, text)
    words = [x for x in found or () if isinstance(x, str)]
    if words:
        raise ValueError(f"{argument}: {text!r} must be numbers, such as 0,2,5-7")
    return None if found is None else [x for x in found if isinstance(x, int)]


def summarise(found: Survey, console: Any) -> None:
    """A row for each layer: means over its heads, from the least to the most, and which head that is."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, header_style="dim")
    table.add_column("layer", justify="right")
    table.add_column("module", no_wrap=True)
    names = [m.name for m in found.view.measures]
    units = {m.name: m.unit for m in found.view.measures}
    for name in names:
        table.add_column(f"{name}, {units[name]}" if units[name] else name)
    for layer in found.layers:
        cells = [_spread(layer.measures[name], layer.heads) for name in names]
        table.add_row(str(layer.number), layer.name, *cells)
    console.print(table)
    console.print("mean over heads (least–most, and which head that is)", style="dim", highlight=False)
    if found.importance is not None:
        top = "  ".join(f"{layer}.{head}" for layer, head in _top(found))
        console.print(f"most important heads (layer.head): {top}", highlight=False)
    if found.strength is not None:
        mean, spread = found.strength.profile("distance")
        said = "  ".join(f"{m:.1f}±{s:.1f}" for m, s in zip(mean.tolist(), spread.tolist(), strict=True))
        console.print(f"expected hops by layer: {said}", highlight=False)
    if found.patterns is not None:
        said = ", ".join(f"{name} {count}" for name, count in found.patterns.counts().items())
        console.print(f"patterns: {said}", highlight=False)


def _spread(values: Sequence[float], heads: Sequence[int]) -> str:
    mean, low, high = sum(values) / len(values), min(values), max(values)
    if len(values) == 1:
        return _short(mean)
    return f"{_short(mean)} ({_short(low)}–{_short(high)} h{heads[list(values).index(high)]})"


def _short(value: float) -> str:
    """Two digits or the whole number, and no exponents where none are needed."""
    return (
        f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}" if abs(value) >= 1e-4 or not value else f"{value:.0e}"
    )


def _top(found: Survey, count: int = 8) -> list[tuple[int, int]]:
    keep_one = found.importance is not None and found.importance.mode == "keep_one"
    scored = [
        (score, layer.number, head)
        for layer in found.layers
        for score, head in zip(layer.measures["importance"], layer.heads, strict=True)
    ]
    scored.sort(key=lambda x: x[0], reverse=not keep_one)
    return [(layer, head) for _, layer, head in scored[:count]]
