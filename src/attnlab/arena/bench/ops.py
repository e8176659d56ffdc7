"""`attend` and `scan` over lengths: the patterns and states that mechanisms stand on, beside their peers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.arena.bench import Grid, Progress, curve, pivot
from attnlab.arena.bench.longca import speedups
from attnlab.arena.bench.operators import OPERATORS, OURS, Refusal, Run, chosen
from attnlab.attend import attend
from attnlab.patterns import Causal, Full, Neighborhood, Pattern, PowersOfTwo, Sinks, Window
from attnlab.routing import Route, TopKBlocks
from attnlab.scan import scan

TITLE = "the operators that mechanisms stand on, milliseconds a call"


def _grid(length: int) -> tuple[int, int]:
    side = math.isqrt(length)
    return side, length // side


ATTEND: dict[str, Callable[[int], Pattern]] = {
    "full": lambda n: Full(),
    "causal": lambda n: Causal(),
    "window of 256": lambda n: Window(256),
    "window of 256 and 4 sinks": lambda n: Window(256) | (Sinks(4) & Causal()),
    "powers of two": lambda n: PowersOfTwo(block=64, window=5, sinks=1),
    "neighborhood of 7²": lambda n: Neighborhood(_grid(n), 7),
    "neighborhood of 7², every 2nd": lambda n: Neighborhood(_grid(n), 7, dilation=2),
}
ROUTED = "8 of the blocks of 64"
SCAN = ("linear attention", "retention", "gated linear attention", "delta rule", "KDA")
CASES = (*ATTEND, ROUTED, *SCAN)
RECURRENT, FLA = "recurrent", "fla naive"


def cases(
    budget: str = "small", *, peers: bool = False, only: Sequence[str] = (), lengths: Sequence[int] = (),
    heads: int = 4, head_dim: int = 64, dtype: str = "float32",
) -> list[dict]:  # fmt: skip
    """One case per operation and operator."""
    unknown = [name for name in only if name not in CASES]
    if unknown:
        raise ValueError(f"only: {', '.join(unknown)} unknown; there are {', '.join(CASES)}")
    shared = dict(
        lengths=list(lengths) or list(curve.LENGTHS[budget]), heads=heads, kv_heads=heads, head_dim=head_dim,
        dtype=dtype, patience=curve.PATIENCE[budget],
    )  # fmt: skip
    listed = []
    for what in only or CASES:
        operators = [OURS, *([RECURRENT, FLA] if peers else [])] if what in SCAN else chosen(peers)
        listed += [{"operation": what, "operator": operator, **shared} for operator in operators]
    return listed


def measure(case: dict, device: str, progress: Progress) -> dict:
    what, operator = case["operation"], case["operator"]

    def prepare(length: int) -> curve.Prepared:
        if what in SCAN:
            return _scanned(what, operator, case, length, device)
        if what == ROUTED:
            route = TopKBlocks(8, block=64)
            run = _routed(route, operator, length, device)
            return curve.Prepared(
                run, min(8 * 64, length) * length, lambda q, k, v: attend(q, k, v, route=route, backend="reference")
            )
        pattern = ATTEND[what](length)
        return curve.attended(operator, pattern, None, round(pattern.density(length) * length**2), length, device)

    return curve.measure(case, prepare, device, progress)


def _routed(route: Route, operator: str, length: int, device: str) -> Run:
    """A route that chooses anew at every call; peers take the chosen pattern as their mask, choosing included."""
    if operator not in (OURS, "sdpa"):
        raise Refusal(
            f"{operator} would compile for every choice" if operator == "flex" else f"{operator} routes nothing"
        )
    if operator == OURS:
        return OPERATORS[OURS](Full(), route, length, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shown = route.select(q.detach(), k.detach()).matrix(length, batch=len(q), heads=q.shape[1], device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shown)

    return run


def _scanned(what: str, operator: str, case: dict, length: int, device: str) -> curve.Prepared:
    """A state's scan with decays and rates that are drawn once; q and k are normalised, as delta rules need them."""
    rng = torch.Generator().manual_seed(length)
    shape = (1, case["heads"], length)
    kind = getattr(torch, case["dtype"])

    def drawn(*size: int) -> Tensor:
        return torch.rand(*size, generator=rng).to(device, kind)

    decay = {
        "retention": -0.1 * drawn(*shape),
        "gated linear attention": -0.1 * drawn(*shape, case["head_dim"]),
        "KDA": -0.1 * drawn(*shape, case["head_dim"]),
    }.get(what)
    beta = drawn(*shape) if what in ("delta rule", "KDA") else None

    def with_backend(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        how = {name: None if x is None else x.to(q.dtype) for name, x in (("decay", decay), ("beta", beta))}
        return scan(q, k, v, **how, backend=backend)[0]  # type: ignore[arg-type]

    def fla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from fla.ops.kda.naive import naive_recurrent_kda

        q, k, v = (x.transpose(1, 2) for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v))
        out, _ = naive_recurrent_kda(q, k, v, decay.transpose(1, 2), beta.transpose(1, 2), scale=1.0)  # type: ignore[union-attr]
        return out.transpose(1, 2)

    if operator == FLA and (what != "KDA" or importlib.util.find_spec("fla") is None):
        raise Refusal("flash-linear-attention is not installed" if what == "KDA" else "compared on KDA alone")
    runs = {
        OURS: lambda q, k, v: with_backend("auto", q, k, v),
        RECURRENT: lambda q, k, v: with_backend("recurrent", q, k, v),
        FLA: fla,
    }
    # A scan writes and reads a state of head_dim² for each token: as many products as head_dim pairs of attention.
    return curve.Prepared(
        runs[operator], case["head_dim"] * length, lambda q, k, v: with_backend("recurrent", q, k, v)[:, :, -32:]
    )


def grids(records: Sequence[dict]) -> list[Grid]:
    found = []
    for name, title in (("forward", "forward, ms"), ("train", "forward and backward, ms")):

        def milliseconds(record: dict, point: dict, name: str = name) -> float | None:
            seconds = (point.get(name) or {}).get("seconds")
            return None if seconds is None else 1e3 * seconds

        found.append(pivot(title, records, "operation", milliseconds, best="low"))
    if any(record["mechanism"] != OURS for record in records):
        found.append(speedups(records, "operation"))
    return found
