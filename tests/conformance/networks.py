"""What the card of a network promises, as checks: sizes, outputs, gradients, and reloading."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnlab.cards import BACKBONE, CAUSAL_SELF, DENOISER, STREAMING, Card
from conformance.claims import check_size, close, shake


class Network:
    """A network's card with its constructor, built at the tiny size of the card's `sample`."""

    def __init__(self, card: Card, target: Any) -> None:
        self.card, self.target = card, target

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.target(**self.card.sample)
        shake(module)
        return module.eval()

    def input(self, batch: int = 2) -> Tensor:
        torch.manual_seed(1)
        if self.card.kind is BACKBONE:
            return torch.randn(batch, 3, *(self.card.probe or (64, 64)))
        return torch.randint(0, 40, (batch, *(self.card.probe or (12,))))

    def inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        """All that a call takes: for a denoiser a noisy image, its time and its class."""
        if self.card.kind is not DENOISER:
            return (self.input(batch),)
        torch.manual_seed(1)
        return torch.randn(batch, *self.card.probe), 1000 * torch.rand(batch), torch.randint(0, 5, (batch,))


def has_the_published_sizes(network: Network) -> None:
    for name, size in network.card.sizes.items():
        with torch.device("meta"):
            built = network.target(**size.arguments)
        # Tied weights count once.
        count = sum(p.numel() for p in {id(p): p for p in built.parameters()}.values())
        assert count == size.params, f"{name} has {count:,} parameters, the authors' {size.params:,}"


def treats_each_sample_alone(network: Network) -> None:
    module, inputs = network.build(), network.inputs(3)
    close(module(*(x[1:2] for x in inputs)), module(*inputs)[1:2], 1e-4)


def trains_every_parameter(network: Network) -> None:
    module = network.build().train()
    out = module(*network.inputs(4))
    outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor) and o.requires_grad]
    sum(o.float().pow(2).sum() for o in outputs).backward()
    idle = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"no gradient reaches {idle}"


def survives_a_round_trip(network: Network) -> None:
    module, inputs, file = network.build(), network.inputs(), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = network.target(**network.card.sample).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    close(other(*inputs), module(*inputs), 0.0)


def compiles(network: Network) -> None:
    module, inputs = network.build(), network.inputs()
    torch.compiler.reset()
    try:
        with torch.no_grad():
            traced = torch.compile(copy.deepcopy(module), fullgraph=True, backend="eager")(*inputs)
    except Exception as error:
        reason = network.card.compiles
        assert reason, f"it fails, and the card gives no reason: {type(error).__name__}: {str(error)[:500]}"
        return
    assert not network.card.compiles, f"it works, but the card says that it does not: {network.card.compiles}"
    close(traced, module(*inputs), 1e-4)


def gives_features_at_its_strides(network: Network) -> None:
    if network.card.kind is not BACKBONE:
        return
    module, x = network.build(), network.input()
    maps = module.forward_features(x)
    assert len(maps) == len(module.channels) == len(module.reductions)
    for found, channels, reduction in zip(maps, module.channels, module.reductions, strict=True):
        wanted = (x.shape[0], channels, *(-(-n // reduction) for n in x.shape[2:]))
        assert found.shape == wanted, f"features {tuple(found.shape)}, wanted {wanted}"


def causal(network: Network) -> None:
    if CAUSAL_SELF not in network.card.capabilities:
        return
    module, ids = network.build().double(), network.input()
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 40
    close(module(other)[:, :5], module(ids)[:, :5])


def streams(network: Network) -> None:
    if STREAMING not in network.card.capabilities:
        return
    module, ids = network.build().double(), network.input()
    full, state, out = module(ids), module.initial_state(ids.shape[0], dtype=torch.float64), []
    with torch.no_grad():
        for piece in ids.split([3, 1, ids.shape[1] - 4], 1):
            y, state = module(piece, state=state)
            out.append(y)
    close(torch.cat(out, 1), full)


def keeps_what_it_says(network: Network) -> None:
    if STREAMING not in network.card.capabilities:
        return
    module, ids = network.build(), network.input(1)
    for length in (ids.shape[1] // 2, ids.shape[1]):
        with torch.no_grad():
            _, state = module(ids[:, :length], state=module.initial_state(1))
        check_size(network.card, module, length, state)


def refuses_what_does_not_fit(network: Network) -> None:
    """A state of another model or batch is refused, and a text longer than the model reads."""
    if STREAMING not in network.card.capabilities:
        return
    module, ids, sample = network.build(), network.input(), network.card.sample
    others = [("a tensor", ids), ("another batch", module.initial_state(3))]
    for name, value in (
        ("dim", 2 * sample["dim"]),
        ("heads", 2 * sample.get("heads", 1)),
        ("depth", 2 * sample["depth"]),
    ):
        if name in sample:
            others.append((f"{name}={value}", network.target(**{**sample, name: value}).initial_state(len(ids))))
    for name, state in others:
        try:
            module(ids, state=state)
        except (ValueError, TypeError) as error:
            assert "state" in str(error), f"the error about a state of {name} does not name it: {error}"
            continue
        raise AssertionError(f"a state of {name} was taken")
    short = network.target(**{**sample, "length": ids.shape[1] - 1})
    state = short.initial_state(len(ids))
    _, state = short(ids[:, :3], state=state)
    for prompt, before in ((ids, None), (ids[:, 3:], state)):
        with pytest.raises(ValueError, match="ids reach"):
            short(prompt) if before is None else short(prompt, state=before)


CHECKS = (
    has_the_published_sizes,
    treats_each_sample_alone,
    trains_every_parameter,
    survives_a_round_trip,
    compiles,
    gives_features_at_its_strides,
    causal,
    streams,
    keeps_what_it_says,
    refuses_what_does_not_fit,
)
