"""Speech: made by a source and a filter from phones, or read from LJSpeech with its alignments."""

from __future__ import annotations

import math
import re
import wave
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.arena.tasks.cab.sound import Mel

# Voice, noise, and three formants in hertz, of vowels, sonorants and fricatives; the first is silence.
_PHONES = (
    (0.0, 0.0, 500, 1500, 2500), (1.0, 0.0, 730, 1090, 2440), (1.0, 0.0, 530, 1840, 2480), (1.0, 0.0, 270, 2290, 3010),
    (1.0, 0.0, 570, 840, 2410), (1.0, 0.0, 300, 870, 2240), (0.5, 0.0, 250, 1000, 2200), (0.5, 0.0, 250, 1600, 2600),
    (0.6, 0.0, 360, 1300, 2700), (0.0, 0.5, 3000, 3500, 3700), (0.0, 0.6, 1800, 2400, 3000), (0.4, 0.3, 300, 1500, 3400)
)  # fmt: skip
_MOODS = 3  # the first phone of an utterance: it falls, rises at its end, or is loud and high
SYMBOLS = len(_PHONES) + _MOODS


@dataclass
class Speech:
    """Utterances of one length: the phone of each frame (U, frames) and log-mel spectra (U, frames, bands)."""

    phones: Tensor
    mels: Tensor


def synthesise(count: int, frames: int, mel: Mel, seed: int) -> Speech:
    """Utterances of random phones, whose first tells the mood, and with it pitch and loudness of all that follows.

    Harmonics of a gliding pitch and noise, weighed by three resonances that glide from phone to phone.
    """
    rng = np.random.default_rng(seed)
    phones, parts = np.zeros((count, frames), np.int64), []
    for u in range(count):
        at, mood = 4, int(rng.integers(_MOODS))
        phones[u, :at] = len(_PHONES) + mood
        while at < frames:
            phone = int(rng.integers(1, 6) if at % 2 else rng.integers(0, len(_PHONES)))
            lasts = int(rng.integers(5, 11) if phone in range(1, 6) else rng.integers(3, 7))
            phones[u, at : at + lasts] = phone
            at += lasts
    numbers = torch.from_numpy(phones)
    generator = torch.Generator().manual_seed(seed)
    for part in numbers.split(32):
        parts.append(mel.log(_sound(part, mel, generator))[:, :frames])
    return Speech(numbers, torch.cat(parts))


