"""Line charts as inline SVG, coloured by the page's style sheet (`.line-0`, `.line-1`, …)."""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 42
MAX_POINTS = 160
"""Longer series are averaged into so many points."""


Whiskers = Sequence[tuple[float, float, float]]
"""x, low, high."""


def line_chart(series: Mapping[str, Points], x_label: str, intervals: Mapping[str, Whiskers] | None = None) -> Markup:
    """Draws named series of (x, y) in one pair of axes, with a legend; `intervals` are drawn as bars behind their series.

    Raises:
        ValueError: there is no finite point to draw.
    """
    thinned = {name: points for name, some in series.items() if (points := thin(some))}
    if not thinned:
        raise ValueError("a chart needs at least one finite point")
    everything = [point for points in thinned.values() for point in points]
    x_ticks = ticks(min(x for x, _ in everything), max(x for x, _ in everything))
    bars = {name: bars for name, bars in (intervals or {}).items() if name in thinned}
    heights = [y for _, y in everything] + [end for some in bars.values() for _, *ends in some for end in ends]
    y_ticks = ticks(min(heights), max(heights))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(thinned))}">']
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 24}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_label)}</text>')
    for number, (name, points) in enumerate(thinned.items()):
        for x, low, high in bars.get(name, ()):
            (across, bottom), (_, top) = place(x, low), place(x, high)
            parts.append(
                f'<line class="line-{number % 6} bar" x1="{across:.1f}" x2="{across:.1f}" y1="{bottom:.1f}" y2="{top:.1f}"/>'
            )
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline class="line-{number % 6}" points="{path}"/>')
        if len(points) < 12:
            dots = (place(*point) for point in points)
            parts += [f'<circle class="dot-{number % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in dots]
    parts.append("</svg>")
    return Markup("".join(parts)) + _legend(list(thinned))


def thin(points: Points) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of its neighbours; finite values only."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(finite) / MAX_POINTS) or 1
    groups = (finite[start : start + size] for start in range(0, len(finite), size))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that enclose the range."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), low + 0.5 * (abs(low) or 1)
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _legend(names: list[str]) -> Markup:
    items = (f'<span><i class="dot-{number % 6}"></i>{escape(name)}</span>' for number, name in enumerate(names))
    return Markup(f'<p class="legend">{"".join(items)}</p>')
