"""Summarisation: the mechanism as encoder (noncausal self), as language model (causal self), between both (cross)."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.arena.task import CAUSAL, CAUSAL_CROSS, SELF, Budget, Score, task
from attnlab.arena.tasks.cab.base import MEDIUM, PAPER, TINY, CabTask
from attnlab.arena.tasks.cab.parts import Places, Softmax, table
from attnlab.arena.tasks.cab.rouge import rouge
from attnlab.arena.tasks.cab.vocabulary import BEGIN, END, PAD, Vocabulary
from attnlab.arena.tasks.text import _NOT_THE_LIBRARY
from attnlab.models.skeletons.parts import MLP
from attnlab.nn.multihead import MultiHead

# Words of a source, of a summary, and in the vocabulary.
_SIZES = {TINY: (48, 12, 768), MEDIUM: (512, 48, 8192), PAPER: (4096, 400, 50_265)}
Pairs = list[tuple[list[str], list[str]]]  # the words of a source and of its summary


def _budgets(length: Callable[[int, int], int]) -> dict[str, Budget]:
    """The same for all three; `length` makes tokens of the words of a source and a summary."""
    tiny, medium, paper = (length(*size[:2]) for size in _SIZES.values())
    return {
        TINY: Budget(parameters=120_000, depth=1, steps=300, batch=16, length=tiny, learning_rate=5e-3, examples=96),
        MEDIUM: Budget(parameters=8_000_000, depth=4, steps=5_000, batch=16, length=medium, learning_rate=1e-3),
        PAPER: Budget(100_000_000, depth=6, steps=50_000, batch=16, length=paper, learning_rate=5e-4, examples=10**6),
    }


class _Summaries(CabTask):
    """Python functions, summarised by the first line of their docstrings; or the articles of Multi-News.

    Summaries are written word by word, each time the likeliest, and compared by ROUGE. Words are those of the text in
    lower case, identifiers split into theirs; the benchmark itself cuts by BART's tokenizer.
    """

    about, metric, better = "Sum", "ROUGE-1", "higher"
    signs = {"ROUGE-1": 1, "ROUGE-2": 1, "ROUGE-L": 1}
    folder = "multi-news"
    source = (
        "Multi-News: {train,test}.src, one cluster of articles a line, and {train,test}.tgt, their summaries "
        "(https://huggingface.co/datasets/multi_news; train.src.cleaned and test.src.cleaned are read too)"
    )

    def load(self) -> None:
        name = next(name for name, budget in self.budgets.items() if budget is self.budget)
        self.words_in, self.words_out, self.words_known = _SIZES[name]
        super().load()
        self.vocabulary = Vocabulary((text for pair in self.train for text in pair), self.words_known)
        self.sources, self.targets = self._numbers(self.train)

    def make(self) -> None:
        self.train, self.held_out = _functions(self.words_in, self.words_out)
        self.held_out = self.held_out[: self.budget.examples]

    def read(self, root: Path) -> None:
        self.train, self.held_out = (
            _lines(self.find(root, f"{part}.src", f"{part}.src.cleaned"), self.find(root, f"{part}.tgt"), self.words_in)
            for part in ("train", "test")
        )

    def arrays(self) -> list[np.ndarray | bytes]:
        return [repr(self.held_out).encode(), repr(self.train[:: max(1, len(self.train) // 1000)]).encode()]

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = self.choose(rng, len(self.sources))
        targets = self.targets[chosen]
        begun = torch.cat((torch.full_like(targets[:, :1], BEGIN), targets[:, :-1]), 1)
        return torch.cat((self.sources[chosen], begun), 1).long(), targets.long()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=PAD, label_smoothing=0.1)

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        sources, scores = self._numbers(self.held_out)[0], []
        for first in range(0, len(sources), 32):
            written = self.write(predict, sources[first : first + 32].long())
            for numbers, (_, truth) in zip(written.tolist(), self.held_out[first : first + 32], strict=True):
                scores.append(rouge(self.vocabulary.text(numbers), truth[: self.words_out]))
        return self.scored(*np.mean(scores, 0).tolist())

    def write(self, predict: Callable[[Tensor], Tensor], sources: Tensor) -> Tensor:
        """The likeliest next word, again and again, until all have ended: (B, words)."""
        inputs = torch.cat((sources, torch.full((len(sources), self.words_out), PAD)), 1)
        inputs[:, self.words_in] = BEGIN
        words = []
        for i in range(self.words_out):
            likely = predict(inputs)[:, i].float()
            likely[:, [PAD, BEGIN]] = -torch.inf
            words.append(likely.argmax(-1))
            if i + 1 < self.words_out:
                inputs[:, self.words_in + i + 1] = words[-1]
            if all(END in row for row in torch.stack(words, 1).tolist()):
                break
        return torch.stack(words, 1)

    def trivial(self) -> tuple[str, float]:
        scores = [rouge(source[: self.words_out], truth[: self.words_out])[0] for source, truth in self.held_out]
        return "first words", float(np.mean(scores))

    def stem(self, width: int) -> nn.Module:
        return _Both(len(self.vocabulary), width, self.words_in, self.layout)

    def head(self, width: int) -> nn.Module:
        return _Words(width, self.words_out)

    def _numbers(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Sources (count, words_in) and summaries with their ends (count, words_out), padded."""
        tables = []
        for which, width, end in ((0, self.words_in, list[int]()), (1, self.words_out, [END])):
            rows = np.zeros((len(pairs), width), np.int32)
            for row, pair in zip(rows, pairs, strict=True):
                numbers = [*self.vocabulary.numbers(pair[which]), *end][:width]
                row[: len(numbers)] = numbers
            tables.append(torch.from_numpy(rows))
        return tables[0], tables[1]


