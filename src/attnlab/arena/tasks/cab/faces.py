"""Super-resolution of faces by eight (noncausal self)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.arena.ends import Patches
from attnlab.arena.task import SELF, Budget, Score, need, task
from attnlab.arena.tasks.cab.base import MEDIUM, PAPER, TINY, CabTask
from attnlab.arena.tasks.cab.parts import Places

_TYPICAL = 0.1  # what bicubic misses is about this large; outputs are in this unit
_PHOTOS = ("astronaut", "camera", "cat", "rocket"), ("coffee",)  # to learn from, held out


@task
class SuperResolution(CabTask):
    """From 16×16 to 128×128: tokens are patches of the bicubic enlargement, to which the network adds what it lacks.

    Published: SR3, a diffusion model, learns on FFHQ and is scored on 100 images of CelebA-HQ; here the correction is
    regressed. Tiny: 200 photographs of 24×24 (Labeled Faces in the Wild), from 6×6; medium: views of photographs.
    """

    name, title, about, layout = "cab-sr-ns", "faces at a higher resolution", "SR", SELF
    metric, better = "PSNR (dB)", "higher"
    signs = {"PSNR": 1, "SSIM": 1}
    folder, extra = ".", "data"
    source = (
        "PNG images as SR3's prepare_data.py --size 16,128 leaves them: ffhq_16_128/{hr_128,sr_16_128} to learn from "
        "and celebahq_16_128/{hr_128,sr_16_128} to be scored on, where sr_16_128 is bicubic "
        "(https://github.com/Janspiry/Image-Super-Resolution-via-Iterative-Refinement)"
    )
    budgets = {
        TINY: Budget(parameters=50_000, depth=2, steps=200, batch=12, length=144, learning_rate=4e-3, examples=40),
        MEDIUM: Budget(parameters=1_000_000, depth=6, steps=5_000, batch=8, length=576, learning_rate=1e-3),
        PAPER: Budget(
            parameters=90_000_000, depth=12, steps=1_000_000, batch=4, length=4096, learning_rate=1e-4, examples=100
        ),
    }
    patch = 2

    def make(self) -> None:
        side, tiny = self.patch * round(self.budget.length**0.5), self.budget is self.budgets[TINY]
        train, held_out = _lfw(side) if tiny else _photographs(side, self.budget.examples)
        self.train, self.held_out = ((high, enlarge(high, 4 if tiny else 8)) for high in (train, held_out))

    def read(self, root: Path) -> None:
        self.train, self.held_out = (
            (_images(self.find(root, f"{name}/hr_128"), most), _images(self.find(root, f"{name}/sr_16_128"), most))
            for name, most in (("ffhq_16_128", None), ("celebahq_16_128", self.budget.examples))
        )
        side = self.patch * round(self.budget.length**0.5)
        for high, low in (self.train, self.held_out):
            if high.shape != low.shape or high.shape[2:] != (side, side):
                raise ValueError(
                    f"data: pairs of {side}×{side} images are wanted, got {tuple(high.shape)} and {tuple(low.shape)}"
                )

    def arrays(self) -> list[np.ndarray | bytes]:
        return [x.numpy() for pair in (self.train, self.held_out) for x in pair]

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = self.choose(rng, len(self.train[0]))
        high, low = (images[chosen] for images in self.train)
        turned = torch.rand(len(high), generator=rng) < 0.5  # half of them, left to right
        high, low = (torch.where(turned[:, None, None, None], x.flip(-1), x).float() / 255 for x in (high, low))
        return low - 0.5, self._patches(high - low) / _TYPICAL

    def stem(self, width: int) -> nn.Module:
        return nn.Sequential(Patches(self.train[0].shape[1], width, self.patch), Places())

    def head(self, width: int) -> nn.Module:
        head = nn.Linear(width, self.train[0].shape[1] * self.patch**2)
        nn.init.zeros_(head.weight)  # so that training starts from bicubic
        nn.init.zeros_(head.bias)
        return head

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        high, low = (x.float() / 255 for x in self.held_out)
        missing = torch.cat([predict(part - 0.5) for part in low.split(16)]).float()
        return self.scored(*_metrics(low + _TYPICAL * self._image(missing), high))

    def trivial(self) -> tuple[str, float]:
        high, low = (x.float() / 255 for x in self.held_out)
        return "bicubic", _metrics(low, high)[0]

    def _patches(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.patch).flatten(2).transpose(1, 2)

    def _image(self, patches: Tensor) -> Tensor:
        side = round(patches.shape[1] ** 0.5)
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (side, side)), self.patch)


def _metrics(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean PSNR and SSIM of images in 0 … 1, after rounding to bytes."""
    found, truth = ((255 * x).round().clamp(0, 255).double() for x in (found, truth))
    return psnr(found, truth).mean().item(), ssim(found, truth).mean().item()


