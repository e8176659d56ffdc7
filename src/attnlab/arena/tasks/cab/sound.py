"""Sound as log-mel spectrograms and back, and how far two spoken versions lie apart (MCD, MSD)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_FLOOR = 1e-5


@dataclass(frozen=True)
class Mel:
    """How a spectrogram is made: samples a second, and those of a window and from one frame to the next."""

    rate: int
    window: int
    hop: int
    bands: int

    def magnitude(self, waves: Tensor, power: float = 1.0) -> Tensor:
        """(B, samples) → (B, bands, 1 + samples // hop), summed over each band."""
        return filters(self) @ self.spectrum(waves).abs() ** power

    def log(self, waves: Tensor) -> Tensor:
        """(B, samples) → (B, frames, bands)."""
        return self.magnitude(waves).clamp_min(_FLOOR).log().mT

    def spectrum(self, waves: Tensor) -> Tensor:
        window = torch.hann_window(self.window, dtype=waves.dtype)
        return torch.stft(waves, self.window, self.hop, window=window, return_complex=True)

    def sound(self, log_mels: Tensor, rounds: int = 32) -> Tensor:
        """Waves with about such spectra (B, frames, bands) → (B, samples), phases by Griffin and Lim."""
        wanted = (torch.linalg.pinv(filters(self)) @ log_mels.exp().mT.float()).clamp_min(0.0)
        phases = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
        spectrum, window = torch.polar(wanted, phases), torch.hann_window(self.window)
        waves = torch.istft(spectrum, self.window, self.hop, window=window)
        for _ in range(rounds):
            found = self.spectrum(waves)
            waves = torch.istft(wanted * found / found.abs().clamp_min(1e-8), self.window, self.hop, window=window)
        return waves


@lru_cache(maxsize=4)
def filters(mel: Mel, low: float = 20.0) -> Tensor:
    """Triangles (bands, 1 + window // 2), equally wide on the mel scale m = 2595 log₁₀(1 + f / 700)."""

    def to_mel(f: float) -> float:
        return 2595 * math.log10(1 + f / 700)

    edges = torch.linspace(to_mel(low), to_mel(mel.rate / 2), mel.bands + 2)
    hertz = 700 * (10 ** (edges / 2595) - 1)
    bins = torch.linspace(0, mel.rate / 2, 1 + mel.window // 2)
    rising = (bins - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]
    falling = (hertz[2:, None] - bins) / (hertz[2:] - hertz[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp_min(0.0)


def distortions(found: Tensor, truth: Tensor, rate: int) -> tuple[float, float]:
    """MCD and MSD of waves (B, samples), averaged over the B: as fairseq's evaluation has them (arXiv 2011.03568).

    Root mean square differences of 13 cepstral coefficients, and of 80 logarithms of mel energies, windows of 50 ms
    every 12.5 ms; frames are aligned by dynamic time warping, and the sum along the path is divided by the number of
    frames of what was found.
    """
    mel = Mel(rate, int(0.05 * rate), int(0.0125 * rate), 80)
    spectra = [(mel.magnitude(waves, 2.0) + 1e-6).log().mT for waves in (found, truth)]
    number = torch.arange(80, dtype=torch.float32)
    cosines = torch.cos(math.pi / 80 * (number + 0.5) * torch.arange(13.0)[:, None]) * math.sqrt(2 / 80)
    cosines[0] /= math.sqrt(2)
    cepstra = [s @ cosines.T for s in spectra]
    found_by = []
    for a, b in (cepstra, spectra):
        apart = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(a.shape[2])
        found_by.append((warped(apart) / a.shape[1]).mean().item())
    mcd, msd = found_by
    return mcd, msd


def warped(costs: Tensor) -> Tensor:
    """The least sum of costs (B, N, M) along a path from corner to corner that goes on in one or both: (B,)."""
    _, n, m = costs.shape
    total = torch.full((len(costs), n + 1, m + 1), torch.inf, dtype=torch.float64)
    total[:, 0, 0] = 0.0
    for diagonal in range(2, n + m + 1):  # all places of a diagonal at once
        i = torch.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        before = torch.minimum(torch.minimum(total[:, i - 1, j], total[:, i, j - 1]), total[:, i - 1, j - 1])
        total[:, i, j] = before + costs[:, i - 1, j - 1].double()
    return total[:, n, m]
