"""Which way to spread a model over GPUs: predicted time, bytes and memory of a training step, and why.

    time = flops / rate + bytes / bandwidth + messages · latency

of what cannot hide behind arithmetic. The laws are exact counts (those that `traffic` measures); the three numbers of a
machine come from a data sheet, or from `fit` over measured runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

# Ways to spread a layer that keeps a state; the library has the first, the others are what it is compared with.
STATES = ("lasp2", "lasp", "ring of states", "ring of keys and values")


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes: what one of them computes and holds, and what it sends within its node and beyond.

    `rate` is what attention kernels and products reach, in FLOP/s; bandwidths in bytes per second for each GPU and
    direction; `latency` in seconds for each message, with what the host does for it.
    """

    name: str
    rate: float
    inside: float
    outside: float
    latency: float
    memory: float
    node: int = 8


# Data sheets, and the share of them that training reaches: 40 % of bfloat16 peak, 80 % of the links (NVLink; one
# 200 or 400 Gb/s adapter for each GPU).
MACHINES = {
    "a100": Machine("a100", 0.4 * 312e12, 0.8 * 300e9, 0.8 * 25e9, 1e-4, 80e9),
    "h100": Machine("h100", 0.4 * 989e12, 0.8 * 450e9, 0.8 * 50e9, 1e-4, 80e9),
    "h200": Machine("h200", 0.4 * 989e12, 0.8 * 450e9, 0.8 * 50e9, 1e-4, 141e9),
}


@dataclass(frozen=True)
class Model:
    """A decoder: `linear` is the share of its layers that keep a state (a delta rule gathers a matrix with it).

    Llama-3-shaped with 1.2 billion parameters unless said otherwise, as in the LASP-2 paper.
    """

    dim: int = 2048
    depth: int = 16
    heads: int = 16
    kv_heads: int = 16
    hidden: int = 8192
    vocabulary: int = 32000
    linear: float = 0.0
    delta: bool = False

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def layer_params(self) -> int:
        return 2 * self.dim * self.dim + 2 * self.dim * self.kv_heads * self.head_dim + 3 * self.dim * self.hidden

    @property
    def params(self) -> int:
        return self.depth * self.layer_params + 2 * self.vocabulary * self.dim


@dataclass(frozen=True)
class Work:
    """What one rank does in a step for one thing: arithmetic, bytes that it sends and how far, messages in a row.

    `hidden` says that the bytes travel while the arithmetic is done.
    """

    flops: float = 0.0
    sent: float = 0.0
    messages: float = 0.0
    across: bool = False  # between nodes
    hidden: bool = False

    def seconds(self, machine: Machine) -> float:
        compute = self.flops / machine.rate
        travel = self.sent / (machine.outside if self.across else machine.inside)
        moving = max(compute, travel) if self.hidden else compute + travel
        return moving + self.messages * machine.latency


