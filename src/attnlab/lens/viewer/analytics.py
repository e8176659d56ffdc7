"""The analyses of a vision transformer as the page takes them: of the layers and heads that it shows."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnlab.lens.measures.pruning import Importance
from attnlab.lens.measures.spatial import Strength
from attnlab.lens.viewer.pack import quantised

_MEANING = {
    "jsd": "divergence of the answers, bits",
    "d_prob": "what the right class loses",
    "abs_d_pred": "change of the predicted class",
    "acc_drop": "accuracy lost",
    "cls_cos": "turn of what the classifier reads",
}


def importance(
    found: Importance, rows: Sequence[int], heads: Sequence[Sequence[int]], images: int, labelled: bool
) -> dict[str, Any]:
    def table(scores: Tensor) -> list[list[float | None]]:
        return [[_number(scores[row, h]) for h in kept] for row, kept in zip(rows, heads, strict=True)]

    pruned = "the head" if found.mode == "leave_one_out" else "all other heads of its layer"
    becomes = "zero" if found.ablate == "zero" else "its mean over the inputs"
    count = f"{images} input{'s' * (images > 1)}"
    _, correlation = found.correlation()
    return {
        "scores": {name: table(scores) for name, scores in found.scores.items()},
        "perClass": {name: [table(one) for one in scores] for name, scores in found.per_class.items()},
        "classes": found.classes.tolist(),
        "labelled": labelled,
        "meaning": {name: _MEANING.get(name, name) for name in found.scores},
        "smallest": found.mode == "keep_one",
        "correlation": [[_number(x) for x in row] for row in correlation],
        "about": f"What changes in the model's answer on {count} when the output of {pruned} becomes {becomes}"
        f"{'; the smallest change ranks first' if found.mode == 'keep_one' else ''}."
        f"{'' if labelled else ' Without labels, metrics that need the right class are left out.'}",
    }


def distance(
    found: Strength, rows: Sequence[tuple[int, int]], heads: Sequence[Sequence[int]], images: int
) -> dict[str, Any]:
    """`rows` pairs a row of `found` with a layer of the page."""
    return {
        "layers": [at for _, at in rows],
        "hop": found.hop,
        "sum": [[_list(found.sum[row, h]) for h in heads[at]] for row, at in rows],
        "mean": [[_list(found.mean[row, h]) for h in heads[at]] for row, at in rows],
        "distance": [[_number(found.distance[row, h]) for h in heads[at]] for row, at in rows],
        "prefix": [[_number(found.prefix_share[row, h]) for h in heads[at]] for row, at in rows],
        "hasPrefix": bool((found.prefix_share > 0).any()),
        "about": "Attention from patch to patch, by how many hops the patches are apart; the tokens before the patches "
        f"are left out. Mean over queries and {images} image{'s' * (images > 1)}. Dots are heads.",
    }


def patterns(
    found: Any, maps: Tensor, where: Sequence[tuple[int, int]], side: tuple[int, int], images: int
) -> dict[str, Any]:
    """`where` is the layer and head on the page of each map."""
    codes, _ = quantised(maps.flatten(1))
    centres, _ = quantised(found.centres.flatten(1))
    grid = f"{side[0]}×{side[1]}"
    return {
        "heads": [list(at) for at in where],
        "places": [_list(place) for place in found.places],
        "clusters": found.clusters.tolist(),
        "labels": found.labels,
        "cosines": _list(found.cosines),
        "side": maps.shape[-1],
        "maps": base64.b64encode(codes).decode(),
        "centres": base64.b64encode(centres).decode(),
        "about": f"Each dot is a head's map from patch to patch, on a grid of {grid}, of {images} "
        f"image{'s' * (images > 1)}. An autoencoder made a short code of each; codes are grouped by k-means and laid "
        "out by their principal axes. A name is that of the template with the highest cosine.",
    }


def _number(value: Any) -> float | None:
    value = float(value)
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _list(values: Tensor) -> list[float | None]:
    return [_number(x) for x in values.flatten().tolist()]
