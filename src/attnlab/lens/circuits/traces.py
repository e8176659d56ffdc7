"""What a run leaves behind at one position, and runs in which some of it is another run's: what patching is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab.lens.event import Event
from attnlab.lens.subscriber import Handle, Subscriber

Part = Literal["z", "q", "k", "v"]
Inputs = Tensor | Mapping[str, Any]
_MLP = re.compile(r"(^|_)(mlp|ffn|feed_?forward)$")


@dataclass
class Trace:
    """Of each layer the heads' outputs z `(B, H, P, D)`, their q, k, v, and the outputs of modules, at P positions."""

    heads: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # by layer and part
    modules: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, the most heads of one)."""
        layers = [z.shape[1] for (_, part), z in self.heads.items() if part == "z"]
        return len(layers), max(layers)


class Tracer(Subscriber):
    """Keeps a run's trace: z of all layers, the parts of heads in `parts`, and what the modules `modules` give."""

    def __init__(self, position: slice, parts: Iterable[str] = ("z",), modules: Iterable[str] = ()) -> None:
        self.position, self.parts, self.modules = position, set(parts), list(modules)
        self.trace = Trace()

    def open(self, model: nn.Module) -> Iterable[Handle]:
        return [hook_output(model.get_submodule(name), self._keep(name)) for name in self.modules]

    def _keep(self, name: str) -> Any:
        def keep(output: Tensor) -> Tensor:
            self.trace.modules[name] = output[:, self.position].detach().clone()
            return output

        return keep

    def before(self, event: Event) -> None:
        for part in self.parts & {"q", "k", "v"}:
            whole = query_heads(event, part)
            self.trace.heads[event.layer, part] = whole[:, :, self.position].detach().clone()

    def output(self, event: Event, out: Tensor) -> Tensor:
        if event.index:
            raise ValueError(f"{event.name} attends more than once in a pass: its heads cannot be told apart")
        self.trace.heads[event.layer, "z"] = out[:, :, self.position].detach().clone()
        return out


class Writer(Subscriber):
    """Puts given values in place of a run's own, at one position.

    heads: by layer and part, values `(B, H, P, D)` and which of them are meant, bool `(B, H)`. modules: by name, values
    `(B, P, C)`.
    """

    def __init__(
        self, position: slice, heads: Mapping[tuple[int, str], tuple[Tensor, Tensor]], modules: Mapping[str, Tensor]
    ) -> None:
        self.position, self.heads, self.modules = position, heads, modules

    def open(self, model: nn.Module) -> Iterable[Handle]:
        return [hook_output(model.get_submodule(name), self._put(value)) for name, value in self.modules.items()]

    def _put(self, value: Tensor) -> Any:
        def put(output: Tensor) -> Tensor:
            output = output.clone()
            output[:, self.position] = value
            return output

        return put

    def before(self, event: Event) -> None:
        for part in ("q", "k", "v"):
            if (event.layer, part) in self.heads:
                setattr(event, part, self._written(event, part, query_heads(event, part)))
        if event.k.shape[1] != event.v.shape[1]:
            event.k, event.v = query_heads(event, "k"), query_heads(event, "v")

    def output(self, event: Event, out: Tensor) -> Tensor:
        return self._written(event, "z", out) if (event.layer, "z") in self.heads else out

    def _written(self, event: Event, part: str, own: Tensor) -> Tensor:
        value, meant = self.heads[event.layer, part]
        new = own.clone()
        new[:, :, self.position] = torch.where(meant[:, :, None, None], value, own[:, :, self.position])
        return new


def query_heads(event: Event, part: str) -> Tensor:
    """q, k or v `(B, H, N, D)`, one for each query head, also where heads share their keys and values."""
    whole: Tensor = getattr(event, part)
    return whole if whole.shape[1] == event.heads else whole.repeat_interleave(event.heads // whole.shape[1], 1)


def hook_output(module: nn.Module, change: Any) -> Handle:
    """`change(output) -> output` of a module, or of the first of what it gives."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return module.register_forward_hook(hook)


def mlps_of(model: nn.Module, wanted: bool | str | Sequence[str]) -> list[str]:
    """Names of the modules that are meant: none, all that are called mlp, ffn or feed_forward, or those of globs."""
    if wanted is False:
        return []
    names = [name for name, _ in model.named_modules() if name]
    if wanted is True:
        found = [n for n in names if _MLP.search(n.rpartition(".")[2])]
    else:
        globs = [wanted] if isinstance(wanted, str) else list(wanted)
        found = [n for n in names if any(fnmatchcase(n, g) for g in globs)]
    if not found:
        raise ValueError(f"freeze_mlps found no module ({wanted!r}): give names or globs, such as 'blocks.*.mlp'")
    return found


def positions(position: int | slice | None) -> slice:
    """As a slice: one position, several, or all."""
    if position is None:
        return slice(None)
    if isinstance(position, slice):
        return position
    return slice(position, position + 1 or None)


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits of one pass, as a tensor whatever the model gives."""
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(out, Tensor):
        return out
    logits = getattr(out, "logits", None)
    return out[0] if logits is None else logits


def rows(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """Some of the prompts of a batch."""
    if isinstance(inputs, Tensor):
        return inputs[index]
    return {name: value[index] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def count(inputs: Inputs) -> int:
    """How many prompts there are."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    sizes = [len(value) for value in inputs.values() if isinstance(value, Tensor)]
    if not sizes:
        raise TypeError("inputs must be a tensor, or hold one, got none")
    return sizes[0]
