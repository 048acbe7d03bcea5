"""Charts as inline SVG inside ``<figure>``: lines, histograms, bars; colours come from the page's style sheet.

A chart is drawn 360 units wide, so that its words keep their size on a phone and in a column of a wide page. Its
numbers can be read by pointing at it, and its ``aria-label`` says in words what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 360, 212
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40
_MOST_HOVERS = 120
_MOST_POINTS = 600


@dataclass(frozen=True)
class Line:
    """One series; ``color`` counts the style sheet's series from 1; where the pen is lifted, y is NaN."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """The area between two curves."""

    name: str
    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    color: int


@dataclass(frozen=True)
class Span:
    """A shaded stretch of the x axis; ``kind`` is a class of the style sheet."""

    name: str
    start: float
    end: float
    kind: Literal["hard", "masked"]


@dataclass(frozen=True)
class Bar:
    """``shown`` stands beside the bar; ``color`` counts the series from 1."""

    name: str
    value: float
    shown: str
    color: int = 1


@dataclass(frozen=True)
class Axes:
    """What a chart shows: ``summary`` is read aloud, ``note`` stands under it; ``log_x`` gives octaves equal room."""

    title: str
    x: str
    y: str
    summary: str
    note: str = ""
    percent: bool = False
    x_from_zero: bool = False
    log_x: bool = False


def line_chart(axes: Axes, lines: Sequence[Line], bands: Sequence[Band] = (), spans: Sequence[Span] = ()) -> str:
    """Draw series over one x axis; empty where no series has a point."""
    xs = [x for line in lines for x in line.x] + [end for span in spans for end in (span.start, span.end)]
    ys = [y for line in lines for y in line.y] + [y for band in bands for y in (*band.low, *band.high)]
    ys = [y for y in ys if math.isfinite(y)]
    if axes.x_from_zero and xs:
        xs.append(0.0)
    if not xs or not ys:
        return ""
    if axes.percent:
        ys += [0.0, 0.01]
    x_ticks = _octaves(min(xs), max(xs), 6) if axes.log_x else _ticks(min(xs), max(xs), 5, whole=_are_whole(xs))
    place = _Place(x_ticks, _ticks(min(ys), max(ys), 5), (min(xs), max(xs)), log_x=axes.log_x)
    parts = [
        f'<rect class="span {span.kind}" x="{place.x(span.start):.1f}" y="{TOP}" '
        f'width="{max(1.0, place.x(span.end) - place.x(span.start)):.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
        for span in spans
    ]
    parts.append(place.grid(axes))
    for band in bands:
        there = [(x, lo, hi) for x, lo, hi in zip(band.x, band.low, band.high, strict=True) if math.isfinite(lo + hi)]
        edge = [(x, lo) for x, lo, _ in there] + [(x, hi) for x, _, hi in reversed(there)]
        points = " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in edge)
        parts.append(f'<polygon class="band f{band.color}" points="{points}"/>')
    for line in lines:
        parts.append(_path(line, place))
    parts.append(_hovers(lines, place, axes))
    legend = [_key(f"line f{line.color}{' dashed' if line.dashed else ''}", line.name) for line in lines]
    legend += [_key(f"band f{band.color}", band.name) for band in bands]
    legend += [_key(f"span {span.kind}", span.name) for span in spans]
    return _figure(axes, "".join(parts), legend)


def histogram(axes: Axes, bins: Sequence[Bar]) -> str:
    """Draw upright bars side by side, one a bin, in the order given."""
    high = max((bar.value for bar in bins), default=0.0)
    if high <= 0:
        return ""
    place = _Place(
        [0.0, float(len(bins))],
        _ticks(0.0, high, 5, whole=_are_whole(bar.value for bar in bins)),
        (0.0, float(len(bins))),
    )
    step = place.x(1) - place.x(0)
    every = max(1, math.ceil(max(len(bar.name) for bar in bins) * 6.2 / step))
    parts = [place.grid(axes, x_ticks=False)]
    for index, bar in enumerate(bins):
        x, top, bottom = place.x(index), place.y(bar.value), place.y(0)
        width = max(1.0, step - 2)
        parts.append(f"<g><title>{escape(f'{bar.name}: {bar.shown}')}</title>")
        parts.append(f'<rect class="hover" x="{x:.1f}" y="{TOP}" width="{step:.1f}" height="{bottom - TOP:.1f}"/>')
        if bar.value > 0:
            shape = _rounded(x + (step - width) / 2, min(top, bottom - 1), width, bottom)
            parts.append(f'<path class="f{bar.color}" d="{shape}"/>')
        parts.append("</g>")
        if index % every == 0:
            name = escape(bar.name)
            parts.append(f'<text class="tick" x="{x + step / 2:.1f}" y="{bottom + 14:.1f}">{name}</text>')
    return _figure(axes, "".join(parts), [])


def bars(axes: Axes, listed: Sequence[Bar]) -> str:
    """Draw one lying bar a name, the name above and the value beside it."""
    high = max((bar.value for bar in listed), default=0.0)
    if high <= 0:
        return ""
    step = 46
    parts = []
    for index, bar in enumerate(listed):
        y = TOP + index * step
        width = max(2.0, (WIDTH - 74) * bar.value / high)
        round_ = min(4.0, width)
        side = width - round_
        parts.append(f'<text class="name" x="0" y="{y + 8}">{escape(bar.name)}</text>')
        parts.append(
            f'<path class="f{bar.color}" d="M0 {y + 15}h{side:.1f}q{round_:.1f} 0 {round_:.1f} 4v8'
            f'q0 4 {-round_:.1f} 4h{-side:.1f}z"/>'
        )
        parts.append(f'<text class="value" x="{width + 7:.1f}" y="{y + 28}">{escape(bar.shown)}</text>')
    return _figure(axes, "".join(parts), [], height=TOP + len(listed) * step)


