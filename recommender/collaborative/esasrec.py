"""eSASRec."""

from __future__ import annotations

from recommender.collaborative.attention import LiGRBlock
from recommender.collaborative.sasrec import SASRec


class ESASRec(SASRec):
    """SASRec out of better parts (Tikhonovich et al., RecSys 2025).

    SASRec's shifted sequences, read by LiGR blocks (gated layers, SwiGLU) and trained with a softmax over the target
    and a few hundred negatives. It differs from the paper in negatives that the whole batch shares, in normalised
    inputs, and in an item bias.
    """

    block = LiGRBlock