def _sound(phones: Tensor, mel: Mel, generator: torch.Generator) -> Tensor:
    """(U, frames) phones → (U, frames · hop) samples."""
    frames, samples = phones.shape[1], phones.shape[1] * mel.hop
    mood = phones[:, :1] - len(_PHONES)
    table = torch.tensor([*_PHONES, *[_PHONES[0]] * _MOODS], dtype=torch.float32)
    smooth = F.pad(table[phones].mT, (2, 2), mode="replicate").unfold(2, 5, 1).mean(-1)  # (U, 5, frames)
    voice, noise, formants = smooth[:, 0], smooth[:, 1], smooth[:, 2:]
    place = torch.linspace(0, 1, frames)
    falls, rises, loud = 120 - 25 * place, 115 + 60 * (place - 0.7).clamp_min(0) / 0.3, 165 - 20 * place
    pitch = torch.where(mood == 0, falls, torch.where(mood == 1, rises, loud))
    voice = voice * torch.where(mood == 2, 2.0, 1.0)

    def resonance(hertz: Tensor) -> Tensor:
        """(U, K, frames) frequencies → how strongly they sound there."""
        widths = torch.tensor([60.0, 90.0, 140.0])[:, None, None]
        off = (hertz[:, None] - formants[:, :, None]) / widths
        return (torch.tensor([1.0, 0.6, 0.35])[:, None, None] / (1 + off.square())).sum(1)

    harmonics = torch.arange(1, 41)[:, None]
    at = harmonics * pitch[:, None]
    strength = torch.where(at < 0.48 * mel.rate, resonance(at) * voice[:, None] / harmonics.sqrt(), 0.0)
    strength = F.interpolate(strength, size=samples, mode="linear")
    phase = (F.interpolate(pitch[:, None], size=samples, mode="linear") / mel.rate).cumsum(-1) * 2 * math.pi
    voiced = (strength * torch.sin(harmonics * phase)).sum(1)
    bins = torch.linspace(0, mel.rate / 2, 1 + mel.window // 2)[None, :, None].expand(len(phones), -1, frames)
    hiss = mel.spectrum(torch.randn(len(phones), samples, generator=generator))
    hiss = hiss * F.pad(resonance(bins) * noise[:, None], (0, hiss.shape[2] - frames), mode="replicate")
    hissed = torch.istft(hiss, mel.window, mel.hop, window=torch.hann_window(mel.window), length=samples)
    return 0.2 * (voiced + 0.5 * hissed)


# LJSpeech ----------------------------------------------------------------------------------------------

_INTERVAL = re.compile(r'xmin = ([\d.]+)\s+xmax = ([\d.]+)\s+text = "([^"]*)"')


def read_ljspeech(root: Path, alignments: Path, frames: int, mel: Mel) -> tuple[Speech, Speech, int]:
    """Utterances to learn from and those of chapters 49 and 50, and how many phones there are; cut or padded."""
    numbers = {"": 0}
    parts: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
    for line in (root / "metadata.csv").read_text(encoding="utf-8").splitlines():
        name = line.split("|")[0]
        grid = _alignment(alignments, name)
        if grid is None:  # the aligner left some out
            continue
        samples = read_wave(root / "wavs" / f"{name}.wav", mel.rate)
        needed = frames * mel.hop
        samples = F.pad(samples[:needed], (0, max(0, needed - len(samples))))
        times = np.arange(frames) * mel.hop / mel.rate
        phones = np.zeros(frames, np.int64)
        for begin, end, phone in intervals(grid):
            phones[(times >= begin) & (times < end)] = numbers.setdefault(phone, len(numbers))
        held_out = name.startswith(("LJ049", "LJ050"))
        parts[held_out].append((torch.from_numpy(phones), mel.log(samples[None])[0, :frames]))
    if not all(parts):
        raise ValueError(f"data: {root} must hold aligned utterances, some of them of the chapters LJ049 and LJ050")
    train, test = (Speech(*(torch.stack(x) for x in zip(*part, strict=True))) for part in parts)
    return train, test, len(numbers)


def intervals(grid: str) -> list[tuple[float, float, str]]:
    """Begin, end and phone of each interval in the tier "phones" of a TextGrid."""
    _, found, tier = grid.partition('name = "phones"')
    if not found:
        raise ValueError('data: a TextGrid must have a tier named "phones"')
    return [(float(begin), float(end), phone) for begin, end, phone in _INTERVAL.findall(tier.partition("item [")[0])]


def _alignment(place: Path, name: str) -> str | None:
    if place.is_dir():
        path = place / f"{name}.TextGrid"
        return path.read_text(encoding="utf-8") if path.exists() else None
    with zipfile.ZipFile(place) as archive:
        found = [inside for inside in archive.namelist() if inside.rpartition("/")[2] == f"{name}.TextGrid"]
        return archive.read(found[0]).decode() if found else None


def read_wave(path: Path, rate: int) -> Tensor:
    """Samples in −1 … 1 of a file of 16 bits, one channel, and this rate."""
    with wave.open(str(path)) as file:
        kind = file.getframerate(), file.getnchannels(), file.getsampwidth()
        if kind != (rate, 1, 2):
            raise ValueError(f"data: {path} must have {rate} samples a second, 1 channel and 2 bytes, got {kind}")
        raw = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return torch.from_numpy(raw.astype(np.float32) / 2**15)
