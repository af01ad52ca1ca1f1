"""Where a model stands: above the floors or below one, and what to try then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from recommender.bundle import Manifest
from recommender.metrics import metric_values, popularity_ranks
from trainer.config import EvaluationConfig
from trainer.data.dataset import Dataset
from trainer.evaluation.floors import kept_floors
from trainer.evaluation.ranking import held_out
from trainer.parts import Say

NAMES = {"model": "model", "most_popular": "most-popular", "itemknn": "ItemKNN", "tfidf": "TF-IDF"}
_REMEDIES = {
    "most_popular": "it has learnt less than counts tell; look at the losses, train longer, or raise the learning rate",
    "itemknn": "it misses what follows what; `ilrec blend` adds the counts to its score; or train until its validation "
    "metric stops rising, raise the learning rate, or try --set recommender.kind=sasrec",
    "tfidf": "it misses what the titles say; `ilrec blend` adds them to its score; or take a pretrained backbone, "
    "spell longer titles (identifier.max_tokens), serve --set recommender.kind=tfidf where items are new",
}


def standing(
    metrics: Mapping[str, Mapping[str, float]], differences: Mapping[str, Mapping[str, tuple[float, float]]]
) -> str:
    """A sentence: the floor that the model is most below, or that it is not told apart from, or the best one below it.

    Args:
        metrics: system → metric → mean; "model" and the floors.
        differences: floor → metric → 95 % interval of model − floor; a floor without is compared by its mean alone.
    """
    metric = "NDCG@10" if "NDCG@10" in metrics["model"] else next(m for m in metrics["model"] if m.startswith("NDCG"))
    floors = [name for name in NAMES if name in metrics and name != "model"]
    best = max(floors, key=lambda name: metrics[name][metric])
    gap = metrics["model"][metric] - metrics[best][metric]
    low, high = differences[best][metric] if best in differences else (gap, gap)
    interval = f", 95 % interval [{low:+.4f}, {high:+.4f}]" if best in differences else ""
    means = f"{metrics['model'][metric]:.4f} to {metrics[best][metric]:.4f}{interval}"
    if high < 0:
        return f"below {NAMES[best]} by {-gap:.4f} {metric} ({means}): {_REMEDIES[best]}"
    if low <= 0:
        return f"not better than {NAMES[best]}: {gap:+.4f} {metric} ({means}): {_REMEDIES[best]}"
    return f"above every floor; {NAMES[best]}, the best of them, by {gap:.4f} {metric} ({means})"


def on_validation(
    manifest: Manifest, dataset: Dataset, evaluation: EvaluationConfig, floors_dir: Path, say: Say
) -> dict[str, dict[str, float]]:
    """system → NDCG@10 → its mean on the validation targets that a bundle was chosen by, as `standing` takes it. The
    floors were chosen on the same targets."""
    split = held_out(dataset, "validation", evaluation.validation_targets)
    seen = split.histories if evaluation.exclude_seen else None
    popular = metric_values(popularity_ranks(dataset.popularity(), split.targets, seen), [10])["NDCG@10"]
    floors = kept_floors(dataset, evaluation, floors_dir, say)
    others = [kind for kind in floors if kind != manifest.kind]
    found = {
        "model": manifest.metrics["validation_NDCG@10"],
        "most_popular": float(popular.mean()),
        **{kind: floors[kind].manifest.metrics["validation_NDCG@10"] for kind in others},
    }
    return {system: {"NDCG@10": value} for system, value in found.items()}
