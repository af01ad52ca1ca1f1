"""Figures as inline SVG, and the page that holds them: one HTML file that fetches nothing when it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

WIDTH = 960  # of a figure as wide as the page
COLOURS = ("#2f6fb0", "#c4572e", "#4b8f4b", "#8a5fb0", "#a08020", "#5a8a94")
GREY = "#8a8f98"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
svg { width: 100%; height: auto; overflow: visible } td, th { padding: .15em .8em .15em 0; text-align: left }
table { border-collapse: collapse } tr.best { font-weight: bold } .trial:hover { stroke: #000; stroke-width: 4 }
h2 { margin-top: 2em } td { vertical-align: top } .lists td { padding-bottom: .8em }
pre { overflow-x: auto; font-size: 13px } .panels { display: flex; flex-wrap: wrap; gap: 1em 24px }
figure { margin: 0; width: 300px } figcaption { line-height: 1.3; min-height: 2.6em; font-size: 13px; color: #555 }
figcaption b { color: #222; font-size: 15px; display: block }
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole HTML page; `body` is markup, `title` is text."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
    return head + "\n".join(body) + "</html>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    """A table of texts, one row of it set in bold."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}" for cell in head)] if head else []
    for number_of_row, row in enumerate(rows):
        style = ' class="best"' if number_of_row == best else ""
        lines.append(f"<tr{style}>" + "".join(f"<td>{escape(cell)}" for cell in row))
    return "<table>" + "\n".join(lines) + "</table>"


class Axis:
    """Where values lie between 0 and 1: numbers on a line, a logarithmic one over wide ranges, others evenly.

    Args:
        wide: how many times the least positive number the largest is where the line becomes logarithmic.
    """

    def __init__(self, values: Sequence[Any], wide: float = 20):
        self._numbers = are_numbers(values)
        if self._numbers:
            self._log = min(values) > 0 and max(values) > wide * min(values)
            self.ticks = sorted({min(values), max(values)})
        else:
            self.ticks = sorted({str(value) for value in values})

    def __call__(self, value: Any) -> float:
        if not self._numbers:
            return (self.ticks.index(str(value)) + 0.5) / len(self.ticks)
        scale = np.log if self._log else float
        low, high = scale(self.ticks[0]), scale(self.ticks[-1])
        return float((scale(value) - low) / (high - low)) if high > low else 0.5


@dataclass(frozen=True)
class Frame:
    """The rectangle between a figure's axes, in the SVG's units, y downwards."""

    left: float
    right: float
    top: float
    bottom: float

    def x(self, share: float) -> float:
        """From 0 (left) … 1 (right)."""
        return self.left + share * (self.right - self.left)

    def y(self, share: float) -> float:
        """From 0 (bottom) … 1 (top)."""
        return self.bottom - share * (self.bottom - self.top)


