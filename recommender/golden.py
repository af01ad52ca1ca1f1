"""The golden request: a history and its top-K, recorded in the bundle, that whoever opens the bundle can repeat."""

from __future__ import annotations

from typing import Any

import numpy as np

from recommender.bundle import Golden
from recommender.config import SearchConfig
from recommender.errors import UserError
from recommender.recommendation import AnyRecommender

_HISTORY, _K = 3, 10
# Other devices and half precision move a log-probability by a few hundredths; wrong weights, titles or prompts by far
# more.
_ABSOLUTE, _RELATIVE = 0.05, 0.05


def record(recommender: AnyRecommender) -> Golden:
    """The answer to the history of the catalogue's first items."""
    history = list(range(min(_HISTORY, len(recommender.catalogue))))
    [answer] = recommender.recommend([history], _K)
    return Golden(
        history=history,
        items=answer.items,
        scores=answer.scores,
        search=recommender.manifest.searched(),
    )


def _scoring(search: SearchConfig) -> dict[str, Any]:
    """What scores depend on."""
    return search.model_dump(include={"score", "temperature", "priors"})


def check(recommender: AnyRecommender) -> None:
    """Repeat the golden request: its items must score as they did and, under the same search, head the list again.

    A bundle from before golden requests, or one whose search settings were replaced by others that score differently,
    has just to answer.

    Raises:
        UserError: the recommender does not answer as it did when it was exported.
    """
    golden, search = recommender.manifest.golden, recommender.manifest.searched()
    made_by = None if golden is None else recommender.manifest.searched(golden.search)
    if golden is None or made_by is None or _scoring(made_by) != _scoring(search):
        recommender.recommend([[0]], 1)
        return
    answers = recommender.rank([golden.history], [golden.items])
    [answer] = recommender.recommend([golden.history], len(golden.items))
    if search == made_by:
        complete = len(answer.scores) == len(golden.scores)
        answers.append(answer.scores if complete else [-np.inf] * len(golden.scores))
    for found in answers:
        if not np.allclose(found, golden.scores, atol=_ABSOLUTE, rtol=_RELATIVE):
            worst = float(np.abs(np.subtract(found, golden.scores)).max())
            raise UserError(
                f"{recommender.manifest.name}: does not answer its golden request as it did when it was exported "
                f"(scores are off by up to {worst:.2g}); the libraries or the base model differ, or the bundle is "
                "damaged: export it again with the release that serves it"
            )
