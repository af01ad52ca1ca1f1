"""A sweep as one HTML page: drawn as SVG, nothing is fetched when it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tune.results import Trial, best_of
from tune.space import shown

_WIDTH, _HEIGHT, _MARGIN = 960, 320, 70
_METRIC = "validation NDCG@10"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
svg { width: 100%; height: auto; font-size: 12px } td, th { padding: .15em .8em .15em 0; text-align: left }
table { border-collapse: collapse } tr.best { font-weight: bold } .trial:hover { stroke: #000; stroke-width: 4 }
"""


def write_report(name: str, trials: Sequence[Trial], path: Path) -> None:
    """Draw the trials of a sweep; failed ones are only listed.

    Args:
        trials: oldest first; at least one has finished an epoch.
    """
    best = best_of(trials)
    drawn = [trial for trial in trials if trial.curve]
    epochs = min(len(trial.curve) for trial in drawn)
    body = [
        f"<h1>Sweep {escape(name)}</h1>",
        f"<p>Best of {len(trials)} trials: {_METRIC} <b>{best.best:.4f}</b> at epoch "
        f"{best.curve.index(best.best) + 1}, with {escape(shown(best.parameters))}.</p>",
        f"<p>{escape(saving(trials))}</p>",
        "<h2>Trials</h2><p>A line for each trial; the darker, the better. Dashed: stopped early.</p>",
        parallel_coordinates(drawn),
        f"<h2>What matters</h2><p>Rank correlation of each parameter with {_METRIC} after {epochs} epoch(s), which all "
        "of these trials ran (for categories: the correlation ratio of the ranks, which has no sign). A hint, not "
        f"proof, with {len(drawn)} trials; what acts together is not seen.</p>",
        bars(
            {
                name: association([t.parameters[name] for t in drawn], [max(t.curve[:epochs]) for t in drawn])
                for name in best.parameters
            }
        ),
        f"<h2>Best so far</h2><p>{_METRIC} by epochs run, trial after trial in the order of their start.</p>",
        best_so_far(drawn),
        "<h2>All trials</h2>",
        table(trials, best),
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(name)}</title><style>{_STYLE}</style>"
    path.write_text(head + "\n".join(body) + "</html>\n", encoding="utf-8")


def saving(trials: Sequence[Trial]) -> str:
    """What early stopping saved, in a sentence."""
    stopped = [trial for trial in trials if trial.outcome == "stopped"]
    run = sum(len(trial.curve) for trial in trials)
    saved = sum(trial.planned - len(trial.curve) for trial in stopped)
    return (
        f"Early stopping ended {len(stopped)} of {len(trials)} trials: {run} epochs were run, {saved} at most were "
        f"not ({saved / (run + saved):.0%})."
    )


def association(values: Sequence[Any], scores: Sequence[float]) -> float:
    """Spearman's rank correlation; for values that are no numbers, the correlation ratio η of the scores' ranks."""
    ranks = _ranks(scores)
    spread = ((ranks - ranks.mean()) ** 2).sum()
    if _are_numbers(values):
        x = _ranks(values) - _ranks(values).mean()
        scale = np.sqrt((x**2).sum() * spread)
        return float((x * (ranks - ranks.mean())).sum() / scale) if scale else 0.0
    groups = [ranks[[str(value) == each for value in values]] for each in {str(value) for value in values}]
    between = sum(len(group) * (group.mean() - ranks.mean()) ** 2 for group in groups)
    return float(np.sqrt(between / spread)) if spread else 0.0


def _ranks(values: Sequence[Any]) -> np.ndarray:
    """Ranks from 0; equal values share their mean."""
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


class _Axis:
    """Where values lie between 0 and 1: numbers on a line, a logarithmic one over wide ranges, others evenly."""

    def __init__(self, values: Sequence[Any]):
        self._numbers = _are_numbers(values)
        if self._numbers:
            self._log = min(values) > 0 and max(values) > 20 * min(values)
            self.ticks = sorted({min(values), max(values)})
        else:
            self.ticks = sorted({str(value) for value in values})

    def __call__(self, value: Any) -> float:
        if not self._numbers:
            return (self.ticks.index(str(value)) + 0.5) / len(self.ticks)
        scale = np.log if self._log else float
        low, high = scale(self.ticks[0]), scale(self.ticks[-1])
        return float((scale(value) - low) / (high - low)) if high > low else 0.5


