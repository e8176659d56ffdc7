"""Ranks that are threads of this process: the same code as on many machines, for tests, counting and teaching."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnlab.scale.wire import Wire

T = TypeVar("T")


Letter = tuple[int, int, tuple[int, ...], int]  # from, to, the group, the number


class _Post:
    """Letters, and the turn: one rank works at a time, until it waits for a letter."""

    def __init__(self, ranks: int, timeout: float) -> None:
        self.ranks, self.timeout = ranks, timeout
        self.letters: dict[Letter, Tensor] = {}
        self.turn, self.failed = threading.Condition(), False


class _Simulated(Wire):
    def __init__(self, rank: int, post: _Post, ranks: Sequence[int] = ()) -> None:
        super().__init__()
        self.names = list(ranks or range(post.ranks))  # of the group, in the post's numbers
        self.me, self.rank, self.size, self.post = rank, self.names.index(rank), len(self.names), post
        self.sent, self.expected = [0] * self.size, [0] * self.size

    def part(self, ranks: Sequence[int]) -> _Simulated:
        """The group of some of the ranks, this one among them."""
        return _Simulated(self.me, self.post, ranks)

    def _send(self, to: int, x: Tensor) -> None:
        self.post.letters[self.me, self.names[to], tuple(self.names), self.sent[to]] = x.detach().clone()
        self.sent[to] += 1
        self.post.turn.notify_all()

    def _receive(self, source: int) -> Letter:
        self.expected[source] += 1
        return self.names[source], self.me, tuple(self.names), self.expected[source] - 1

    def _take(self, letter: Letter) -> Tensor:
        post = self.post
        arrived = post.turn.wait_for(lambda: letter in post.letters or post.failed, post.timeout)
        if not arrived or letter not in post.letters:
            raise RuntimeError(f"rank {letter[0]} sent nothing to rank {self.me}")
        return post.letters.pop(letter)

    def _exchange(self, sends: list[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Any:
        for to, x in sends:
            self._send(to, x)
        awaited = [(self._receive(source), x) for source, x in receives]

        def wait() -> None:
            for letter, x in awaited:
                x.detach().copy_(self._take(letter))

        return wait

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        others = [r for r in range(self.size) if r != self.rank]
        for to in others:
            self._send(to, x)
        letters = {source: self._receive(source) for source in others}
        return [self._take(letters[r]) if r in letters else x.detach().clone() for r in range(self.size)]


def simulate(ranks: int, function: Callable[[Any], T], *, timeout: float = 30.0) -> list[T]:
    """What `function(wire)` returns on each of `ranks` ranks, which run as threads; the wire stands for a mesh.

    >>> simulate(2, lambda wire: wire.all_reduce(torch.tensor(wire.rank + 1)).item())
    [3, 3]

    Autograd works on each rank by itself; `wire.part(ranks)` is a group of some of them. The first error of any rank
    is raised.
    """
    post, results, errors = _Post(ranks, timeout), dict[int, T](), list[BaseException]()
    grad = torch.is_grad_enabled()

    def run(rank: int) -> None:
        with post.turn, torch.set_grad_enabled(grad):
            try:
                results[rank] = function(_Simulated(rank, post))
            except BaseException as error:
                errors.append(error)
                post.failed = True
                post.turn.notify_all()

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[r] for r in range(ranks)]
