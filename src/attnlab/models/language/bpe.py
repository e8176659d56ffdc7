"""Byte-pair encoding: a vocabulary learned from lines of text, and text as its ids."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_RELEASED = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
Pair = tuple[str, str]

# GPT-2's pieces: letters, digits or other marks, with at most one space before, and what is left of spaces.
_PIECES = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def _letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it prints, and else one of the letters from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in prints]
    return {b: chr(b) for b in prints} | {b: chr(256 + i) for i, b in enumerate(others)}


_LETTERS = _letters()
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}


class Encoded(NamedTuple):
    """`ids` (B, N) with `keep` (B, N), true at tokens and false at the padding behind them."""

    ids: Tensor
    keep: Tensor


def learn_merges(
    pieces: Mapping[str, int], vocabulary: dict[str, int], *, size: int, min_frequency: int = 2
) -> list[Pair]:
    """Joins the commonest pair of neighbours, again and again, until `vocabulary`, extended in place, is of `size`.

    `pieces` are counted; pairs never reach over a piece's end. Of pairs as common, that of the lower ids is taken.
    """
    words = [(list(piece), count) for piece, count in pieces.items()]
    merges: list[Pair] = []
    while len(vocabulary) < size:
        counts: Counter[Pair] = Counter()
        for word, count in words:
            for pair in pairwise(word):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda p: (-counts[p], vocabulary[p[0]], vocabulary[p[1]]))
        if counts[best] < max(min_frequency, 1):
            break
        merges.append(best)
        vocabulary.setdefault("".join(best), len(vocabulary))
        for word, _ in words:
            _join(word, best)
    return merges


def _join(word: list[str], pair: Pair) -> None:
    i = 0
    while i < len(word) - 1:
        if word[i] == pair[0] and word[i + 1] == pair[1]:
            word[i : i + 2] = ["".join(pair)]
        i += 1


class ByteTokenizer:
    """Byte-level BPE in RoBERTa's frame, `<s> … </s>` and padding: lines to ids and back.

        tokenizer = ByteTokenizer.train(lines, size=800)
        ids, keep = tokenizer.encode(lines)          lines == tokenizer.decode(ids)

    `load` reads the `vocab.json` and `merges.txt` that the packages tokenizers and transformers write, and `save`
    writes them. Bytes without a token of their own (a trained vocabulary has all) are left out. ASCII text is cut in
    pieces exactly as GPT-2 does it.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[Pair]) -> None:
        missing = [token for token in SPECIALS if token not in vocabulary]
        if missing:
            raise ValueError(f"vocabulary must hold the tokens {', '.join(SPECIALS)}; it lacks {', '.join(missing)}")
        self.vocabulary, self.merges = dict(vocabulary), list(merges)
        self.start, self.pad, self.end, self.unknown, self.mask = (vocabulary[token] for token in SPECIALS)
        self.specials = frozenset(vocabulary[token] for token in SPECIALS)
        self._tokens = {i: token for token, i in vocabulary.items()}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._piece = lru_cache(maxsize=65536)(self._encode_piece)

    def __len__(self) -> int:
        return len(self.vocabulary)

    @classmethod
    def train(
        cls, lines: Iterable[str], *, size: int = 800, min_frequency: int = 2, variant: str = "paper"
    ) -> ByteTokenizer:
        """A vocabulary of at most `size`: the special tokens, the bytes, and the merges that `lines` call for.

        `variant="release"` is SELFormer's code, which learns from symbols without their brackets, has only bytes that
        occur there, and orders the special tokens otherwise. What it encodes comes back without brackets.
        """
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        if variant == "paper":
            pieces = Counter(piece for line in lines for piece in _pieces(line))
            tokens = [*SPECIALS, *sorted(_LETTERS.values())]
        else:
            symbols = Counter(symbol for line in lines for symbol in re.split(r"[\[\]\n]+", line) if symbol)
            pieces = Counter({_as_letters(symbol): count for symbol, count in symbols.items()})
            tokens = [*_RELEASED, *sorted({letter for piece in pieces for letter in piece})]
        if size < len(tokens):
            raise ValueError(f"size must hold the {len(tokens)} special tokens and bytes, got {size}")
        vocabulary = {token: i for i, token in enumerate(tokens)}
        return cls(vocabulary, learn_merges(pieces, vocabulary, size=size, min_frequency=min_frequency))

    def _encode_piece(self, piece: str) -> list[int]:
        word = [letter for letter in piece if letter in self.vocabulary]
        last = len(self._ranks)
        while len(word) > 1:
            best = min(pairwise(word), key=lambda pair: self._ranks.get(pair, last))
            if best not in self._ranks:
                break
            _join(word, best)
        return [self.vocabulary[token] for token in word]

    def encode(self, lines: Iterable[str], *, length: int = 128, truncate: bool = False) -> Encoded:
        """Lines in the frame, padded to the longest of them; a ValueError where one has more than `length` tokens.

        `truncate` cuts those instead, as the SELFormer authors do, which silently drops the end of large molecules.
        """
        rows = [[i for piece in _pieces(line) for i in self._piece(piece)] for line in lines]
        long = [row for row in rows if len(row) > length - 2]
        if long and not truncate:
            raise ValueError(
                f"{len(long)} of {len(rows)} lines have more than length = {length} tokens (up to "
                f"{max(map(len, long)) + 2}); leave them out, raise length, or let truncate=True cut them"
            )
        framed = [torch.tensor([self.start, *row[: length - 2], self.end]) for row in rows]
        if not framed:
            raise ValueError("lines must hold at least one line")
        ids = torch.nn.utils.rnn.pad_sequence(framed, batch_first=True, padding_value=self.pad)
        keep = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in framed]).unsqueeze(1)
        return Encoded(ids, keep)

    def decode(self, ids: Tensor) -> list[str]:
        """The lines of `ids` (B, N), without special tokens."""
        lines = []
        for row in ids.tolist():
            letters = "".join(self._tokens[i] for i in row if i not in self.specials)
            lines.append(bytes(_BYTES[letter] for letter in letters).decode(errors="replace"))
        return lines

    def save(self, folder: str | Path) -> None:
        """Writes `vocab.json` and `merges.txt`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ByteTokenizer:
        """Reads `vocab.json` and `merges.txt`."""
        vocabulary = json.loads((Path(folder) / "vocab.json").read_text(encoding="utf-8"))
        lines = (Path(folder) / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        wrong = [pair for pair in pairs if len(pair) != 2]
        if wrong:
            raise ValueError(f"merges.txt must hold two tokens per line, got {' '.join(wrong[0])!r}")
        return cls(vocabulary, [(a, b) for a, b in pairs])


def _as_letters(text: str) -> str:
    return "".join(_LETTERS[byte] for byte in text.encode())


def _pieces(line: str) -> list[str]:
    return [_as_letters(piece) for piece in _PIECES.findall(line)]