def parallel_coordinates(trials: Sequence[Trial]) -> str:
    """An axis for each parameter and one for the metric, a line for each trial."""
    names = [*trials[0].parameters, _METRIC]
    rows = [[*trial.parameters.values(), trial.best] for trial in trials]
    axes = [_Axis(column) for column in zip(*rows, strict=True)]
    step = (_WIDTH - 2 * _MARGIN) / (len(axes) - 1)
    shapes = []
    for at in np.argsort([trial.best for trial in trials]):  # the best on top
        heights = [_down(axis(value)) for axis, value in zip(axes, rows[at], strict=True)]
        points = [(_MARGIN + i * step, height) for i, height in enumerate(heights)]
        dash = ' stroke-dasharray="6 4"' if trials[at].outcome == "stopped" else ""
        title = f"{trials[at].name}: {shown(trials[at].parameters)}; {_METRIC} {trials[at].best:.4f}"
        shapes.append(
            f'<polyline class="trial" points="{_points(points)}" fill="none" stroke-width="2"{dash} '
            f'stroke="{_colour(axes[-1](trials[at].best))}"><title>{escape(title)}</title></polyline>'
        )
    for i, (name, axis) in enumerate(zip(names, axes, strict=True)):
        x = _MARGIN + i * step
        shapes.append(f'<line x1="{x}" x2="{x}" y1="{_down(0)}" y2="{_down(1)}" stroke="#888"/>')
        shapes.append(_text(x, 20, name, "middle"))
        shapes += [_text(x + 6, _down(axis(tick)) + 4, _number(tick)) for tick in axis.ticks]
    return _svg(shapes)


def bars(values: dict[str, float]) -> str:
    """A bar for each parameter, the longest first."""
    shapes, zero, scale = [], _WIDTH * 0.6, _WIDTH * 0.3
    for row, (name, value) in enumerate(sorted(values.items(), key=lambda item: -abs(item[1]))):
        y, width = 10 + 28 * row, abs(value) * scale
        shapes.append(_text(20, y + 15, name))
        shapes.append(f'<rect x="{zero - (value < 0) * width}" y="{y}" width="{width}" height="20" fill="#4472a8"/>')
        shapes.append(_text(zero + (value > 0) * width + 6, y + 15, f"{value:+.2f}"))
    return _svg(shapes, 20 + 28 * len(values))


def best_so_far(trials: Sequence[Trial]) -> str:
    """A dot for each epoch, and a line for the best until then."""
    values = [value for trial in trials for value in trial.curve]
    across, up = _Axis([0, len(values)]), _Axis(values)

    def at(number: int, value: float) -> tuple[float, float]:
        return _MARGIN + across(number) * (_WIDTH - 2 * _MARGIN), _down(up(value))

    dots = [at(number, value) for number, value in enumerate(values, 1)]
    line = [at(number, max(values[:number])) for number in range(1, len(values) + 1)]
    shapes = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#9ab"/>' for x, y in dots]
    shapes.append(f'<polyline points="{_points(line)}" fill="none" stroke="#b03a2e" stroke-width="2"/>')
    shapes += [_text(_MARGIN - 8, _down(up(tick)) + 4, _number(tick), "end") for tick in up.ticks]
    shapes.append(_text(_WIDTH - _MARGIN, _HEIGHT - 8, f"{len(values)} epochs", "end"))
    return _svg(shapes)


def table(trials: Sequence[Trial], best: Trial) -> str:
    """A row for each trial, the best first, failed ones last."""
    names = list(best.parameters)
    cells = ["trial", *names, "epochs", _METRIC, ""]
    rows = ["<tr>" + "".join(f"<th>{escape(cell)}" for cell in cells)]
    for trial in sorted(trials, key=lambda each: -each.best if each.curve else 1.0):
        value = f"{trial.best:.4f}" if trial.curve else "–"
        outcome = trial.outcome if trial.error is None else f"failed: {(trial.error or 'unknown').splitlines()[0]}"
        epochs = f"{len(trial.curve)} of {trial.planned}"
        cells = [trial.name, *(_number(trial.parameters[name]) for name in names), epochs, value, outcome]
        style = ' class="best"' if trial is best else ""
        rows.append(f"<tr{style}>" + "".join(f"<td>{escape(cell)}" for cell in cells))
    return "<table>" + "\n".join(rows) + "</table>"


def _svg(shapes: Sequence[str], height: float = _HEIGHT) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}">' + "\n".join(shapes) + "</svg>"


def _down(share: float) -> float:
    """From 0 (bottom) … 1 (top) to SVG's y."""
    return _HEIGHT - 40 - share * (_HEIGHT - 80)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _colour(share: float) -> str:
    """From pale to dark blue."""
    return f"hsl(212 60% {85 - 60 * share:.0f}%)"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
