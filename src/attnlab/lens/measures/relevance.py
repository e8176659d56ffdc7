"""Layer-wise relevance propagation: how much each input of a plain convolutional network gave to its answer.

Source: arXiv 1712.08268 (Hey1Li/Salient-Relevance-Propagation), after Bach et al., doi 10.1371/journal.pone.0130140.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

EPSILON = 1e-9
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_PASSES = (nn.ReLU, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d)
Rule = Literal["official", "zplus"]


@dataclass(frozen=True)
class Relevance:
    """Relevance at the input of every layer, in the order of the layers, and what it began as."""

    logits: Tensor
    top: Tensor  # the logits' relevance
    layers: dict[str, Tensor]

    @property
    def input(self) -> Tensor:
        """Relevance of the network's input, as large as it."""
        return next(iter(self.layers.values()))


def layerwise_relevance(
    model: nn.Module,
    x: Tensor,
    *,
    target: Tensor | int | None = None,
    rule: Rule = "official",
    bounds: tuple[float, float] | None = None,
) -> Relevance:
    """Leads the logit of the most likely class (or `target`, (B) or one for all) back to the input x (B, …).

    From R = logits ⊙ one-hot, in each layer, of inputs X,

        R_in = X ⊙ ∂Z/∂Xᵀ (R / (Z + 1e-9))         Z what the layer shares the relevance out by

    Z is X max(W, 0) without bias in linear layers, of pools the output (so a maximum takes all), and of convolutions,
    by `rule`: "official", as released, the output, bias and all signs in it, so that relevance is lost to the bias,
    and can grow without bound where an output is near zero; "zplus", as the paper describes it, X max(W, 0), and in
    the first layer, for inputs in `bounds` = (l, h), the rule that knows them:
    R_in = X ⊙ c(W) − l ⊙ c(max(W, 0)) − h ⊙ c(min(W, 0)), c(W) the same products, Z their sum. Both conserve the sum
    of relevance. ReLU passes it on. Cost: one forward and one backward pass.

    The model must be a chain of Linear, Conv, pooling, ReLU, Flatten and Dropout modules in eval mode.
    """
    if rule not in ("official", "zplus"):
        raise ValueError(f"rule must be 'official' or 'zplus', got {rule!r}")
    if model.training:
        raise ValueError("model must be in eval mode: call model.eval()")
    if bounds is not None and (rule != "zplus" or bounds[0] >= bounds[1]):
        raise ValueError(f"bounds (low, high) go with rule='zplus', got {bounds} with {rule!r}")
    steps, logits = _chain(model, x)
    if logits.ndim != 2:
        raise ValueError(f"model must give logits (B, classes), got {tuple(logits.shape)}")
    wanted = logits.argmax(1) if target is None else torch.as_tensor(target, device=x.device).expand(len(logits))
    top = logits * F.one_hot(wanted, logits.shape[1])
    found: list[tuple[str, Tensor]] = []
    relevance = top
    first = next((i for i, (_, module, _) in enumerate(steps) if isinstance(module, _WEIGHTED)), -1)
    for i, (name, module, given) in reversed(list(enumerate(steps))):
        if isinstance(module, _PASSES):
            relevance = relevance.reshape(given.shape)
        elif rule == "zplus" and bounds is not None and i == first:
            relevance = _bounded(module, given, relevance, bounds)
        elif isinstance(module, nn.Linear) or (rule == "zplus" and isinstance(module, _WEIGHTED)):
            relevance = given * _share(_signed(module, 1), given, relevance)
        else:
            relevance = given * _share(module, given, relevance)
        found.append((name, relevance))
    return Relevance(logits, top, dict(reversed(found)))


def relevance_image(relevance: Tensor) -> Tensor:
    """|R| of each image (B, C, H, W) in [0, 1], the channels kept: relevance as a picture."""
    size = relevance.abs()
    low = size.amin((1, 2, 3), keepdim=True)
    spread = size.amax((1, 2, 3), keepdim=True) - low
    return torch.where(spread > 0, (size - low) / spread, 0.0)


def _chain(model: nn.Module, x: Tensor) -> tuple[list[tuple[str, nn.Module, Tensor]], Tensor]:
    """(name, module, its input) of each layer in order, and the logits; ValueError if they are no chain."""
    steps: list[tuple[str, nn.Module, Tensor]] = []
    last = x.detach()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            nonlocal last
            if not isinstance(module, _WEIGHTED + _POOLS + _PASSES):
                raise ValueError(f"no rule of relevance for {name}, a {type(module).__name__}")
            # A ReLU in place has written its output over its input; no rule needs what was there.
            if not _follows(given[0], last):
                raise ValueError(
                    f"{name} is not given what the layer before it gave: relevance needs a chain of layers"
                )
            steps.append((f"{name}.{len(steps)}" if any(n == name for n, *_ in steps) else name, module, given[0]))
            last = out

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_hook(keep(n)) for n, m in leaves]
    try:
        with torch.no_grad():
            logits = model(x.detach().clone())
    finally:
        for handle in handles:
            handle.remove()
    if not steps or not _follows(logits, last):
        raise ValueError(f"{type(model).__name__} does more to its logits than its layers do: relevance needs a chain")
    return steps, logits


def _follows(given: Tensor, last: Tensor) -> bool:
    """Whether a layer's input is what came before, but for its shape or a ReLU on the way."""
    if given.numel() != last.numel():
        return False
    before = last.reshape(given.shape)
    return torch.equal(given, before) or torch.equal(given, before.relu())


def _share(layer: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor) -> Tensor:
    """∂Z/∂Xᵀ (R / (Z + ε)) of Z = layer(X)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z = layer(x)
    return torch.autograd.grad(z, x, relevance.reshape(z.shape) / (z.detach() + EPSILON))[0]


def _signed(module: nn.Module, sign: int) -> Callable[[Tensor], Tensor]:
    """The layer without a bias, with its weights above (1), below (-1) zero, or all (0)."""
    weight = module.get_parameter("weight").detach()
    weight = weight.clamp(min=0) if sign > 0 else weight.clamp(max=0) if sign < 0 else weight
    given = {"weight": weight}
    if getattr(module, "bias", None) is not None:
        given["bias"] = torch.zeros_like(module.get_parameter("bias"))
    return lambda x: functional_call(module, given, (x,))


def _bounded(module: nn.Module, x: Tensor, relevance: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The rule of inputs that lie in `bounds`."""
    inputs = [x.detach().clone(), torch.full_like(x, bounds[0]), torch.full_like(x, bounds[1])]
    with torch.enable_grad():
        for at in inputs:
            at.requires_grad_()
        z = _signed(module, 0)(inputs[0]) - _signed(module, 1)(inputs[1]) - _signed(module, -1)(inputs[2])
    shares = torch.autograd.grad(z, inputs, relevance.reshape(z.shape) / (z.detach() + EPSILON))
    return torch.stack([at.detach() * share for at, share in zip(inputs, shares, strict=True)]).sum(0)
