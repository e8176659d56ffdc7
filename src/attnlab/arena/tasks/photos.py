"""Super-resolution of photographs by two."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ends import Patches
from ..task import GRID, Budget, Score, Task, digest_of, need, task

_TRAIN, _HELD_OUT = ("astronaut", "rocket", "camera", "cat"), ("coffee", "motorcycle")
_TYPICAL = 0.03  # what bicubic misses is about this large; outputs are in this unit
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


@task
class PhotosTwice(Task):
    """Double the size of a photograph that was halved; the network adds what bicubic interpolation lacks.

    On luminance, like the literature. Whole photographs are held out (with `--data`, every fifth image of the folder).
    Metric: PSNR over all held-out pixels of views of 2·√length pixels. Trivial: bicubic.
    """

    name = "photos-x2"
    title = "photographs at twice the resolution"
    metric = "PSNR (dB)"
    better = "higher"
    layout = GRID
    reads = "images"
    extra = "data"
    budgets = {
        "small": Budget(parameters=50_000, depth=2, steps=220, batch=4, length=256, learning_rate=6e-3, examples=96),
        "medium": Budget(parameters=300_000, depth=4, steps=1_500, batch=8, length=576, examples=192),
    }

    def load(self) -> None:
        self.train, self.held_out = _ours() if self.data is None else _folder(self.data)
        self.side = round(self.budget.length**0.5)
        for _, low in self.train + self.held_out:
            if min(low.shape) < self.side:
                raise ValueError(
                    f"data: an image of {2 * low.shape[1]}×{2 * low.shape[0]} pixels is too small; "
                    f"{2 * self.side} are wanted"
                )

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        places = torch.rand(self.budget.batch, 2, generator=rng).numpy()
        chosen = self.choose(rng, len(self.train))
        return self._views([(self.train[i], *place) for i, place in zip(chosen, places, strict=True)])

    def stem(self, width: int) -> nn.Module:
        return Patches(2, width)

    def head(self, width: int) -> nn.Module:
        head = nn.Linear(width, 4)  # the four pixels that a pixel becomes
        nn.init.zeros_(head.weight)  # so that training starts from bicubic
        nn.init.zeros_(head.bias)
        return head

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets / _TYPICAL)

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        inputs, missing = self._fixed_views()
        outputs = torch.cat([predict(part) for part in inputs.split(16)])
        return Score(_psnr(_TYPICAL * outputs - missing))

    def trivial(self) -> tuple[str, float]:
        return "bicubic", _psnr(self._fixed_views()[1])

    def grid(self, length: int) -> tuple[int, int]:
        side = round(length**0.5)
        return side, side

    def digest(self) -> str:
        return digest_of(*(array for pair in self.train + self.held_out for array in pair))

    def _fixed_views(self) -> tuple[Tensor, Tensor]:
        places = np.random.default_rng(3).random((self.budget.examples, 2))
        return self._views([(self.held_out[i % len(self.held_out)], *place) for i, place in enumerate(places)])

    def _views(self, wanted: list) -> tuple[Tensor, Tensor]:
        """Halved views and their edges (B, 2, side, side), and per pixel the four that bicubic misses (B, N, 4)."""
        side, lows, misses = self.side, [], []
        for (missing, low), down, right in wanted:
            y, x = int(down * (low.shape[0] - side + 1)), int(right * (low.shape[1] - side + 1))
            lows.append(low[y : y + side, x : x + side])
            misses.append(missing[:, y : y + side, x : x + side])
        low = torch.from_numpy(np.stack(lows))[:, None]
        edges = low - F.avg_pool2d(F.pad(low, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return torch.cat((low - 0.5, edges / _TYPICAL), 1), torch.from_numpy(np.stack(misses)).flatten(2).transpose(
            1, 2
        )


def _psnr(error: Tensor) -> float:
    return -10 * error.double().square().mean().log10().item()


def _pair(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What bicubic misses (4, h, w) of an image (2h, 2w[, 3]), and the halved image (h, w)."""
    grey = image[..., :3] @ np.array([0.299, 0.587, 0.114]) if image.ndim == 3 else image
    height, width = (side // 2 * 2 for side in grey.shape)
    high = torch.from_numpy(np.ascontiguousarray(grey[:height, :width], dtype=np.float32) / 255)[None, None]
    low = F.interpolate(high, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)
    missing = F.pixel_unshuffle(high - F.interpolate(low, scale_factor=2, mode="bicubic"), 2)
    return missing[0].numpy(), low[0, 0].numpy()


@lru_cache(maxsize=1)
def _ours() -> tuple[list, list]:
    data = need("skimage.data", "data", "the task photos-x2")
    images = {
        name: data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
        for name in _TRAIN + _HELD_OUT
    }
    return [_pair(images[name]) for name in _TRAIN], [_pair(images[name]) for name in _HELD_OUT]


def _folder(folder: Path) -> tuple[list, list]:
    reader = need("matplotlib.image", "data", "reading images")
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _IMAGES)
    if len(paths) < 2:
        raise ValueError(
            f"data: {folder} holds {len(paths)} images ({', '.join(sorted(_IMAGES))}); at least 2 are wanted"
        )
    pairs = []
    for path in paths:
        image = reader.imread(path)
        pairs.append(_pair(image * 255 if image.dtype.kind == "f" else image))
    return [pair for i, pair in enumerate(pairs) if i % 5], pairs[::5]
