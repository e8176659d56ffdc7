"""How busy a spiking network is: how often its neurons fire, and how many additions that makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from attnlab.nn.spiking.lif import LIF


@dataclass
class Activity:
    """What ran inside `watched`: firing rates by neurons' name, and the work of linear and convolution layers.

    `dense` counts their multiply-adds, `synaptic` those whose input is not 0 (each layer's count times the share of its
    inputs that is not): what event-driven hardware does, additions where the inputs are spikes.
    """

    rates: dict[str, float] = field(default_factory=dict)
    dense: float = 0.0
    synaptic: float = 0.0

    @property
    def rate(self) -> float:
        """The mean over the groups of neurons."""
        if not self.rates:
            raise ValueError("no neurons fired: run a spiking network inside `watched`")
        return sum(self.rates.values()) / len(self.rates)


@contextmanager
def watched(model: nn.Module) -> Iterator[Activity]:
    """Records the firing rates and synaptic operations of `model` while it runs inside the context.

        with watched(model) as activity, torch.no_grad():
            model(images)
        activity.rate, activity.synaptic

    Of several calls, the rates are the last one's and the operations are summed. Costs one pass over each layer's
    input. Source: arXiv 2401.02020, whose count of operations this is.
    """
    activity = Activity()

    def fired(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
            spikes: Tensor = out[0] if isinstance(out, tuple) else out
            activity.rates[name] = spikes.detach().float().mean().item()

        return hook

    def worked(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        count = float(out.numel() * module.weight[0].numel())  # type: ignore[index]
        activity.dense += count
        activity.synaptic += count * (inputs[0] != 0).float().mean().item()

    hooks = [m.register_forward_hook(fired(name)) for name, m in model.named_modules() if isinstance(m, LIF)]
    layers = (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)))
    hooks += [m.register_forward_hook(worked) for m in layers]
    try:
        yield activity
    finally:
        for hook in hooks:
            hook.remove()
