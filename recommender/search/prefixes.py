"""Keys and values of how prompts begin, kept from search to search."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from recommender.backbone.cache import States, TreeCache
from recommender.backbone.packing import Packing

if TYPE_CHECKING:
    from recommender.backbone.backbone import Backbone

_WORTHWHILE = 8  # tokens; to compute fewer costs less than the mask that leaving them out takes


class Prefixes:
    """The instruction that every prompt begins with and, if there is room, the histories that were read last.

    A history that grew by an item begins with the one before: only the item and the suffix are computed. One that is
    longer than the prompt's window loses its first item with each new one, and has nothing but the instruction kept.

    One thread at a time may use it, and the backbone's weights may not change while it lives.

    Args:
        backbone: in eval mode.
        instruction: int32 [p]; what prompts begin with. It is computed once, when it is first met.
        suffix: tokens that close a prompt behind its history.
        max_bytes: of kept histories, on the backbone's device; those that were not used for longest make room. 0
            keeps none.
    """

    def __init__(self, backbone: Backbone, instruction: np.ndarray, suffix: int = 0, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._backbone = backbone
        self._instruction = instruction if len(instruction) >= _WORTHWHILE else instruction[:0]
        self._states: States | None = None
        self._suffix = suffix
        self._histories: OrderedDict[bytes, States] = OrderedDict()
        self._lengths: Counter[int] = Counter()  # of the histories, in bytes

    def longest(self, prompt: np.ndarray) -> tuple[int, States]:
        """The longest kept beginning of `prompt` (int32 [t]) that leaves a token of it to compute: its length, and
        the states of at least as many tokens."""
        key = prompt.tobytes()
        last = len(prompt) - 1
        for length in sorted(self._lengths, reverse=True):
            if length <= len(key) and key[:length] in self._histories:
                self._histories.move_to_end(key[:length])
                return min(length // prompt.itemsize, last), self._histories[key[:length]]
        shared = len(self._instruction)
        if shared and np.array_equal(prompt[:shared], self._instruction):
            return min(shared, last), self._instruction_states()
        return 0, []

    def keep(self, prompts: Sequence[np.ndarray], cache: TreeCache) -> None:
        """Keep the histories of `prompts`, whose states lie in the rows of `cache`."""
        if not self.max_bytes:
            return
        for row, prompt in enumerate(prompts):
            trunk = prompt[: len(prompt) - self._suffix]
            key = trunk.tobytes()
            if len(trunk) <= len(self._instruction) or key in self._histories:
                continue
            states = cache.states(row, len(trunk))
            if _size(states) > self.max_bytes:
                continue
            self._histories[key] = states
            self._lengths[len(key)] += 1
            self.bytes += _size(states)
            while self.bytes > self.max_bytes:
                oldest, dropped = self._histories.popitem(last=False)
                self.bytes -= _size(dropped)
                self._lengths[len(oldest)] -= 1
                self._lengths += Counter()  # without the lengths that none has any more

    def _instruction_states(self) -> States:
        if self._states is None:
            tokens = torch.from_numpy(self._instruction).to(self._backbone.device).long()
            packing = Packing.of_row(0, len(tokens), None, tokens.device)
            cache = TreeCache(self._backbone.num_layers, 1, len(tokens))
            self._backbone.appended(tokens, packing.slot, packing, cache)
            self._states = cache.states(0, len(tokens))
        return self._states


def _size(states: States) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in states)