@dataclass(frozen=True)
class Option:
    """One way: predicted seconds, bytes sent and bytes held by each rank in a step; or the reason why it cannot be."""

    method: str
    seconds: float = 0.0
    exposed: float = 0.0  # seconds of them in which a rank waits for others
    sent: float = 0.0
    memory: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """What `plan` found; prints as a table. `choice` is the fastest that fits."""

    gpus: int
    length: int
    machine: Machine
    model: Model
    options: tuple[Option, ...]

    @property
    def choice(self) -> str:
        able = [o for o in self.options if not o.reason and o.memory <= self.machine.memory]
        return min(able, key=lambda o: o.seconds).method if able else ""

    @property
    def why(self) -> str:
        """The choice in a sentence."""
        if not self.choice:
            least = min((o for o in self.options if not o.reason), key=lambda o: o.memory)
            return (
                f"nothing fits: the least memory is {least.method}'s {_bytes(least.memory)} for each rank, of "
                f"{_bytes(self.machine.memory)}; more GPUs would help"
            )
        best = self.of(self.choice)
        others = [
            o for o in self.options if not o.reason and o.method != self.choice and o.memory <= self.machine.memory
        ]
        idle = f"waits for others {best.exposed / best.seconds:.0%} of {_seconds(best.seconds)}"
        if not others:
            return f"{self.choice}: the only one that fits; it {idle}"
        second = min(others, key=lambda o: o.seconds)
        gain = second.seconds / best.seconds - 1
        close = " (less than these predictions are good for)" if gain < 0.05 else ""
        return (
            f"{self.choice}: it {idle} and sends {_bytes(best.sent)}; {second.method}, the next, sends "
            f"{_bytes(second.sent)} and is predicted {gain:.0%} slower{close}"
        )

    def of(self, method: str) -> Option:
        return next(o for o in self.options if o.method == method)

    def rows(self) -> list[tuple[str, ...]]:
        """The table: a row of texts for each method, below the head."""
        found: list[tuple[str, ...]] = [("method", "step", "waiting", "sent per rank", "memory per rank", "")]
        for o in sorted(self.options, key=lambda o: (bool(o.reason), o.seconds)):
            if o.reason:
                found.append((o.method, "", "", "", "", o.reason))
                continue
            note = "← chosen" if o.method == self.choice else "" if o.memory <= self.machine.memory else "does not fit"
            found.append(
                (o.method, _seconds(o.seconds), f"{o.exposed / o.seconds:.0%}", _bytes(o.sent), _bytes(o.memory), note)
            )
        return found

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        head = (
            f"{self.length:,} tokens on {self.gpus} × {self.machine.name}, {self.model.params / 1e9:.1f} B parameters"
        )
        return "\n".join([head, *lines, self.why])


def plan(
    gpus: int = 64,
    length: int | str = "2M",
    *,
    machine: str | Machine = "h100",
    model: Model | None = None,
    batch: int = 1,
    **changes: Any,
) -> Plan:
    """How to train on texts of `length` tokens ("2M", "512K", or a number) over `gpus` GPUs, with predictions.

    >>> plan(gpus=64, length="2M", linear=1.0).choice
    'lasp2'

    Args:
        machine: a name of `MACHINES`, or one's own (`fit` makes one of measured runs).
        model: its shape; `changes` are fields of it (`linear=0.75`, `kv_heads=4`, …).
        batch: texts at a time; all GPUs share each.
    """
    tokens = _number(length)
    if gpus < 1 or tokens < gpus:
        raise ValueError(f"gpus must be between 1 and the {tokens} tokens of length, got {gpus}")
    if isinstance(machine, str):
        if machine not in MACHINES:
            raise ValueError(f"machine must be one of {', '.join(MACHINES)} or a Machine, got {machine!r}")
        machine = MACHINES[machine]
    shape = replace(model or Model(), **changes)
    if not 0 <= shape.linear <= 1:
        raise ValueError(f"linear must be a share between 0 and 1, got {shape.linear}")
    softmax = ("ring", "allgather", "ulysses", "usp")
    names: tuple[str, ...] = softmax if shape.linear < 1 else STATES
    if 0 < shape.linear < 1:  # scans by LASP-2 in any case
        names = tuple(f"lasp2 + {name}" for name in softmax)
    found = tuple(_option(name, gpus, tokens, batch, shape, machine) for name in names)
    return Plan(gpus, tokens, machine, shape, found)


def _option(name: str, gpus: int, length: int, batch: int, model: Model, machine: Machine) -> Option:
    works = [_rest(gpus, length, batch, model, machine)]
    full, linear = round(model.depth * (1 - model.linear)), round(model.depth * model.linear)
    for part in name.split(" + "):
        if part in STATES:
            works += [_state_layer(part, gpus, length, batch, model, machine)] * linear
        else:
            reason = refused(part, gpus, model, machine)
            if reason:
                return Option(name, reason=reason)
            works += [
                layer for one in [softmax_layer(part, gpus, length, batch, model, machine)] for layer in one
            ] * full
    seconds = sum(w.seconds(machine) for w in works)
    compute = sum(w.flops for w in works) / machine.rate
    memory = _memory(name, gpus, length, batch, model)
    return Option(name, seconds, seconds - compute, sum(w.sent for w in works), memory)


