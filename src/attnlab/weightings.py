"""How much each key weighs: from a score s = scale·q·k + bias to a weight, given which keys are seen.

Softmax divides by the sum over the seen keys; the others weigh each pair on its own, so parts over disjoint keys add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weighting:
    """The weight of every key for every query. `normalised` weights share a sum over the seen keys."""

    normalised = False

    def weights(self, scores: Tensor, seen: Tensor, keys: int) -> Tensor:
        """Weights `(..., Nq, Nk)` of `scores`, zero where `seen` is False; `keys` is the number of keys there are."""
        raise NotImplementedError


@dataclass(frozen=True)
class Softmax(Weighting):
    """w = exp(s) / (Σ exp(s) + off): the usual weights. A query that sees no key gets zeros.

    `off=1` is the off-by-one softmax, which lets a head say nothing.
    """

    off: float = 0.0
    normalised = True

    def weights(self, scores: Tensor, seen: Tensor, keys: int) -> Tensor:
        scores = scores.masked_fill(~seen, -math.inf)
        top = scores.amax(-1, keepdim=True)
        top = top.masked_fill(top == -math.inf, 0.0)
        if self.off:
            top = top.clamp_min(0.0)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        if self.off:
            total = total + self.off * (-top).exp()
        return weights / total.masked_fill(total == 0, 1.0)


@dataclass(frozen=True)
class Elementwise(Weighting):
    """Weights that depend on their own score alone: w = f(s)."""

    def apply(self, scores: Tensor, keys: int) -> Tensor:
        """f of `scores`, of the same shape; a new tensor."""
        raise NotImplementedError

    def derivative(self, scores: Tensor, weights: Tensor, keys: int) -> Tensor:
        """f′ at `scores`, where `weights` = f(`scores`); a new tensor."""
        raise NotImplementedError

    def weights(self, scores: Tensor, seen: Tensor, keys: int) -> Tensor:
        return self.apply(scores, keys).masked_fill(~seen, 0.0)


@dataclass(frozen=True)
class Sigmoid(Elementwise):
    """w = σ(s + bias), bias −log n by default, n the number of keys (arXiv 2409.04431). Rows do not sum to one."""

    bias: float | None = None

    def _bias(self, keys: int) -> float:
        return -math.log(keys) if self.bias is None else self.bias

    def apply(self, scores: Tensor, keys: int) -> Tensor:
        return torch.sigmoid(scores + self._bias(keys))

    def derivative(self, scores: Tensor, weights: Tensor, keys: int) -> Tensor:
        return weights * (1 - weights)


@dataclass(frozen=True)
class Relu(Elementwise):
    """w = max(s, 0)^power / n, n the number of keys (arXiv 2309.08586)."""

    power: int = 1

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise ValueError(f"Relu: power must be 1 or 2, got {self.power!r}")

    def apply(self, scores: Tensor, keys: int) -> Tensor:
        return scores.relu().pow(self.power) / keys

    def derivative(self, scores: Tensor, weights: Tensor, keys: int) -> Tensor:
        return self.power * scores.relu().pow(self.power - 1) * (scores > 0) / keys


@dataclass(frozen=True)
class Elu(Elementwise):
    """w = elu(s) + 1, never negative: exp(s) below zero, s + 1 above (arXiv 2410.10781). Rows do not sum to one."""

    def apply(self, scores: Tensor, keys: int) -> Tensor:
        return torch.nn.functional.elu(scores).add_(1.0)

    def derivative(self, scores: Tensor, weights: Tensor, keys: int) -> Tensor:
        return weights.clamp_max(1.0)


@dataclass(frozen=True)
class Linear(Elementwise):
    """w = s: the bare scores, with no weighting function at all."""

    def apply(self, scores: Tensor, keys: int) -> Tensor:
        return scores.clone()

    def derivative(self, scores: Tensor, weights: Tensor, keys: int) -> Tensor:
        return torch.ones_like(scores)


@dataclass(frozen=True)
class Shares(Weighting):
    """w = f(s) / (Σ f(s) + 1e-8), f ≥ 0 the weights `of` another weighting: rows sum to one, without a softmax."""

    of: Elementwise

    def weights(self, scores: Tensor, seen: Tensor, keys: int) -> Tensor:
        weights = self.of.weights(scores, seen, keys)
        return weights / (weights.sum(-1, keepdim=True) + 1e-8)


@dataclass(frozen=True, eq=False)
class Affine(Weighting):
    """w = α P + (ᾱ − α)/N, P the softmax weights and N the number of keys seen (arXiv 2602.23057).

    A query takes the share `factor` = α `(B, H, Nq, 1)` of softmax attention and spreads what is left of `total` = ᾱ
    evenly over the keys that it sees: its weights sum to ᾱ, and are negative where α > ᾱ + P N α. `attend` computes it
    as α · softmax attention + (ᾱ − α) · mean of the seen values, on any backend.
    """

    factor: Tensor
    total: Tensor | float = 1.0

    def weights(self, scores: Tensor, seen: Tensor, keys: int) -> Tensor:
        count = seen.sum(-1, keepdim=True).clamp_min(1)
        return self.factor * SOFTMAX.weights(scores, seen, keys) + (self.total - self.factor) / count * seen

    def __str__(self) -> str:
        return "Affine"


SOFTMAX = Softmax()
_NAMES: dict[str, Weighting] = {"softmax": SOFTMAX, "sigmoid": Sigmoid(), "relu": Relu(), "none": Linear()}


def weighting(given: Weighting | str | None) -> Weighting:
    """The weighting that `given` names: softmax (or None), sigmoid, relu or none; an object stays as it is."""
    if given is None:
        return SOFTMAX
    if isinstance(given, Weighting):
        return given
    if given in _NAMES:
        return _NAMES[given]
    raise ValueError(f"weighting must be a Weighting or one of {', '.join(_NAMES)}, got {given!r}")
