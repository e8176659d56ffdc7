"""Charts as inline SVG: no scripts, no fonts or files from elsewhere; colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from attnlab.arena.summary import number

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 40


@dataclass
class Series:
    """Points of one mechanism; `colour` is its place in the palette. `band` holds (x, low, high)."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    spread: Sequence[float] = ()  # of each point, as error bars


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    marks: bool = False,
) -> str:
    """Lines over x, with bands where there are some."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + [y for s in series for _, low, high in s.band for y in (low, high)]
    if not xs:
        return ""
    plot = _Plot(_Axis.over(xs, log_x, pad=0.0), _Axis.over(ys, log_y), x_label, y_label)
    for s in series:
        if s.band:
            outline = [(x, low) for x, low, _ in s.band] + [(x, high) for x, _, high in reversed(s.band)]
            plot.add(f'<polygon class="band c{s.colour}" points="{plot.path(outline)}"/>')
    for s in series:
        title = f"<title>{escape(s.name)}</title>"
        plot.add(f'<polyline class="line c{s.colour}" points="{plot.path(s.points)}">{title}</polyline>')
        for x, y in s.points if marks else ():
            plot.dot(x, y, s.colour, f"{s.name}: {number(y)} at {number(x)}", radius=3)
    return plot.svg()


def front_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, lower: bool, baseline: tuple[str, float] | None = None
) -> str:
    """One labelled dot per series, cost across (logarithmic) and quality upwards or downwards, and the Pareto front."""
    points = [(s, *s.points[0]) for s in series if s.points]
    if not points:
        return ""
    ys = [y for _, _, y in points] + [y + d for s, _, y in points for e in s.spread[:1] for d in (e, -e)]
    ys += [baseline[1]] if baseline and _near(baseline[1], ys) else []
    plot = _Plot(_Axis.over([x for _, x, _ in points], True, pad=0.12), _Axis.over(ys, False), x_label, y_label)
    if baseline and baseline[1] in ys:
        plot.rule(baseline[1], baseline[0])
    front = pareto([(x, y) for _, x, y in points], lower)
    if len(front) > 1:
        steps = [front[0]]
        for x, y in front[1:]:
            steps += [(x, steps[-1][1]), (x, y)]
        plot.add(f'<polyline class="front" points="{plot.path(steps)}"><title>Pareto front</title></polyline>')
    taken: list[tuple[float, float]] = []
    for s, x, y in sorted(points, key=lambda p: p[2]):
        if s.spread:
            plot.add(
                f'<line class="line c{s.colour}" x1="{plot.x(x):.1f}" x2="{plot.x(x):.1f}" '
                f'y1="{plot.y(y - s.spread[0]):.1f}" y2="{plot.y(y + s.spread[0]):.1f}"/>'
            )
        plot.dot(x, y, s.colour, f"{s.name}: {number(y)} at {number(x)}", radius=5 if (x, y) in front else 4)
        plot.label(x, y, s.name, taken)
    return plot.svg()


def pareto(points: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both cost and quality, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], p[1] if lower else -p[1])):
        if not front or (y < front[-1][1] if lower else y > front[-1][1]):
            front.append((x, y))
    return front


def _near(value: float, values: Sequence[float]) -> bool:
    """Whether showing `value` too would leave the others room to differ."""
    low, high = min(values), max(values)
    return low - 2 * (high - low) <= value <= high + 2 * (high - low)


@dataclass
class _Axis:
    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool, pad: float = 0.06) -> _Axis:
        log = log and min(values) > 0
        low, high = (math.log10(v) if log else v for v in (min(values), max(values)))
        room = (high - low or abs(high) * 0.1 or 1.0) * (pad if high > low else 0.5)
        return cls(low - room, high + room, log)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        if self.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                ticks = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
                if len(ticks) >= 3:
                    return ticks
        rough = (high - low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough)
        return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


class _Plot:
    def __init__(self, x: _Axis, y: _Axis, x_label: str, y_label: str, width: int = 380, height: int = 270):
        self.axes, self.width, self.height = (x, y), width, height
        self.parts: list[str] = []
        bottom, left, right = height - _BOTTOM, _LEFT, width - _RIGHT
        for tick in x.ticks():
            at = self.x(tick)
            self.add(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
            self.text(at, bottom + 16, short(tick), "middle")
        for tick in y.ticks():
            at = self.y(tick)
            self.add(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            self.text(left - 6, at + 4, short(tick), "end")
        self.text((left + right) / 2, height - 6, x_label, "middle", "axis")
        place = f'text-anchor="middle" transform="translate(12 {(_TOP + bottom) / 2}) rotate(-90)"'
        self.add(f'<text class="axis" {place}>{escape(y_label)}</text>')

    def x(self, value: float) -> float:
        return _LEFT + self.axes[0].place(value) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.height - _BOTTOM - self.axes[1].place(value) * (self.height - _TOP - _BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def add(self, part: str) -> None:
        self.parts.append(part)

    def text(self, x: float, y: float, text: str, anchor: str, style: str = "tick") -> None:
        self.add(f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def dot(self, x: float, y: float, colour: int, title: str, radius: float) -> None:
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}"'
        self.add(f'<circle class="dot c{colour}" {place}><title>{escape(title)}</title></circle>')

    def label(self, x: float, y: float, text: str, taken: list[tuple[float, float]]) -> None:
        """Writes beside a dot, a little higher or lower where another label stands."""
        anchor, at = ("end", self.x(x) - 8) if self.axes[0].place(x) > 0.6 else ("start", self.x(x) + 8)
        places = [self.y(y) + 4 + step for step in (0, -11, 11, -22, 22, -33, 33, -44, 44)]
        free = [
            height
            for height in places
            if _TOP + 8 < height < self.height - _BOTTOM
            and not any(abs(at - other_x) < 80 and abs(height - other_y) < 11 for other_x, other_y in taken)
        ]
        height = (free or places)[0]
        taken.append((at, height))
        self.text(at, height, text, anchor, "label")

    def rule(self, y: float, text: str) -> None:
        at = self.y(y)
        self.add(f'<line class="rule" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        self.text(self.width - _RIGHT - 4, at - 5, text, "end", "tick")

    def svg(self) -> str:
        return f'<svg viewBox="0 0 {self.width} {self.height}" role="img">{"".join(self.parts)}</svg>'


def short(value: float) -> str:
    """A tick's number: 0.05, 2, 300, 4k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{round(value, 10):g}"