class _Both(nn.Module):
    """From a source and the summary so far (B, S + T) to tokens, and beside them the table of words.

    Noncausal self: those of the source (B, S, C), and beside them those of the summary for the decoder. Causal self:
    one after the other (B, S + T, C). Cross: the encoded source, padded, and the summary behind as much padding, so
    that the first word sees the whole source (B, 2 (S + T), C).
    """

    def __init__(self, symbols: int, width: int, words_in: int, layout: str):
        super().__init__()
        self.table, self.places, self.words_in, self.layout = table(symbols, width), Places(), words_in, layout
        if layout == CAUSAL_CROSS:
            self.encoder, self.decoder = Softmax(width), Softmax(width, causal=True)

    def forward(self, numbers: Tensor) -> tuple[Tensor, ...]:
        words = self.table(numbers)
        if self.layout == CAUSAL:
            return self.places(words), self.table.weight
        source, summary = (self.places(part) for part in (words[:, : self.words_in], words[:, self.words_in :]))
        if self.layout == SELF:
            return source, self.table.weight, summary
        behind = (0, 0, 0, summary.shape[1])
        before = (0, 0, source.shape[1], 0)
        both = F.pad(self.encoder(source), behind), F.pad(self.decoder(summary), before)
        return torch.cat(both, 1), self.table.weight


class _Words(nn.Module):
    """The next words (B, T, symbols) from the last T tokens, by the table that the stem embeds with."""

    def __init__(self, width: int, words_out: int):
        super().__init__()
        self.out, self.words_out = nn.Linear(width, width), words_out

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        return self.out(tokens[:, -self.words_out :]) @ table.mT


