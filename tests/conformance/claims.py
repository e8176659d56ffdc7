"""What a card's claims mean, as checks: each takes a subject and fails unless the claim is true of it.

`test_cards.py` runs them over every registered card; `test_claims.py` proves that they catch false claims.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import (
    ANY_GRID,
    ANY_LENGTH,
    CAUSAL_CROSS,
    CAUSAL_SELF,
    EXACT,
    FEATURES,
    NONCAUSAL_CROSS,
    NONCAUSAL_SELF,
    PERMUTATION_EQUIVARIANT,
    STREAMING,
    TOKENS,
    Capability,
    Card,
    entries,
)
from attnlab.cost import count_flops, fit_growth
from attnlab.nn.cache import numbers
from attnlab.nn.multihead import MultiHead

DIM = 32
GRIDS = {1: (24,), 2: (4, 6), 3: (2, 3, 4)}
OTHER_GRIDS = {1: ((1,), (17,)), 2: ((1, 1), (5, 7), (9, 4)), 3: ((1, 1, 1), (3, 5, 2))}
LENGTHS = (1, 2, 7, 33, 67)
GROWTH_GRIDS = {
    1: ((1024,), (2048,), (4096,)),
    2: ((32, 32), (64, 32), (64, 64)),
    3: ((8, 16, 8), (8, 16, 16), (16, 16, 16)),
}
GROWTH_LENGTHS = (1024, 2048, 4096)
# Float64 rounding through one mechanism, relative to the largest entry.
EXACTLY = 1e-9


@dataclass
class Subject:
    """A card with the thing that it describes, and how tests call it."""

    card: Card
    target: Callable[..., Any]

    @property
    def on_grid(self) -> bool:
        return ANY_GRID in self.card.capabilities and self.card.kind is TOKENS

    @property
    def grid(self) -> tuple[int, ...]:
        return GRIDS[self.card.grid_axes]

    def build(self, *, dim: int = DIM, **keywords: Any) -> nn.Module:
        """The mechanism in float64, in evaluation mode, with every parameter moved off its special initial value."""
        torch.manual_seed(0)
        module = self.target(dim, **{**self.card.sample, **keywords})
        shake(module)
        return module.double().eval()

    def causal(self, **keywords: Any) -> nn.Module:
        return self.build(causal=True, **keywords)

    def input(self, *, batch: int = 2, grid: tuple[int, ...] | None = None, length: int = 24, dim: int = DIM) -> Tensor:
        if self.card.kind is FEATURES:
            return torch.randn(batch, dim, *(grid or self.grid), dtype=torch.float64)
        tokens = torch.Size(grid or self.grid).numel() if self.on_grid else length
        return torch.randn(batch, tokens, dim, dtype=torch.float64)

    def call(self, module: nn.Module, x: Tensor, *, grid: tuple[int, ...] | None = None, **keywords: Any) -> Tensor:
        if self.on_grid:
            keywords["grid"] = grid or self.grid
        return module(x, **keywords)


def shake(module: nn.Module) -> None:
    """Move every floating-point parameter: zeros and ones at initialisation hide what depends on them."""
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                p.add_(0.1 * torch.randn_like(p))


def close(ours: Tensor, wanted: Tensor, tolerance: float = EXACTLY) -> None:
    assert ours.shape == wanted.shape, f"shape {tuple(ours.shape)}, wanted {tuple(wanted.shape)}"
    assert bool(ours.isfinite().all()), "the output is not finite"
    error = (ours - wanted).abs().max().item()
    scale = max(wanted.abs().max().item(), 1e-3)
    assert error <= tolerance * scale, f"off by {error / scale:.1e} of the largest entry"


def depends(function: Callable[[Tensor], Tensor], at: Tensor, *, out: Any, on: Any) -> bool:
    """Whether `function(at)[out]` has any gradient with respect to `at[on]`."""
    at = at.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(at)[out].pow(2).sum(), at, allow_unused=True)
    return gradient is not None and bool((gradient[on] != 0).any())


# What holds for every mechanism, claimed or not


def keeps_shape_and_dtype(s: Subject) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        y = s.call(s.build().to(dtype), x := s.input().to(dtype))
        assert y.shape == x.shape, f"{tuple(x.shape)} became {tuple(y.shape)}"
        assert y.dtype == dtype, f"{dtype} became {y.dtype}"
        assert bool(y.isfinite().all()), f"not finite in {dtype}"


def treats_each_sample_alone(s: Subject) -> None:
    module, x = s.build(), s.input(batch=3)
    together = s.call(module, x)
    close(s.call(module, x[1:2]), together[1:2])


def trains_every_parameter(s: Subject) -> None:
    module = s.build().train()
    s.call(module, s.input()).pow(2).sum().backward()
    idle = [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle, f"no gradient reaches {idle}"


def survives_a_round_trip(s: Subject) -> None:
    module, x, file = s.build(), s.input(), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = s.target(DIM, **s.card.sample).double().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    close(s.call(other, x), s.call(module, x), 0.0)


def refuses_what_does_not_fit(s: Subject) -> None:
    module, x = s.build(), s.input()
    bad = [s.input(dim=DIM + 1), x[:, :0] if s.card.kind is TOKENS else x[..., :0], x[0] if x.dim() == 3 else x[0, 0]]
    for wrong in bad:
        try:
            s.call(module, wrong)
        except (ValueError, TypeError):
            continue
        raise AssertionError(f"an input of shape {tuple(wrong.shape)} was taken, or raised something else")
    if s.on_grid:
        for grid in (None, tuple(g + 1 for g in s.grid)):
            try:
                module(x, grid=grid)
            except (ValueError, TypeError):
                continue
            raise AssertionError(f"grid={grid} was taken for {x.shape[1]} tokens")


def compiles(s: Subject) -> None:
    traces(s, lambda module, keywords: torch.compile(module, fullgraph=True, backend="aot_eager"), s.card.compiles)


def exports(s: Subject) -> None:
    def export(module: nn.Module, keywords: dict[str, Any]) -> Callable[..., Any]:
        return torch.export.export(module, (s.input().float(),), keywords, strict=False).module()

    traces(s, export, s.card.exports)


def traces(s: Subject, tool: Callable[[nn.Module, dict[str, Any]], Callable[..., Any]], reason: str) -> None:
    """`tool` takes the mechanism and gives the same numbers; or the card states why not, and it is still so."""
    module, x = s.build().float(), s.input().float()
    keywords = {"grid": s.grid} if s.on_grid else {}
    torch.compiler.reset()
    try:
        traced = tool(copy.deepcopy(module), keywords)(x, **keywords)
    except Exception as error:
        assert reason, f"it fails, and the card gives no reason: {type(error).__name__}: {str(error)[:500]}"
        return
    assert not reason, f"it works, but the card says that it does not: {reason}"
    close(traced, s.call(module, x), 1e-4)


# What a card claims


def noncausal_self(s: Subject) -> None:
    module, x = s.build(), s.input(batch=1)
    first, rest = (0, slice(0, 1)), (0, slice(1, None))
    assert depends(lambda t: s.call(module, t), x, out=first, on=rest), "the first token sees nothing after itself"


def causal_self(s: Subject) -> None:
    module, x = s.causal(), s.input(batch=1)
    n = x.shape[1]
    for cut in (1, n // 3, n - 1):
        changed = x.clone()
        changed[:, cut:] = torch.randn_like(changed[:, cut:])
        close(s.call(module, changed)[:, :cut], s.call(module, x)[:, :cut])
    last, before = (0, slice(n - 1, n)), (0, slice(0, n - 1))
    assert depends(lambda t: s.call(module, t), x, out=last, on=before), "the last token sees nothing before itself"


def noncausal_cross(s: Subject) -> None:
    module, x, context = s.build(), s.input(batch=1), torch.randn(1, 13, DIM, dtype=torch.float64)
    assert s.call(module, x, context=context).shape == x.shape
    seen = depends(lambda c: s.call(module, x, context=c), context, out=(0, slice(0, 1)), on=(0, slice(1, None)))
    assert seen, "the first query does not depend on later context"
    alone = depends(lambda t: s.call(module, t, context=context), x, out=(0, slice(0, 1)), on=(0, slice(1, None)))
    assert not alone, "a query depends on other queries' tokens: that is not cross-attention"


def causal_cross(s: Subject) -> None:
    module, x = s.causal(), s.input(batch=1)
    context = torch.randn_like(x)
    for cut in (1, x.shape[1] // 2):
        changed = context.clone()
        changed[:, cut:] = torch.randn_like(changed[:, cut:])
        close(s.call(module, x, context=changed)[:, :cut], s.call(module, x, context=context)[:, :cut])
    seen = depends(lambda c: s.call(module, x, context=c), context, out=(0, slice(-1, None)), on=(0, slice(0, -1)))
    assert seen, "the last query does not depend on earlier context"


def permutation_equivariant(s: Subject) -> None:
    module, x = s.build(), s.input()
    order = torch.randperm(x.shape[1])
    close(s.call(module, x[:, order]), s.call(module, x)[:, order])


def any_length(s: Subject) -> None:
    for length in LENGTHS:
        for module in [s.build()] + ([s.causal()] if CAUSAL_SELF in s.card.capabilities else []):
            x = s.input(length=length)
            y = s.call(module, x)
            assert y.shape == x.shape and bool(y.isfinite().all()), f"length {length}"


def any_grid(s: Subject) -> None:
    module = s.build()
    for grid in OTHER_GRIDS[s.card.grid_axes]:
        x = s.input(grid=grid)
        y = s.call(module, x, grid=grid) if s.card.kind is TOKENS else module(x)
        assert y.shape == x.shape and bool(y.isfinite().all()), f"grid {grid}"


def streaming(s: Subject) -> None:
    module, x = s.causal(), s.input()
    full = s.call(module, x)
    for pieces in ([1] * x.shape[1], [5, 1, x.shape[1] - 6], [x.shape[1]]):
        state, out = module.initial_state(x.shape[0], dtype=torch.float64), []
        with torch.no_grad():
            for piece in x.split(pieces, 1):
                y, state = s.call(module, piece, state=state)
                out.append(y)
        close(torch.cat(out, 1), full)


def keeps_what_it_says(s: Subject) -> None:
    """A state has as many numbers as the card's formula says, after two lengths."""
    module = s.causal()
    x = s.input(batch=1, length=41)
    for length in (x.shape[1] // 2 + 1, x.shape[1]):
        with torch.no_grad():
            _, state = s.call(module, x[:, :length], state=module.initial_state(1, dtype=torch.float64))
        check_size(s.card, module, length, state)


def check_size(card: Card, thing: nn.Module, tokens: int, state: Any) -> None:
    found = numbers(state)
    assert card.state, f"the card gives no state=; after {tokens} tokens it has {found:,} numbers"
    claimed = card.state_numbers(thing, tokens)
    assert found == claimed, f"after {tokens} tokens the state has {found:,} numbers, claimed {claimed:,}: {card.state}"


# Settings without which a state means something else.
SETTINGS = ("heads", "chunk", "segment", "window", "span", "keep", "states", "sinks", "block")


def refuses_foreign_states(s: Subject) -> None:
    """The state of another mechanism, width, batch or setting is refused, and never read as one's own."""
    module, x = s.causal(), s.input()
    others: list[tuple[str, Any]] = [("a tensor", x[:, 0]), ("another batch", module.initial_state(3))]
    others.append(("another width", s.causal(dim=2 * DIM).initial_state(len(x))))
    for name in SETTINGS:
        if name in s.card.sample:
            changed = {name: 2 * s.card.sample[name]}
            others.append((f"{changed}", s.causal(**changed).initial_state(len(x))))
    others += [(name, state) for name, state in _states() if name != s.card.name]
    for name, state in others:
        try:
            s.call(module, x, state=state)
        except (ValueError, TypeError) as error:
            assert "state" in str(error), f"the error about a state of {name} does not name it: {error}"
            continue
        raise AssertionError(f"a state of {name} was taken")


@cache
def _states() -> list[tuple[str, Any]]:
    """A state of each streaming mechanism after a few tokens."""
    found = []
    for other in (Subject(e.card, e.target) for e in entries() if e.card.claims(STREAMING) and e.card.kind is TOKENS):
        module, x = other.causal(), other.input()
        with torch.no_grad():
            found.append((other.card.name, other.call(module, x, state=module.initial_state(len(x)))[1]))
    return found


def exact(s: Subject) -> None:
    """In the limit that the card builds, it is multi-head attention with the same projections."""
    assert s.card.limit is not None, "EXACT is claimed, but the card gives no limit"
    torch.manual_seed(0)
    module = s.card.limit(DIM, s.grid).double().eval()
    x = s.input()
    plain = MultiHead(DIM, heads=module.heads, bias=module.wqkv.bias is not None).double()
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if n.split(".")[0] in ("wqkv", "wo")})
    close(s.call(module, x), plain(x))


