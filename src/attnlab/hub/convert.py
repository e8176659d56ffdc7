"""Attention modules of other libraries as ours: their weights read, one of our mechanisms built around them."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.nn.linear.kda import KimiDeltaAttention
from attnlab.nn.mechanism import Mechanism
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.gated import GatedAttention
from attnlab.nn.softmax.mixture_of_heads import MixtureOfHeads


@dataclass(eq=False)
class Old:
    """What an attention module of another library holds, in our terms; `host` is how it is called."""

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    wqkv: tuple[Tensor, Tensor | None]
    wo: tuple[Tensor, Tensor | None]
    host: str
    scale: float
    dropout: float = 0.0
    norms: tuple[nn.Module | None, nn.Module | None] = (None, None)
    out_dropout: nn.Module | None = None
    position: Any = None
    refuses: str = ""  # why it cannot be replaced, where it cannot


@dataclass(frozen=True)
class Taken:
    """What a new layer has of the old one's weights, what is new in it, and what the old one had that it has not."""

    name: str
    taken: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"takes {', '.join(self.taken) or 'nothing'}"]
        parts += [f"new: {', '.join(self.new)}"] * bool(self.new)
        parts += [f"left behind: {', '.join(self.dropped)}"] * bool(self.dropped)
        return f"{self.name}: {'; '.join(parts)}"


def read(module: nn.Module) -> Old | None:
    """The attention that `module` is, of timm, transformers, torch or ours; None if it is none that is known."""
    for reader in (_ours, _torch, _timm, _transformers):
        old = reader(module)
        if old is not None:
            return old
    return None


def _joined(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    biases = [layer.bias for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    if all(b is None for b in biases):
        return weight, None
    return weight, torch.cat([weight.new_zeros(n.out_features) if n.bias is None else n.bias for n in layers])


def _ours(module: nn.Module) -> Old | None:
    if not isinstance(module, MultiHead):
        return None
    return Old(
        module.dim, module.heads, module.kv_heads, module.head_dim, module.causal,
        (module.wqkv.weight, module.wqkv.bias), (module.wo.weight, module.wo.bias), "ours",
        scale=module.head_dim**-0.5, dropout=module.dropout, norms=(module.q_norm, module.k_norm),
        position=module.position,
    )  # fmt: skip


def _torch(module: nn.Module) -> Old | None:
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if module.in_proj_weight is None:
        refuses, weight = "keys and values have widths of their own", module.q_proj_weight
    else:
        refuses, weight = "", module.in_proj_weight
    if module.bias_k is not None or module.add_zero_attn:
        refuses = "it adds a key of its own"
    return Old(
        module.embed_dim, module.num_heads, module.num_heads, module.head_dim, False, (weight, module.in_proj_bias),
        (module.out_proj.weight, module.out_proj.bias), "torch", scale=module.head_dim**-0.5, dropout=module.dropout,
        refuses=refuses,
    )  # fmt: skip


def _timm(module: nn.Module) -> Old | None:
    qkv, proj, heads = (getattr(module, name, None) for name in ("qkv", "proj", "num_heads"))
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int)):
        return None
    takes = list(inspect.signature(module.forward).parameters)
    extra = [
        name for name in ("norm", "gate") if not isinstance(getattr(module, name, None), (nn.Identity, type(None)))
    ]
    refuses = f"it has a {extra[0]} of its own" if extra else ""
    if takes not in (["x"], ["x", "attn_mask"], ["x", "attn_mask", "is_causal"]):
        refuses = f"its forward takes {', '.join(takes)}"
    head_dim = qkv.out_features // (3 * heads)
    return Old(
        qkv.in_features, heads, heads, head_dim, False, (qkv.weight, qkv.bias), (proj.weight, proj.bias), "timm",
        scale=float(getattr(module, "scale", head_dim**-0.5)), dropout=_rate(getattr(module, "attn_drop", 0.0)),
        norms=(getattr(module, "q_norm", None), getattr(module, "k_norm", None)),
        out_dropout=getattr(module, "proj_drop", None), refuses=refuses,
    )  # fmt: skip


def _transformers(module: nn.Module) -> Old | None:
    layers: list[Any] = [getattr(module, f"{name}_proj", None) for name in "qkv"]
    q, k, v = layers
    out: Any = getattr(module, "o_proj", getattr(module, "out_proj", None))
    if not all(isinstance(x, nn.Linear) for x in (q, k, v, out)):
        return None
    config, head_dim = getattr(module, "config", None), getattr(module, "head_dim", None)
    heads = getattr(config, "num_attention_heads", getattr(module, "num_heads", None))
    if not isinstance(head_dim, int) or not isinstance(heads, int):
        return None
    refuses = "" if q.out_features == heads * head_dim else "its queries are wider than its heads need"
    norms = (getattr(module, "q_norm", None), getattr(module, "k_norm", None))
    for norm in norms:
        weight = getattr(norm, "weight", None)
        if isinstance(weight, Tensor) and weight.numel() != head_dim:
            refuses = "it norms all heads together"
    if getattr(module, "sinks", None) is not None:
        refuses = "it has learned sinks"
    turns = "position_embeddings" in inspect.signature(module.forward).parameters
    if turns and not hasattr(sys.modules[type(module).__module__], Turned.function):
        refuses = "it turns its queries and keys in a way of its own"
    return Old(
        q.in_features, heads, k.out_features // head_dim, head_dim, bool(getattr(module, "is_causal", False)),
        _joined(q, k, v), (out.weight, out.bias), "transformers",
        scale=float(getattr(module, "scaling", getattr(module, "scale", head_dim**-0.5))),
        dropout=_rate(getattr(module, "attention_dropout", 0.0)), norms=norms,
        position=Turned(type(module).__module__) if turns else None, refuses=refuses,
    )  # fmt: skip


