"""Words as numbers: the most frequent ones of a text, or a file of tokens that somebody else has cut."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

PAD, UNKNOWN, BEGIN, END = range(4)
_SPECIAL = ("", "<unknown>", "<begin>", "<end>")


class Vocabulary:
    """The `size` most frequent words, four of which are not words: padding, unknown, begin and end."""

    def __init__(self, texts: Iterable[Sequence[str]], size: int):
        counts = Counter(word for text in texts for word in text)
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(_SPECIAL)]
        self.words = [*_SPECIAL, *frequent]
        self._number = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def numbers(self, text: Sequence[str]) -> list[int]:
        return [self._number.get(word, UNKNOWN) for word in text]

    def text(self, numbers: Iterable[int]) -> list[str]:
        """The words up to the end, without what is none."""
        words = []
        for number in numbers:
            if number == END:
                break
            if number >= len(_SPECIAL):
                words.append(self.words[number])
        return words


def read_tokens(train: Path, held_out: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Two files of tokens between spaces as numbers, and how many kinds there are; the end of a line is one too.

    Kinds are numbered as they appear in the first file; those that it lacks are all the same.
    """
    kinds: dict[str, int] = {"": 0, "\n": 1}
    learned = array("i")
    with train.open(encoding="utf-8") as lines:
        for line in lines:
            learned.extend(kinds.setdefault(word, len(kinds)) for word in line.split())
            learned.append(1)
    with held_out.open(encoding="utf-8") as lines:
        asked = array("i", (kinds.get(word, 0) for line in lines for word in [*line.split(), "\n"]))
    return np.frombuffer(learned, np.int32), np.frombuffer(asked, np.int32), len(kinds)
