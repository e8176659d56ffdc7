"""A network of ours and its peer with the same weights, out of timm or a checkout of the authors': `pair`."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbone_shims import SHIMS
from official_pairs import StandIn, lenient_import
from torch import Tensor, nn

import attnlab
from attnlab.hub.official import adapter_of, find
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.parts import DropPath
from attnlab.torchvision_schemas import declare

TIMM = "huggingface/pytorch-image-models"
Make = Callable[[Any, int], nn.Module]


@dataclass(frozen=True)
class Peer:
    """How the peer is made: `make(module, side)` of `module`, a module of timm or of a checkout of `repository`."""

    make: Make
    repository: str = TIMM
    module: str = "timm"
    within: str = ""  # the folder in the checkout that its own imports start from
    ours: dict[str, Any] = field(default_factory=dict)  # keywords of ours beside the named size; functions, of the side
    side: int = 0  # the side of the image where it is not a free choice
    fuse: Callable[[nn.Module], Any] | None = None  # their exact re-parameterisation for inference
    names: tuple[Rule, ...] = ()  # from its names to those that our adapter reads
    note: str = ""  # what is not as the authors have it

    @property
    def kind(self) -> str:
        return "timm" if self.repository == TIMM else "the authors"


@dataclass
class Pair:
    """Both networks in float32 with the same weights, as far as `off` says."""

    ours: nn.Module
    theirs: nn.Module
    off: float | None  # how far the outputs differ, relative to the largest; None if the weights are not shared
    note: str


def timm() -> Any:
    """timm; torchvision's compiled operators, which it imports, need not load."""
    declare()
    return importlib.import_module("timm")


@contextlib.contextmanager
def borrowed(peer: Peer, folder: Path | None) -> Iterator[Any]:
    """The peer's module, of which nothing stays behind: checkouts all have a `models` and a `utils` of their own."""
    if peer.repository == TIMM:
        yield timm()
        return
    if folder is None:
        raise ImportError(f"{peer.repository} is not there: give its checkout's folder as --official")
    root = folder / peer.repository.split("/")[1]
    if not root.exists():
        raise ImportError(f"{root} is not there")
    timm()
    registries = [importlib.import_module(f"timm.models{name}") for name in ("", "._registry", ".registry", ".helpers")]
    kept = [(module, module.__dict__.get("register_model")) for module in registries]
    before, path = dict(sys.modules), list(sys.path)
    sys.path.insert(0, str(root / peer.within))
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    try:
        for module in registries:  # timm's own networks keep their names
            module.register_model = lambda function: function  # type: ignore[attr-defined]
        sys.modules.update(SHIMS)
        np.__dict__.update({name: kind for name, kind in (("int", int), ("float", float)) if name not in np.__dict__})
        yield lenient_import(peer.module)
    finally:
        for module, register in kept:
            module.__dict__.pop("register_model") if register is None else setattr(module, "register_model", register)
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            places = (module.__dict__.get("__file__"), *module.__dict__.get("__path__", ()))
            theirs = any(str(place).startswith(str(root)) for place in places)
            if name not in before and (theirs or name in SHIMS or isinstance(module, StandIn)):
                del sys.modules[name]
        sys.modules.update({name: before[name] for name in SHIMS if name in before})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def pair(name: str, peer: Peer, side: int, folder: Path | None) -> Pair:
    """Both networks, without stochastic depth and dropout; ours with their weights."""
    torch.manual_seed(0)
    with quiet(), borrowed(peer, folder) as module:
        theirs = peer.make(module, side)
        off_special_values(theirs, torch.randn(2, 3, side, side))
        ours = build(name, side, peer.ours)
        for part in (*theirs.modules(), *ours.modules()):
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.p = 0.0
            names = ("rate",) if isinstance(part, DropPath) else ("drop_prob", "dropout")
            for chance in names:
                if isinstance(getattr(part, chance, None), float):
                    setattr(part, chance, 0.0)
        note = share(theirs, ours, peer.names)
        off = None if note else difference(ours, theirs, torch.randn(1, 3, side, side))
    return Pair(ours, theirs, off, "; ".join(part for part in (peer.note, note) if part))


def difference(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted, found = logits(theirs.eval()(x))[0], logits(ours.eval()(x))[0]
    return float((wanted - found).abs().max() / wanted.abs().max())


def build(name: str, side: int, keywords: dict[str, Any]) -> nn.Module:
    keywords = {key: value(side) if callable(value) else value for key, value in keywords.items()}
    if side != 224 and "image" not in keywords:
        with contextlib.suppress(TypeError):  # networks of any image have no such keyword
            return attnlab.build(name, image=side, **keywords)
    return attnlab.build(name, **keywords)


def share(theirs: nn.Module, ours: nn.Module, names: tuple[Rule, ...]) -> str:
    """Give ours their weights; otherwise the reason why not."""
    adapters: list[Any] = []
    reasons = []
    with contextlib.suppress(ValueError):
        adapters.append(find(TIMM, type(theirs).__name__))
    with contextlib.suppress(ValueError):
        adapters.append(adapter_of(type(ours)))
    for adapter in adapters:
        try:
            load(ours, adapter.rename(rename(theirs.state_dict(), names)))
            return ""
        except (ValueError, AttributeError, KeyError) as error:
            reasons.append(str(error))
    return "other weights" + (f" ({reasons[-1][:160]})" if reasons else "")


def off_special_values(net: nn.Module, x: Tensor) -> None:
    """Move parameters off special first values, which hide differences, and let batch norms see `x` once."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad and p.numel() > 1 and p.is_floating_point() and (p == p.flatten()[0]).all():
                p.add_(0.1 * torch.randn_like(p))
        if norms:
            for norm in norms:
                norm.momentum = 1.0
            net.train()(x)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def logits(out: Any) -> list[Tensor]:
    """All tensors of what a network returns."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        out = out.values()
    return (
        [tensor for part in out for tensor in logits(part)] if isinstance(out, (tuple, list, type({}.values()))) else []
    )


def has_fuse(net: nn.Module) -> bool:
    return callable(getattr(type(net), "fuse", None))


def own_fuse(net: Any) -> Any:
    return net.fuse()


def fused_timm(net: nn.Module) -> nn.Module:
    """What timm itself offers before inference."""
    timm()
    return importlib.import_module("timm.utils.model").reparameterize_model(net)
