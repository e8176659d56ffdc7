"""The tap: every attention call of any model, seen and changed without touching the model."""

from __future__ import annotations

import math
import re
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnlab.attend import attend
from attnlab.lens import calls
from attnlab.lens.calls import Frame
from attnlab.lens.event import Event
from attnlab.lens.handwritten import HandWritten, complaint
from attnlab.lens.subscriber import Handle, Subscriber
from attnlab.nn.decode import attend_one
from attnlab.scan import scan

__all__ = ["Subscriber", "Tap", "join", "tap"]


class _Thread(threading.local):
    """Where a thread stands in the model: the modules it is in, and the mode that shows their calls."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.mode: TorchFunctionMode | None = None
        self.calls: Counter[tuple[str, bool]] = Counter()
        self.step = 0
        self.seen = 0
        self.aside: Collection[Subscriber] | None = None  # who alone sees a run that is no pass of the model (`aside`)
        self.by_hand = HandWritten()


_taps: weakref.WeakKeyDictionary[nn.Module, Tap] = weakref.WeakKeyDictionary()
_known: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class Tap:
    """The open tap of a model: `subscribe` to it. Made by `tap`.

    Nothing is installed before somebody subscribes. Then each module has two hooks, which name the caller, and while
    the model runs, in whichever thread, a `TorchFunctionMode` sees `scaled_dot_product_attention`,
    `multi_head_attention_forward`, `attend` and `scan`. When the tap closes, all of it goes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.held = False  # by a `with tap(model)`, to which alone it then belongs
        self.subscribers: list[Subscriber] = []
        self.names: list[str] = []  # modules that have attended, in order of their first calls
        self._handles: list[Handle] = []
        self._own: dict[int, list[Handle]] = {}
        self._steps = count()
        self._thread = _Thread()
        self._warned: set[str] = set()

    @property
    def expected(self) -> list[str]:
        """The layers' names: as an earlier pass found them, else as the names of the modules' classes suggest."""
        known = _known.get(self.model)
        return known if known is not None else [n for n, m in self.model.named_modules() if _attends(m)]

    def subscribe(self, subscriber: Subscriber) -> None:
        """Let `subscriber` see and change every call from now on, after those who came before."""
        if not self._handles:
            self._install()
        self.subscribers.append(subscriber)
        try:
            self._own[id(subscriber)] = list(subscriber.open(self.model))
        except BaseException:
            self.unsubscribe(subscriber)
            raise

    def unsubscribe(self, subscriber: Subscriber) -> None:
        self.subscribers.remove(subscriber)
        for handle in self._own.pop(id(subscriber), ()):
            handle.remove()
        try:
            subscriber.close()
        finally:
            if not self.subscribers:
                self._remove()

    def _install(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(
                    f"{name or 'the model'} is scripted, and its calls cannot be seen: tap the module it came from"
                )
            if hasattr(module, "_orig_mod"):
                raise ValueError(
                    f"{name or 'the model'} is compiled, and its calls cannot be seen: tap its `_orig_mod`"
                )
        self._handles = [self.model.register_forward_hook(self._passed)]
        for name, module in self.model.named_modules():
            enter = self._enter(name)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def close(self) -> None:
        """Leave the model as it was."""
        for subscriber in reversed(self.subscribers[:]):
            self.unsubscribe(subscriber)
        self._remove()

    # Following the model.

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            here = self._thread
            if here.aside is None and module is self.model and all(f.module is not module for f in here.frames):
                here.step, here.seen = next(self._steps), 0
                here.calls.clear()
                here.by_hand.clear()
                for subscriber in self.subscribers:
                    subscriber.start(here.step)
            if not here.frames:
                here.mode = _Calls(self)
                here.mode.__enter__()
            here.frames.append(Frame(name, module, arguments, keywords))

        return enter

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        here = self._thread
        # Frames above this one are those of modules that an exception left.
        while here.frames and here.frames.pop().module is not module:
            pass
        if not here.frames and here.mode is not None:
            mode, here.mode = here.mode, None
            mode.__exit__(None, None, None)

    def _passed(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """A pass has ended well: say so, unless what was asked for was not there."""
        here = self._thread
        if here.aside is not None or sum(f.module is module for f in here.frames) > 1:
            return
        found = here.by_hand.found
        if not here.seen and found is None:
            raise ValueError(
                f"{type(self.model).__name__} made no attention call: the tap sees scaled_dot_product_attention, "
                "multi_head_attention_forward, attnlab's attend and scan"
            )
        if found is not None and not here.seen:
            raise ValueError(complaint(self.model, found))
        if found is not None and found not in self._warned:
            self._warned.add(found)
            warnings.warn(complaint(self.model, found), stacklevel=2)
        if any(s.where.counts_back for s in self.subscribers) and self.expected != self.names:
            _known[self.model] = list(self.names)
            raise ValueError(
                f"layers counted from the end were not known before this first pass; now they are ({len(self.names)}): "
                "run it again"
            )
        _known[self.model] = list(self.names)
        for subscriber in self.subscribers:
            subscriber.where.check(self.names)
            subscriber.finish(here.step)

    # Handling a call.

    def handle(self, event: Event) -> Tensor:
        """What the call gives, after all that the subscribers do to it."""
        here = self._thread
        here.seen += 1
        if event.name not in self.names:
            with _lock:
                self.names.append(event.name)
        event.layer, event.step = self.names.index(event.name), here.step
        event.recomputed = torch._C._current_graph_task_id() != -1
        event.index = here.calls[event.name, event.recomputed]
        here.calls[event.name, event.recomputed] += 1
        expected = self.expected if any(s.where.counts_back for s in self.subscribers) else self.names
        active = [
            s for s in (self.subscribers if here.aside is None else here.aside)
            if s.where.step(event.step) and s.where.layer(event, expected) and s.wants(event)
        ]  # fmt: skip
        for s in active:
            if s.where.heads is not None:
                s.where.head_list(event)
            if _overrides(s, "before"):
                before = replace(event)
                s.before(event)
                if event.changed:
                    _sound(s, event, before)
        out = self._by_hand(event, active) if any(map(_by_hand, active)) else event.run()
        for s in active:
            out = _same(s, event, "output", s.output(event, out), out)
        for s in active:
            s.after(event, out)
        return out

    def _by_hand(self, event: Event, active: list[Subscriber]) -> Tensor:
        if event.source == "scan":
            if any(_overrides(s, "scores") for s in active):
                raise ValueError(
                    f"{event.name} keeps a running state: its weights can be edited, its scores do not exist"
                )
            weights = event.weights()
        else:
            scores = event.scores()
            for s in active:
                if _overrides(s, "scores"):
                    blind = (scores == -math.inf).all(-1)
                    scores = _same(s, event, "scores", s.scores(event, scores), scores)
                    if bool(((scores == -math.inf).all(-1) & ~blind).any()):
                        raise ValueError(f"{type(s).__name__} hides every key from a query of {event.name}")
            weights, event.lse = event.weigh(scores), scores.logsumexp(-1)
        for s in active:
            if _overrides(s, "weights"):
                weights = _same(s, event, "weights", s.weights(event, weights), weights)
        event.computed = weights
        return event.mix(weights)


def _overrides(subscriber: Subscriber, method: str) -> bool:
    return getattr(type(subscriber), method) is not getattr(Subscriber, method)


def _by_hand(subscriber: Subscriber) -> bool:
    return _overrides(subscriber, "scores") or _overrides(subscriber, "weights")


def _same(who: Subscriber, event: Event, what: str, new: Any, old: Tensor) -> Tensor:
    """`new`, if it can stand for `old`."""
    if not isinstance(new, Tensor):
        raise TypeError(f"{type(who).__name__}.{what} must return a tensor, got {type(new).__name__}")
    if new.shape != old.shape:
        raise ValueError(
            f"{type(who).__name__}.{what} must keep the shape {tuple(old.shape)} at {event.name}, "
            f"got {tuple(new.shape)}"
        )
    return new if new.dtype is old.dtype else new.to(old.dtype)


def _sound(who: Subscriber, event: Event, before: Event) -> None:
    """Raise ValueError where what an edit has put into a call cannot be computed, or hides all from a query."""
    q, k, v, mask = event.q.shape, event.k.shape, event.v.shape, event.mask
    at = f"{type(who).__name__}.before must"
    if q != before.q.shape or v[-1:] != before.v.shape[-1:]:
        wanted = f"keep q of {tuple(before.q.shape)} and values of {before.v.shape[-1]}"
        raise ValueError(f"{at} {wanted} at {event.name}, got q {tuple(q)} and v {tuple(v)}")
    if len(k) != 4 or k[:3] != v[:3] or (k[0], k[3]) != (q[0], q[3]) or not k[1] or q[1] % k[1]:
        raise ValueError(
            f"{at} give keys and values that q {tuple(q)} can look at in {event.name}, got k {tuple(k)}, v {tuple(v)}"
        )
    if mask is None or mask is before.mask:
        return
    whole = torch.Size((*q[:3], k[2]))
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(whole), strict=False)):
        raise ValueError(f"{at} give a mask for {tuple(whole)} at {event.name}, got {tuple(mask.shape)}")
    hidden = ~event.allowed().any(-1)
    if bool(hidden.any()) and k == before.k.shape:
        hidden = hidden & before.allowed().any(-1)
    if bool(hidden.any()):
        raise ValueError(f"{type(who).__name__} hides every key from a query of {event.name}")


