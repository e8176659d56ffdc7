"""A whole language model over a sequence that no rank holds alone: no code of the model changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attnlab.lens.event import Event
from attnlab.lens.subscriber import Handle, Subscriber
from attnlab.lens.tap import join
from attnlab.nn.linear.short_conv import ShortConv
from attnlab.patterns import Causal, Full, Pattern, Window
from attnlab.positions import Position
from attnlab.positions.learned import Learned
from attnlab.scale import operators
from attnlab.scale.layout import Layout
from attnlab.scale.neighbours import tokens_before
from attnlab.scale.wire import Mesh, Wire, wire
from attnlab.weightings import SOFTMAX

_taken: WeakSet[nn.Module] = WeakSet()
LAYOUTS: dict[str, Callable[[int, int], Layout]] = {"zigzag": Layout.zigzag, "contiguous": Layout.contiguous}


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    method: str = "ring",
    layout: str | Callable[[int, int], Layout] = "auto",
    check: bool = True,
) -> ContextParallel:
    """Make a language model context-parallel: each rank of `mesh` computes its own part of every sequence.

        parallel = scale.parallelize(model, mesh["cp"])
        logits = parallel(ids)                     # ids (B, N), the same on all ranks; logits of this rank's tokens
        loss = parallel.loss(logits, ids)          # the loss of the whole, on every rank
        loss.backward()

    A `Decoder` of attnlab with mixers made of `attend` and `scan` (and short convolutions), or a causal language model
    of transformers. Attention and scans are replaced by those of `attnlab.scale` through the model's tap, positions
    count over the whole sequence; all else works on single tokens and stays. Loss and gradients are those of one
    process, to rounding.

    Works inside DDP and with FSDP2 (`fully_shard` the blocks and the model, before or after), over a mesh that has the
    dimension of `mesh` in it: both average gradients over ranks, as `loss` expects. Alone, call `average_gradients()`.

    Args:
        model: stays as it is; the object that is returned runs it.
        mesh: one dimension of a `DeviceMesh`, or a process group.
        method: of attention: "ring", "allgather" (with scans in other layers, this is LASP-2H) or "ulysses".
        layout: "zigzag" (even work under a causal mask), "contiguous", or "auto": contiguous for ulysses, else zigzag;
            or a function of length and ranks, such as `partial(Layout.balanced, Window(512) | Sinks(4))`.
        check: first run a few random tokens both ways and raise ValueError if the results differ: then the model
            mixes tokens in a way that is not seen here. Needs a `vocabulary` or transformers' config.
    """
    ranks = wire(mesh)
    if method not in ("ring", "allgather", "ulysses"):
        raise ValueError(f"method must be ring, allgather or ulysses, got {method!r}")
    if not callable(layout) and layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout must be auto, {' or '.join(LAYOUTS)}, got {layout!r}")
    if layout == "auto":
        layout = "contiguous" if method == "ulysses" else "zigzag"
    if method == "ulysses":
        _divides(model, ranks.size)
    parallel = ContextParallel(model, ranks, method, layout if callable(layout) else LAYOUTS[layout])
    if check:
        parallel.check()
    return parallel


def _divides(model: nn.Module, ranks: int) -> None:
    config = getattr(model, "config", None)
    found: list[Any] = [getattr(m, "heads", None) for m in model.modules()]
    for heads in (*found, getattr(config, "num_attention_heads", None)):
        if isinstance(heads, int) and heads % ranks:
            raise ValueError(f"heads must be a multiple of the {ranks} ranks for ulysses, got {heads}")


class ContextParallel(nn.Module):
    """What `parallelize` returns: `model`, run on this rank's part of each sequence."""

    def __init__(self, model: nn.Module, ranks: Wire, method: str, layout: Callable[[int, int], Layout]) -> None:
        super().__init__()
        self.model = model
        self.wire, self.method = ranks, method
        self.layout = lru_cache(64)(lambda length: layout(length, ranks.size))  # where tokens of so long a text lie
        self.foreign = hasattr(getattr(model, "config", None), "to_dict")
        self.now: Layout | None = None
        self.spread = _Spread(self)
        self._leave: Callable[[], None] | None = None
        self.open()

    def open(self) -> None:
        """Take over the model's attention, if it is not taken over already."""
        if self._leave is None:
            if self.model in _taken:
                raise ValueError(f"{type(self.model).__name__} is spread over ranks already: close() what spreads it")
            self._leave = join(self.model, self.spread)
            _taken.add(self.model)

    def close(self) -> None:
        """Give the model back as it was."""
        if self._leave is not None:
            leave, self._leave = self._leave, None
            _taken.discard(self.model)
            leave()

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a whole tensor."""
        return self.layout(x.shape[dim]).shard(x, self.wire.rank, dim)

    def forward(self, ids: Tensor, **keywords: Any) -> Any:
        """The model's output for this rank's tokens of `ids (B, N)`, which are whole and the same on all ranks."""
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"ids must be integers (B, N), got {ids.dtype} {tuple(ids.shape)}")
        layout = self.layout(ids.shape[1])
        mine = layout.shard(ids, self.wire.rank, 1)
        if self.foreign:
            refused = [n for n in ("attention_mask", "labels", "past_key_values") if keywords.get(n) is not None]
            if refused:
                raise ValueError(f"{refused[0]} is not spread over ranks: pack texts without padding, and use `loss`")
            keywords.setdefault("position_ids", layout.positions(self.wire.rank, ids.device).expand(len(ids), -1))
            keywords.setdefault("use_cache", False)
            # A mask that is there already, and is ignored: who sees whom is known here.
            keywords["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        self.now = layout
        return self.model(mine, **keywords)

    def loss(self, outputs: Any, ids: Tensor, ignore: int = -100) -> Tensor:
        """The mean cross-entropy of the next token over the whole of `ids (B, N)`: the same number on every rank.

        Its gradients are made to be averaged over the ranks. Targets equal to `ignore` do not count.
        """
        logits = outputs.logits if hasattr(outputs, "logits") else outputs
        targets = F.pad(ids[:, 1:], (0, 1), value=ignore)
        mine = self.shard(targets)
        if logits.shape[:2] != mine.shape:
            raise ValueError(
                f"outputs must be logits of this rank's {tuple(mine.shape)} tokens, got {tuple(logits.shape)}"
            )
        wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        share = F.cross_entropy(wide, mine.flatten(), ignore_index=ignore, reduction="sum")
        return _Total.apply(share / (targets != ignore).sum().clamp_min(1), self.wire)

    def average_gradients(self) -> None:
        """Average all gradients over the ranks: what DDP and FSDP do by themselves."""
        grads = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        for bucket in _buckets(grads):
            mean = self.wire.all_reduce(torch.cat([g.flatten() for g in bucket])) / self.wire.size
            for grad, part in zip(bucket, mean.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(part.view_as(grad))

    @torch.no_grad()
    def check(self) -> None:
        """Raise ValueError unless a short random text gives what the model alone gives."""
        config = getattr(self.model, "config", None)
        size = getattr(config, "vocab_size", None) or getattr(self.model, "vocabulary", None)
        if not isinstance(size, int):
            raise ValueError("check=True needs a model with a vocabulary; pass check=False")
        device = next(self.model.parameters()).device
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (1, 16 * self.wire.size + 3), generator=random).to(device)
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        try:
            self.close()
            whole = self.model(ids)
            self.open()
            mine = self(ids)
        finally:
            self.open()
            for module in training:
                module.training = True
            for module in self.model.modules():
                if hasattr(module, "reshard"):  # FSDP2: what a forward alone leaves gathered, no optimizer must find
                    module.reshard()  # type: ignore[operator]
        whole, mine = (x.logits if hasattr(x, "logits") else x for x in (whole, mine))
        wanted = self.shard(whole)
        off = float((mine - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
        worst = float(torch.stack(self.wire.all_gather(torch.tensor([off], device=device))).max())
        if not worst <= (1e-3 if wanted.dtype in (torch.float32, torch.float64) else 0.1):
            raise ValueError(
                f"model: {type(self.model).__name__} gives other results over ranks (off by {worst:.1e}); some part "
                "of it mixes tokens otherwise than by attention, attnlab's scan or a short convolution"
            )


def _window(module: Any) -> int | None:
    """The sliding window of an attention module of transformers, which keeps it itself or leaves it in the config."""
    config = getattr(module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    if kinds is not None and index is not None and kinds[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _buckets(tensors: Iterable[Tensor], most: int = 2**24) -> list[list[Tensor]]:
    """Tensors that go on a journey together: of one dtype, and of about so many numbers."""
    found: list[list[Tensor]] = []
    for x in tensors:
        last = found[-1] if found else []
        fits = last and last[0].dtype == x.dtype and sum(y.numel() for y in last) + x.numel() <= most
        if fits:
            last.append(x)
        else:
            found.append([x])
    return found


class _Total(torch.autograd.Function):
    """The sum of all ranks' shares; backward times their number, for gradients that will be averaged."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, ranks: Wire) -> Tensor:
        ctx.size = ranks.size
        return ranks.all_reduce(share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.size, None


class _Undo:
    def __init__(self, module: nn.Module, forward: Any) -> None:
        self.module = module
        module.forward = forward

    def remove(self) -> None:
        del self.module.forward


class _Spread(Subscriber):
    """At the model's tap: each attention and scan becomes the one over ranks."""

    def __init__(self, parallel: ContextParallel) -> None:
        self.parallel = parallel

    @property
    def layout(self) -> Layout:
        if self.parallel.now is None:
            raise ValueError("call what parallelize returned, not the model itself")
        return self.parallel.now

    def open(self, model: nn.Module) -> Iterable[Handle]:
        found: list[Handle] = []
        for module in model.modules():
            if isinstance(module, Position):
                found.append(_Undo(module, partial(self._turn, module.forward)))
            elif isinstance(module, Learned):
                found.append(_Undo(module, partial(self._place, module.forward)))
            elif isinstance(module, ShortConv):
                found.append(_Undo(module, partial(self._convolve, module.forward, module.taps - 1)))
        return found

    def before(self, event: Event) -> None:
        event.run = partial(self._run, event)  # type: ignore[method-assign]

    def _run(self, event: Event) -> Tensor:
        parallel, layout = self.parallel, self.layout
        mine = layout.lengths[parallel.wire.rank]
        if event.q.shape[2] != mine or event.k.shape[2] != mine:
            raise ValueError(
                f"{event.name} attends from {event.q.shape[2]} to {event.k.shape[2]} tokens, but this rank holds {mine}"
            )
        if event.source == "scan":
            if event.state is not None:
                raise ValueError(f"{event.name} continues a state: a spread sequence begins at its beginning")
            out = operators.scan(
                event.q, event.k, event.v, mesh=parallel.wire, layout=layout, decay=event.decay, beta=event.beta,
                scale=event.scale,
            )  # fmt: skip
            event.last = event.v.new_zeros(len(event.v), event.v.shape[1], event.q.shape[3], event.v.shape[3])
            return out[0] if isinstance(out, tuple) else out
        if event.dropout:
            raise ValueError(f"{event.name} drops {event.dropout:.0%} of its weights, which is not spread: set it to 0")
        if event.route is not None or event.weighting != SOFTMAX:
            raise ValueError(f"{event.name} chooses keys by content, or is no softmax: neither is spread")
        bias = event.bias
        if isinstance(bias, Tensor) and max(bias.shape[-2:]) > 1:
            raise ValueError(f"{event.name} has a bias as a tensor, of local places: it is spread only as a function")
        out = operators.attend(
            event.q, event.k, event.v, mesh=parallel.wire, method=parallel.method, layout=layout,
            pattern=self._pattern(event), bias=bias, scale=event.scale,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    def _pattern(self, event: Event) -> Pattern:
        """Who sees whom in the whole sequence."""
        if not self.parallel.foreign:
            if event.mask is not None:
                raise ValueError(f"{event.name} has a mask of local places: it is spread only as a pattern")
            pattern = event.pattern or Full()
            return pattern & Causal() if event.is_causal else pattern
        module: Any = event.module
        causal, window = getattr(module, "is_causal", event.is_causal), _window(module)
        if window:
            return Window(int(window), causal=bool(causal))
        return Causal() if causal else Full()

    def _pieces(self, forward: Callable[[int, int, int], Any]) -> list[Any]:
        """`forward(begin, end, position)` for each piece held here."""
        found, at = [], 0
        for a, b in self.layout.pieces[self.parallel.wire.rank]:
            found.append(forward(at, at + b - a, a))
            at += b - a
        return found

    def _turn(self, forward: Any, q: Tensor, k: Tensor, offset: int = 0, **keywords: Any) -> tuple[Tensor, Tensor]:
        parts = self._pieces(lambda i, j, at: forward(q[:, :, i:j], k[:, :, i:j], offset + at, **keywords))
        return torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2)

    def _place(self, forward: Any, x: Tensor, offset: int = 0) -> Tensor:
        return torch.cat(self._pieces(lambda i, j, at: forward(x[:, i:j], offset + at)), 1)

    def _convolve(self, forward: Any, count: int, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if past is not None:
            raise ValueError("a convolution continues a state: a spread sequence begins at its beginning")
        before = tokens_before(x, self.parallel.wire, self.layout, count)
        parts = iter(before)
        found = self._pieces(lambda i, j, at: forward(x[:, i:j], next(parts)))
        return torch.cat([y for y, _ in found], 1), found[-1][1]
