"""One trial: a mechanism, a task and a seed, from nothing to a score."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from attnlab.arena import memory
from attnlab.arena.network import Network, solve
from attnlab.arena.task import Task
from attnlab.cost import count_flops

DONE, DIVERGED, REFUSED, FAILED = "done", "diverged", "refused", "failed"
Progress = Callable[[float], None]
_CURVE = 40  # points kept of a learning curve


@dataclass
class Trial:
    """What a trial gave. `status` is done, diverged, refused (would not fit) or failed; `reason` says why not done."""

    task: str
    mechanism: str
    seed: int
    status: str = DONE
    reason: str = ""
    score: float | None = None
    details: dict = field(default_factory=dict)
    parameters: int | None = None
    width: int | None = None
    hidden: int | None = None
    flops_per_token: float | None = None  # of a forward pass at the training length
    tokens_per_second: float | None = None  # in training, at the median step
    seconds: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)  # step, training loss averaged since the last point

    def record(self) -> dict:
        return asdict(self)


def run_trial(
    task: Task, mechanism: str, seed: int, device: str = "cpu", progress: Progress = lambda fraction: None
) -> Trial:
    """Trains and evaluates. The batches depend on the seed alone, so all mechanisms see the same ones.

    A loss that is not finite ends it as diverged; what would not fit in memory is refused before it starts; any other
    error makes it failed, with the error as the reason, so that a study goes on.
    """
    start = time.perf_counter()
    trial = Trial(task.name, mechanism, seed)
    try:
        _run(trial, task, device, progress)
    except torch.cuda.OutOfMemoryError as error:
        trial.status, trial.reason = REFUSED, f"ran out of GPU memory: {_first_line(error)}"
    except MemoryError:
        trial.status, trial.reason = REFUSED, "ran out of memory"
    except Exception as error:  # whatever a mechanism raises is its own result
        outgrown = "can't allocate memory" in str(error)
        trial.status, trial.reason = REFUSED if outgrown else FAILED, f"{type(error).__name__}: {_first_line(error)}"
    trial.seconds = time.perf_counter() - start
    return trial


def _run(trial: Trial, task: Task, device: str, progress: Progress) -> None:
    shape = solve(task, trial.mechanism)
    trial.width, trial.hidden, trial.parameters = shape.width, shape.hidden, shape.parameters
    torch.manual_seed(trial.seed)
    network = Network(task, trial.mechanism, shape.width, shape.hidden).to(device)
    batches = torch.Generator().manual_seed(1_000 + trial.seed)
    first = task.batch(batches)
    if refusal := memory.refusal(memory.estimate(network, task.loss, first), device):
        trial.status, trial.reason = REFUSED, refusal
        return
    trial.flops_per_token = count_forward(network, first[0], task, device)
    if not _fit(trial, task, network, first, batches, device, progress):
        return
    network.eval()

    def predict(inputs: Tensor) -> Tensor:
        return network(inputs.to(device)).cpu()

    # Not inference_mode: what a mechanism caches here must still be good for the next trial's backward.
    with torch.no_grad():
        score = task.evaluate(predict)
    if not math.isfinite(score.value):
        trial.status, trial.reason = DIVERGED, "the score is not a finite number"
        return
    trial.score, trial.details = score.value, score.details


def count_forward(network: nn.Module, inputs: Tensor, task: Task, device: str) -> float:
    """FLOPs of a forward pass of one example, per token."""
    with torch.no_grad():
        return count_flops(network, inputs[:1].to(device)) / task.budget.length


def _fit(
    trial: Trial,
    task: Task,
    network: nn.Module,
    batch: tuple[Tensor, Tensor],
    batches: torch.Generator,
    device: str,
    progress: Progress,
) -> bool:
    """Trains in place and fills in the trial; False if it diverged."""
    budget = task.budget
    optimizer = torch.optim.AdamW(network.parameters(), lr=budget.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, budget.steps))
    every = max(1, budget.steps // _CURVE)
    recent, seconds = [], []
    for step in range(1, budget.steps + 1):
        start = time.perf_counter()
        inputs, targets = batch
        loss = task.loss(network(inputs.to(device)), targets.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())  # waits for the device, so that the time is the step's
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(recent[-1]):
            trial.status, trial.reason = DIVERGED, f"the loss was {recent[-1]} at step {step} of {budget.steps}"
            return False
        if step % every == 0 or step == budget.steps:
            trial.curve.append((step, sum(recent) / len(recent)))
            recent.clear()
        progress(step / budget.steps)
        if step < budget.steps:
            batch = task.batch(batches)
    trial.tokens_per_second = budget.batch * budget.length / sorted(seconds)[len(seconds) // 2]
    return True


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: a linear rise over the first tenth, then a cosine down to a twentieth."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
