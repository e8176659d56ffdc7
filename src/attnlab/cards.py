"""What is known about each system, and the registry that finds it by name.

A `Card` stands over every mechanism, network, recipe, lens method and benchmark. Every claim that it makes is tested by
`tests/conformance/` automatically, so a card says only what is true.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from typing import Any, TypeVar

T = TypeVar("T")


class Kind(str, Enum):
    """What a registered object is, and so how it is built and called."""

    TOKENS = "tokens"  # (B, N, C) → (B, N, C)
    FEATURES = "features"  # (B, C, *spatial) → the same
    BACKBONE = "backbone"  # images → logits or feature maps
    LM = "lm"  # token ids → logits
    DENOISER = "denoiser"  # noisy images, times and classes → the noise
    OPERATOR = "operator"  # a function or module with shapes of its own, which its docstring gives
    RECIPE = "recipe"
    LENS = "lens"
    BENCHMARK = "benchmark"


class Capability(Flag):
    """What a mechanism can do; the first four are the CAB taxonomy (arXiv 2210.07661)."""

    NONE = 0
    NONCAUSAL_SELF = auto()
    CAUSAL_SELF = auto()
    NONCAUSAL_CROSS = auto()
    CAUSAL_CROSS = auto()
    PERMUTATION_EQUIVARIANT = auto()  # permuting tokens permutes the output
    ANY_LENGTH = auto()  # any number of tokens, without padding by the caller
    ANY_GRID = auto()  # any height and width
    STREAMING = auto()  # pieces with a state give what the full causal pass gives
    EXACT = auto()  # equals softmax attention in a limit that the docstring states

    ALL_FOUR = NONCAUSAL_SELF | CAUSAL_SELF | NONCAUSAL_CROSS | CAUSAL_CROSS

    def names(self) -> list[str]:
        """The single capabilities in this set, as lower-case words."""
        singles = [c for c in Capability if c.value and c.value & (c.value - 1) == 0]
        return [str(c.name).lower().replace("_", "-") for c in singles if c in self]


TOKENS, FEATURES, BACKBONE, LM = Kind.TOKENS, Kind.FEATURES, Kind.BACKBONE, Kind.LM
DENOISER, OPERATOR, RECIPE = Kind.DENOISER, Kind.OPERATOR, Kind.RECIPE
LENS, BENCHMARK = Kind.LENS, Kind.BENCHMARK
NONCAUSAL_SELF, CAUSAL_SELF = Capability.NONCAUSAL_SELF, Capability.CAUSAL_SELF
NONCAUSAL_CROSS, CAUSAL_CROSS = Capability.NONCAUSAL_CROSS, Capability.CAUSAL_CROSS
ALL_FOUR, PERMUTATION_EQUIVARIANT = Capability.ALL_FOUR, Capability.PERMUTATION_EQUIVARIANT
ANY_LENGTH, ANY_GRID = Capability.ANY_LENGTH, Capability.ANY_GRID
STREAMING, EXACT = Capability.STREAMING, Capability.EXACT


@dataclass(frozen=True)
class Size:
    """One named size of a network: its constructor arguments and the parameter count that the authors' code has."""

    params: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    image: int | None = None  # the side of the images it is made for, where no argument says so; else 224


@dataclass(frozen=True)
class Card:
    """What is known about one system.

    Beside the obvious: `growth` is the exponent with which FLOPs grow in the number of tokens; `sample` holds the
    constructor keywords (beside `dim`) with which tests and studies build the thing, and `probe` the input size that a
    network takes then, (height, width), (length,) or, of a denoiser, (channels, height, width); `grid_axes` is the
    number of axes of a mechanism's grid. `limit`, for an EXACT claim, builds it as `limit(dim, grid)` where it equals
    `MultiHead` with the same `wqkv` and `wo`. `state`, of a STREAMING one, says how many numbers are kept for each
    sequence after N tokens: arithmetic of N and of the attributes of the thing, or of `layers`, what the layers of a
    network keep. `compiles` and `exports` are empty when torch.compile(fullgraph=True) and torch.export take it, and
    otherwise say why not.
    """

    name: str
    paper: str  # arXiv id
    family: str
    kind: Kind
    capabilities: Capability = Capability.NONE
    cost: str = ""
    growth: float | None = None
    title: str = ""
    system: str = ""  # the paper's name in the catalogue, where all of it is here
    sample: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Size] = field(default_factory=dict)
    grid_axes: int = 2
    probe: tuple[int, ...] = ()
    limit: Callable[..., Any] | None = None
    state: str = ""
    compiles: str = ""
    exports: str = ""

    def claims(self, *wanted: Capability) -> bool:
        return all(w in self.capabilities for w in wanted)

    def state_numbers(self, thing: Any, tokens: int) -> int:
        """How many numbers `thing`, built of what this card is over, keeps of one sequence after so many tokens."""
        if not self.state:
            raise ValueError(f"{self.name!r} does not say how large its state is")
        return eval(self.state, {"__builtins__": {}}, _Names(thing, tokens))