def lines(
    title: str,
    note: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    unit: str = "epoch",
    chosen: float | None = None,
    base: float | None = None,
    dots: bool = True,
) -> str:
    """A panel: a curve, or several on one scale that are named at their ends.

    Args:
        curves: points (x, y) by name, left to right.
        unit: of x.
        chosen: the x that is marked.
        base: a y that the scale reaches to, whatever the curves do.
        dots: whether points are marked, and say their values when pointed at.
    """
    frame = Frame(72, 236 if len(curves) > 1 else 288, 14, 128)
    across = Axis([x for curve in curves.values() for x, _ in curve], np.inf)
    up = Axis([y for curve in curves.values() for _, y in curve] + ([] if base is None else [base]), np.inf)
    shapes = []
    for tick in up.ticks:
        y = frame.y(up(tick))
        shapes.append(f'<line x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e5e8"/>')
        shapes.append(text(frame.left - 6, y + 4, number(tick, 3), "end"))
    for tick in across.ticks:
        shapes.append(text(frame.x(across(tick)), frame.bottom + 18, number(tick), "middle", GREY))
    shapes.append(text((frame.left + frame.right) / 2, frame.bottom + 18, unit, "middle", GREY))
    if chosen is not None:
        x = frame.x(across(chosen))
        shapes.append(
            f'<line class="chosen" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top - 6}" y2="{frame.bottom}" '
            f'stroke="{COLOURS[2]}" stroke-dasharray="4 3"/>'
        )
    ends = []
    for (name, curve), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        at = [(frame.x(across(x)), frame.y(up(y))) for x, y in curve]
        shapes.append(f'<polyline points="{points(at)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (left, top) in zip(curve, at, strict=True) if dots else ():
            hint = f"{escape(name)}, {escape(unit)} {number(x)}: {number(y)}"
            marked = chosen is not None and x == chosen
            fill = COLOURS[2] if marked else colour
            shapes.append(
                f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{5 if marked else 3}" fill="{fill}">'
                f"<title>{hint}</title></circle>"
            )
        ends.append((at[-1][1], name, colour))
    if len(curves) > 1:
        below = -np.inf
        for end, name, colour in sorted(ends):
            below = max(end, below + 13)  # names do not lie on each other
            shapes.append(text(frame.right + 8, below + 4, name, fill=colour))
    caption = f"<figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>"
    return f"<figure>{caption}{svg(shapes, 152, 300)}</figure>"


def intervals(rows: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> str:
    """Means with their intervals on one scale from 0.

    Args:
        rows: label → system → (mean, low, high); the first system's figures are written beside.
    """
    systems = list(dict.fromkeys(system for row in rows.values() for system in row))
    across = Axis([0.0, max(high for row in rows.values() for _, _, high in row.values()) or 1.0], np.inf)
    frame = Frame(330, WIDTH - 200, 34, 34 + 30 * len(rows))
    shapes = [
        f'<line x1="{frame.left}" x2="{frame.left}" y1="{frame.top}" y2="{frame.bottom}" stroke="{GREY}"/>',
        text(frame.right, frame.bottom + 18, number(across.ticks[-1]), "end", GREY),
        text(frame.left, frame.bottom + 18, "0", "middle", GREY),
    ]
    colours = dict(zip(systems, (COLOURS[0], GREY, *COLOURS[1:]), strict=False))
    for place, system in enumerate(systems):
        shapes.append(f'<circle cx="{frame.left + 150 * place}" cy="12" r="5" fill="{colours[system]}"/>')
        shapes.append(text(frame.left + 150 * place + 12, 16, system))
    for place, (label, row) in enumerate(rows.items()):
        middle = frame.top + 30 * place + 15
        shapes.append(text(frame.left - 12, middle + 4, label, "end"))
        for shift, (system, (mean, low, high)) in enumerate(row.items()):
            y = middle - 4 * (len(row) - 1) + 8 * shift
            left, right = frame.x(across(low)), frame.x(across(high))
            colour, hint = colours[system], f"{system}: {interval(mean, low, high)}"
            shapes.append(
                f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="2"/>'
                f'<circle cx="{frame.x(across(mean)):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}">'
                f"<title>{escape(hint)}</title></circle>"
            )
        shapes.append(text(frame.right + 16, middle + 4, interval(*row[systems[0]])))
    return svg(shapes, frame.bottom + 26)


def interval(mean: float, low: float, high: float) -> str:
    """A mean with its interval, as text."""
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def svg(shapes: Sequence[str], height: float, width: float = WIDTH) -> str:
    """A figure of `shapes`."""
    return f'<svg viewBox="0 0 {width} {height}" font-size="12">' + "\n".join(shapes) + "</svg>"


def points(at: Sequence[tuple[float, float]]) -> str:
    """As a polyline wants them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in at)


def text(x: float, y: float, content: str, anchor: str = "start", fill: str = "#222") -> str:
    """A line of text; `anchor` is which end of it lies at x."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(content)}</text>'


def number(value: Any, digits: int = 4) -> str:
    """A value as ticks and tables show it, with as many significant digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are numbers; truth values are not."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]
