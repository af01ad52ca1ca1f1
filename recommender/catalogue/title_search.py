"""Search among the catalogue's titles, for a person who types: by how they begin, and by their words."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from functools import partial, reduce
from itertools import islice

import numpy as np

from recommender.catalogue.catalogue import Catalogue, normalise_title

_WORD = re.compile(r"\w+")
_MOST_COMPLETIONS = 1000  # words that an unfinished one may grow into before titles are read instead
_MOST_READ = 10_000  # titles, some 2 µs each; the event loop waits for it
_LAST = chr(0x10FFFF)


class TitleSearch:
    """An inverted index of the words of all titles, beside the catalogue's trie of whole titles.

    Args:
        catalogue: whose titles are searched.
    """

    def __init__(self, catalogue: Catalogue):
        self.catalogue = catalogue
        items_of: dict[str, list[int]] = defaultdict(list)
        for item, title in enumerate(catalogue.titles):
            for word in set(_WORD.findall(title.casefold())):
                items_of[word].append(item)
        self._words = sorted(items_of)
        self._items = [np.array(items_of[word], np.int32) for word in self._words]

    def search(self, text: str, limit: int) -> list[int]:
        """Items titled so, those whose titles open so, those with all the words, the last may be unfinished."""
        folded = normalise_title(text).casefold()
        if not folded:
            return []
        index = self.catalogue.title_index
        opened = [item for _, (item,) in islice(index.iteritems(folded), limit)]
        found = dict.fromkeys([item for (item,) in index.get(folded, [])] + opened)
        if len(found) < limit:
            found |= dict.fromkeys(self._holding(_WORD.findall(folded)).tolist())
        return list(found)[:limit]

    def _holding(self, words: list[str]) -> np.ndarray:
        """int32, rising: the items whose titles hold every word, the last of them completed."""
        nothing = np.empty(0, np.int32)
        if not words:
            return nothing
        *whole, prefix = words
        begin, end = bisect_left(self._words, prefix), bisect_left(self._words, prefix + _LAST)
        few = self._items[begin : min(end, begin + _MOST_COMPLETIONS)]
        if not whole:
            return np.unique(np.concatenate([nothing, *few]))
        having = [self._having(word) for word in whole]
        items = reduce(partial(np.intersect1d, assume_unique=True), sorted(having, key=len))
        if end - begin <= len(few):
            return np.intersect1d(items, np.concatenate([nothing, *few]))
        titles = self.catalogue.titles
        begun = [any(w.startswith(prefix) for w in _WORD.findall(titles[i].casefold())) for i in items[:_MOST_READ]]
        return items[:_MOST_READ][begun]

    def _having(self, word: str) -> np.ndarray:
        at = bisect_left(self._words, word)
        known = at < len(self._words) and self._words[at] == word
        return self._items[at] if known else np.empty(0, np.int32)
