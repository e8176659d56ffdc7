"""The conformance checks catch false claims: each is shown a mechanism that breaks it, under a card that claims it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, BACKBONE, FEATURES, LM, NONCAUSAL_SELF, TOKENS, Capability, Card, Size
from attnlab.nn.mechanism import Mechanism
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Causal
from conformance import claims, networks
from conformance.claims import Subject


def card(capabilities: Capability = NONCAUSAL_SELF, **keywords) -> Card:
    return Card(
        **{"name": "false", "paper": "0000.00000", "family": "test", "kind": TOKENS, "capabilities": capabilities}
        | keywords
    )


def fails(check, target, *, crash: type[Exception] = AssertionError, **keywords) -> None:
    with pytest.raises(crash):
        check(Subject(card(**keywords), target))


class Broken(Mechanism):
    """A linear layer; subclasses break one promise each."""

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
        self.w = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, grid=None, pattern=None, state=None):
        self.check(x, context)
        return self.w(x)


class Shrinks(Broken):
    def forward(self, x, context=None, **_):
        return self.w(x)[:, 1:]


class MixesSamples(Broken):
    def forward(self, x, context=None, **_):
        return self.w(x) + x.mean(0, keepdim=True)


class Idle(Broken):
    def __init__(self, dim, **keywords):
        super().__init__(dim, **keywords)
        self.unused = nn.Parameter(torch.zeros(dim))


class Forgets(Broken):
    def __init__(self, dim, **keywords):
        super().__init__(dim, **keywords)
        self.secret = torch.randn(dim)

    def forward(self, x, context=None, **_):
        return self.w(x) + self.secret.to(x)


class TakesAnything(Broken):
    def forward(self, x, context=None, **_):
        return x * self.w.weight.sum()


class Branches(Broken):
    def forward(self, x, context=None, **_):
        return self.w(x) if x.sum().item() > 0 else 2 * self.w(x)


class Leaks(MultiHead):
    """Claims to be causal and looks one token ahead."""

    def mix(self, q, k, v, *, pattern=None, **_):
        return attend(q, k, v, pattern=None if pattern is None else pattern | Causal().starting_at(1))


class Blind(Broken):
    """Causal, because it sees nothing."""


class BlindToContext(MultiHead):
    def forward(self, x, context=None, **keywords):
        return super().forward(x, **keywords)


class SeesPositions(MultiHead):
    def project(self, x, context=None, offset=0, **keywords):
        q, k, v = super().project(x, context, offset, **keywords)
        return q + torch.arange(q.shape[2]).to(q)[:, None], k, v


class EvenOnly(Broken):
    def forward(self, x, context=None, **_):
        if x.shape[1] % 2:
            raise ValueError("odd")
        return self.w(x)


class SquareOnly(Broken):
    def forward(self, x, context=None, *, grid=None, **_):
        side = int(x.shape[1] ** 0.5)
        return self.w(x.unflatten(1, (side, side)).flatten(1, 2))


class Amnesiac(MultiHead):
    """Streams without remembering."""

    def forward(self, x, context=None, *, state=None, **keywords):
        y = super().forward(x, context, **keywords)
        return y if state is None else (y, state)


class NotSoftmax(MultiHead):
    def mix(self, q, k, v, *, pattern=None, **_):
        return attend(q, k, v, pattern=pattern, scale=1.0)


class Overflows(Broken):
    def forward(self, x, context=None, **_):
        return self.w(x) / (x - x)


class AlwaysFloat(Broken):
    def forward(self, x, context=None, **_):
        return nn.functional.linear(x.double(), self.w.weight.double()).float()


@pytest.mark.parametrize(
    ("check", "target"),
    [
        (claims.keeps_shape_and_dtype, Shrinks),
        (claims.keeps_shape_and_dtype, Overflows),
        (claims.keeps_shape_and_dtype, AlwaysFloat),
        (claims.treats_each_sample_alone, MixesSamples),
        (claims.trains_every_parameter, Idle),
        (claims.survives_a_round_trip, Forgets),
        (claims.refuses_what_does_not_fit, TakesAnything),
        (claims.compiles, Branches),
        (claims.exports, Branches),
        (claims.noncausal_self, Blind),
        (claims.causal_self, Leaks),
        (claims.causal_self, Blind),
        (claims.noncausal_cross, BlindToContext),
        (claims.causal_cross, Leaks),
        (claims.causal_cross, BlindToContext),
        (claims.permutation_equivariant, SeesPositions),
        (claims.streaming, Amnesiac),
    ],
    ids=lambda value: value.__name__,
)
def test_a_false_claim_is_caught(check, target) -> None:
    fails(check, target)


def test_a_false_limit_is_caught() -> None:
    fails(claims.exact, NotSoftmax, limit=lambda dim, grid: NotSoftmax(dim, heads=4))
    fails(claims.exact, MultiHead)


def test_a_grid_that_is_guessed_is_caught() -> None:
    fails(claims.any_grid, SquareOnly, capabilities=NONCAUSAL_SELF | ANY_GRID, crash=RuntimeError)


def test_a_length_that_is_refused_is_caught() -> None:
    fails(claims.any_length, EvenOnly, crash=ValueError)


def test_streaming_without_a_state_is_caught() -> None:
    fails(claims.streaming, Broken, crash=ValueError)


@pytest.mark.parametrize("growth", [1.0, 1.5])
def test_a_false_growth_is_caught(growth: float) -> None:
    fails(claims.grows_as_claimed, MultiHead, growth=growth, sample=dict(heads=2))


@pytest.mark.parametrize("state", ["", "kv_heads * head_dim * N", "2 * kv_heads * head_dim * 24", "heads * head_dim"])
def test_a_false_size_of_the_state_is_caught(state: str) -> None:
    fails(claims.keeps_what_it_says, MultiHead, state=state, sample=dict(heads=4, kv_heads=2))


class TakesAnyState(MultiHead):
    """Reads whatever it is given as its own."""

    def check_state(self, state, kind, batch) -> None:
        pass


def test_a_foreign_state_that_is_taken_is_caught() -> None:
    with pytest.raises((AssertionError, AttributeError)):
        claims.refuses_foreign_states(Subject(card(sample=dict(heads=4)), TakesAnyState))


def test_an_outdated_reason_is_caught() -> None:
    fails(claims.compiles, Broken, compiles="once it did not")
    fails(claims.exports, Broken, exports="once it did not")


def test_a_feature_mechanism_that_changes_the_map_is_caught() -> None:
    class Pools(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.w = nn.Conv2d(dim, dim, 1)

        def forward(self, x):
            return self.w(x)[..., ::2]

    fails(claims.keeps_shape_and_dtype, Pools, kind=FEATURES)


def test_true_claims_pass() -> None:
    true = Subject(
        card(
            capabilities=Capability.ALL_FOUR | Capability.STREAMING,
            sample=dict(heads=4),
            state="2 * heads * head_dim * N",
        ),
        MultiHead,
    )
    for check in claims.claims_of(true.card):
        if check not in (claims.compiles, claims.exports):
            check(true)


class Classifier(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.w = nn.Conv2d(3, width, 1)
        self.idle = nn.Parameter(torch.zeros(1))
        self.channels, self.reductions = (width,), (2,)

    def forward_features(self, x):
        return [self.w(x)]

    def forward(self, x):
        return self.w(x - x.mean(0)).mean((2, 3))


class Forgetful(nn.Module):
    """A language model that takes any state, and remembers nothing."""

    def __init__(self, dim: int = 8, depth: int = 1, length: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, dim)

    def initial_state(self, batch, **_):
        return [torch.zeros(batch, 7)]

    def forward(self, ids, state=None):
        y = self.embedding(ids)
        return y if state is None else (y, state)


@pytest.mark.parametrize("check", [networks.keeps_what_it_says, networks.refuses_what_does_not_fit])
def test_a_language_models_false_state_is_caught(check) -> None:
    claimed = card(kind=LM, capabilities=Capability.STREAMING, state="6", sample=dict(dim=8, depth=1))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(networks.Network(claimed, Forgetful))


@pytest.mark.parametrize(
    "check",
    [
        networks.has_the_published_sizes,
        networks.treats_each_sample_alone,
        networks.trains_every_parameter,
        networks.gives_features_at_its_strides,
    ],
    ids=lambda check: check.__name__,
)
def test_a_networks_false_promise_is_caught(check) -> None:
    sizes = {"false_tiny": Size(params=18, arguments=dict(width=4))}
    network = networks.Network(card(kind=BACKBONE, sizes=sizes, probe=(8, 8)), Classifier)
    with pytest.raises(AssertionError):
        check(network)
