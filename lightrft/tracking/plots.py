"""Curves as SVG text: pure functions from numbers to markup, without scripts and without outside resources.

Colours are the CSS variables `--curve-0`, `--curve-1`, `--ink`, `--faint` of the page that holds the chart.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise

import attrs

__all__ = ["Series", "format_number", "line_chart", "moving_average", "nice_ticks"]

_WIDTH, _HEIGHT = 460, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 12, 12, 40
_SMOOTH_FROM = 40  # points; fewer are readable as they are
_SMALLEST = 1e-100  # spans below it are none, so that no step underflows
_MAX_POINTS = 400  # about one for each horizontal pixel of the plotting area


@attrs.frozen(kw_only=True)
class Series:
    """One curve.

    Attributes:
        name: what the legend calls it.
        points: (x, y) in ascending x; a y that is not finite leaves a gap.
    """

    name: str
    points: tuple[tuple[float, float], ...]


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, low: float | None = None, high: float | None = None
) -> str:
    """Return a chart of curves as an `<svg>` element.

    A curve of many points is drawn thin, with its moving average over it.

    Args:
        series: the curves; without any point the chart says so.
        x_label: what the horizontal axis counts, with its unit.
        y_label: what the vertical axis measures, with its unit.
        low: end of the vertical axis that is always shown.
        high: other end of the vertical axis that is always shown.
    """
    finite = [point for curve in series for point in curve.points if math.isfinite(point[1])]
    label = html.escape(f"{y_label} over {x_label}", quote=True)
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
    if not finite:
        text = f'<text class="empty" x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">not measured</text>'
        return f"{head}{text}</svg>"
    first, last = min(x for x, _ in finite), max(x for x, _ in finite)
    first, last = (first, last) if first < last else (first - 1, last + 1)
    x_ticks = [tick for tick in nice_ticks(first, last, integers=True) if first <= tick <= last]
    bounds = [bound for bound in (low, high) if bound is not None]
    y_ticks = nice_ticks(min([*bounds, *(y for _, y in finite)]), max([*bounds, *(y for _, y in finite)]))
    to_x = _scale(first, last, _LEFT, _WIDTH - _RIGHT)
    to_y = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    body = [
        *_grid(x_ticks, y_ticks, to_x, to_y),
        *_labels(x_label, y_label),
        *(part for index, curve in enumerate(series) for part in _curve(curve, index, to_x, to_y)),
        *_legend([curve.name for curve in series if curve.points]),
    ]
    return f"{head}{''.join(body)}</svg>"


def nice_ticks(low: float, high: float, *, count: int = 5, integers: bool = False) -> list[float]:
    """Return round numbers, evenly spaced, from at most `low` to at least `high`.

    Args:
        low: smallest value.
        high: largest value.
        count: about how many.
        integers: whether only whole numbers make sense.

    Example:
        >>> nice_ticks(0.03, 0.97)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high - low <= 1e-12 * max(abs(low), abs(high)) or high - low < _SMALLEST:
        margin = abs(low) * 0.1 if abs(low) >= _SMALLEST else 1.0
        low, high = (low, low + 1.0) if integers else (low - margin, high + margin)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.999)
    if integers:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # counted in whole steps, so that no error adds up
    return [float(f"{index * step:.15g}") + 0.0 for index in range(first, max(last, first + 1) + 1)]


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value with its neighbours, `window` of them together, fewer at both ends.

    Args:
        values: finite numbers.
        window: how many; an even one counts as the next odd one.

    Example:
        >>> moving_average([0.0, 3.0, 0.0], 3)
        [1.5, 1.0, 1.5]
    """
    reach = window // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, index - reach), min(len(values), index + reach + 1)) for index in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in bounds]


def format_number(value: float) -> str:
    """Return a number as a heading shows it, with three digits.

    Example:
        >>> [format_number(value) for value in (0.25, 3.14159, 12500.0, 0.00002)]
        ['0.25', '3.14', '12,500', '2e-05']
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.3g}"


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the ticks with as many decimals as tell them apart, the same for all."""
    step = min((after - before for before, after in pairwise(ticks)), default=1.0)
    for decimals in range(7):
        if all(abs(round(tick, decimals) - tick) < step * 1e-6 for tick in ticks):
            return [f"{tick:,.{decimals}f}" for tick in ticks]
    return [f"{tick:.4g}" for tick in ticks]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low

    def to_pixel(value: float) -> float:
        return start + (value - low) / span * (end - start)

    return to_pixel


def _grid(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [
        f'<line class="grid" x1="{_LEFT}" y1="{to_y(tick):.1f}" x2="{right}" y2="{to_y(tick):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{to_y(tick) + 3.5:.1f}" text-anchor="end">{label}</text>'
        for tick, label in zip(y_ticks, _tick_labels(y_ticks), strict=True)
    ]
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts += [
        f'<text x="{to_x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
        for tick, label in zip(x_ticks, _tick_labels(x_ticks), strict=True)
    ]
    return parts


def _labels(x_label: str, y_label: str) -> list[str]:
    y_text = html.escape(y_label)
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    return [
        f'<text class="label" x="{middle_x}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>',
        f'<text class="label" transform="translate(12 {middle_y}) rotate(-90)" text-anchor="middle">{y_text}</text>',
    ]


def _curve(series: Series, index: int, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> list[str]:
    style = f'style="--curve:var(--curve-{index % 2})"'
    drawn = [(to_x(x), to_y(y)) for x, y in series.points]
    num_points = sum(math.isfinite(y) for _, y in drawn)
    if num_points < _SMOOTH_FROM:
        return [part for run in _runs(drawn) for part in _few_points(run, style)]
    window = max(5, num_points // 20)
    raw = [f'<path class="raw" {style} d="{_path(_thinned(_wide(run)))}"/>' for run in _runs(drawn)]
    return raw + [
        f'<path class="curve" {style} d="{_path(_thinned(_averaged(run, window)))}"/>'
        for run in _runs(_bridged(drawn, longest=window))
        if len(run) > 1
    ]


def _few_points(run: Sequence[tuple[float, float]], style: str) -> list[str]:
    if len(run) == 1:
        return [f'<circle class="dot" {style} cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="3"/>']
    dots = [f'<circle class="dot" {style} cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in run]
    return [f'<path class="curve" {style} d="{_path(run)}"/>', *dots]


def _wide(run: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a lone point, which as a path would not be seen, as a line one pixel wide, and all else as it is."""
    (x, y), is_lone = run[0], len(run) == 1
    return [(x - 0.5, y), (x + 0.5, y)] if is_lone else run


