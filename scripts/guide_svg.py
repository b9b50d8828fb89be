"""Plots as SVG for the guide: dots in panels beside their labels, and points in a plane."""

import math
from dataclasses import dataclass
from html import escape

FONT = 'font-family="sans-serif" font-size="13"'
INKS = ["#1f5fa8", "#d07818", "#2f8a4a"]
ROW, LEFT_PAD, PANEL, GAP, TOP, BOTTOM = 26, 12, 330, 54, 62, 40
LETTER = 7.0
"""Width of a letter in pixels, an upper estimate of the font's."""


@dataclass(frozen=True)
class Dot:
    value: float
    error: float = 0.0


@dataclass(frozen=True)
class Panel:
    title: str
    rows: list
    """Of each label, a Dot for each series."""
    series: list
    log: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    labels: list
    panels: list


class Axis:
    """From values to pixels `start` to `end`."""

    def __init__(self, dots, start, end, log):
        lows, highs = [dot.value - dot.error for dot in dots], [dot.value + dot.error for dot in dots]
        self.log, self.start, self.end = log, start, end
        if log:
            self.low = math.floor(math.log10(min(dot.value for dot in dots)))
            self.high = math.ceil(math.log10(max(highs)))
            self.ticks = [10.0**power for power in range(self.low, self.high + 1)]
        else:
            step = tick_step(max(highs) - min(lows))
            self.low, self.high = math.floor(min(lows) / step) * step, math.ceil(max(highs) / step) * step
            self.ticks = [self.low + step * i for i in range(round((self.high - self.low) / step) + 1)]

    def at(self, value):
        position = math.log10(max(value, 10.0**self.low)) if self.log else value
        return self.start + (self.end - self.start) * (position - self.low) / (self.high - self.low)


def tick_step(extent):
    """Of 1, 2 and 5 times a power of ten the smallest that leaves at most six steps."""
    power = 10.0 ** math.floor(math.log10(extent))
    return next(step for step in (power / 5, power / 2, power, 2 * power) if extent / step <= 6)


def shown(tick):
    return f"{tick:.4f}".rstrip("0").rstrip(".") if tick < 1000 else f"{tick:,.0f}"


def text(x, y, words, anchor="start", extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {FONT} fill="#222" {extra}>{escape(words)}</text>'


def line(x1, y1, x2, y2, ink="#ddd", width=1):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{ink}" stroke-width="{width}"/>'


def circle(x, y, ink):
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{ink}"/>'


def page(width, height, parts):
    size = f'width="{width:.0f}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width:.0f} {height:.0f}">'
    return "\n".join([head, f'<rect {size} fill="#fff"/>', *parts, "</svg>"]) + "\n"


def dots(chart):
    labels = LETTER * max(len(label) for label in chart.labels) + 2 * LEFT_PAD
    height = TOP + ROW * len(chart.labels) + BOTTOM
    parts = [text(LEFT_PAD, 22, chart.title, extra='font-weight="bold"')]
    y_of = lambda row: TOP + ROW * (row + 0.5)
    for row, label in enumerate(chart.labels):
        parts.append(text(labels - LEFT_PAD, y_of(row) + 4, label, "end"))
    for place, panel in enumerate(chart.panels):
        start = labels + place * (PANEL + GAP)
        axis = Axis([dot for row in panel.rows for dot in row], start, start + PANEL, panel.log)
        parts += grid(axis, TOP, height - BOTTOM)
        parts.append(text(start, TOP - 8, panel.title))
        for row, values in enumerate(panel.rows):
            parts += [mark for dot, ink in zip(values, INKS) for mark in horizontal(axis, y_of(row), dot, ink)]
        if len(panel.series) > 1:
            parts += legend(panel.series, start + PANEL, 22)
    width = labels + len(chart.panels) * (PANEL + GAP)
    return page(width, height, parts)


def grid(axis, top, bottom):
    for tick in axis.ticks:
        yield line(axis.at(tick), top, axis.at(tick), bottom)
        yield text(axis.at(tick), bottom + 18, shown(tick), "middle")


def horizontal(axis, y, dot, ink):
    if dot.error:
        yield line(axis.at(dot.value - dot.error), y, axis.at(dot.value + dot.error), y, ink, 2)
    yield circle(axis.at(dot.value), y, ink)


def legend(series, right, y):
    x = right
    for name, ink in reversed(list(zip(series, INKS))):
        yield text(x, y, name, "end")
        x -= LETTER * len(name) + 14
        yield circle(x, y - 4, ink)
        x -= 16


def scatter(title, x_title, y_title, points):
    """`points` are (label, x, Dot): x on a logarithmic axis, labels beside the points."""
    left, width, height = 70, 640, 380
    x_axis = Axis([Dot(x) for _, x, _ in points], left, left + width, log=True)
    y_axis = Axis([dot for _, _, dot in points], height - 50, 50, log=False)
    parts = [text(LEFT_PAD, 22, title, extra='font-weight="bold"'), text(left, 42, y_title)]
    parts += [*grid(x_axis, 50, height - 50), text(left + width / 2, height - 10, x_title, "middle")]
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts += [line(left, y, left + width, y), text(left - 8, y + 4, shown(tick), "end")]
    for label, x, dot in points:
        at, y = x_axis.at(x), y_axis.at(dot.value)
        parts.append(line(at, y_axis.at(dot.value - dot.error), at, y_axis.at(dot.value + dot.error), INKS[0], 2))
        # To the left where the right edge is near.
        fits = at + LETTER * len(label) + 12 < left + width
        parts += [circle(at, y, INKS[0]), text(at + (9 if fits else -9), y - 8, label, "start" if fits else "end")]
    return page(left + width + 30, height, parts)
