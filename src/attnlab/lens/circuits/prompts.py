"""Pairs of prompts that differ in one thing: indirect objects (IOI), coloured objects, years; as text and for toys."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Sarah", "Alice", "Paul", "Kate", "Mark", "Anna", "Peter", "Laura", "Steve",
    "Emma", "David", "Susan", "Frank", "Julia", "Simon",
)  # fmt: skip
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
GIFTS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")
TEMPLATES = (
    "Then, {a} and {b} went to the {place}. {s} gave a {gift} to",
    "Then, {a} and {b} had a lot of fun at the {place}. {s} gave a {gift} to",
    "When {a} and {b} got a {gift} at the {place}, {s} decided to give it to",
    "After {a} and {b} went to the {place}, {s} gave a {gift} to",
    "While {a} and {b} were working at the {place}, {s} gave a {gift} to",
    "Friends {a} and {b} found a {gift} at the {place}. {s} gave it to",
)
EVENTS = ("war", "siege", "voyage", "reign", "famine", "trial", "drought", "strike", "festival", "treaty")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "purple", "orange")
OBJECTS = (
    "pen", "cup", "plate", "book", "ball", "pencil", "bracelet", "necklace", "keychain", "puzzle", "jug", "notebook",
    "mug", "envelope", "fidget spinner", "scrunchie", "phone charger",
)  # fmt: skip
SURFACES = ("table", "desk", "floor")
OPENINGS = ("there is", "you see", "I see")


@dataclass(frozen=True)
class Pair:
    """A prompt, its minimal change, and what each of the two is about.

    right is the answer to `clean`, and wrong the others that `clean` names; `corrupt` is as long in words.
    """

    clean: str
    corrupt: str
    right: str
    wrong: tuple[str, ...]


def indirect_objects(count: int, *, templates: Sequence[str] = TEMPLATES, seed: int = 0) -> list[Pair]:
    """ "Then, Mary and John went to the store. John gave a drink to" (Mary): in both orders of the first two names.

    The corrupt prompt says the indirect object in place of the second subject ("Mary gave a drink to"), so that its
    answer is the other name.
    """
    rng = random.Random(_checked(count, seed))
    pairs = []
    for _ in range(count):
        subject, indirect = rng.sample(NAMES, 2)
        a, b = rng.sample((subject, indirect), 2)
        fill = dict(a=a, b=b, place=rng.choice(PLACES), gift=rng.choice(GIFTS))
        template = rng.choice(templates)
        clean, corrupt = (template.format(s=s, **fill) for s in (subject, indirect))
        pairs.append(Pair(clean, corrupt, f" {indirect}", (f" {subject}",)))
    return pairs


def three_names(count: int, *, templates: Sequence[str] = TEMPLATES, seed: int = 0) -> list[str]:
    """Prompts like those of `indirect_objects` in which the giver is a third: neither name is the answer."""
    rng = random.Random(_checked(count, seed))
    prompts = []
    for _ in range(count):
        a, b, s = rng.sample(NAMES, 3)
        prompts.append(rng.choice(templates).format(a=a, b=b, s=s, place=rng.choice(PLACES), gift=rng.choice(GIFTS)))
    return prompts


def greater_than(count: int, *, seed: int = 0) -> list[Pair]:
    """ "The war lasted from the year 1732 to the year 17": right is any later year of the century, here the next.

    The corrupt prompt begins in the year 01, after which nothing is too early: what compares years has nothing to do.
    """
    rng = random.Random(_checked(count, seed))
    pairs = []
    for _ in range(count):
        thing, century, year = rng.choice(EVENTS), rng.randrange(11, 18), rng.randrange(2, 98)
        clean, corrupt = (f"The {thing} lasted from the year {century}{y:02} to the year {century}" for y in (year, 1))
        pairs.append(Pair(clean, corrupt, f"{year + 1:02}", (f"{year - 1:02}",)))
    return pairs


def coloured_objects(count: int, *, items: int = 3, shots: int = 1, seed: int = 0) -> list[Pair]:
    """ "Q: On the desk, I see a red cup, a blue pen, and a green plate. What color is the pen?\\nA:" (blue).

    One such question with its answer comes before, for each of `shots`. The corrupt prompt asks for an object that is
    not in the list. wrong: the other colours in the list.
    """
    rng = random.Random(_checked(count, seed))
    if not 2 <= items <= min(len(COLOURS), len(OBJECTS) - 1):
        raise ValueError(f"items must lie in 2 to {min(len(COLOURS), len(OBJECTS) - 1)}, got {items}")
    pairs = []
    for _ in range(count):
        before = "".join(f"{clean} {right}\n\n" for clean, _, right, _ in (_question(rng, items) for _ in range(shots)))
        clean, corrupt, right, wrong = _question(rng, items)
        pairs.append(Pair(before + clean, before + corrupt, f" {right}", tuple(f" {w}" for w in wrong)))
    return pairs


def _question(rng: random.Random, items: int) -> tuple[str, str, str, list[str]]:
    colours, objects = rng.sample(COLOURS, items), rng.sample(OBJECTS, items + 1)
    things = [f"{_article(c)} {c} {o}" for c, o in zip(colours, objects, strict=False)]
    told = f"{', '.join(things[:-1])}, and {things[-1]}"
    asked = rng.randrange(items)
    start = f"Q: On the {rng.choice(SURFACES)}, {rng.choice(OPENINGS)} {told}. What color is the "
    clean, corrupt = (f"{start}{objects[i]}?\nA:" for i in (asked, items))
    return clean, corrupt, colours[asked], colours[:asked] + colours[asked + 1 :]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _checked(count: int, seed: int) -> int:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return seed


def encode(pairs: Sequence[Pair], tokenise: Callable[[str], list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(clean `(B, N)`, corrupt `(B, N)`, answers `(B, 2)`: right, and the first of wrong) for patching.

    `tokenise(text) -> ids`, without special tokens of its own (`lambda t: tokenizer(t).input_ids`). All prompts, clean
    and corrupt, must come out equally long (see `equally_long`), and each answer is known by its first token.
    """
    clean, corrupt = ([tokenise(getattr(p, side)) for p in pairs] for side in ("clean", "corrupt"))
    lengths = {len(ids) for ids in (*clean, *corrupt)}
    if len(lengths) != 1:
        raise ValueError(f"prompts must be equally long in tokens, got {sorted(lengths)}: choose with equally_long")
    answers = [[tokenise(p.right)[0], tokenise(p.wrong[0])[0]] for p in pairs]
    return torch.tensor(clean), torch.tensor(corrupt), torch.tensor(answers)


