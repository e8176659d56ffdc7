"""Text to speech: all frames at once (noncausal self), or frame after frame (noncausal and causal self, cross)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.arena.task import CAUSAL, CAUSAL_CROSS, SELF, Budget, Score, task
from attnlab.arena.tasks.cab.base import MEDIUM, PAPER, TINY, CabTask
from attnlab.arena.tasks.cab.parts import Places, Softmax, table
from attnlab.arena.tasks.cab.sound import Mel, distortions
from attnlab.arena.tasks.cab.voices import SYMBOLS, Speech, read_ljspeech, synthesise

_FRAMES = {TINY: 96, MEDIUM: 256, PAPER: 560}  # LJSpeech has 559 on average
_MELS = {TINY: Mel(8000, 256, 100, 32), MEDIUM: Mel(16_000, 512, 200, 64), PAPER: Mel(22_050, 1024, 256, 80)}
_COUNT = {TINY: (160, 24), MEDIUM: (240, 32)}


def _budgets(tokens: Callable[[int], int], *, steps: int) -> dict[str, Budget]:
    tiny, medium, paper = (tokens(n) for n in _FRAMES.values())
    return {
        TINY: Budget(70_000, depth=2, steps=steps, batch=8, length=tiny, learning_rate=4e-3, examples=24),
        MEDIUM: Budget(2_000_000, depth=4, steps=4_000, batch=16, length=medium, learning_rate=1e-3, examples=32),
        PAPER: Budget(40_000_000, depth=6, steps=200_000, batch=48, length=paper, learning_rate=5e-4, examples=523),
    }


class _Speech(CabTask):
    """Phones of known durations become log-mel spectra. MCD and MSD are those of the sounds that Griffin and Lim make
    of the spectra that were found and of the true ones."""

    about, metric = "TTS", "MCD"
    signs = {"MCD": -1, "MSD": -1}
    folder = "LJSpeech-1.1"
    source = (
        "LJSpeech: metadata.csv and wavs/*.wav (https://keithito.com/LJ-Speech-Dataset), and with them its alignments, "
        "ljspeech_mfa.zip or a folder TextGrid/ (https://dl.fbaipublicfiles.com/fairseq/s2/ljspeech_mfa.zip)"
    )
    together: ClassVar[dict[str, int]]  # frames that a token stands for

    def load(self) -> None:
        size = next(name for name, budget in self.budgets.items() if budget is self.budget)
        self.mel, self.frames, self.each = _MELS[size], _FRAMES[size], self.together[size]
        self.count = _COUNT.get(size)
        super().load()
        self.mean = self.train.mels.mean((0, 1))
        self.deviation = self.train.mels.std((0, 1)) + 1e-3

    def make(self) -> None:
        if self.count is not None:
            self.train, self.held_out = (_made(n, self.frames, self.mel, seed) for seed, n in enumerate(self.count))
        self.symbols = SYMBOLS

    def read(self, root: Path) -> None:
        self.find(root, "metadata.csv")
        self.find(root, "wavs")
        alignments = self.find(root, "TextGrid", "ljspeech_mfa.zip")
        self.train, self.held_out, self.symbols = read_ljspeech(root, alignments, self.frames, self.mel)

    def arrays(self) -> list[np.ndarray | bytes]:
        return [x.numpy() for part in (self.train, self.held_out) for x in (part.phones, part.mels)]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.l1_loss(outputs, targets) + F.mse_loss(outputs, targets)

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        phones = self.held_out.phones[: self.budget.examples]
        found = torch.cat([self.speak(predict, part) for part in phones.split(32)])
        return self.scored(*self._distortions(found))

    def speak(self, predict: Callable[[Tensor], Tensor], phones: Tensor) -> Tensor:
        """Scaled spectra (B, frames, bands) of phones (B, frames)."""
        raise NotImplementedError

    def trivial(self) -> tuple[str, float]:
        """What one gets who says each phone always alike."""
        sums = torch.zeros(self.symbols, self.mel.bands).index_add_(
            0, self.train.phones.flatten(), self._scaled(self.train.mels).flatten(0, 1)
        )
        counts = torch.bincount(self.train.phones.flatten(), minlength=self.symbols).clamp_min(1)
        means = sums / counts[:, None]
        return "mean of each phone", self._distortions(means[self.held_out.phones[: self.budget.examples]])[0]

    def _scaled(self, mels: Tensor) -> Tensor:
        return (mels - self.mean) / self.deviation

    def _distortions(self, scaled: Tensor) -> tuple[float, float]:
        waves = self.mel.sound(scaled * self.deviation + self.mean)
        return distortions(waves, self.mel.sound(self.held_out.mels[: len(scaled)]), self.mel.rate)


@task
class AtOnce(_Speech):
    """FastSpeech 2's setting: every frame knows its phone, and all are said at once."""

    name, title, layout, prefix = "cab-tts-ns", "speech, all frames at once", SELF, "FastSpeech 2 "
    together = {TINY: 1, MEDIUM: 1, PAPER: 1}
    budgets = _budgets(lambda frames: frames, steps=200)

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = self.choose(rng, len(self.train.phones))
        return self.train.phones[chosen], self._scaled(self.train.mels[chosen])

    def stem(self, width: int) -> nn.Module:
        return nn.Sequential(table(self.symbols, width), Places())

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, self.mel.bands)

    def speak(self, predict: Callable[[Tensor], Tensor], phones: Tensor) -> Tensor:
        return predict(phones).float()


