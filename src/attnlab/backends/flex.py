"""Torch's FlexAttention: the pattern and the bias compiled into one fused kernel that skips empty blocks."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attnlab.cost import Cost, machine
from attnlab.patterns import And, Documents, Not, Or, Pattern, Shifted
from attnlab.patterns.speedup import tile_pairs, visited_share
from attnlab.problem import Problem

BLOCK = 128
# How the log-sum-exp is asked for has changed: in torch 2.9, and the old way is going away.
_ASK_FOR_LSE: dict[str, Any] = {"return_lse": True}
if hasattr(flex_module, "AuxRequest"):
    _ASK_FOR_LSE = {"return_aux": flex_module.AuxRequest(lse=True)}
# Inside torch.compile, below this many pairs, torch's own kernel with a mask is as fast and compiles sooner.
_WORTH = 2**22


class FlexFailed(RuntimeError):
    """FlexAttention did not compile the problem."""


class Flex:
    """Compiles (for seconds) once per pattern and shape; on the CPU without gradient and without log-sum-exp."""

    name = "flex"

    def __init__(self) -> None:
        self._failed: dict[tuple[object, ...], str] = {}

    def unsupported(self, problem: Problem) -> str:
        p = problem
        if not p.is_softmax:
            return f"weighting {p.weighting} (only softmax)"
        if p.dropout:
            return "dropout"
        if p.dtype is torch.float64:
            return "dtype float64"
        if _has_documents(p.pattern):
            return "pattern Documents (searches a list, which it cannot compile)"
        if p.routed:
            return "a route (it would compile for every choice)"
        if p.device.type == "cpu":
            if p.needs_grad:
                return "no gradient on the CPU"
            if p.return_lse:
                return "no lse on the CPU"
        elif p.device.type != "cuda":
            return f"device {p.device.type} (cpu or cuda)"
        elif min(p.dim, p.value_dim) < 16:
            return f"head dimension {min(p.dim, p.value_dim)} (at least 16 on a GPU)"
        if p.traced and p.nq * p.nk < _WORTH:
            return "not worth it for few pairs inside torch.compile"
        if not p.may_compile:
            return "it compiles: opt in with attnlab.compiling()"
        return self._failed.get(p.key) or ("" if p.traced else _no_compiler(p.device.type))

    def cost(self, problem: Problem) -> Cost:
        p = problem
        share = 1.0 if p.is_full else _share(p.pattern.at(0, 0), p.nq, p.nk)
        return machine(p.device).cost(
            "compiled", p.pairs * share, p.dim + p.value_dim, train=p.needs_grad, dtype=p.dtype, calls=2
        )

    def run(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        p = problem
        keywords: dict[str, Any] = dict(score_mod=_score_mod(p), scale=p.scale, enable_gqa=p.groups > 1)
        if p.return_lse:
            keywords.update(_ASK_FOR_LSE)
        batch, heads = p.batch if p.pattern.per_batch else None, p.heads if p.pattern.per_head else None
        if p.traced:
            mask = None
            if not p.is_full:
                mask = create_block_mask(_mask_mod(p.pattern), batch, heads, p.nq, p.nk, device=str(p.device))
            found = flex_attention(q, k, v, block_mask=mask, **keywords)
        else:
            mask = None if p.is_full else _block_mask(p.pattern, batch or 1, heads or 1, p.nq, p.nk, p.device)
            try:
                with _room_to_compile():
                    found = _compiled()(q, k, v, block_mask=mask, **keywords)
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0][:200]
                self._failed[p.key] = f"failed to compile: {type(error).__name__}: {reason}"
                raise FlexFailed(self._failed[p.key]) from error
        if not p.return_lse:
            return found, None
        out, more = found
        return out, more if isinstance(more, Tensor) else more.lse


def _mask_mod(pattern: Pattern) -> Callable[..., Tensor]:
    # Torch counts a method's `self` as an argument too many.
    return lambda b, h, i, j: pattern.allows(b, h, i, j)


def _score_mod(p: Problem) -> Callable[..., Tensor] | None:
    bias = p.bias
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        return lambda score, b, h, i, j: score + bias(b, h, i, j)
    four = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    # An axis of size one is not stepped along.
    steps = [int(n > 1) for n in four.shape]
    return lambda score, b, h, i, j: score + four[b * steps[0], h * steps[1], i * steps[2], j * steps[3]]


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _room_to_compile() -> Any:
    """Let every problem have its compiled kernel: past torch's limit of eight it would run uncompiled, and silently."""
    from torch._dynamo import config

    wanted = {"fail_on_recompile_limit_hit": True, "accumulated_recompile_limit": 4096, "recompile_limit": 1024}
    # Before torch 2.7 the limits had other names.
    wanted |= {name.replace("recompile_limit", "cache_size_limit"): value for name, value in wanted.items()}
    return config.patch({name: value for name, value in wanted.items() if hasattr(config, name)})


@lru_cache(maxsize=2)
def _no_compiler(device: str) -> str:
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        return "no C++ compiler was found"
    return ""


@lru_cache(maxsize=32)
def _block_mask(pattern: Pattern, batch: int, heads: int, nq: int, nk: int, device: torch.device) -> BlockMask:
    """Which blocks are seen, in full or in part, without a matrix of all pairs."""
    pairs = [[tile_pairs(pattern.at(b, h), BLOCK, BLOCK, nq, nk) for h in range(heads)] for b in range(batch)]
    counts = torch.stack([torch.stack(row) for row in pairs]).to(device)
    full = counts == BLOCK * BLOCK
    lists = [_lists((counts > 0) & ~full), _lists(full)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BlockMask.from_kv_blocks(
            *lists[0], *lists[1], BLOCK_SIZE=BLOCK, mask_mod=_mask_mod(pattern), seq_lengths=(nq, nk)
        )


def _lists(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block wants, and which, those wanted first."""
    order = (~wanted).to(torch.int8).argsort(dim=-1, stable=True)
    return wanted.sum(-1).to(torch.int32), order.to(torch.int32).contiguous()


@lru_cache(maxsize=256)
def _share(pattern: Pattern, nq: int, nk: int) -> float:
    return visited_share(pattern, nq, nk, min(BLOCK, max(nq, nk)))


def _has_documents(pattern: Pattern) -> bool:
    if isinstance(pattern, (And, Or)):
        return _has_documents(pattern.left) or _has_documents(pattern.right)
    if isinstance(pattern, (Not, Shifted)):
        return _has_documents(pattern.pattern)
    return isinstance(pattern, Documents)