def equally_long(pairs: Sequence[Pair], tokenise: Callable[[str], list[int]]) -> list[list[Pair]]:
    """The pairs by length in tokens, the largest group first; those whose two prompts differ in length are left out."""
    groups: dict[int, list[Pair]] = {}
    for pair in pairs:
        length = len(tokenise(pair.clean))
        if length == len(tokenise(pair.corrupt)):
            groups.setdefault(length, []).append(pair)
    return sorted(groups.values(), key=len, reverse=True)


class Words:
    """A tokenizer for toys: one token for each word of the prompts of this module, and for "," "." "?" and a new line.

    `words(text) -> ids`, `words.text(ids)`; `len(words)` is the vocabulary.
    """

    def __init__(self, texts: Sequence[str] | None = None) -> None:
        if texts is None:
            every = (*NAMES, *PLACES, *GIFTS, *TEMPLATES, *COLOURS, *OBJECTS, *SURFACES, *OPENINGS)
            texts = [*every, "Q: A: On the a an and . , ? \n What color is", *(f"{name}," for name in NAMES)]
        found = dict.fromkeys(word for text in texts for word in _words(text) if "{" not in word)
        self.known = {word: i for i, word in enumerate(found)}
        self.words = list(found)

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, text: str) -> list[int]:
        unknown = [w for w in _words(text) if w not in self.known]
        if unknown:
            raise ValueError(f"words that are not known: {', '.join(sorted(set(unknown)))}")
        return [self.known[w] for w in _words(text)]

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[int(i)] for i in ids)


def _words(text: str) -> list[str]:
    for mark in ",.?\n":
        text = text.replace(mark, f" {mark} ")
    return [w for w in text.split(" ") if w]
