"""Needles in haystacks: which heads of a causal language model retrieve, found by watching it retrieve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from attnlab.lens.edits.heads_off import HeadsOff
from attnlab.lens.event import Event
from attnlab.lens.measures.retrieval import Head, HeadScores, find_needle, retrieval_scores
from attnlab.lens.measures.rouge import rouge1_recall
from attnlab.lens.subscriber import Subscriber
from attnlab.lens.tap import join

QUESTION = "Based on the content of the book, Question: {question}\nAnswer:"
DEPTHS = tuple(round(100 * i / 9) for i in range(10))


@dataclass(frozen=True)
class Needle:
    """A sentence that the model cannot know, what to ask about it, and the answer, which is a part of it."""

    sentence: str
    question: str
    answer: str


class Trial(NamedTuple):
    """One needle at one depth of one haystack."""

    length: int
    depth: float
    needle: int
    response: str
    recall: float  # ROUGE-1 recall of the answer, 0 to 1
    accepted: bool
    scores: Tensor  # (L, H)


class LastRows(Subscriber):
    """Of each step of decoding, the weights `(L, H, keys)` of its one query."""

    def __init__(self) -> None:
        self.rows: list[dict[int, Tensor]] = []

    def start(self, step: int) -> None:
        self.rows.append({})

    def wants(self, event: Event) -> bool:
        return event.kind == "self" and event.q.shape[2] == 1

    def after(self, event: Event, out: Tensor) -> None:
        if len(event.q) > 1:
            raise ValueError(f"texts must come one at a time, got a batch of {len(event.q)}")
        self.rows[-1][event.layer] = event.weights()[0, :, 0].detach()

    def tables(self) -> list[Tensor]:
        return [torch.stack([rows[layer] for layer in sorted(rows)]) for rows in self.rows if rows]


@torch.no_grad()
def write(
    model: nn.Module, prompt: Tensor | Sequence[int], new: int = 50, *, stop: Sequence[int] = (),
    without: Sequence[Head] = (), style: Literal["uniform", "zero"] = "uniform",
) -> list[int]:  # fmt: skip
    """Continue a prompt `(N)` greedily: its tokens but the last in one pass, and then one token at a time.

    For causal language models of transformers and of attnlab. `stop` are tokens that end the text, themselves written.
    The heads `without` read the prompt, and are off while the text is written (`HeadsOff`): the masking test.
    """
    ids = torch.as_tensor(prompt)
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"prompt must be (N) ids of one text, two or more, got {tuple(ids.shape)}")
    feed = _feeder(model)
    feed(ids[None, :-1])
    written: list[int] = []
    leave = join(model, HeadsOff(without, style, steps=None)) if without else None
    try:
        piece = ids[-1:]
        while len(written) < new and not (written and written[-1] in stop):
            written.append(int(feed(piece[None])[0, -1].argmax()))
            piece = torch.tensor(written[-1:], device=ids.device)
    finally:
        if leave is not None:
            leave()
    return written


def _feeder(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Feeds a model piece by piece, and gives its logits."""
    state: Any = None
    ours: Any = model
    if hasattr(model, "initial_state"):
        state = ours.initial_state(1)

        def feed(ids: Tensor) -> Tensor:
            nonlocal state
            logits, state = model(ids, state=state)
            return logits

        return feed

    def feed_cached(ids: Tensor) -> Tensor:
        nonlocal state
        out = model(input_ids=ids, past_key_values=state, use_cache=True)
        state = out.past_key_values
        return out.logits

    return feed_cached


def score_heads(
    model: nn.Module, prompt: Tensor, needle: Tensor | Sequence[int], *, new: int = 50, stop: Sequence[int] = (),
    top: int = 1, without: Sequence[Head] = (), style: Literal["uniform", "zero"] = "uniform",
) -> tuple[list[int], Tensor]:  # fmt: skip
    """What a model writes after a prompt `(N)`, and how much of a needle each head copied for it, `(L, H)`.

    The needle is looked for by `find_needle`. Cost: the model's, and the weights of one query per step.
    Source: arXiv 2404.15574.
    """
    leave = join(model, watch := LastRows())
    try:
        written = write(model, prompt, new, stop=stop, without=without, style=style)
    finally:
        leave()
    return written, retrieval_scores(watch.tables(), written, prompt, find_needle(prompt, needle), top=top)


