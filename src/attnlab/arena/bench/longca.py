"""The Long-Context Attention Benchmark (arXiv 2510.17896): operators × masks × lengths, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

from attnlab.arena.bench import Grid, Progress, curve, pivot
from attnlab.arena.bench.operators import OURS, chosen
from attnlab.cards import BENCHMARK, Card, register
from attnlab.patterns import Full, Pattern
from attnlab.patterns.training import DOCUMENTS, STATIC, Setting, area, document_lengths, flops, mask
from attnlab.routing import Route
from attnlab.routing.random_blocks import block_sparse

TITLE = "kernels under the masks of long-context training, GFLOP/s by the pairs that a mask shows"
DYNAMIC = {"block_sparse": False, "variable_block_sparse": True}  # whether the blocks' sizes vary
MASKS = (*STATIC, *DYNAMIC)


@register(
    Card(
        name="longca",
        system="longca",
        title="Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context Parallelism",
        paper="2510.17896",
        family="benchmark",
        kind=BENCHMARK,
        cost="masks · operators · N²",
    )
)
def cases(
    budget: str = "small", *, peers: bool = False, masks: Sequence[str] = (), operators: Sequence[str] = (),
    lengths: Sequence[int] = (), heads: int = 8, kv_heads: int | None = None, head_dim: int = 64,
    dtype: str = "float32", sparsity: float = 0.9, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """The cases of the benchmark: one per mask and operator, over lengths; documents are drawn for each, by `seed`.

        rate = 4 · heads · head_dim · pairs that the mask shows / seconds        3.5 times the work with the backward

    Fourteen static masks (`attnlab.patterns.training`) and two dynamic ones (`attnlab.routing.random_blocks`); run by
    `attnlab bench longca`, which then spreads the static ones over processes with `--ranks` (`bench.scale`).
    Source: arXiv 2510.17896 (NJUDeepEngine/LongCA-bench).
    """
    unknown = [name for name in masks if name not in MASKS]
    if unknown:
        raise ValueError(f"masks: {', '.join(unknown)} unknown; there are {', '.join(MASKS)}")
    shared = dict(
        lengths=list(lengths) or list(curve.LENGTHS[budget]), heads=heads, kv_heads=kv_heads or heads,
        head_dim=head_dim, dtype=dtype, sparsity=sparsity, seed=seed, patience=curve.PATIENCE[budget],
    )  # fmt: skip
    return [
        {"mask": kind, "operator": operator, **shared}
        for kind in masks or MASKS
        for operator in chosen(peers, tuple(operators))
    ]


def measure(case: dict, device: str, progress: Progress) -> dict:
    def prepare(length: int) -> curve.Prepared:
        pattern, route, shown = shape(case, length)
        return curve.attended(case["operator"], pattern, route, shown, length, device)

    return curve.measure(case, prepare, device, progress)


def shape(case: dict, length: int) -> tuple[Pattern, Route | None, int]:
    """The case's mask at a length, as a pattern or a route, and how many pairs it shows."""
    kind = case["mask"]
    if kind in DYNAMIC:
        route = block_sparse(
            length, heads=case["heads"], block=max(16, min(128, length // 16)), sparsity=case["sparsity"],
            variable=DYNAMIC[kind], seed=case["seed"],
        )  # fmt: skip
        return Full(), route, round(route.density() * length**2)
    pattern = mask(kind, setting(length, case["seed"]))
    return pattern, None, area(pattern, length)


def setting(length: int, seed: int = 0) -> Setting:
    """Documents, window, block and prefix in proportion to the length, as the benchmark's are to its own."""
    scaled = [(max(1, a * length // 65_536), max(2, b * length // 65_536), w) for a, b, w in DOCUMENTS]
    lengths = document_lengths(length, scaled, seed=seed)
    return Setting(lengths, window=max(1, length // 64), block=max(1, length // 32), prefix=max(1, length // 256))


def grids(records: Sequence[dict]) -> list[Grid]:
    found = []
    for name, title in (("forward", "forward"), ("train", "forward and backward")):

        def rate(record: dict, point: dict, name: str = name) -> float | None:
            seconds = (point.get(name) or {}).get("seconds")
            if not seconds:
                return None
            case = record["case"]
            return flops(point["area"], case["heads"], case["head_dim"], backward=name == "train") / seconds / 1e9

        def bytes_of(record: dict, point: dict, name: str = name) -> float | None:
            taken = (point.get(name) or {}).get("memory")
            return None if taken is None else taken / 2**20

        found.append(pivot(f"{title}, GFLOP/s", records, "mask", rate, best="high"))
        found.append(pivot(f"{title}, peak MiB", records, "mask", bytes_of, best="low"))
    if any(record["mechanism"] != OURS for record in records):
        found.append(speedups(records, "mask"))
    return found


def speedups(records: Sequence[dict], row: str) -> Grid:
    """How many times a peer's forward time ours takes less."""
    ours = {
        (record["case"][row], point["length"]): (point.get("forward") or {}).get("seconds")
        for record in records if record["mechanism"] == OURS for point in record.get("points") or ()
    }  # fmt: skip

    def times(record: dict, point: dict) -> float | None:
        theirs = (point.get("forward") or {}).get("seconds")
        mine = ours.get((record["case"][row], point["length"]))
        return theirs / mine if theirs and mine else None

    peers = [record for record in records if record["mechanism"] != OURS]
    return pivot("forward, time over attnlab's (above 1: attnlab is faster)", peers, row, times)
