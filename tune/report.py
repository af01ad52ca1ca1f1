"""A sweep as one HTML page: drawn as SVG, nothing is fetched when it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from trainer.reporting import figures
from trainer.reporting.figures import WIDTH, Axis, Frame, are_numbers, number, points, svg, text
from tune.progress import ending
from tune.results import Trial, best_of
from tune.space import shown

_HEIGHT = 320
_FRAME = Frame(70, WIDTH - 70, 40, _HEIGHT - 40)
_METRIC = "validation NDCG@10"


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
    path.write_text(figures.page(name, body), encoding="utf-8")


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
    if are_numbers(values):
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


def parallel_coordinates(trials: Sequence[Trial]) -> str:
    """An axis for each parameter and one for the metric, a line for each trial."""
    names = [*trials[0].parameters, _METRIC]
    rows = [[*trial.parameters.values(), trial.best] for trial in trials]
    axes = [Axis(column) for column in zip(*rows, strict=True)]
    lefts = [_FRAME.x(i / (len(axes) - 1)) for i in range(len(axes))]
    shapes = []
    for at in np.argsort([trial.best for trial in trials]):  # the best on top
        heights = [_FRAME.y(axis(value)) for axis, value in zip(axes, rows[at], strict=True)]
        line = list(zip(lefts, heights, strict=True))
        dash = ' stroke-dasharray="6 4"' if trials[at].outcome == "stopped" else ""
        title = f"{trials[at].name}: {shown(trials[at].parameters)}; {_METRIC} {trials[at].best:.4f}"
        shapes.append(
            f'<polyline class="trial" points="{points(line)}" fill="none" stroke-width="2"{dash} '
            f'stroke="{_colour(axes[-1](trials[at].best))}"><title>{escape(title)}</title></polyline>'
        )
    for x, name, axis in zip(lefts, names, axes, strict=True):
        shapes.append(f'<line x1="{x}" x2="{x}" y1="{_FRAME.bottom}" y2="{_FRAME.top}" stroke="#888"/>')
        shapes.append(text(x, 20, name, "middle"))
        shapes += [text(x + 6, _FRAME.y(axis(tick)) + 4, number(tick)) for tick in axis.ticks]
    return svg(shapes, _HEIGHT)


def bars(values: dict[str, float]) -> str:
    """A bar for each parameter, the longest first."""
    shapes, zero, scale = [], WIDTH * 0.6, WIDTH * 0.3
    for row, (name, value) in enumerate(sorted(values.items(), key=lambda item: -abs(item[1]))):
        y, width = 10 + 28 * row, abs(value) * scale
        shapes.append(text(20, y + 15, name))
        shapes.append(f'<rect x="{zero - (value < 0) * width}" y="{y}" width="{width}" height="20" fill="#4472a8"/>')
        shapes.append(text(zero + (value > 0) * width + 6, y + 15, f"{value:+.2f}"))
    return svg(shapes, 20 + 28 * len(values))


def best_so_far(trials: Sequence[Trial]) -> str:
    """A dot for each epoch, and a line for the best until then."""
    values = [value for trial in trials for value in trial.curve]
    across, up = Axis([0, len(values)]), Axis(values)

    def at(epoch: int, value: float) -> tuple[float, float]:
        return _FRAME.x(across(epoch)), _FRAME.y(up(value))

    dots = [at(epoch, value) for epoch, value in enumerate(values, 1)]
    line = [at(epoch, max(values[:epoch])) for epoch in range(1, len(values) + 1)]
    shapes = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#9ab"/>' for x, y in dots]
    shapes.append(f'<polyline points="{points(line)}" fill="none" stroke="#b03a2e" stroke-width="2"/>')
    shapes += [text(_FRAME.left - 8, _FRAME.y(up(tick)) + 4, number(tick), "end") for tick in up.ticks]
    shapes.append(text(_FRAME.right, _HEIGHT - 8, f"{len(values)} epochs", "end"))
    return svg(shapes, _HEIGHT)


def table(trials: Sequence[Trial], best: Trial) -> str:
    """A row for each trial, the best first, failed ones last."""
    names, rows = list(best.parameters), []
    ordered = sorted(trials, key=lambda each: -each.best if each.curve else 1.0)
    for trial in ordered:
        value, epochs = f"{trial.best:.4f}" if trial.curve else "–", len(trial.curve)
        failed = trial.error is not None
        outcome = f"failed: {(trial.error or 'unknown').splitlines()[0]}" if failed else ending(trial.outcome, epochs)
        of = f"{epochs} of {trial.planned}"
        rows.append([trial.name, *(number(trial.parameters[name]) for name in names), of, value, outcome])
    return figures.table(["trial", *names, "epochs", _METRIC, "how it ended"], rows, ordered.index(best))


def _colour(share: float) -> str:
    """From pale to dark blue."""
    return f"hsl(212 60% {85 - 60 * share:.0f}%)"