def bury(
    context: Sequence[int], needle: Sequence[int], length: int, depth: float, *, full_stops: Sequence[int],
    room: int = 200,
) -> list[int]:  # fmt: skip
    """A needle's ids `depth` per cent into a context cut to `length` − `room` tokens, after the full stop before there.

    Where no full stop comes before, it stands at the beginning; at a depth of 100 at the very end.
    """
    if not 0 <= depth <= 100:
        raise ValueError(f"depth must lie in 0 to 100, got {depth}")
    if length - room < len(needle):
        raise ValueError(f"length must leave {room} tokens beside a needle of {len(needle)}, got {length}")
    kept = list(context)[: length - room - len(needle)]
    if depth == 100:
        return [*kept, *needle]
    at = int(len(kept) * depth / 100)
    while at and kept[at - 1] not in full_stops:
        at -= 1
    return [*kept[:at], *needle, *kept[at:]]


def detect(
    model: nn.Module, tokenizer: Any, needles: Sequence[Needle], haystacks: Sequence[str], *,
    lengths: Sequence[int], depths: Sequence[float] = DEPTHS, new: int = 50, top: int = 1,
    least: float = 0.5, room: int = 200, stop: Sequence[int] | None = None, question: str = QUESTION,
    without: Sequence[Head] = (), style: Literal["uniform", "zero"] = "uniform",
    report: Callable[[Trial], None] | None = None,
) -> tuple[HeadScores, list[Trial]]:  # fmt: skip
    """Find the retrieval heads of a causal language model: needles in haystacks of all `lengths`, at all `depths`.

    A trial counts if the response says the answer again, ROUGE-1 recall above `least`; scores of others are dropped.

    Args:
        tokenizer: with `encode(text)` and `decode(ids)`, as those of transformers.
        needles, haystacks: needle i goes into haystack i, a text that is repeated until it is long enough.
        lengths: in tokens, `room` of which are for the question and the response. The paper: 20 from 1,000 to 50,000.
        new, stop: at most so many tokens are written, up to a token of `stop` (a line's end, if None).
        top: see `retrieval_scores`.
        without, style: heads that are off while a response is written; then the trials are what to look at.
        report: is called with each trial.

    Source: arXiv 2404.15574.
    """
    if len(needles) != len(haystacks) or not needles:
        raise ValueError(f"haystacks must be as many as needles, got {len(haystacks)} and {len(needles)}")
    dots = {ids[-1] for text in (".", "a.") if (ids := _encode(tokenizer, text))}
    ends = list({ids[-1] for ids in (_encode(tokenizer, "\n"),) if ids}) if stop is None else list(stop)
    scores, trials = HeadScores(), []
    for which, (needle, haystack) in enumerate(zip(needles, haystacks, strict=True)):
        sentence, answer = _encode(tokenizer, needle.sentence), _encode(tokenizer, needle.answer)
        context = _encode(tokenizer, haystack)
        if not context:
            raise ValueError(f"haystacks must hold text, number {which} does not")
        context = context * -(-max(lengths) // len(context))
        for length in lengths:
            for depth in depths:
                buried = bury(context, sentence, length, depth, full_stops=list(dots), room=room)
                text = tokenizer.decode(buried) + question.format(question=needle.question)
                prompt = torch.tensor(tokenizer.encode(text), device=_device(model))
                written, table = score_heads(
                    model, prompt, answer, new=new, stop=ends, top=top, without=without, style=style
                )
                response = tokenizer.decode([t for t in written if t not in ends]).strip()
                recall = rouge1_recall(needle.answer, response)
                trial = Trial(length, depth, which, response, recall, recall > least, table)
                if trial.accepted:
                    scores.add(table)
                trials.append(trial)
                if report is not None:
                    report(trial)
    return scores, trials


def _encode(tokenizer: Any, text: str) -> list[int]:
    """A text's ids without a tokenizer's special ones."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except TypeError:
        return list(tokenizer.encode(text))


def _device(model: nn.Module) -> torch.device:
    return next(iter(model.parameters())).device
