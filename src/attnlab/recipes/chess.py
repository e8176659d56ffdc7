"""CHESS: a trained language model skips the channels of its feed-forwards, and attention inputs, that matter least."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear, silu

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.decoder import SwiGLU
from attnlab.nn.multihead import MultiHead

METHODS = ("cats", "chess", "chess+")


def quantile(x: Tensor, p: float) -> Tensor:
    """The k-th smallest entry of `x`, k = int(p · number of entries), without interpolation; 0 at p = 0."""
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    k = int(x.numel() * p)
    if p == 0:
        return x.new_zeros(())
    if k == 0:
        raise ValueError(f"p = {p} of {x.numel()} entries is none of them: x must have at least {-(-1 // p):.0f}")
    return x.flatten().kthvalue(k).values


def weighted_rows(weights: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """weights (len(at),) over rows (K, C) → Σ weights · rows[at] (C,), reading those rows alone.

    The sparse kernel of a projection whose matrix is stored by its inputs.
    """
    # A bag per thread: one bag is summed by one.
    bags = max(min(torch.get_num_threads(), len(at)), 1)
    offsets = torch.arange(bags, device=at.device) * len(at) // bags
    found = embedding_bag(at, rows, offsets, mode="sum", per_sample_weights=weights)
    return found.sum(0) if bags > 1 else found[0]


def chosen_rows(x: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """x (C,) and rows (K, C) → rows[at] · x, (len(at),), without a copy of the rows."""
    # What the gradient of a bag's weights is: the products of its rows with one vector.
    offsets, bags = at.new_zeros(1), torch.zeros_like(at)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x.unsqueeze(0), rows, at, offsets, bags, 0, -1)


def _one_token(x: Tensor) -> bool:
    """Whether the sparse kernels pay: a matrix is read once for all tokens, sparse rows once for each."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


@dataclass(frozen=True)
class Thresholds:
    """What one feed-forward was calibrated to: E|u| of each channel (hidden,), and thresholds on |a| and |a| E|u|."""

    up_abs_mean: Tensor
    cats: Tensor
    importance: Tensor

    @property
    def chess(self) -> Tensor:
        """The threshold on |a| of each channel (hidden,)."""
        return self.importance / self.up_abs_mean


@dataclass(frozen=True)
class AttentionThresholds:
    """Thresholds on the entries of an attention's input, for the queries, and of its heads, before their projection."""

    inputs: Tensor
    outputs: Tensor


class SparseSwiGLU(nn.Module):
    """w2(a · w3 x), a = silu(w1 x) where |a| is not below `threshold`, and 0 elsewhere: `(…, C)` → the same.

    For a single token without gradients it computes the surviving channels of w3 alone, and reads their rows of w2
    alone (spared at sparsity s: 2s of 3 matrices); otherwise all, with zeros. `threshold`: of each channel, or one.
    """

    threshold: Tensor
    w1: nn.Linear
    w3: nn.Linear
    w2: nn.Parameter

    def __init__(self, dense: SwiGLU, threshold: Tensor) -> None:
        super().__init__()
        hidden = dense.w1.out_features
        if dense.w1.bias is not None:
            raise ValueError("dense must have no biases")
        if threshold.shape not in ((), (1,), (hidden,)):
            raise ValueError(f"threshold must be one number or ({hidden},), got {tuple(threshold.shape)}")
        self.w1, self.w3 = dense.w1, dense.w3
        # By hidden channels, so that what a channel adds is one row.
        self.w2 = nn.Parameter(dense.w2.weight.detach().t().contiguous())
        self.register_buffer("threshold", threshold.to(dense.w1.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        if _one_token(x):
            token = x.reshape(-1)
            a = silu(linear(token, self.w1.weight))
            at = (a.abs() >= self.threshold).nonzero().view(-1)
            hidden = a.index_select(0, at) * chosen_rows(token, self.w3.weight, at)
            return weighted_rows(hidden, self.w2, at).view_as(x)
        a = silu(self.w1(x))
        a = a.masked_fill(a.abs() < self.threshold, 0.0)
        return (a * self.w3(x)) @ self.w2


class SparseLinear(nn.Module):
    """A linear layer whose inputs below a threshold are taken for 0, for the first `rows` outputs (all if None).

    It stands in the place of an attention's `wo`, or, with the queries as its first rows, of its `wqkv`. For a single
    token without gradients it reads the weights of the inputs that are left alone.
    """

    threshold: Tensor
    inputs: nn.Parameter
    rest: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, dense: nn.Linear, threshold: Tensor, *, rows: int | None = None) -> None:
        super().__init__()
        rows = dense.out_features if rows is None else rows
        if not 0 < rows <= dense.out_features or threshold.numel() != 1:
            raise ValueError(
                f"rows must be in [1, {dense.out_features}] and threshold one number, got {rows} and "
                f"{tuple(threshold.shape)}"
            )
        weight = dense.weight.detach()
        # By inputs, so that what an input adds is one row.
        self.inputs = nn.Parameter(weight[:rows].t().contiguous())
        self.rest = nn.Parameter(weight[rows:].clone())
        self.bias = dense.bias
        self.register_buffer("threshold", threshold.to(weight).reshape(()).clone())

    @property
    def weight(self) -> Tensor:
        """All rows, as a linear layer has them."""
        return torch.cat((self.inputs.t(), self.rest))

    def forward(self, x: Tensor) -> Tensor:
        if _one_token(x):
            token = x.reshape(-1)
            at = (token.abs() >= self.threshold).nonzero().view(-1)
            sparse = weighted_rows(token.index_select(0, at), self.inputs, at).view(*x.shape[:-1], -1)
        else:
            sparse = x.masked_fill(x.abs() < self.threshold, 0.0) @ self.inputs
        if len(self.rest):
            sparse = torch.cat((sparse, linear(x, self.rest)), -1)
        return sparse if self.bias is None else sparse + self.bias


@contextmanager
def _looking(modules: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    def watch(name: str) -> Callable[..., None]:
        return lambda module, args: look(name, args[0])

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: nn.Module) -> tuple[dict[str, SwiGLU], dict[str, MultiHead]]:
    feeds = {n: m for n, m in model.named_modules() if isinstance(m, SwiGLU)}
    if not feeds:
        raise ValueError(f"{type(model).__name__} has no SwiGLU feed-forwards to make sparse")
    return feeds, {n: m for n, m in model.named_modules() if isinstance(m, MultiHead)}


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).mean(0)