def _averaged(run: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    return list(zip([x for x, _ in run], moving_average([y for _, y in run], window), strict=True))


def _bridged(points: Sequence[tuple[float, float]], *, longest: int) -> list[tuple[float, float]]:
    """Return the points without the gaps of up to `longest` points: an average goes on over what it averages over."""
    kept: list[tuple[float, float]] = []
    for is_there, group in groupby(points, key=_is_there):
        stretch = list(group)
        kept += stretch if is_there or len(stretch) > longest else []
    return kept


def _is_there(point: tuple[float, float]) -> bool:
    return math.isfinite(point[1])


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Return the stretches of points between gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if _is_there(point):
            runs[-1].append(point)
        else:
            runs.append([])
    return [run for run in runs if run]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lowest and the highest point of each of a few hundred stretches, so that no peak is lost."""
    size = math.ceil(2 * len(points) / _MAX_POINTS)
    if size <= 2:
        return list(points)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=_height), max(stretch, key=_height)}
        kept += sorted(ends)
    return kept


def _height(point: tuple[float, float]) -> float:
    return point[1]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _legend(names: Sequence[str]) -> list[str]:
    if len(names) < 2:
        return []
    parts: list[str] = []
    right = _WIDTH - _RIGHT
    for index, name in enumerate(names):
        y = _TOP + 12 + 15 * index
        parts.append(
            f'<circle class="dot" style="--curve:var(--curve-{index % 2})" cx="{right - 8}" cy="{y - 3.5}" r="3.5"/>'
            f'<text x="{right - 16}" y="{y}" text-anchor="end">{html.escape(name)}</text>'
        )
    return parts
