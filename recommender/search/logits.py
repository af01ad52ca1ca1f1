"""What the prediction layer says of single tokens. Shapes are those of `recommender/search/search.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from recommender.backbone.backbone import Backbone

_AT_ONCE = 2**26  # elements of one block of logits
_FEW = 8  # times as fast are the logits of all tokens as those of single ones, each


class TokenLogits:
    """Logits over a temperature, and log-probabilities, of chosen tokens. Logits [P, V] exist block by block only.

    The methods take `hidden`, [P, D], normed; `position` and `token`, int64 [T]: which of the hidden states, and which
    output of it.

    Args:
        backbone: its prediction layer is read.
        temperature: divides the logits.
        widest: children of the node with the most, the root aside. Where they are few for the vocabulary, logits of
            children are computed one by one: one arithmetic for a node's, whatever else is in a batch.
    """

    def __init__(self, backbone: Backbone, temperature: float, widest: int) -> None:
        self.temperature = temperature
        self._backbone = backbone
        self._one_by_one = _FEW * widest < backbone.vocabulary

    def of(self, hidden: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """float32 [T], the logits."""
        if self._one_by_one:
            return self._backbone.logits_of(hidden, position, token) / self.temperature
        return self._of_blocks(hidden, position, token, None)

    def log_probabilities(self, hidden: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """float32 [T], log-softmax over the whole vocabulary."""
        norms: list[torch.Tensor] = []
        logits = self._of_blocks(hidden, position, token, norms)
        return logits - torch.cat(norms)[position]

    def _of_blocks(
        self, hidden: torch.Tensor, position: torch.Tensor, token: torch.Tensor, norms: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """The logits; each block's logsumexp over the vocabulary goes to `norms`, where it is wanted."""
        block = max(1, _AT_ONCE // self._backbone.vocabulary)
        picked = torch.zeros(len(token), device=hidden.device)
        for begin in range(0, len(hidden), block):
            logits = self._backbone.logits(hidden[begin : begin + block])
            if norms is not None:
                norms.append(torch.logsumexp(logits.float() / self.temperature, dim=-1))
            if len(hidden) <= block:
                picked = logits[position, token].float() / self.temperature
            else:
                inside = torch.nonzero((position >= begin) & (position < begin + block)).squeeze(1)
                picked[inside] = logits[position[inside] - begin, token[inside]].float() / self.temperature
        return picked


def log_softmax_within(logits: torch.Tensor, counts: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Log-softmax of float32 `logits` [E] within consecutive groups of `counts` [N]; never above 0.

    Args:
        owner: int64 [E]; the group of each.

    >>> logits = torch.tensor([3.0, 1.0, 7.0]).log()
    >>> log_softmax_within(logits, torch.tensor([2, 1]), torch.tensor([0, 0, 1])).exp()  # 3/4, 1/4; 7/7
    tensor([0.7500, 0.2500, 1.0000])
    """
    shifted = logits - torch.segment_reduce(logits, "max", lengths=counts, unsafe=True)[owner]
    total = torch.segment_reduce(shifted.exp().double(), "sum", lengths=counts, unsafe=True)
    return shifted - total.log().float()[owner]