class _InTurn(_Speech):
    """Transformer-TTS's setting: frames are said one group after the other, each knowing those before it.

    Inputs (B, T, each · (1 + bands)): the phones of a group, and the spectra of the group before it.
    """

    prefix = "Transformer-TTS "
    together = {TINY: 2, MEDIUM: 4, PAPER: 4}

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = self.choose(rng, len(self.train.phones))
        mels = self._scaled(self.train.mels[chosen]).unflatten(1, (-1, self.each)).flatten(2)
        return self.inputs(self.train.phones[chosen], mels), mels

    def inputs(self, phones: Tensor, mels: Tensor) -> Tensor:
        groups = phones.unflatten(1, (-1, self.each)).to(mels.dtype)
        return torch.cat((groups, F.pad(mels, (0, 0, 1, 0))[:, :-1]), -1)

    def stem(self, width: int) -> nn.Module:
        return _Spoken(self.symbols, self.each, self.mel.bands, width, self.layout)

    def head(self, width: int) -> nn.Module:
        return _Frames(width, self.frames // self.each, self.each * self.mel.bands)

    def speak(self, predict: Callable[[Tensor], Tensor], phones: Tensor) -> Tensor:
        groups = self.frames // self.each
        mels = torch.zeros(len(phones), groups, self.each * self.mel.bands)
        for i in range(groups):
            mels[:, i] = predict(self.inputs(phones, mels))[:, i].float().clamp(-8, 8)
        return mels.unflatten(2, (self.each, -1)).flatten(1, 2)


class _Spoken(nn.Module):
    """From phones and earlier spectra to tokens.

    Noncausal self: of the phones, and beside them those of the spectra for a softmax decoder. Causal self: of both.
    Cross: the encoded phones as context (B, T, C), and behind them the spectra so far (B, T, C).
    """

    def __init__(self, symbols: int, each: int, bands: int, width: int, layout: str):
        super().__init__()
        self.tables = nn.ModuleList(table(symbols, width) for _ in range(each))
        # What looks into the text must find its own place there, and has little else to find it by.
        self.before, self.places = nn.Linear(each * bands, width), Places(1.0 if layout == CAUSAL_CROSS else 0.3)
        self.each, self.layout = each, layout
        if layout == CAUSAL_CROSS:
            self.encoder, self.decoder = Softmax(width), Softmax(width, causal=True)

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        numbers = inputs[..., : self.each].long()
        phones = self.places(sum(embed(numbers[..., i]) for i, embed in enumerate(self.tables)))
        spectra = inputs[..., self.each :]
        if self.training:  # half of them are not told: else what is said in turn drifts from the true frames
            spectra = spectra * (torch.rand_like(spectra[..., :1]) < 0.5)
        spectra = self.before(spectra)
        if self.layout == SELF:
            return phones, spectra
        if self.layout == CAUSAL:
            return phones + spectra
        return torch.cat((self.encoder(phones), self.decoder(self.places(spectra))), 1)


class _Frames(nn.Linear):
    """Spectra from the last tokens."""

    def __init__(self, width: int, tokens: int, numbers: int):
        super().__init__(width, numbers)
        self.tokens = tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens[:, -self.tokens :])


class _Decoder(_Frames):
    """Spectra by softmax attention over the encoded phones and the spectra so far."""

    def __init__(self, width: int, tokens: int, numbers: int):
        super().__init__(width, tokens, numbers)
        self.causal = Softmax(width, causal=True)

    def forward(self, tokens: Tensor, spectra: Tensor | None = None) -> Tensor:
        return super().forward(self.causal(tokens if spectra is None else tokens + spectra))


@task
class Encoder(_InTurn):
    """The mechanism encodes the phones; a softmax decoder speaks."""

    name, title, layout = "cab-tts-encoder-ns", "speech in turn, by an encoder of the text", SELF
    budgets = _budgets(lambda frames: frames // (2 if frames == _FRAMES[TINY] else 4), steps=200)

    def head(self, width: int) -> nn.Module:
        return _Decoder(width, self.frames // self.each, self.each * self.mel.bands)


@task
class Decoder(_InTurn):
    """The mechanism is what a group of frames knows of those before it."""

    name, title, layout, positions = "cab-tts-cs", "speech in turn, by a decoder", CAUSAL, True
    budgets = Encoder.budgets


@task
class LookingUp(_InTurn):
    """The mechanism is what frames see of the text so far."""

    name, title, layout = "cab-tts-cc", "speech in turn, by looking into the text so far", CAUSAL_CROSS
    budgets = _budgets(lambda frames: 2 * frames // (2 if frames == _FRAMES[TINY] else 4), steps=300)


@lru_cache(maxsize=4)
def _made(count: int, frames: int, mel: Mel, seed: int) -> Speech:
    return synthesise(count, frames, mel, seed)
