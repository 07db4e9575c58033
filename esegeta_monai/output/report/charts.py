"""Line charts as SVG, coloured by the style sheet of the page so that they suit the light and the dark theme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from esegeta_monai.output.report.collect import CONTROL, Curve

__all__ = ["Chart", "charts", "line_chart"]

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 34
COLOURS = 8


@dataclass
class Chart:
    """A chart with its heading and legend (CSS class, text)."""

    title: str
    target: str
    svg: Markup
    legend: list[tuple[str, str]]


AXES = {
    "deletion": ("share of voxels deleted, strongest first", "score"),
    "insertion": ("share of voxels inserted, strongest first", "score"),
    "irof": ("supervoxels replaced, strongest first", "score"),
    "regionperturbation": ("regions replaced, strongest first", "loss"),
    "road": ("share of voxels imputed", "loss"),
    "sensitivityn": ("parts in a set", "correlation"),
    "randomisation": ("randomised stages, from the output on", "similarity to the map"),
    "synthesis": ("step", ""),
}


def charts(curves: Sequence[Curve]) -> list[Chart]:
    """Draw one chart per target and kind of curve, with one line per method."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.target, curve.name), []).append(curve)
    drawn = []
    for (target, name), lines in groups.items():
        x, y = next((axes for key, axes in AXES.items() if key in name.lower()), ("", ""))
        controls = [line for line in lines if line.method.startswith(CONTROL)]
        own = [line for line in lines if not line.method.startswith(CONTROL)]
        legend = [(f"s{i % COLOURS + 1}", line.method) for i, line in enumerate(own)]
        legend += [(f"c{i % 3 + 1}", line.method) for i, line in enumerate(controls)]
        svg = line_chart([*own, *controls], [css for css, _ in legend], x, y, f"{name}, {target}")
        drawn.append(Chart(name.replace("_", " "), target, svg, legend))
    return drawn


def line_chart(lines: Sequence[Curve], styles: Sequence[str], x_label: str, y_label: str, title: str) -> Markup:
    """Draw lines over shared axes; ``styles`` has one CSS class per line.

    >>> svg = line_chart([Curve("loss", "", "m<1>", [0, 1, 2], [3.0, 2.0, 1.0])], ["s1"], "step", "loss", "loss")
    >>> "<title>loss</title>" in svg, svg.count("<polyline")
    (True, 1)
    """
    xs, ys = [v for line in lines for v in line.x], [v for line in lines for v in line.y]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    x0, x1 = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    y0, y1 = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / ((y1 - y0) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>').format(WIDTH, HEIGHT, title)]
    for tick in y_ticks:
        _, y = at(x0, tick)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
        )
        parts.append(Markup('<text x="{}" y="{:.1f}" class="end">{}</text>').format(LEFT - 6, y + 3.5, f"{tick:.4g}"))
    for tick in x_ticks:
        x, _ = at(tick, y0)
        parts.append(
            Markup('<text x="{:.1f}" y="{}" class="middle">{}</text>').format(x, HEIGHT - BOTTOM + 15, f"{tick:.4g}")
        )
    for line, style in zip(lines, styles):
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in zip(line.x, line.y))
        parts.append(
            Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(style, points, line.method)
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(Markup('<text x="{}" y="{}" class="middle label">{}</text>').format(middle, HEIGHT - 3, x_label))
    parts.append(Markup('<text x="{}" y="{}" class="label">{}</text></svg>').format(2, 9, y_label))
    return Markup("").join(parts)


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers that cover the range from ``low`` to ``high``.

    >>> _ticks(0.0, 1.0), _ticks(2.0, 2.0), _ticks(0.0, 3e-14)
    ([0.0, 0.5, 1.0], [2.0], [0.0, 1e-14, 2e-14, 3e-14])
    """
    rough = high / about - low / about
    if not rough > 1e-300 or max(abs(low), abs(high)) > 1e12 * rough:  # there are no round numbers in between
        return sorted({low, high})
    exponent = int(f"{rough:e}".split("e")[1])
    power = 10.0**exponent
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    first, last = int(low // step), -int(-high // step)
    return [round(n * step, 1 - exponent) for n in range(first, last + 1)]
