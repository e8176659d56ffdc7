"""Another mechanism in the place of a model's attention modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnlab import cards
from attnlab.hub.convert import Old, Taken, convert, read
from attnlab.hub.grids import Grids
from attnlab.hub.stand_ins import STAND_INS
from attnlab.hub.swapped import Swap
from attnlab.lens.aside import aside
from attnlab.lens.where import Layers
from attnlab.nn.mechanism import Mechanism
from attnlab.nn.multihead import MultiHead


class MechanismSwap(Swap):
    """Other modules in the place of a model's attention, with the old weights where they fit (`report`)."""

    def __init__(
        self, model: nn.Module, by: type[Mechanism], layers: Layers, grids: Grids, options: Mapping[str, Any]
    ) -> None:
        self.model = model
        found = [(n, m, old) for n, m in model.named_modules() if (old := read(m)) is not None]
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no attention module that can be replaced: those of timm, transformers "
                "(q_proj, k_proj, v_proj), torch (MultiheadAttention) and attnlab (MultiHead) can; patterns work on all"
            )
        chosen = _chosen(layers, [n for n, _, _ in found])
        if found[0][0] == "":
            raise ValueError("model is an attention module itself: swap it in the model that holds it")
        card: cards.Card | None = getattr(by, "card", None)
        on_grid = card is not None and cards.ANY_GRID in card.capabilities
        self._pairs: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        report = []
        for name, module, old in found:
            if name not in chosen:
                continue
            known = grids.known(name) if on_grid else {}
            mixer, taken = convert(_understood(model, module, old, name), by, dict(options), name, known)
            new = _stand_in(mixer, module, old, name, grids if on_grid else None).train(module.training)
            parent, _, child = name.rpartition(".")
            self._pairs.append((model.get_submodule(parent), child, module, new))
            report.append(taken)
        self.report: tuple[Taken, ...] = tuple(report)
        self.layers = tuple(taken.name for taken in report)
        self._handles = grids.open() if on_grid else []
        self._switch(True)

    def undo(self) -> None:
        """The old modules, as they were, in their places."""
        if self._pairs:
            self._switch(False)
        for handle in self._handles:
            handle.remove()
        self._pairs, self._handles = [], []

    @property
    def holds(self) -> bool:
        return bool(self._pairs)

    def _switch(self, on: bool) -> None:
        for parent, child, old, new in self._pairs:
            setattr(parent, child, new if on else old)

    def __str__(self) -> str:
        return "\n".join(map(str, self.report))


@torch.no_grad()
def _understood(model: nn.Module, module: nn.Module, old: Old, name: str) -> Old:
    """`old`, if softmax attention with its weights gives what the module gives; ValueError if the module does more.

    Not all that a module does stands in its weights: a layer may leave out the rotations, or cap its scores.
    """
    if old.host == "ours" or old.refuses or old.wo[0].is_meta:
        return old
    arguments, keywords = _probe(module, old)
    near = 1e-3 if old.wo[0].dtype in (torch.float32, torch.float64) else 0.05
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with aside(model):
            wanted = _first(module(*arguments, **keywords))
            for one in (old, replace(old, position=None)):
                plain = _stand_in(convert(one, MultiHead, {}, name, {})[0], module, one, name, None).eval()
                apart = _first(plain(*arguments, **keywords)) - wanted
                if apart.norm() <= near * wanted.norm():
                    return one
    finally:
        for part, mode in training:
            part.training = mode
    raise ValueError(
        f"{name} cannot be replaced: a {type(module).__name__} does more than softmax attention with its weights"
    )


def _probe(module: nn.Module, old: Old) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A few tokens, as the module takes them."""
    weight = old.wo[0]
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, old.dim, generator=noise).to(weight)
    if old.host == "torch":
        return (x, x, x), {"need_weights": False}
    if old.host == "timm":
        return (x,), {}
    keywords: dict[str, Any] = {"hidden_states": x}
    if old.causal:
        later = torch.ones(5, 5, dtype=torch.bool, device=x.device).triu(1)
        hidden = torch.finfo(x.dtype).min
        keywords["attention_mask"] = torch.zeros_like(later, dtype=x.dtype).masked_fill(later, hidden)[None, None]
    if old.position is not None:
        share = getattr(getattr(module, "config", None), "partial_rotary_factor", None) or 1.0
        angles = torch.randn(1, 5, int(old.head_dim * share) // 2, generator=noise).repeat(1, 1, 2)
        keywords["position_embeddings"] = (angles.cos().to(x), angles.sin().to(x))
    return (), keywords


def _first(y: Any) -> Tensor:
    return (y[0] if isinstance(y, tuple) else y).float()


def _stand_in(mixer: Mechanism, module: nn.Module, old: Old, name: str, grids: Grids | None) -> nn.Module:
    return mixer if old.host == "ours" else STAND_INS[old.host](mixer, module, old, name, grids)


def _chosen(layers: Layers, names: list[str]) -> set[str]:
    """The names that `layers` means; ValueError, which lists them, where it means none of them."""
    if layers is None:
        return set(names)
    if isinstance(layers, slice):
        return set(names[layers])
    if callable(layers):
        raise TypeError("layers must be ordinals or names for a mechanism: there is no event to ask a function about")
    wanted = [layers] if isinstance(layers, (int, str)) else list(cast(Iterable[Any], layers))
    found: set[str] = set()
    for one in wanted:
        if isinstance(one, str):
            mine = [n for n in names if fnmatchcase(n, one)]
        else:
            mine = [names[one]] if -len(names) <= one < len(names) else []
        if not mine:
            there = ", ".join(f"{i} {n}" for i, n in enumerate(names))
            raise ValueError(f"layers: {one!r} is not there; there are {there}")
        found |= set(mine)
    return found
