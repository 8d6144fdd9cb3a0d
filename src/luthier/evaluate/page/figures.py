"""Small drawings for the report: numbers in, SVG out. Pure functions; nothing in here reads a file.

Each drawing stretches to its box (`preserveAspectRatio="none"`) with strokes that do not stretch, and its labels are
HTML beside it, so that text keeps its size on a narrow screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10

from markupsafe import Markup, escape

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart. `style` is its CSS class: `raw` (thin), `smooth` (strong), `dots` (marked points)."""

    name: str
    points: Sequence[Point]
    style: str


@dataclass(frozen=True, slots=True)
class Axis:
    """A stretch of numbers, and where they lie in percent of it."""

    low: float
    high: float

    def at(self, value: float) -> float:
        width = (self.high - self.low) or 1.0
        return round(100.0 * (min(max(value, self.low), self.high) - self.low) / width, 2)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers inside the axis, about as many as asked for."""
        width = self.high - self.low
        if width <= 0:
            return [self.low]
        power = 10.0 ** floor(log10(width / about))
        step = next(m * power for m in (1, 2, 5, 10) if width / (m * power) <= about)
        first = ceil(self.low / step - 1e-9)
        return [round(step * k, 10) for k in range(first, floor(self.high / step + 1e-9) + 1)]


def interval(
    low: float, middle: float | None, high: float, axis: Axis, label: str, *, zero: float | None = 0.0
) -> Markup:
    """A 95 % interval as a bar with a dot at the estimate and a tick at `zero`; `label` is read out instead. Empty
    where the estimate is not finite."""
    if middle is None:
        return Markup("")
    left, dot, right = (axis.at(v) for v in (low, middle, high))
    body = Markup(
        '<line class="bar" x1="{0}" x2="{1}" y1="50" y2="50"/><line class="dot" x1="{2}" x2="{2}" y1="50" y2="50"/>'
    ).format(left, right, dot)
    if zero is not None:
        body = Markup('<line class="zero" x1="{0}" x2="{0}" y1="5" y2="95"/>').format(axis.at(zero)) + body
    return _svg(body, "interval", label)


def chart(series: Sequence[Series], *, label: str, x_title: str, y: Axis | None = None) -> Markup:
    """Lines over a common x. Empty where there is no point to draw."""
    points = [point for line in series for point in line.points]
    if not points:
        return Markup("")
    across = Axis(min(x for x, _ in points), max(x for x, _ in points))
    up = y or _padded(min(v for _, v in points), max(v for _, v in points))
    grid = Markup("").join(
        Markup('<line class="grid" x1="0" x2="100" y1="{0}" y2="{0}"/>').format(100 - up.at(t)) for t in up.ticks()
    )
    lines = Markup("").join(_line(line, across, up) for line in series)
    keys = Markup("").join(Markup('<span class="key {}">{}</span>').format(s.style, s.name) for s in series)
    legend = Markup("<figcaption>{}</figcaption>").format(keys) if len(series) > 1 else Markup("")
    return Markup('<figure class="chart">{}<div class="plot">{}{}{}</div><p class="x-title">{}</p></figure>').format(
        legend, _svg(grid + lines, "lines", label), _y_labels(up), _x_labels(across), x_title
    )


def histogram(
    edges: Sequence[float], counts: Sequence[int], *, label: str, x_title: str, mark: float | None = None
) -> Markup:
    """Bars between `edges` [n+1] of height `counts` [n]; `mark` draws a limit."""
    if not counts or not any(counts):
        return Markup("")
    across, up = Axis(edges[0], max(edges[-1], mark or 0.0)), Axis(0.0, float(max(counts)))
    bars = Markup("").join(
        Markup('<rect x="{}" y="{}" width="{}" height="{}"/>').format(
            across.at(a), 100 - up.at(c), max(0.2, round(across.at(b) - across.at(a) - 0.4, 2)), up.at(c)
        )
        for a, b, c in zip(edges, edges[1:], counts, strict=False)
    )
    limit = Markup("")
    if mark is not None:
        limit = Markup('<line class="limit" x1="{0}" x2="{0}" y1="0" y2="100"/>').format(across.at(mark))
    return Markup('<figure class="chart"><div class="plot">{}{}{}</div><p class="x-title">{}</p></figure>').format(
        _svg(bars + limit, "bars", label), _y_labels(up), _x_labels(across), x_title
    )


def smooth(points: Sequence[Point], share: float = 0.1) -> list[Point]:
    """Running mean over a window of `share` of the points, centred, narrower at both ends."""
    half = max(1, round(len(points) * share / 2))
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(point[0], sum(y for _, y in w) / len(w)) for point, w in zip(points, windows, strict=True)]


def labels(axis: Axis) -> list[tuple[float, str]]:
    """Ticks and their texts, with as many decimals as tell them apart: 1.5e-4, 0.25, 10.85, 1,200."""
    ticks = axis.ticks()
    if max(map(abs, ticks)) < 0.001:
        return [(tick, _small(tick)) for tick in ticks]
    step = min((b - a for a, b in pairwise(ticks)), default=abs(ticks[0]) or 1.0)
    decimals = max(0, -floor(log10(step) + 1e-9))
    return [(tick, f"{tick:,.{decimals}f}" if tick else "0") for tick in ticks]


def _small(value: float) -> str:
    """1.5e-4"""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _line(series: Series, across: Axis, up: Axis) -> Markup:
    path = " ".join(f"{across.at(x)},{round(100 - up.at(y), 2)}" for x, y in series.points)
    line = Markup('<polyline class="{}" points="{}"/>').format(series.style, path)
    if series.style != "dots":
        return line
    dots = (
        Markup('<line class="dot" x1="{0}" x2="{0}" y1="{1}" y2="{1}"/>').format(*p.split(",")) for p in path.split()
    )
    return line + Markup("").join(dots)


def _padded(low: float, high: float) -> Axis:
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)


def _svg(body: Markup, style: str, label: str) -> Markup:
    return Markup(
        '<svg class="{}" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(style, escape(label), body)


def _y_labels(axis: Axis) -> Markup:
    spans = (
        Markup('<span class="y" style="bottom:{}%">{}</span>').format(axis.at(t), said) for t, said in labels(axis)
    )
    return Markup("").join(spans)


def _x_labels(axis: Axis) -> Markup:
    spans = (Markup('<span class="x" style="left:{}%">{}</span>').format(axis.at(t), said) for t, said in labels(axis))
    return Markup("").join(spans)
