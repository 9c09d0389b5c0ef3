"""Line charts as inline SVG: no network, colours from the page, a tooltip at every point."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 18, 16, 52
_NAMES = 30  # above a chart that stands alone
# Series differ by mark as well as by colour.
_MARKS = ("circle", "square", "diamond", "triangle")


@dataclasses.dataclass(frozen=True)
class Point:
    """One value: place, height, the label of the place, the tooltip, and an error bar if any."""

    x: float
    y: float
    tip: str
    label: str | None = None
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    marks: bool = True


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    references: Sequence[tuple[float, str]] = (),
    log_x: bool = False,
) -> str:
    """Draw lines over a common axis; references are dashed horizontal lines with names."""
    points = [p for s in series for p in s.points]
    xs = [_x(p.x, log_x) for p in points]
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low, y_high = y_range or _nice_range([p.y for p in points])

    def px(x: float) -> float:
        share = (_x(x, log_x) - x_low) / (x_high - x_low)
        inset = 24 if x_ticks else 0
        return _LEFT + inset + share * (_WIDTH - _LEFT - _RIGHT - 2 * inset)

    def py(y: float) -> float:
        share = (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}">',
        *_y_axis(y_low, y_high, py, percent),
        *_x_axis(x_ticks or _ticks(x_low, x_high), px),
        _text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _HEIGHT - 6, x_label, "axis", "middle"),
        f'<text class="axis y" transform="translate(14 {(_HEIGHT - _BOTTOM + _TOP) / 2}) '
        f'rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    for height, name in references:
        y = py(height)
        parts.append(f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_at(y)}/>')
        parts.append(_text(_WIDTH - _RIGHT - 4, y - 6, name, "axis", "end"))
    for i, one in enumerate(series):
        parts += _draw_series(one, i, px, py)
    return "\n".join([*parts, "</svg>"])


def legend(series: Sequence[Series]) -> str:
    """Write the names of several series beside their marks; nothing for a single one."""
    if len(series) < 2:
        return ""
    items = "".join(
        f'<li><svg width="18" height="14" aria-hidden="true">'
        f"{_mark(9, 7, i)}</svg>{escape(s.name)}</li>"
        for i, s in enumerate(series)
    )
    return f'<ul class="legend">{items}</ul>'


def standalone(chart: str, series: Sequence[Series], style: str) -> str:
    """Make a chart an SVG file of its own: its style inside, the names of the series above it."""
    head, rest = chart.split(">", 1)
    old = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    size = f'viewBox="0 {-_NAMES} {_WIDTH} {_HEIGHT + _NAMES}"'
    head = head.replace(old, f'xmlns="http://www.w3.org/2000/svg" {size}')
    ground = f'<rect y="{-_NAMES}" width="100%" height="100%" style="fill:var(--card)"/>'
    names, x = [], float(_LEFT)
    for i, one in enumerate(series):
        names += [
            _mark(x + 5, 14 - _NAMES, i),
            _text(x + 16, 18 - _NAMES, one.name, "", "start"),
        ]
        x += 34 + 7.5 * len(one.name)
    return "\n".join([f"{head}>", f"<style>{style}</style>", ground, *names, rest.strip(), ""])


def _draw_series(series: Series, index: int, px, py) -> list[str]:
    colour = f"s{index % 4}"
    path = " ".join(
        f"{'M' if i == 0 else 'L'}{px(p.x):.1f} {py(p.y):.1f}" for i, p in enumerate(series.points)
    )
    parts = [f'<path class="line {colour}" d="{path}"/>']
    for p in series.points:
        x, y = px(p.x), py(p.y)
        if p.low is not None and p.high is not None:
            parts.append(
                f'<line class="bar {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{py(p.low):.1f}" '
                f'y2="{py(p.high):.1f}"/>'
            )
        tip = escape(p.tip, quote=True)
        if series.marks:
            inner = _mark(x, y, index)
            if p.label:
                below = y < _TOP + 20
                inner += _text(x + 9, y + (18 if below else -9), p.label, "value", "start")
            focus = f'tabindex="0" aria-label="{tip}"'
        else:
            inner, focus = f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>', ""
        hit = f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="12"/>'
        parts.append(f'<g class="point" data-tip="{tip}" {focus}>{inner}{hit}</g>')
    return parts


def _mark(x: float, y: float, index: int) -> str:
    """Draw the mark of a series."""
    # Of each four series another four marks: sixteen differ.
    kind, css = _MARKS[(index + index // 4) % 4], f'class="mark s{index % 4}"'
    if kind == "circle":
        return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    if kind == "square":
        return f'<rect {css} x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>'
    shape = [(0, -6), (6, 0), (0, 6), (-6, 0)] if kind == "diamond" else [(0, -6), (6, 5), (-6, 5)]
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shape)
    return f'<polygon {css} points="{corners}"/>'


def _y_axis(low: float, high: float, py, percent: bool) -> list[str]:
    parts = []
    for value, label in _ticks(low, high):
        text = f"{value:.0%}" if percent else label
        y = py(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_at(y)}/>')
        parts.append(_text(_LEFT - 8, y + 4, text, "tick", "end"))
    return parts


def _x_axis(ticks: Sequence[tuple[float, str]], px) -> list[str]:
    return [_text(px(v), _HEIGHT - _BOTTOM + 20, label, "tick", "middle") for v, label in ticks]


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return four to seven round values between two bounds, with their labels."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    unit = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first = math.ceil(low / unit - 1e-9)
    values = [i * unit for i in range(first, math.floor(high / unit + 1e-9) + 1)]
    return [(v, f"{v:,.0f}" if unit >= 1 else f"{v:.6g}") for v in (round(v, 10) for v in values)]


def _nice_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(min(values), 0.0), max(values)
    return (low, high * 1.05) if high > low else (low, low + 1)


def _x(x: float, log: bool) -> float:
    return math.log2(max(x, 1e-9)) if log else x


def _at(y: float) -> str:
    return f'y1="{y:.1f}" y2="{y:.1f}"'


def _text(x: float, y: float, text: str, css: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{css}" {place}>{escape(text)}</text>'