def psnr(found: Tensor, truth: Tensor) -> Tensor:
    """20 log₁₀(255 / RMSE) of each image (B, C, H, W) of values 0 … 255."""
    error = (found - truth).square().mean((1, 2, 3)).clamp_min(1e-10)
    return 10 * torch.log10(255.0**2 / error)


def ssim(found: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image (B, C, H, W) of values 0 … 255: Gaussian windows of 11, deviation 1.5.

    mean of (2 μx μy + c₁)(2 σxy + c₂) / ((μx² + μy² + c₁)(σx² + σy² + c₂)) over places where the window fits.
    """
    places = torch.arange(11, dtype=found.dtype) - 5
    line = torch.exp(-places.square() / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    x, y = (images.flatten(0, 1)[:, None] for images in (found, truth))

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window)

    mx, my, c1, c2 = mean(x), mean(y), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    map_ = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return map_.mean((1, 2, 3)).unflatten(0, found.shape[:2]).mean(1)


def enlarge(high: Tensor, times: int) -> Tensor:
    """What bicubic interpolation makes of the images (bytes) after they were shrunk."""
    low = F.interpolate(high.float(), scale_factor=1 / times, mode="bicubic", antialias=True).round().clamp(0, 255)
    return F.interpolate(low, scale_factor=float(times), mode="bicubic").round().clamp(0, 255).byte()


@lru_cache(maxsize=1)
def _lfw(side: int) -> tuple[Tensor, Tensor]:
    """The hundred faces and hundred other views of Labeled Faces in the Wild that scikit-image brings."""
    data = need("skimage.data", "data", "the task cab-sr-ns")
    images = torch.from_numpy((255 * data.lfw_subset()[:, :side, :side]).round().astype(np.uint8))[:, None]
    held_out = torch.arange(len(images)) % 5 == 0
    return images[~held_out], images[held_out]


@lru_cache(maxsize=1)
def _photographs(side: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Grey views of photographs that scikit-image brings, at half their size; whole photographs are held out."""
    data = need("skimage.data", "data", "the task cab-sr-ns")
    rng, parts = np.random.default_rng(3), []
    for names, count in zip(_PHOTOS, (1024, held_out), strict=True):
        views, photographs = [], []
        for image in (getattr(data, name)() for name in names):
            grey = image[..., :3].mean(-1) if image.ndim == 3 else image
            photographs.append(F.avg_pool2d(torch.from_numpy(np.array(grey, np.float32))[None], 2))
        for i in range(count):
            small = photographs[i % len(names)]
            y, x = (int(rng.integers(n - side + 1)) for n in small.shape[1:])
            views.append(small[:, y : y + side, x : x + side].round().byte())
        parts.append(torch.stack(views))
    return parts[0], parts[1]


def _images(folder: Path, most: int | None) -> Tensor:
    """The PNG images of a folder in the order of their names, (count, channels, H, W) bytes."""
    reader = need("matplotlib.image", "data", "reading images")
    paths = sorted(folder.glob("*.png"))[:most]
    if not paths:
        raise FileNotFoundError(f"data: {folder} holds no .png images")
    arrays = [np.atleast_3d(reader.imread(path))[..., :3] for path in paths]
    if len({a.shape for a in arrays}) > 1:
        raise ValueError(f"data: the images of {folder} are not of one size")
    return torch.from_numpy((255 * np.stack(arrays)).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
