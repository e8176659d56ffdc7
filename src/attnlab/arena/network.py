"""The network in which every mechanism is tried: the task's stem, blocks of the mechanism and an MLP, the task's head.

What differs between two contestants is the mixer alone. The parameter budget is met by the width (a multiple of 16, so
that heads divide it) and, within that step, by the hidden width of the MLP.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnlab import cards
from attnlab.arena.task import CAUSAL, CAUSAL_CROSS, CAUSAL_GRID, CROSS, GRID, SELF, Task
from attnlab.models.skeletons.plain import Encoder
from attnlab.nn.multihead import MultiHead
from attnlab.positions import Rotary

NONE = "none"  # the control: the same network without any mechanism
TOLERANCE = 0.02
_STEP = 16


@dataclass(frozen=True)
class Shape:
    """What meets the budget: width, hidden width of the MLP, and the parameters that they make."""

    width: int
    hidden: int
    parameters: int


class Network(nn.Module):
    """Stem → `depth` × (mechanism, MLP), pre-norm and residual → norm → head."""

    def __init__(self, task: Task, mechanism: str, width: int, hidden: int):
        super().__init__()
        self.task = task
        self.stem = task.stem(width)
        self.blocks = Encoder(
            dim=width,
            depth=task.budget.depth,
            mixer=lambda layer: mixer(mechanism, width, task.layout, positions=task.positions, context=task.context),
            mlp_ratio=(hidden + 0.5) / width,
            norm=nn.RMSNorm,
        )
        self.head = task.head(width)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.stem(inputs)
        tokens, *beside = tokens if isinstance(tokens, tuple) else (tokens,)
        return self.head(self.blocks(tokens, grid=self.task.grid(tokens.shape[1])), *beside)


class Nothing(nn.Module):
    """Mixes nothing: what the rest of the network can do alone."""

    def forward(self, x: Tensor, *, grid: tuple[int, ...] | None = None) -> Tensor:
        return torch.zeros_like(x)


class OnMap(nn.Module):
    """Runs a mechanism of feature maps (B, C, H, W) on the tokens of a grid (B, N, C)."""

    def __init__(self, mechanism: nn.Module):
        super().__init__()
        self.mechanism = mechanism

    def forward(self, x: Tensor, *, grid: tuple[int, ...]) -> Tensor:
        return self.mechanism(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class Across(nn.Module):
    """The last tokens look into the first, their context, which stays as it is: (B, M + N, C) → the same.

    `context` is M; half of the tokens if None.
    """

    def __init__(self, mechanism: nn.Module, context: int | None = None):
        super().__init__()
        self.mechanism, self.context = mechanism, context

    def forward(self, x: Tensor, *, grid: tuple[int, ...] | None = None) -> Tensor:
        first = x.shape[1] // 2 if self.context is None else self.context
        context, queries = x[:, :first], x[:, first:]
        return torch.cat((torch.zeros_like(context), self.mechanism(queries, context)), 1)


def mixer(mechanism: str, width: int, layout: str, *, positions: bool = False, context: int | None = None) -> nn.Module:
    """The mechanism as its card samples it, causal or not as the layout asks; with rotary positions if it takes any."""
    if mechanism == NONE:
        return Nothing()
    card = cards.describe(mechanism)
    options = dict(card.sample)
    if card.kind is cards.Kind.FEATURES:
        return OnMap(cards.build(mechanism, width, **options))
    parameters = inspect.signature(cards.target(mechanism)).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if passes_on or "causal" in parameters:
        options["causal"] = layout in (CAUSAL, CAUSAL_CROSS, CAUSAL_GRID)
    if positions and takes_positions(mechanism):
        own = parameters if "heads" in parameters else inspect.signature(MultiHead).parameters
        heads = options.get("heads", own["heads"].default)
        options["position"] = Rotary(options.get("head_dim") or width // heads)
    built = cards.build(mechanism, width, **options)
    return Across(built, context) if layout in (CROSS, CAUSAL_CROSS) else built


def takes_positions(mechanism: str) -> bool:
    """Whether it turns queries and keys by their positions when given some."""
    target = cards.target(mechanism)
    if not (isinstance(target, type) and issubclass(target, MultiHead)):
        return False
    parameters = inspect.signature(target).parameters.values()
    return any(p.name == "position" or p.kind is p.VAR_KEYWORD for p in parameters)


def why_not(card: cards.Card, task: type[Task]) -> str:
    """Why a mechanism takes no part in a task; empty if it does."""
    if card.kind not in (cards.Kind.TOKENS, cards.Kind.FEATURES):
        return f"is a {card.kind.value}, not a mechanism to put into a network"
    if task.layout in (CROSS, CAUSAL_CROSS):
        if card.kind is cards.Kind.FEATURES:
            return "works on feature maps, and this is two sequences"
        if not card.claims(cards.NONCAUSAL_CROSS if task.layout == CROSS else cards.CAUSAL_CROSS):
            return "cannot look into another sequence" + (" without looking ahead" * (task.layout == CAUSAL_CROSS))
        return ""
    if task.layout == GRID:
        if card.kind is cards.Kind.TOKENS and not card.claims(cards.NONCAUSAL_SELF):
            return "only looks back, and here every token sees all others"
        return ""
    if card.kind is cards.Kind.FEATURES:
        return "works on feature maps, and this is read token by token"
    if task.layout == CAUSAL_GRID:
        return "" if card.claims(cards.CAUSAL_SELF) else "cannot keep from looking ahead (not causal)"
    if task.layout == SELF:
        if not card.claims(cards.NONCAUSAL_SELF):
            return "only looks back, and here every token sees all others"
    elif not card.claims(cards.CAUSAL_SELF):
        return "cannot keep from looking ahead (not causal)"
    if card.claims(cards.ANY_GRID) and not card.claims(cards.ANY_LENGTH):
        return "works on grids, and this is a sequence"
    if task.beyond and not card.claims(cards.ANY_LENGTH):
        return "is bound to one length, and here lengths vary"
    return ""


def solve(task: Task, mechanism: str) -> Shape:
    """The shape whose parameters come within 2 % of the task's budget."""
    budget = task.budget.parameters
    best: tuple[float, Shape] | None = None
    for width in range(_STEP, 2048, _STEP):
        lean = _parameters(task, mechanism, width, hidden=1)
        if lean is None:
            continue  # the mechanism does not come in this width
        each = 2 * width * task.budget.depth + task.budget.depth  # of one more hidden unit: in, out and bias
        hidden = 1 + round((budget - lean) / each)
        if hidden < width // 2:
            break
        distance = abs(math.log(hidden / (2 * width)))  # an MLP of twice the width is the shape to stay close to
        shape = Shape(width, hidden, lean + (hidden - 1) * each)
        if best is None or distance < best[0]:
            best = distance, shape
    if best is None or abs(best[1].parameters / budget - 1) > TOLERANCE:
        raise ValueError(
            f"budget: {budget:,} parameters cannot be met within {TOLERANCE:.0%} with {mechanism} on {task.name}"
        )
    return best[1]


def _parameters(task: Task, mechanism: str, width: int, hidden: int) -> int | None:
    try:
        with torch.device("meta"):
            network = Network(task, mechanism, width, hidden)
    except ValueError:
        return None
    return sum(p.numel() for p in network.parameters())


def takes_part(mechanism: str, task: type[Task]) -> str:
    """`why_not` by name; the control takes part everywhere."""
    return "" if mechanism == NONE else why_not(cards.describe(mechanism), task)


def refuses(mechanism: str, task: Task) -> str:
    """What a mechanism says against the task's length or grid; empty if it takes it."""
    length, width = task.budget.length, 4 * _STEP
    try:
        with torch.no_grad():
            mixer(mechanism, width, task.layout, context=task.context)(
                torch.zeros(1, length, width), grid=task.grid(length)
            )
    except ValueError as error:
        return str(error)
    except Exception:  # a mechanism that breaks is a result, and the trial will say so
        return ""
    return ""