class _Decoder(nn.Module):
    """The next words from the encoded source: softmax attention in the summary so far, then into the source."""

    def __init__(self, width: int):
        super().__init__()
        self.causal, self.out = Softmax(width, causal=True), nn.Linear(width, width)
        self.cross, self.mlp = MultiHead(width, heads=max(1, width // 16)), MLP(width, width)
        self.norm1, self.norm2, self.norm3 = nn.RMSNorm(width), nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, tokens: Tensor, table: Tensor, summary: Tensor) -> Tensor:
        x = self.causal(summary)
        x = x + self.cross(self.norm1(x), tokens)
        return self.out(self.norm3(x + self.mlp(self.norm2(x)))) @ table.mT


@task
class Encoded(_Summaries):
    """The mechanism encodes the source, noncausally; a softmax decoder writes."""

    name, title, layout = "cab-sum-ns", "summaries, by an encoder of the source", SELF
    budgets = _budgets(lambda source, summary: source)

    def head(self, width: int) -> nn.Module:
        return _Decoder(width)


@task
class Continued(_Summaries):
    """The mechanism reads the source and goes on with the summary, as a language model does."""

    name, title, layout = "cab-sum-cs", "summaries, as what follows the source", CAUSAL
    budgets = _budgets(lambda source, summary: source + summary)
    positions = True


@task
class LookedUp(_Summaries):
    """The mechanism is what the summary sees of the source; softmax attention reads both.

    As in the benchmark, causality is that of the queries, which are written one after another: each of them sees the
    whole source. In a mechanism for which query i sees the context up to i, padding before the queries does that.
    """

    name, title, layout = "cab-sum-cc", "summaries, by looking into the source", CAUSAL_CROSS
    budgets = _budgets(lambda source, summary: 2 * (source + summary))


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def words_of(text: str) -> list[str]:
    """Words and numbers in lower case; identifiers are split: readAll_lines → read, all, lines."""
    return [word.lower() for word in _WORD.findall(text)]


@lru_cache(maxsize=2)
def _functions(words_in: int, words_out: int) -> tuple[Pairs, Pairs]:
    """Functions of the standard library with docstrings, one module in ten held out (by the hash of its name).

    The source is the code without the docstring, the summary its first line, if it has 3 words and fits.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[Pairs, Pairs] = ([], [])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _NOT_THE_LIBRARY.isdisjoint(inside.parts):
            module = inside.parts[0].removesuffix(".py")
            held_out = hashlib.blake2b(module.encode(), digest_size=4).digest()[0] % 10 == 0
            for code, first_line in _documented(path.read_text(encoding="utf-8", errors="replace")):
                source, summary = words_of(code)[:words_in], words_of(first_line)
                if len(source) >= 8 and 3 <= len(summary) < words_out:
                    parts[held_out].append((source, summary))
    if not all(parts):
        raise FileNotFoundError(f"cab-sum: this Python has no library sources under {root}")
    order = np.random.default_rng(0).permutation(len(parts[1]))  # else the first modules alone would be scored
    return parts[0], [parts[1][i] for i in order]


# A function whose docstring opens in the line after it: its indent, head, docstring's first line and what is behind.
_FUNCTION = re.compile(
    r"^(?P<indent> *)(?P<head>(?:async )?def [^\n]*?:)\n"
    r'(?P=indent)    [rR]?"""(?P<said>[^\n"]+?)\s*(?:"""|\n(?:[^"\\]|"(?!""))*?""")\s*\n'
    r"(?P<body>(?:(?P=indent)    [^\n]*\n|\n)*)",
    re.MULTILINE,
)


def _documented(text: str) -> Iterator[tuple[str, str]]:
    """The code of each function with a docstring, and the docstring's first line."""
    for found in _FUNCTION.finditer(text):
        yield found["head"] + "\n" + found["body"], found["said"]


def _lines(source: Path, target: Path, words_in: int) -> Pairs:
    """Two files with a text a line, as many in both."""
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (source, target)]
    if len(texts[0]) != len(texts[1]) or not texts[0]:
        raise ValueError(f"data: {source} has {len(texts[0])} lines and {target} {len(texts[1])}; as many are wanted")
    return [(_plain(a)[:words_in], _plain(b)) for a, b in zip(*texts, strict=True)]


def _plain(text: str) -> list[str]:
    """Words and marks in lower case; NEWLINE_CHAR, which stands for line ends, is none."""
    return re.findall(r"\w+|[^\w\s]", text.replace("NEWLINE_CHAR", " ").lower())
