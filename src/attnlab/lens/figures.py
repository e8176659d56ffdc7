"""The figures of an analysis of a vision transformer, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlab.lens.analytics import Analysis


def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """importance.png (heads coloured, a panel a metric), strength.png (curves by layer and hop), patterns.png."""
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, draw_one in (("importance", _importance), ("strength", _strength), ("patterns", _patterns)):
        figure = Figure(layout="constrained")
        draw_one(figure, analysis)
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=130)
    return made


def _importance(figure: Any, analysis: Analysis) -> None:
    found = analysis.importance
    figure.set_size_inches(3.2 * len(found.scores), 3.6)
    for axes, (metric, scores) in zip(
        figure.subplots(1, len(found.scores), squeeze=False)[0], found.scores.items(), strict=True
    ):
        shown = axes.imshow(scores.numpy(), cmap="viridis", aspect="auto")
        axes.set(title=metric, xlabel="head", ylabel="layer")
        figure.colorbar(shown, ax=axes)
        ranks = found.ranks(metric)
        for layer, head in found.top(5, metric):
            axes.text(head, layer, int(ranks[layer, head]), ha="center", va="center", color="white", weight="bold")
    figure.suptitle(f"{found.mode.replace('_', ' ')}, {found.ablate}; numbers: the first five ranks")


def _strength(figure: Any, analysis: Analysis) -> None:
    found = analysis.strength
    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    mean, spread = found.profile("distance")
    layers = list(range(len(mean)))
    left.plot(layers, mean.numpy())
    left.fill_between(layers, (mean - spread).numpy(), (mean + spread).numpy(), alpha=0.2)
    for head in found.distance.unbind(1):
        left.plot(layers, head.numpy(), ".", color="gray", markersize=4)
    left.set(xlabel="layer", ylabel="expected hops", title="How far layers look: mean ± deviation over heads")
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    for layer, curve in enumerate(found.profile("sum")[0]):
        right.plot(curve.numpy(), color=colours(layer / max(1, len(mean) - 1)), label=f"layer {layer}")
    right.set(xlabel=f"hops ({found.hop})", ylabel="strength, sum", title="Strength by hop, mean over heads")
    right.legend(fontsize=7, ncols=2)


def _patterns(figure: Any, analysis: Analysis) -> None:
    found = analysis.patterns
    groups = len(found.centres)
    figure.set_size_inches(11, 5)
    left, right = figure.subfigures(1, 2)
    axes = left.subplots()
    axes.scatter(*found.places.T.numpy(), c=found.clusters.numpy(), cmap="tab10", s=14, vmin=0, vmax=9)
    axes.set(title="Maps by their codes, coloured by cluster", xlabel="first axis", ylabel="second axis")
    columns = 3
    for g, cell in enumerate(right.subplots(-(-groups // columns), columns, squeeze=False).flat):
        cell.set_axis_off()
        if g < groups:
            cell.imshow(found.centres[g].numpy(), cmap="magma")
            names = [name for name, c in zip(found.labels, found.clusters.tolist(), strict=True) if c == g]
            cell.set_title(f"{g}: {len(names)} maps, {max(set(names), key=names.count)}", fontsize=8)