class _Calls(TorchFunctionMode):
    """Sees the calls of one thread while it is in the model."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = self.tap._thread
        take = _TAKES.get(func)
        if take is None or not here.frames:
            result = func(*args, **kwargs)
            here.by_hand.follow(func, args, result, here.frames[-1].name if here.frames else "")
            return result
        return take(self.tap.handle, here.frames[-1], *args, **kwargs)


_TAKES: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: calls.scaled_dot_product,
    F.multi_head_attention_forward: calls.multi_head,
    attend: calls.attended,
    attend_one: calls.attended_one,
    scan: calls.scanned,
}


def _attends(module: nn.Module) -> bool:
    """Whether the class of a module, and of none within it, is called an attention."""
    called = re.compile("atten|attn", re.IGNORECASE)
    named = [bool(called.search(type(m).__name__)) for m in module.modules()]
    return named[0] and not any(named[1:])


@contextmanager
def tap(model: nn.Module) -> Iterator[Tap]:
    """Open the tap of `model`, to which watchers and editors subscribe; closed, the model is as it was.

    A call is followed wherever the model runs: in any thread, in generation, when checkpointing recomputes it in a
    backward (call that before the tap closes, or edited layers are recomputed unedited). Torch's encoder layers leave
    their inference shortcut, which gives zeros for padding, as they do in training: its real tokens stay the same.

    Raises:
        TypeError: `model` is no module. ValueError: it, or a part of it, has an open tap already (subscribe to that
        one; `steer`, `watch` and `swap` do); and from the model's own call, where it makes no call that can be seen.
    """
    opened = _opened(model)
    opened.held = True
    try:
        yield opened
    finally:
        _shut(opened)


def _opened(model: nn.Module) -> Tap:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with _lock:
        for name, module in model.named_modules():
            if module in _taps:
                raise ValueError(f"{name or 'the model'} has an open tap already: close it, or subscribe to it")
        opened = Tap(model)
        _taps.update((m, opened) for m in model.modules())
    return opened


def _shut(opened: Tap) -> None:
    """Close a tap, whatever its subscribers do."""
    try:
        opened.close()
    finally:
        with _lock:
            for module in [m for m, t in _taps.items() if t is opened]:
                del _taps[module]


def join(model: nn.Module, *subscribers: Subscriber) -> Callable[[], None]:
    """Subscribe at the open tap of `model`, or open it; what is returned leaves, and the last to leave closes it."""
    there = _taps.get(model) if isinstance(model, nn.Module) else None
    at = there if there is not None and there.model is model else _opened(model)

    def leave() -> None:
        try:
            for s in reversed(subscribers):
                if s in at.subscribers:
                    at.unsubscribe(s)
        finally:
            if not at.held and not at.subscribers:
                _shut(at)

    try:
        for s in subscribers:
            at.subscribe(s)
    except BaseException:
        leave()
        raise
    return leave