Calibration = dict[str, "Thresholds | AttentionThresholds"]


@register(
    Card(
        name="chess",
        title="CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification",
        paper="2409.01366",
        system="chess",
        family="sparse",
        kind=RECIPE,
        cost="N",
    )
)
@torch.no_grad()
def calibrate(model: nn.Module, texts: Sequence[Any], *, sparsity: float = 0.5) -> Calibration:
    """Thresholds by the name of each SwiGLU and each attention of `model`, such that a share of entries falls below.

        y = W2 (a ⊙ u), a = silu(W1 x), u = W3 x           zeroing channel i errs by |a_i u_i| ≈ |a_i| E|u_i|
        T = quantile of |a_i| E|u_i|                        t_i = T / E|u_i|: a_i counts where |a_i| ≥ t_i

    Two passes over the texts, each what `model` takes; every number is the mean over texts of one text's own. Attention
    gets one threshold for its input, on which only the queries depend, and one for its heads. `sparsify` puts them in.
    The authors take 64 · 1024 tokens of C4. Source: arXiv 2409.01366.
    """
    if not len(texts):
        raise ValueError("texts must hold at least one")
    feeds, attentions = _layers(model)
    means: dict[str, list[Tensor]] = {name: [] for name in feeds}
    cats: dict[str, list[Tensor]] = {name: [] for name in feeds}
    importance: dict[str, list[Tensor]] = {name: [] for name in feeds}
    inputs: dict[str, list[Tensor]] = {name: [] for name in attentions}
    outputs: dict[str, list[Tensor]] = {name: [] for name in attentions}

    def first(name: str, x: Tensor) -> None:
        means[name].append(feeds[name].w3(x).abs().flatten(0, -2).mean(0))
        cats[name].append(quantile(silu(feeds[name].w1(x)).abs(), sparsity))

    def second(name: str, x: Tensor) -> None:
        importance[name].append(quantile(silu(feeds[name].w1(x)).abs() * up[name], sparsity))

    before = {name: mixer.wqkv for name, mixer in attentions.items()}
    after = {name: mixer.wo for name, mixer in attentions.items()}
    with (
        _looking(feeds, first),
        _looking(before, lambda name, x: inputs[name].append(quantile(x.abs(), sparsity))),
        _looking(after, lambda name, x: outputs[name].append(quantile(x.abs(), sparsity))),
    ):
        for text in texts:
            model(text)
    up = {name: _mean(parts) for name, parts in means.items()}
    with _looking(feeds, second):
        for text in texts:
            model(text)
    found: Calibration = {n: Thresholds(up[n], _mean(cats[n]), _mean(importance[n])) for n in feeds}
    return found | {n: AttentionThresholds(_mean(inputs[n]), _mean(outputs[n])) for n in attentions}


def sparsify(model: nn.Module, thresholds: Calibration, *, method: str = "chess") -> nn.Module:
    """A copy of `model` that skips what is below the thresholds.

    "chess": channels of feed-forwards by their own thresholds; "chess+": also inputs of the queries' projection (keys
    and values see all) and of the heads' projection; "cats": channels by one threshold per layer (arXiv 2404.08763).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    sparse = copy.deepcopy(model)
    feeds, attentions = _layers(sparse)
    if unknown := sorted(set(thresholds) ^ {*feeds, *attentions}):
        raise ValueError(f"thresholds are of another model: they and its layers differ in {unknown}")
    for name, found in thresholds.items():
        if isinstance(found, Thresholds):
            threshold = found.cats if method == "cats" else found.chess
            parent, _, own = name.rpartition(".")
            setattr(sparse.get_submodule(parent), own, SparseSwiGLU(feeds[name], threshold))
        elif method == "chess+":
            sparsify_attention(attentions[name], found)
    return sparse


def sparsify_attention(mixer: MultiHead, found: AttentionThresholds) -> None:
    """Puts thresholds before the queries' and the heads' projection of `mixer`, in place."""
    queries = mixer.heads * mixer.head_dim
    mixer.wqkv = SparseLinear(mixer.wqkv, found.inputs, rows=queries)  # type: ignore[assignment]
    mixer.wo = SparseLinear(mixer.wo, found.outputs)  # type: ignore[assignment]
