"""Long sequence forecasting (noncausal cross): what is to come looks into what was."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.arena.task import CROSS, Budget, Score, need, task
from attnlab.arena.tasks.cab.base import MEDIUM, PAPER, TINY, CabTask
from attnlab.arena.tasks.cab.parts import Places, Softmax

_HOURS_OF_A_MONTH = 30 * 24
_CLOCK = 4  # hour, weekday, day of the month and of the year


@dataclass(frozen=True)
class Lengths:
    """How much is seen, how much of that the decoder is given too, and how much is forecast."""

    seen: int
    given: int
    ahead: int


_TINY, _MEDIUM = Lengths(48, 0, 24), Lengths(168, 48, 168)


class _Forecast(CabTask):
    """A table of hourly values, scaled by mean and deviation of its first part; errors are of the scaled values.

    The context is encoded by softmax attention; the tokens ahead know their date (and the decoder's the last values,
    as Informer's) and look into it. Windows, splits and columns are Informer's.
    """

    title, about, layout = "what a series will be", "LSTF", CROSS
    metric, better = "MSE", "lower"
    signs = {"MSE": -1, "MAE": -1}
    folder = "ETT"
    source = "Informer's tables of ETT, ECL and WTH (https://github.com/zhouhaoyi/Informer2020)"
    file: ClassVar[str]
    target: ClassVar[str]
    columns: ClassVar[int]  # of values, without the date
    several: ClassVar[bool]  # all columns, or the target alone
    months: ClassVar[tuple[int, int, int] | None] = None  # to learn from, validate and test on; else 7 : 1 : 2
    an_hour: ClassVar[int] = 1
    published: ClassVar[Lengths]
    values: np.ndarray  # (hours, columns)
    dates: np.ndarray  # (hours, 4)

    def load(self) -> None:
        sizes = {id(self.budgets.get(TINY)): _TINY, id(self.budgets.get(MEDIUM)): _MEDIUM}
        self.lengths = sizes.get(id(self.budget), self.published)
        self.context = self.lengths.seen
        super().load()
        total, lengths = len(self.values), self.lengths
        if self.months:
            month = _HOURS_OF_A_MONTH * self.an_hour
            first, second, third = (part * month for part in self.months)
            train, test, end = first, first + second, first + second + third
        else:
            train, test, end = int(0.7 * total), total - int(0.2 * total), total
        if end > total or train < lengths.seen + lengths.ahead or end - test < lengths.ahead:
            raise ValueError(
                f"data: {self.file} holds {total} rows; {max(end, 10 * lengths.ahead)} are wanted, to see "
                f"{lengths.seen} and forecast {lengths.ahead}"
            )
        mean, deviation = self.values[:train].mean(0), self.values[:train].std(0)
        self.values = ((self.values - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
        self.train_until, self.test_from, self.end = train, test, end

    def make(self) -> None:
        self.dates, values = self.generated()
        self.values = values if self.several else values[:, -1:]

    def generated(self) -> tuple[np.ndarray, np.ndarray]:
        """Clock (hours, 4) and values (hours, columns), the target last."""
        raise NotImplementedError

    def read(self, root: Path) -> None:
        names, self.dates, values = read_table(self.find(root, self.file))
        if self.target not in names or len(names) != self.columns:
            raise ValueError(
                f"data: {self.file} must have a date, {self.columns - 1} columns and {self.target}, got "
                f"{', '.join(names[:8])}"
            )
        order = [name for name in names if name != self.target] if self.several else []
        self.values = values[:, [names.index(name) for name in [*order, self.target]]]

    def arrays(self) -> list[np.ndarray | bytes]:
        return [self.values, self.dates]

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        last = self.train_until - self.lengths.ahead
        return self._windows(self.lengths.seen + self.choose(rng, last - self.lengths.seen + 1))

    def stem(self, width: int) -> nn.Module:
        return _SeenAndAhead(self.values.shape[1] + _CLOCK, width, self.lengths)

    def head(self, width: int) -> nn.Module:
        return _Ahead(width, self.values.shape[1], self.lengths.ahead)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        squared, absolute = [], []
        origins = self._origins()
        for part in np.array_split(origins, max(1, len(origins) // 32)):
            inputs, targets = self._windows(part)
            error = (predict(inputs) - targets).double().flatten(1)
            squared.append(error.square().mean(1))
            absolute.append(error.abs().mean(1))
        return self.scored(torch.cat(squared).mean().item(), torch.cat(absolute).mean().item())

    def trivial(self) -> tuple[str, float]:
        errors = [self._windows(part)[1].square().mean() for part in np.array_split(self._origins(), 8)]
        return "mean", float(torch.stack(errors).mean())

    def _origins(self) -> np.ndarray:
        """Where forecasts begin in the last part: at most as many as the budget's examples, evenly."""
        last = self.end - self.lengths.ahead
        count = min(self.budget.examples, last - self.test_from + 1)
        return np.unique(np.linspace(self.test_from, last, count).astype(int))

    def _windows(self, origins: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs (B, seen + given + ahead, columns + clock), values ahead being zero, and the values ahead."""
        seen, given, ahead = self.lengths.seen, self.lengths.given, self.lengths.ahead
        rows = origins[:, None] + np.concatenate((np.arange(-seen, 0), np.arange(-given, ahead)))
        values = torch.from_numpy(self.values[rows])
        targets = values[:, seen + given :].clone()
        values[:, seen + given :] = 0
        return torch.cat((values, torch.from_numpy(self.dates[rows])), -1), targets


class _SeenAndAhead(nn.Module):
    """Tokens of the encoded context and, behind it, of what is given and asked for: (B, M + N, columns) → (…, C)."""

    def __init__(self, columns: int, width: int, lengths: Lengths):
        super().__init__()
        self.seen, self.ahead = nn.Linear(columns, width), nn.Linear(columns, width)
        self.places, self.encoder, self.lengths = Places(), Softmax(width), lengths
        self.decoder = Softmax(width, causal=True) if lengths.given else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        seen, ahead = x[:, : self.lengths.seen], x[:, self.lengths.seen :]
        context = self.encoder(self.places(self.seen(seen)))
        return torch.cat((context, self.decoder(self.places(self.ahead(ahead)))), 1)


class _Ahead(nn.Linear):
    """The values ahead (B, ahead, columns) from the last tokens."""

    def __init__(self, width: int, columns: int, ahead: int):
        super().__init__(width, columns)
        self.ahead = ahead

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens[:, -self.ahead :])


def clock(dates: list[datetime]) -> np.ndarray:
    """Hour, weekday, day of the month and of the year, each in −½ … ½: (N, 4)."""
    parts = [(d.hour / 23, d.weekday() / 6, (d.day - 1) / 30, (d.timetuple().tm_yday - 1) / 365) for d in dates]
    return np.array(parts, np.float32) - 0.5


def read_table(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the columns beside `date`, the clock, and the values of a CSV file."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines)
        names = next(rows, [])
        if names[:1] != ["date"]:
            raise ValueError(f"data: the first column of {path} must be 'date', got {names[:1]}")
        read = [row for row in rows if row]
    dates = [datetime.fromisoformat(row[0]) for row in read]
    return names[1:], clock(dates), np.array([row[1:] for row in read], float)


# Generated ---------------------------------------------------------------------------------------------


def _hours(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    start = datetime(2016, 7, 1)
    dates = [start + timedelta(hours=i) for i in range(count)]
    hours = np.arange(count)
    return clock(dates), hours % 24, hours // 24 % 7


def _noise(rng: np.random.Generator, count: int, keep: float) -> np.ndarray:
    """Noise of deviation one that remembers itself: x ← keep · x + …"""
    steps, x = rng.normal(size=count) * (1 - keep**2) ** 0.5, np.zeros(count)
    for i in range(1, count):
        x[i] = keep * x[i - 1] + steps[i]
    return x


def transformer(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Six loads with daily and weekly cycles and slow drifts, and the oil's temperature, which follows their sum."""
    rng = np.random.default_rng(11)
    dates, hour, weekday = _hours(count)
    work = np.where(weekday < 5, 1.0, 0.6)
    loads = []
    for peak in rng.uniform(8, 20, 6):
        day = np.cos(2 * np.pi * (hour - peak) / 24) + 0.4 * np.cos(4 * np.pi * (hour - peak) / 24)
        loads.append(work * day + 0.5 * _noise(rng, count, 0.98) + 0.2 * rng.normal(size=count))
    heat, oil = np.sum(loads, 0), np.zeros(count)
    for i in range(1, count):  # warms and cools with a time constant of twelve hours
        oil[i] = oil[i - 1] + (heat[i - 1] - oil[i - 1]) / 12
    return dates, np.stack([*loads, oil + 0.1 * rng.normal(size=count)], 1)


def clients(count: int, number: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Consumption of clients: households, shops and works with their hours, weekends, and weather in common."""
    rng = np.random.default_rng(13)
    dates, hour, weekday = _hours(count)
    weather, tables = _noise(rng, count, 0.99), []
    for i in range(number):
        opens, closes, at_weekends = ((17, 23, 1.2), (9, 19, 0.9), (6, 22, 0.2))[i % 3]
        on = 1 / (1 + np.exp(-(hour - opens))) / (1 + np.exp(hour - closes))
        load = 1 + 3 * on * np.where(weekday < 5, 1.0, at_weekends) + 0.4 * weather
        tables.append(load + 0.3 * _noise(rng, count, 0.8))
    return dates, np.stack(tables, 1)


def sea() -> tuple[np.ndarray, np.ndarray]:
    """Monthly temperatures of the sea off Peru since 1950 (El Niño), which come with statsmodels."""
    need("statsmodels", "data", "the task cab-wth-s-nc")
    frame = importlib.import_module("statsmodels.datasets.elnino").load_pandas().data
    values = frame.drop(columns="YEAR").to_numpy(float).ravel()[:, None]
    dates = [datetime(int(frame["YEAR"].iloc[0]) + i // 12, i % 12 + 1, 1) for i in range(len(values))]
    return clock(dates), values


def station(count: int) -> tuple[np.ndarray, np.ndarray]:
    """A weather station: sun, wind, pressure, temperature, dew point and the wet bulb between both."""
    rng = np.random.default_rng(17)
    dates, hour, _ = _hours(count)
    day, season = -np.cos(2 * np.pi * (hour - 3) / 24), np.cos(2 * np.pi * np.arange(count) / 8766)
    front, cloud, wind = (_noise(rng, count, keep) for keep in (0.995, 0.97, 0.9))
    air = 3 * season + 3 * front + (1.5 - 0.5 * np.tanh(cloud)) * day + 0.2 * rng.normal(size=count)
    dew = 2 * season + 2.5 * front + cloud + 0.2 * rng.normal(size=count)
    wet = 0.6 * air + 0.4 * dew + 0.05 * rng.normal(size=count)
    return dates, np.stack((cloud, wind, -front + 0.2 * wind, air, dew, wet), 1)


# The tasks ---------------------------------------------------------------------------------------------


def _budgets(published: Lengths, *, tiny: bool, medium: bool) -> dict[str, Budget]:
    def tokens(lengths: Lengths) -> int:
        return lengths.seen + lengths.given + lengths.ahead

    found = {}
    if tiny:
        found[TINY] = Budget(
            parameters=30_000, depth=2, steps=250, batch=32, length=tokens(_TINY), learning_rate=3e-3, examples=192
        )
    if medium:
        found[MEDIUM] = Budget(
            parameters=1_000_000, depth=2, steps=2_000, batch=32, length=tokens(_MEDIUM), learning_rate=1e-3
        )
    found[PAPER] = Budget(
        parameters=11_000_000, depth=2, steps=2_000, batch=32, length=tokens(published), learning_rate=1e-4,
        examples=10**6,
    )  # fmt: skip
    return found


@task
class ETTh1(_Forecast):
    """Oil temperature of an electric transformer and its six loads, hourly; generated alike in small sizes."""

    name, prefix, file, target, columns, several = "cab-etth1-m-nc", "ETT ", "ETTh1.csv", "OT", 7, True
    months, published = (12, 4, 4), Lengths(336, 336, 720)
    budgets = _budgets(published, tiny=True, medium=True)

    def generated(self) -> tuple[np.ndarray, np.ndarray]:
        return transformer(20 * _HOURS_OF_A_MONTH)


@task
class ETTh1Alone(ETTh1):
    """The oil's temperature alone."""

    name, several, published = "cab-etth1-s-nc", False, Lengths(168, 168, 720)
    budgets = _budgets(published, tiny=False, medium=True)


@task
class ETTh2(ETTh1):
    """A second transformer."""

    name, file, published = "cab-etth2-m-nc", "ETTh2.csv", Lengths(720, 336, 720)
    budgets = _budgets(published, tiny=False, medium=False)


@task
class ETTh2Alone(ETTh2):
    """Its oil's temperature alone."""

    name, several, published = "cab-etth2-s-nc", False, Lengths(336, 336, 720)
    budgets = _budgets(published, tiny=False, medium=False)


@task
class ETTm1(ETTh1):
    """The first transformer every quarter of an hour."""

    name, file, an_hour, published = "cab-ettm1-m-nc", "ETTm1.csv", 4, Lengths(672, 384, 672)
    budgets = _budgets(published, tiny=False, medium=False)


@task
class ETTm1Alone(ETTm1):
    """Its oil's temperature alone."""

    name, several, published = "cab-ettm1-s-nc", False, Lengths(384, 384, 672)
    budgets = _budgets(published, tiny=False, medium=False)


@task
class ECL(_Forecast):
    """Consumption of 321 clients, hourly; eight in small sizes, generated."""

    name, prefix, file, target, columns, several = "cab-ecl-m-nc", "ECL ", "ECL.csv", "MT_320", 321, True
    published = Lengths(336, 336, 960)
    budgets = _budgets(published, tiny=True, medium=True)

    def generated(self) -> tuple[np.ndarray, np.ndarray]:
        return clients(9_000)


@task
class ECLAlone(ECL):
    """One client alone."""

    name, several = "cab-ecl-s-nc", False
    budgets = _budgets(ECL.published, tiny=False, medium=True)


@task
class Weather(_Forecast):
    """Wet bulb and eleven other values of weather stations, hourly; a generated station in the medium size."""

    name, prefix, file, target, columns, several = "cab-wth-m-nc", "Weather ", "WTH.csv", "WetBulbCelsius", 12, True
    published = Lengths(720, 336, 720)
    budgets = _budgets(published, tiny=False, medium=True)

    def generated(self) -> tuple[np.ndarray, np.ndarray]:
        return station(9_000)


@task
class WeatherAlone(Weather):
    """The wet bulb alone; in the tiny size the temperature of the sea off Peru, monthly and measured."""

    name, several = "cab-wth-s-nc", False
    budgets = _budgets(Weather.published, tiny=True, medium=True)

    def generated(self) -> tuple[np.ndarray, np.ndarray]:
        return sea() if self.lengths is _TINY else super().generated()