def refused(method: str, gpus: int, model: Model, machine: Machine) -> str:
    """Why a method cannot be; empty if it can."""
    if method == "ulysses" and model.heads % gpus:
        return f"{gpus} ranks do not divide {model.heads} heads"
    if method == "usp" and (gpus <= machine.node or gpus % _group(gpus, model, machine)):
        return "one node: this is ulysses"
    return ""


def _group(gpus: int, model: Model, machine: Machine) -> int:
    """Ranks of a group of usp: as many of a node as divide the heads."""
    return max(n for n in range(1, machine.node + 1) if model.heads % n == 0 and gpus % n == 0)


def softmax_layer(
    method: str, gpus: int, length: int, batch: int, model: Model, machine: Machine, *, share: float = 0.5,
    train: bool = True, width: int = 2,
) -> list[Work]:  # fmt: skip
    """One attention layer of a step (forward and backward if `train`); `share` of all pairs is visible.

    Ring and all-gather send K and V to R − 1 ranks, and backward again with their gradients. All-to-all sends
    (R − 1)/R of q, k, v and out, twice. A causal zigzag sends three quarters of a ring's bytes.
    """
    r, b = gpus, batch
    kv = 2 * b * model.kv_heads * model.head_dim * (length / r) * width
    qo = 2 * b * model.heads * model.head_dim * (length / r) * width
    passes, back = (3.5, 3) if train else (1.0, 1)
    flops = 4.0 * b * model.heads * model.head_dim * share * length**2 / r * passes
    across = r > machine.node
    if r == 1:
        return [Work(flops)]
    if method == "ring":
        return [Work(flops, back * kv * (r - 1) * (0.5 + share / 2), (1 + train) * (r - 1), across, hidden=True)]
    if method == "allgather":
        return [Work(flops), Work(0.0, back * kv * (r - 1), 1 + 2 * train, across)]
    repeated = max(1.0, r / model.kv_heads)
    if method == "ulysses":
        return [Work(flops), Work(0.0, (1 + train) * (qo + kv * repeated) * (r - 1) / r, 4 * (1 + train), across)]
    group = _group(r, model, machine)
    rings, repeated = r // group, max(1.0, group / model.kv_heads)
    trade = (1 + train) * (qo + kv * repeated) * (group - 1) / group
    sent = back * kv * repeated * (rings - 1) * (0.5 + share / 2)
    return [Work(flops, sent, (1 + train) * (rings - 1), across, hidden=True), Work(0.0, trade, 4 * (1 + train))]


def _state_layer(method: str, gpus: int, length: int, batch: int, model: Model, machine: Machine) -> Work:
    """One layer that keeps a state: chunks of 64 and reads of the state; gathered at once, passed on, or not used."""
    r, b, h, d = gpus, batch, model.heads, model.head_dim
    flops = 3.0 * 4 * b * h * (length / r) * d * (64 + d) * (2 if model.delta else 1)
    state, maps = b * h * d * d * 4, (2 if model.delta else 1)
    across = r > machine.node
    if method == "lasp2":
        return Work(flops, (r - 1) * state * (maps + 1), 2, across)
    if method == "lasp":  # each rank waits for the one before: the last for all
        return Work(flops, 2.0 * (r - 1) * state, 2 * (r - 1), across)
    if method == "ring of states":  # every state passes every rank, which reads it as it comes
        reads = 3.0 * 2 * b * h * (length / r) * d * d * (r - 1) / 2
        return Work(flops + reads, 2.0 * (r - 1) * state, 2 * (r - 1), across)
    kv = 2 * b * h * d * (length / r) * 2
    return Work(flops, 3 * kv * (r - 1), 2 * (r - 1), across, hidden=True)


