"""Head importance of any model by pruning, through the tap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.lens.event import Event
from attnlab.lens.measures.pruning import Answer, Importance, importance
from attnlab.lens.subscriber import Handle, Subscriber
from attnlab.lens.tap import join

Inputs = Tensor | Mapping[str, Any]
Progress = Callable[[int, int], None]


def head_importance(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor | None = None,
    *,
    mode: str = "leave_one_out",
    ablate: str = "zero",
    batch: int = 64,
    progress: Progress | None = None,
) -> Importance:
    """How much the answer of `model` depends on each of its heads: one pass for each head and input (arXiv 2303.13731).

    A head is pruned by its output, before the output projection; five metrics say what changes (`measures.pruning`).

    Args:
        inputs: what the model takes: a tensor, or keywords, tensors of which are cut along their first axis. The
            answer is the class logits, of a language model those after the last token; the embedding is what the last
            linear map reads that gives them.
        labels: true classes, one for each input; without them d_prob and acc_drop are left out.
        mode: prune the head ("leave_one_out") or all others of its layer ("keep_one").
        ablate: what a pruned head says: "zero", or its "mean" over the inputs, at each place.
        batch: inputs that run at a time.
    """
    if ablate not in ("zero", "mean"):
        raise ValueError(f"ablate must be 'zero' or 'mean', got {ablate!r}")
    prune, reader = _Prune(), _Reader()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with joined(model, prune, reader), torch.no_grad():
            prune.sum_up = ablate == "mean"
            _answer(model, inputs, batch, reader)
            prune.sum_up = False
            if not prune.heads:
                raise ValueError("no layer attends over a fixed number of heads")
            order = sorted(prune.heads)

            def pruned(heads: Mapping[int, Tensor]) -> Answer:
                prune.pruned = {order[layer]: which for layer, which in heads.items()}
                return _answer(model, inputs, batch, reader)

            return importance(
                pruned, [prune.heads[layer] for layer in order], labels, mode=mode, ablate=ablate, progress=progress,
                names=[prune.names[layer] for layer in order],
            )  # fmt: skip
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def joined(model: nn.Module, *subscribers: Subscriber) -> Iterator[None]:
    """The subscribers at the model's tap, for as long as the block runs."""
    leave = join(model, *subscribers)
    try:
        yield
    finally:
        leave()


def run(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def parts(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """`inputs`, some at a time."""
    if isinstance(inputs, Tensor):
        yield from inputs.split(size)
        return
    count = max((len(x) for x in inputs.values() if isinstance(x, Tensor) and x.dim()), default=1)
    for at in range(0, count, size):
        cut = slice(at, at + size)
        yield {n: x[cut] if isinstance(x, Tensor) and x.dim() and len(x) == count else x for n, x in inputs.items()}


class _Prune(Subscriber):
    """Silences the heads in `pruned`, {layer: (heads,) bool}; counts heads, and sums up their outputs when asked."""

    def __init__(self) -> None:
        self.pruned: dict[int, Tensor] = {}
        self.heads: dict[int, int] = {}
        self.names: dict[int, str] = {}
        self.sum_up = False
        self.sums: dict[tuple[int, int], tuple[int, Tensor]] = {}

    def output(self, event: Event, out: Tensor) -> Tensor:
        self.heads[event.layer], self.names[event.layer] = event.heads, event.name
        if self.sum_up:
            count, total = self.sums.get((event.layer, event.index), (0, torch.zeros_like(out[:1])))
            self.sums[event.layer, event.index] = count + len(out), total + out.sum(0, keepdim=True)
        which = self.pruned.get(event.layer)
        if which is None:
            return out
        count, total = self.sums.get((event.layer, event.index), (1, torch.zeros_like(out[:1])))
        return torch.where(which.to(out.device)[:, None, None], total / count, out)


class _Reader(Subscriber):
    """Keeps what the linear maps of the model read and give, until the answer is known."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def open(self, model: nn.Module) -> list[Handle]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self.calls.append((arguments[0], output))

        wide = [m for m in model.modules() if isinstance(m, nn.Linear)]
        return [m.register_forward_hook(hook) for m in wide]

    def start(self, step: int) -> None:
        self.calls.clear()

    def embedding(self, logits: Tensor) -> Tensor | None:
        """What the last map read that gives as many numbers as there are classes."""
        for read, given in reversed(self.calls):
            if isinstance(given, Tensor) and given.shape == logits.shape:
                return read
        return None


def _answer(model: nn.Module, inputs: Inputs, batch: int, reader: _Reader) -> Answer:
    logits, embeddings = [], []
    for part in parts(inputs, batch):
        said = _logits(run(model, part))
        read = reader.embedding(said)
        reader.calls.clear()
        last = (slice(None), -1) if said.dim() == 3 else slice(None)
        logits.append(said[last].float())
        if read is not None:
            embeddings.append(read[last].float())
    whole = len(embeddings) == len(logits)
    return Answer(torch.cat(logits), torch.cat(embeddings) if whole else None)


def _logits(said: Any) -> Tensor:
    """The class logits in what a model returns."""
    found = getattr(said, "logits", said[0] if isinstance(said, (tuple, list)) and said else said)
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the model must return class logits (M, classes) or (M, N, vocabulary), got {shape}")
    return found