class _Names(dict[str, Any]):
    """What the formula of a state may name."""

    def __init__(self, thing: Any, tokens: int) -> None:
        super().__init__(N=tokens, min=min, max=max, sum=sum, len=len)
        self.thing = thing

    def __missing__(self, name: str) -> Any:
        if name != "layers":
            return getattr(self.thing, name)
        mixers = (block.mixer for block in self.thing.blocks)
        return sum(m.card.state_numbers(m, self["N"]) for m in mixers if hasattr(m, "card"))


@dataclass(frozen=True)
class Entry:
    """A registered object with its card."""

    card: Card
    target: Callable[..., Any]


_entries: dict[str, Entry] = {}
_loaded = False
_HOMES = tuple(f"attnlab.{room}" for room in ("nn", "models", "recipes", "lens", "scale", "arena.bench"))


def register(card: Card) -> Callable[[T], T]:
    """Decorator: put a class or function under `card.name`, and under the name of each of its sizes."""

    def add(target: T) -> T:
        for name in (card.name, *(size for size in card.sizes if size != card.name)):
            known = _entries.get(name)
            if known is not None and _origin(known.target) != _origin(target):
                raise ValueError(f"name {name!r} is already registered by {_origin(known.target)}")
            _entries[name] = Entry(card, target)  # type: ignore[arg-type]
        target.card = card  # type: ignore[attr-defined]
        return target

    return add


def _origin(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _load() -> None:
    """Import every module in which something may be registered: once, at the first question."""
    global _loaded
    if _loaded:
        return
    for home in _HOMES:
        package = importlib.import_module(home)
        for module in pkgutil.walk_packages(package.__path__, home + "."):
            importlib.import_module(module.name)
    _loaded = True


def _find(name: str) -> Entry:
    _load()
    if name not in _entries:
        close = difflib.get_close_matches(name, _entries, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else "; attnlab.names() lists what there is"
        raise ValueError(f"unknown name {name!r}{hint}")
    return _entries[name]


def entries() -> list[Entry]:
    """Every registered object once, in order of its card's name."""
    _load()
    return [e for n, e in sorted(_entries.items()) if n == e.card.name]


def names(
    *, kind: Kind | str | None = None, family: str | None = None, capability: Capability | None = None
) -> list[str]:
    """Names of the registered systems, filtered by kind, family and capability."""
    if kind is not None and kind not in list(Kind):
        raise ValueError(f"kind must be one of {', '.join(k.value for k in Kind)}, got {kind!r}")
    return [
        e.card.name
        for e in entries()
        if (kind is None or e.card.kind == kind)
        and (family is None or e.card.family == family)
        and (capability is None or capability in e.card.capabilities)
    ]


def describe(name: str) -> Card:
    """The card of the system or named size `name`; an unknown name raises ValueError with the closest ones."""
    return _find(name).card


def target(name: str) -> Callable[..., Any]:
    """The class or function registered under `name`."""
    return _find(name).target


def build(
    name: str,
    *args: Any,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **keywords: Any,
) -> Any:
    """Build what is registered under `name`: `build("gated", 64, heads=4)`, or a size: `build("focalnet_tiny_srf")`.

    For a named size, the size's own arguments come first and `keywords` override them. With `features_only`, a backbone
    gives its maps at several scales (those of `out_indices`, or all) instead of logits, and has `channels` and
    `reductions`.
    """
    if features_only:
        from attnlab.models.skeletons.features import features_of

        return features_of(name, out_indices, keywords)
    if out_indices is not None:
        raise ValueError("out_indices goes with features_only=True")
    entry = _find(name)
    size = entry.card.sizes.get(name)
    return entry.target(*args, **({**size.arguments, **keywords} if size else keywords))