def grows_as_claimed(s: Subject) -> None:
    """FLOPs counted over a sweep of lengths grow with the claimed exponent, between the two longest."""
    assert s.card.growth is not None
    dim, sample = 16, dict(s.card.sample)
    if "heads" in sample:
        sample.update(heads=2, **({"kv_heads": 1} if "kv_heads" in sample else {}))
    torch.manual_seed(0)
    causal = s.card.kind is TOKENS and NONCAUSAL_SELF not in s.card.capabilities
    module = s.target(dim, **sample, **({"causal": True} if causal else {})).eval()
    axes = s.card.grid_axes
    uses_grid = s.on_grid or s.card.kind is FEATURES
    sweep = GROWTH_GRIDS[axes] if uses_grid else [(n,) for n in GROWTH_LENGTHS]
    counts = []
    for shape in sweep[1:]:
        x = s.input(batch=1, grid=shape, length=shape[0], dim=dim).float()
        with torch.no_grad():
            counts.append(
                count_flops(lambda x=x, shape=shape: s.call(module, x, grid=shape) if s.on_grid else module(x))
            )
    found = fit_growth([torch.Size(g).numel() for g in sweep[1:]], counts)
    assert abs(found - s.card.growth) <= 0.1, f"FLOPs grow as N^{found:.2f}, claimed N^{s.card.growth}"


ALWAYS: tuple[Callable[[Subject], None], ...] = (
    keeps_shape_and_dtype,
    treats_each_sample_alone,
    trains_every_parameter,
    survives_a_round_trip,
    refuses_what_does_not_fit,
    compiles,
    exports,
)
CLAIMS: dict[Capability, Callable[[Subject], None]] = {
    NONCAUSAL_SELF: noncausal_self,
    CAUSAL_SELF: causal_self,
    NONCAUSAL_CROSS: noncausal_cross,
    CAUSAL_CROSS: causal_cross,
    PERMUTATION_EQUIVARIANT: permutation_equivariant,
    ANY_LENGTH: any_length,
    ANY_GRID: any_grid,
    STREAMING: streaming,
    EXACT: exact,
}


def claims_of(card: Card) -> list[Callable[[Subject], None]]:
    """Every check that `card` must pass."""
    made = [check for claim, check in CLAIMS.items() if claim in card.capabilities]
    if STREAMING in card.capabilities:
        made += [keeps_what_it_says, refuses_foreign_states]
    return [*ALWAYS, *made, *([grows_as_claimed] if card.growth is not None else [])]