def _rest(gpus: int, length: int, batch: int, model: Model, machine: Machine) -> Work:
    """Everything that works on single tokens, and the gradients' reduction (FSDP: 3 passes over the weights)."""
    sent = 3.0 * 2 * model.params * (gpus - 1) / gpus
    return Work(6.0 * model.params * batch * length / gpus, sent, 3.0 * model.depth, gpus > machine.node, hidden=True)


def _memory(name: str, gpus: int, length: int, batch: int, model: Model) -> float:
    """Weights and moments in shares, layer inputs (the rest is recomputed), one layer's own, and what has gathered."""
    tokens = batch * length / gpus
    weights = 16.0 * model.params / gpus + 2 * 2 * model.layer_params
    kept = 2.0 * tokens * model.dim * model.depth
    own = 2.0 * tokens * (8 * model.dim + 3 * model.hidden)
    kv = 2 * 2.0 * tokens * model.kv_heads * model.head_dim
    if "allgather" in name:
        own += 2 * kv * gpus
    elif "ring" in name or "usp" in name:
        own += 4 * kv
    if "lasp" in name:
        own += 4.0 * batch * model.heads * model.head_dim**2 * gpus * (2 if model.delta else 1)
    return weights + kept + own


@dataclass(frozen=True)
class Run:
    """One measured call: what a rank did, and the seconds it took."""

    work: Work
    seconds: float


def fit(runs: Sequence[Run], name: str = "measured", *, memory: float = 8e9, node: int = 1 << 30) -> Machine:
    """The machine whose rate, bandwidth and latency explain the runs best, in relative least squares, none negative."""
    if len(runs) < 3:
        raise ValueError(f"runs must be at least three, got {len(runs)}")
    rows = torch.tensor([[r.work.flops, r.work.sent, r.work.messages] for r in runs], dtype=torch.float64)
    seconds = torch.tensor([r.seconds for r in runs], dtype=torch.float64)
    scales = rows.amax(0).clamp_min(1e-30)
    a, active = rows / scales / seconds[:, None], [0, 1, 2]
    found = torch.zeros(3, dtype=torch.float64)
    while active:  # whoever would be negative leaves
        solved = torch.linalg.lstsq(a[:, active], torch.ones(len(runs), 1, dtype=torch.float64)).solution[:, 0]
        if bool((solved >= 0).all()):
            found[active] = solved
            break
        active.pop(int(solved.argmin()))
    rate, bandwidth, latency = (found / scales).tolist()
    sends = 1 / max(bandwidth, 1e-15)
    return Machine(name, 1 / max(rate, 1e-18), sends, sends, latency, memory, node)


# Published, for `published()`: LASP-2 (2502.07563, abstract): a 1B model of linear layers, 2048K tokens, 64 A100.
# Its ring is not said to send states, but keys and values of 32,768 tokens in 63 steps would take 20 times as long.
PUBLISHED: Mapping[str, float] = {"lasp": 0.152, "ring of states": 0.366}


def published() -> dict[str, tuple[float, float]]:
    """How much slower than LASP-2 the others are at 2048K on 64 GPUs: (predicted, published)."""
    found = plan(64, 2048 * 1024, machine="a100", linear=1.0)
    best = found.of("lasp2").seconds
    return {name: (found.of(name).seconds / best - 1, value) for name, value in PUBLISHED.items()}


def _number(length: int | str) -> int:
    """A number of tokens: 4096, "512K" (of 1024) or "2M" (of 1024²)."""
    if isinstance(length, int) and not isinstance(length, bool):
        return length
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*", str(length))
    if not match:
        raise ValueError(f"length must be a number of tokens such as 65536, 512K or 2M, got {length!r}")
    return int(float(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()])


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