class _Place:
    """Where a value lies on the canvas."""

    def __init__(
        self, x_ticks: list[float], y_ticks: list[float], x_range: tuple[float, float], *, log_x: bool = False
    ) -> None:
        self.x_ticks, self.y_ticks = x_ticks, y_ticks
        self._scale: Callable[[float], float] = math.log2 if log_x else float
        self.left, self.right = map(self._scale, x_range)
        self.low, self.high = y_ticks[0], y_ticks[-1]

    def x(self, value: float) -> float:
        share = (self._scale(value) - self.left) / ((self.right - self.left) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self, axes: Axes, *, x_ticks: bool = True) -> str:
        parts = []
        for value in self.y_ticks:
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            shown = f"{value * 100:g}%" if axes.percent else short(value)
            parts.append(f'<text class="tick right" x="{LEFT - 6}" y="{y + 3.5:.1f}">{shown}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
        if x_ticks:
            for value in self.x_ticks:
                if self.left <= self._scale(value) <= self.right:
                    text = (
                        f'<text class="tick" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 14}">{short(value)}</text>'
                    )
                    parts.append(text)
        parts.append(
            f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5}">{escape(axes.x)}</text>'
        )
        return "".join(parts)


def _path(line: Line, place: _Place) -> str:
    step = max(1, len(line.x) // _MOST_POINTS)
    points = list(zip(line.x, line.y, strict=True))
    points = [*points[:-1:step], *points[-1:]]
    commands, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{pen}{place.x(x):.1f} {place.y(y):.1f}")
            pen = "L"
        else:
            pen = "M"
    drawn = f'<path class="line f{line.color}{" dashed" if line.dashed else ""}" d="{"".join(commands)}"/>'
    there = [(x, y) for x, y in points if math.isfinite(y)]
    if len(there) <= 24:
        drawn += "".join(
            f'<circle class="f{line.color}" cx="{place.x(x):.1f}" cy="{place.y(y):.1f}" r="3"/>' for x, y in there
        )
    return drawn


def _hovers(lines: Sequence[Line], place: _Place, axes: Axes) -> str:
    """Invisible columns whose titles tell the values there."""
    found: dict[float, list[str]] = {}
    for line in lines:
        for x, y in zip(line.x, line.y, strict=True):
            if math.isfinite(y):
                shown = f"{y:.1%}" if axes.percent else f"{y:.4g}"
                found.setdefault(float(x), []).append(f"{line.name}: {shown}")
    xs = sorted(found)
    xs = xs[:: max(1, math.ceil(len(xs) / _MOST_HOVERS))]
    parts = []
    for index, x in enumerate(xs):
        start = LEFT if index == 0 else (place.x(xs[index - 1]) + place.x(x)) / 2
        end = WIDTH - RIGHT if index == len(xs) - 1 else (place.x(xs[index + 1]) + place.x(x)) / 2
        words = escape("\n".join([f"{axes.x} {x:,g}", *found[x]]))
        parts.append(
            f'<rect class="hover" x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{words}</title></rect>'
        )
    return "".join(parts)


def _rounded(x: float, top: float, width: float, bottom: float) -> str:
    r = min(3.0, width / 2, bottom - top)
    return (
        f"M{x:.1f} {bottom:.1f}V{top + r:.1f}q0 {-r:.1f} {r:.1f} {-r:.1f}h{width - 2 * r:.1f}"
        f"q{r:.1f} 0 {r:.1f} {r:.1f}V{bottom:.1f}z"
    )


def _key(classes: str, name: str) -> str:
    return f'<li><i class="key {classes}"></i>{escape(name)}</li>'


def _figure(axes: Axes, drawn: str, legend: list[str], height: int = HEIGHT) -> str:
    keys = f'<ul class="legend">{"".join(legend)}</ul>' if legend else ""
    note = f'<p class="note">{escape(axes.note)}</p>' if axes.note else ""
    unit = f'<p class="unit">{escape(axes.y)}</p>' if axes.y else ""
    return (
        f'<figure class="chart"><figcaption>{escape(axes.title)}</figcaption>{keys}{unit}'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(f"{axes.title}. {axes.summary}")}">'
        f"{drawn}</svg>{note}</figure>"
    )


def _are_whole(values: Iterable[float]) -> bool:
    return all(float(value).is_integer() for value in values)


def _ticks(low: float, high: float, n: int, *, whole: bool = False) -> list[float]:
    """Round numbers around a range; ``whole`` ones for ranks and counts."""
    if high <= low:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= rough * (1 - 1e-9))
    if whole:
        step = float(math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _octaves(low: float, high: float, n: int) -> list[float]:
    """At most ``n`` powers of two within a range."""
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    return [2.0**power for power in powers[:: max(1, math.ceil(len(powers) / n))]]


def short(value: float) -> str:
    """A number in few characters: 12k, 16,384, 1.5M."""
    if 1e4 <= abs(value) < 1e5 and value % 100:
        return f"{value:,.0f}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:g}"