def _rate(dropout: Any) -> float:
    return float(dropout.p) if isinstance(dropout, nn.Dropout) else float(dropout or 0.0)


class Turned:
    """The rotation that a model of transformers computes once for all layers, by that model's own function."""

    on_grid = False
    function = "apply_rotary_pos_emb"

    def __init__(self, home: str) -> None:
        self.home = home
        self.angles: tuple[Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        if self.angles is None:
            raise ValueError("position_embeddings must be given: this model turns its queries and keys")
        return getattr(sys.modules[self.home], self.function)(q, k, *self.angles)


def convert(
    old: Old, by: Callable[..., Mechanism], options: dict[str, Any], name: str, known: dict[str, Any]
) -> tuple[Mechanism, Taken]:
    """A new `by` with what fits of the old weights (copies), and what became of them.

    `options` are the new layer's own; `known`, what else is known and may go into it (the grid, the class token).
    """
    if old.refuses:
        raise ValueError(f"{name} cannot be replaced: {old.refuses}")
    takes = _parameters(by)
    offered = dict(
        heads=old.heads, kv_heads=old.kv_heads, head_dim=old.head_dim, causal=old.causal, dropout=old.dropout,
        bias=old.wqkv[1] is not None, out_bias=old.wo[1] is not None, **known,
    )  # fmt: skip
    if old.head_dim * old.heads == old.dim and "kv_heads" not in takes:
        offered.pop("head_dim")
    new = by(old.dim, **{**{n: v for n, v in offered.items() if n in takes}, **options})
    new = new.to(old.wo[0].device, old.wo[0].dtype)
    return new, _fill(new, old, name)


def _parameters(by: Callable[..., Any]) -> set[str]:
    """The keywords that a mechanism takes, those it hands on to its bases included."""
    found: set[str] = set()
    for kind in getattr(by, "__mro__", (by,)):
        if kind in (Mechanism, nn.Module, object):
            break
        parameters = inspect.signature(kind).parameters.values()
        found |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


@dataclass
class _Filling:
    taken: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    def put(self, home: nn.Linear, where: str, weight: Tensor, bias: Tensor | None) -> bool:
        if home.weight.shape != weight.shape:
            return False
        home.weight.copy_(weight)
        self.taken.append(where)
        self.done |= {f"{where}.weight", f"{where}.bias"}
        if home.bias is not None:
            home.bias.zero_() if bias is None else home.bias.copy_(bias)
        elif bias is not None:
            self.dropped.append(f"the bias of {where}")
        return True


@torch.no_grad()
def _fill(new: Mechanism, old: Old, name: str) -> Taken:
    filling = _Filling()
    wqkv, wo = getattr(new, "wqkv", None), getattr(new, "wo", None)
    q, kv = old.heads * old.head_dim, old.kv_heads * old.head_dim
    weight, bias = old.wqkv
    if isinstance(wqkv, nn.Linear):
        stretch = old.scale * old.head_dim**0.5
        fits = filling.put(wqkv, "wqkv", weight, bias)
        if not fits and old.kv_heads < old.heads:
            # Key heads that served several query heads are given to each of them.
            rows = torch.arange(kv).view(old.kv_heads, -1).repeat_interleave(old.heads // old.kv_heads, 0).flatten()
            rows = torch.cat([torch.arange(q), q + rows, q + kv + rows]).to(weight.device)
            fits = filling.put(wqkv, "wqkv", weight[rows], None if bias is None else bias[rows])
        if fits and abs(stretch - 1) > 1e-6:
            if any(not isinstance(n, (nn.Identity, type(None))) for n in old.norms):
                raise ValueError(f"{name} cannot be replaced: it scales scores by {old.scale} and norms its queries")
            wqkv.weight[:q] *= stretch
            if wqkv.bias is not None:
                wqkv.bias[:q] *= stretch
    if isinstance(wo, nn.Linear):
        filling.put(wo, "wo", *old.wo)
    for where, norm in zip(("q_norm", "k_norm"), old.norms, strict=True):
        if isinstance(norm, (nn.Identity, type(None))):
            continue
        if isinstance(new, MultiHead):
            setattr(new, where, copy.deepcopy(norm))
            filling.taken.append(where)
            filling.done |= {f"{where}.{n}" for n, _ in norm.named_parameters()}
        else:
            filling.dropped.append(where)
    if old.position is not None:
        if isinstance(new, MultiHead):
            new.position = old.position if old.host == "ours" else copy.copy(old.position)
            filling.taken.append("positions")
        else:
            filling.dropped.append("positions")
    _begin_quietly(new, filling)
    fresh = [n for n, _ in new.named_parameters() if n not in filling.done]
    return Taken(name, tuple(filling.taken), tuple(fresh), tuple(filling.dropped))


def _begin_quietly(new: Mechanism, filling: _Filling) -> None:
    """New weights that begin where they change as little as can be."""
    if isinstance(new, MixtureOfHeads) and new.router is not None:
        nn.init.zeros_(new.router.weight)  # every picked head counts in full
    if (
        isinstance(new, GatedAttention)
        and new.wg is not None
        and (new.combine, new.activation) == ("multiply", "sigmoid")
    ):
        if new.at == "heads" and "wo" in filling.taken:
            # All gates are ½ at first, so twice the output projection gives what there was.
            nn.init.zeros_(new.wg.weight)
            if new.wg.bias is not None:
                nn.init.zeros_(new.wg.bias)
            new.wo.weight *= 2
    if isinstance(new, KimiDeltaAttention) and new.conv is not None:
        weight = next(p for p in new.conv.parameters() if p.dim() > 1)
        weight.zero_()[..., -1] = 1.0  # each token passes as it is
