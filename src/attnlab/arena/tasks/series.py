"""Forecasting the economic, climate and sun series that come with statsmodels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from ..ends import Values
from ..task import Budget, Score, Task, digest_of, need, task

_HORIZON = 12
_WARM = 24  # forecasts are asked once this many values have been read


@task
class Series(Task):
    """Read a series value by value; at each one, forecast the next twelve.

    The network corrects the seasonal-naive forecast (the value one season earlier), and is trained on the first 70 % of
    each series and measured on the rest. Values are centred and scaled by what the context shows, never by the future.
    Metric: mean absolute error in standard deviations of the context, each series weighing the same.
    Trivial: seasonal-naive.
    """

    name = "series"
    title = "next twelve values of climate and economic series"
    metric = "MAE"
    extra = "data"
    budgets = {
        "small": Budget(parameters=40_000, depth=2, steps=200, batch=16, length=60, learning_rate=2e-3, examples=32),
        "medium": Budget(parameters=100_000, depth=3, steps=800, batch=64, length=60, learning_rate=1e-3, examples=64),
    }

    def load(self) -> None:
        self.series = _statsmodels_series()
        self.names = list(self.series)

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen, where = self.choose(rng, len(self.names)), torch.rand(self.budget.batch, generator=rng).numpy()
        examples = []
        for name, place in zip((self.names[i] for i in chosen), where, strict=True):
            values, season = self.series[name]
            last = int(0.7 * len(values)) - _HORIZON
            examples.append(
                self._example(values, season, self.budget.length + int(place * (last - self.budget.length + 1)))
            )
        return _stack(examples)

    def stem(self, width: int) -> nn.Module:
        return Values(3, width)

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, _HORIZON)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets)[:, _WARM:].abs().mean()

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        errors = {}
        for name in self.names:
            inputs, targets = self._held_out(name)
            errors[name] = (predict(inputs)[:, -1] - targets[:, -1]).abs().mean().item()
        return Score(float(np.mean(list(errors.values()))), {"MAE by series": errors})

    def trivial(self) -> tuple[str, float]:
        return "seasonal-naive", float(np.mean([self._held_out(name)[1][:, -1].abs().mean() for name in self.names]))

    def digest(self) -> str:
        return digest_of(*(values for values, _ in self.series.values()))

    def _held_out(self, name: str) -> tuple[Tensor, Tensor]:
        """Forecasts whose whole horizon lies in the last 30 % of the series."""
        values, season = self.series[name]
        origins = np.linspace(int(0.7 * len(values)), len(values) - _HORIZON, self.budget.examples).astype(int)
        return _stack([self._example(values, season, origin) for origin in np.unique(origins)])

    def _example(self, values: np.ndarray, season: int, origin: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (length, 3): value, value a season ago, step; targets (length, horizon): what seasonal-naive lacks.

        The last token is the value just before `origin`.
        """
        at = np.arange(origin - self.budget.length, origin)
        context = values[at]
        scale = context.std() + 1e-6
        ahead = at[:, None] + 1 + np.arange(_HORIZON)
        naive = ahead - season * ((np.arange(_HORIZON) + season) // season)  # one season back, or as many as it takes
        future = values[np.minimum(ahead, len(values) - 1)] - values[np.maximum(naive, 0)]
        before = np.where(at >= season, values[np.maximum(at - season, 0)], context)
        step = np.diff(context, prepend=context[:1])
        inputs = np.stack((context - context.mean(), before - context.mean(), step), -1) / scale
        return inputs, future / scale


def _stack(examples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*examples, strict=True)
    return torch.from_numpy(np.stack(inputs)).float(), torch.from_numpy(np.stack(targets)).float()


@lru_cache(maxsize=1)
def _statsmodels_series() -> dict[str, tuple[np.ndarray, int]]:
    """Each series and the length of its season."""
    need("statsmodels", "data", "the task series")
    frames = {
        name: importlib.import_module(f"statsmodels.datasets.{name}").load_pandas().data
        for name in ("co2", "elnino", "elec_equip", "macrodata", "sunspots")
    }
    macro = frames["macrodata"]
    return {
        "CO₂ at Mauna Loa, monthly": (frames["co2"]["co2"].resample("MS").mean().interpolate().to_numpy(), 12),
        "sea temperature (El Niño), monthly": (frames["elnino"].drop(columns="YEAR").to_numpy().ravel(), 12),
        "electrical equipment, monthly": (frames["elec_equip"].iloc[:, 0].to_numpy(), 12),
        "sunspots, yearly": (frames["sunspots"]["SUNACTIVITY"].to_numpy(), 11),
        "US consumption, quarterly": (np.log(macro["realcons"].to_numpy()), 4),
        "US investment, quarterly": (np.log(macro["realinv"].to_numpy()), 4),
        "US unemployment, quarterly": (macro["unemp"].to_numpy(), 4),
    }
