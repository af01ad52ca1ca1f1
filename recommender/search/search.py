"""Top-K of a catalogue by best-first search over the radix trie, on one row of the key-value cache per history.

The prompt is run once. Each step takes the best open nodes of every row, appends the tokens of their chains to the
*same* cache rows, and lets a token see its prompt and its ancestors (tree attention). The prediction head then scores
the children of those nodes.

A forward of few tokens costs nearly as much as one of many, so an exact step does not wait for the scores of nodes
that will probably be wanted: nodes further down compete with the open ones, at the score of the open node above them
and the logarithm of their share of its items. Whatever is expanded, scores and certificates are the same.

Two scores, each the sum of log-probabilities along an identifier:

- `valid`: at a node that branches, `log_softmax(logits[children] / temperature)`; a forced token adds 0. So a child
  with one item under it is finished without a forward.
- `full`: `log_softmax(logits / temperature)` over the whole vocabulary, for every token.

Log-probabilities only fall along a path: a node's score bounds everything under it. When the best open node cannot
beat the K-th finished item, the answer is the true top-K of the catalogue (`exact`). Ties rank the lower item index
first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from recommender.backbone.cache import TreeCache
from recommender.backbone.packing import Block, Packing
from recommender.catalogue.filters import Allowed, Filter
from recommender.config import Score, SearchConfig
from recommender.items.trie import Below, RadixTrie, TrieTensors
from recommender.ragged import ragged
from recommender.search.appended_tree import AppendedTree
from recommender.search.frontier import NOTHING, Answers, Ranking, Rows, decoded, keys_of, place_in_row, selected
from recommender.search.prefill import prefill
from recommender.search.prefixes import Prefixes

if TYPE_CHECKING:
    from recommender.backbone.backbone import Backbone

HEADROOM = 128  # slots of a cache row for what a search appends, before it has to grow
_FURTHER = 32  # nodes, the largest below an open one, that compete with the open ones
_STEPS_OF_A_WIDTH = 4  # after which it doubles
_LOGITS_AT_ONCE = 2**26  # elements of one block of logits
_FEW = 8  # times as fast are the logits of all tokens as those of single ones, each


class TreeSearch:
    """Search over one catalogue with one backbone (which must be in `eval` mode).

    `prefixes` are what prompts begin with; None shares nothing between prompts.
    """

    def __init__(
        self, backbone: Backbone, trie: RadixTrie, config: SearchConfig, prefixes: Prefixes | None = None
    ) -> None:
        self.backbone = backbone
        self.config = config
        self.prefixes = prefixes or Prefixes(backbone, np.empty(0, np.int32))
        self.trie = trie.to(backbone.device)
        self.items = len(trie)
        self._leaf_of_item = trie.leaf_of_item
        # One arithmetic for a node's children, whatever else is in a batch.
        self._reads_single_logits = _FEW * int(trie.child_count[1:].max()) < backbone.vocabulary
        self.root_children = int(trie.child_count[0])
        self.is_leaf = self.trie.child_count == 0
        self._radix = trie
        self._expansions: dict[Score, _Expansion] = {}

    @property
    def expansion(self) -> _Expansion:
        """What it is to expand each node under this search's score; made once for all searches `within` this one."""
        score = self.config.score
        if score not in self._expansions:
            self._expansions[score] = _Expansion.of(self._radix, self.trie, score)
        return self._expansions[score]

    @torch.inference_mode()
    def search(
        self,
        prompts: Sequence[np.ndarray | Sequence[int]],
        k: int | Sequence[int],
        exclude: Filter | None = None,
        allow: Filter | None = None,
    ) -> list[Ranking]:
        """Rank the catalogue for every prompt.

        Parameters
        ----------
        prompts : token ids, one sequence per history, of any lengths >= 1
        k : items wanted, for all or for each history; more than there are gives all there are
        exclude : items that may not be recommended, for each history. Filtering never changes a score.
        allow : the only items that may be, for each history; None = all

        Raises
        ------
        ValueError
            An empty prompt, `k` below 1, or shapes that do not fit.
        """
        if len(prompts) == 0:
            return []
        if self.backbone.model.training:
            raise RuntimeError("dropout would falsify the scores: call model.eval() before a search")
        allowed = Allowed.of(self._leaf_of_item, len(prompts), exclude, allow, self.backbone.device)
        rows = self._open_rows(prompts, k, allowed)
        answers = Answers(rows)
        run = prefill(self.backbone, [np.asarray(p, np.int32) for p in prompts], self.prefixes, HEADROOM)
        rows, cache, tree = selected(rows, run.order), run.cache, AppendedTree(self.backbone.device)
        self._expand_root(rows, run.hidden)
        for number in itertools.count():
            # Who is not done after a few steps needs many more nodes, and few forwards. A beam has no more to choose.
            step = self._choose(rows, self.config.width << number // _STEPS_OF_A_WIDTH)
            if step is None:
                break
            if len(rows) > 2 * step.rows_alive:  # so that all copies together are no larger than the cache was
                answers.store(rows)
                alive = torch.nonzero(step.take).squeeze(1)
                rows, step = selected(rows, alive), selected(step, alive)
                cache.keep_rows(alive)
            self._expand(rows, step, cache, tree)
        answers.store(rows)
        return answers.rankings()

    def within(self, limits: SearchConfig) -> TreeSearch:
        """This search with the score, mode, width and node budget of `limits`; the temperature stays."""
        bounded = copy(self)
        bounded.config = limits.model_copy(update={"temperature": self.config.temperature})
        return bounded

    # ------------------------------------------------------------------------------------------------- the steps

    def _open_rows(
        self, prompts: Sequence[np.ndarray | Sequence[int]], k: int | Sequence[int], allowed: Allowed | None
    ) -> Rows:
        device, count = self.backbone.device, len(prompts)
        ks = [k] * count if isinstance(k, int) else list(k)
        if len(ks) != count or min(ks) < 1:
            raise ValueError(f"k must be at least 1, one for all or one for each of the {count} prompts; got {k}")
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) < 1:
            raise ValueError(f"prompt {lengths.index(0)} is empty")
        wanted = torch.tensor([min(each, self.items) for each in ks], device=device)
        if allowed is not None:
            row, all_leaves = torch.arange(count, device=device), torch.full((count,), self.items, device=device)
            wanted = torch.minimum(wanted, allowed.within(row, torch.zeros_like(row), all_leaves))
        empty = torch.full((count, 1), NOTHING, device=device)
        return Rows(
            index=torch.arange(count, device=device),
            prompt_length=torch.tensor(lengths, device=device),
            wanted=wanted,
            finished=empty.expand(count, min(max(ks), self.items)),
            open_key=empty,
            open_node=torch.zeros_like(empty),
            open_parent=torch.zeros_like(empty),
            dropped=empty[:, 0],
            expansions=torch.zeros(count, dtype=torch.int64, device=device),
            allowed=allowed,
        )

    def _expand_root(self, rows: Rows, hidden: torch.Tensor) -> None:
        """Score the root's children after the prompts."""
        count, device = len(rows), rows.index.device
        roots = torch.zeros(count, dtype=torch.int64, device=device)
        row, score = torch.arange(count, device=device), torch.zeros(count, device=device)
        nodes = _Nodes(row, roots, score, roots, roots, torch.ones_like(roots, dtype=torch.bool), roots, 0)
        logits = None
        if self.config.score == "valid":  # all rows have the same children: one matrix product
            logits = self.backbone.logits_among(hidden, self.trie.first_token[1 : 1 + self.root_children]).flatten()
        sizes = _Sizes(entries=count * self.root_children, widest=self.root_children)
        self._receive(rows, nodes, sizes, hidden, logits)

    def _choose(self, rows: Rows, width: int) -> _Step | None:
        """The best nodes of each row that could still change its answer. The one wait for the device per step.

        A node that is not open has the open one above it chosen as well, and all between: it has fewer leaves.
        """
        bar, below = rows.last_wanted(), self.expansion.below
        live = rows.open_key > bar[:, None]
        live_count = live.sum(1)
        above, live = rows.open_node[:, :width], live[:, :width, None]
        place = torch.arange(min(width, _FURTHER) if self.config.mode == "exact" else 1, device=above.device)
        at = (below.start[above][..., None] + place).clamp(max=len(below.node) - 1)
        score, bar_score = decoded(rows.open_key[:, :width])[0], decoded(bar)[0]
        estimate = score[..., None] + below.log_share[at]
        is_further = (place < below.count[above][..., None]) & ~(estimate <= bar_score[:, None, None])
        if rows.allowed is not None:
            node = below.node[at]
            row = rows.index[:, None, None].expand_as(node)
            is_further &= rows.allowed.within(row, self.trie.lo[node], self.trie.hi[node]) > 0
        is_candidate = ((place == 0) | is_further) & live

        ranked = torch.where(is_candidate, estimate, -torch.inf).flatten(1)
        order = ranked.topk(min(width, ranked.shape[1]), dim=1).indices
        take = is_candidate.flatten(1).sum(1).clamp(max=order.shape[1])
        if self.config.mode == "exact":
            take = torch.minimum(take, self.config.node_budget - rows.expansions)
        chosen = torch.arange(order.shape[1], device=take.device) < take[:, None]
        at = at.flatten(1).gather(1, order)
        node, levels = below.node[at].long(), torch.where(chosen, below.levels[at], 0)
        of_rows = torch.where(chosen[..., None], self.expansion.sizes[node], 0).sum(1)
        summary = [of_rows.sum(0), of_rows.amax(0)]
        summary += [each[None] for each in (take.sum(), (take > 0).sum(), live_count.max(), levels.max())]
        tokens, entries, longest, widest, nodes, rows_alive, most_live, deepest = torch.cat(summary).tolist()
        if nodes == 0:
            return None
        rows.keep_open(max(most_live, 1))
        among_open, sizes = order // len(place), _Sizes(entries, widest)
        return _Step(take, node, levels, among_open, rows_alive, nodes, deepest, tokens, longest, sizes)

    def _expand(self, rows: Rows, step: _Step, cache: TreeCache, tree: AppendedTree) -> None:
        """Append the chains of the chosen nodes and score what follows them."""
        nodes = self._pop(rows, step, tree)
        length, start = self.expansion.sizes[nodes.node, 0], self.trie.chain_start[nodes.node]
        above = self.trie.depth[self.trie.parent[nodes.node]]
        owner, place = ragged(length, step.tokens)
        row = nodes.row[owner]
        slot = place_in_row(row, len(rows))
        tokens = self.trie.leaf_tokens[start[owner] + place].long()
        position = rows.prompt_length[row] + above[owner] + place
        last, filled = length.cumsum(0) - 1, cache.end
        mask = tree.append(
            rows.prompt_length, nodes.parent, nodes.deepest, owner, row, slot, slot - place, last, step.longest, filled
        )
        end = filled + step.longest
        block = Block.of(slice(0, len(rows)), slice(0, step.tokens), step.longest, end, mask, row, slot)
        hidden = self.backbone.appended(tokens, position, Packing(row, filled + slot, end, [block]), cache)

        if self.config.score == "valid":
            self._receive(rows, nodes, step.sizes, hidden[last])
        else:
            chain_left = self.trie.chain_length[nodes.node][owner] - place - 1
            following = self.trie.leaf_tokens[start[owner] + place + (chain_left > 0)].long()
            chains = _Chains(last, length, following, chain_left > 0)
            self._receive(rows, nodes, step.sizes, hidden, chains=chains)

    def _pop(self, rows: Rows, step: _Step, tree: AppendedTree) -> _Nodes:
        """Take the chosen nodes out of their rows."""
        row, rank = ragged(step.take, step.nodes)
        node, place = step.node[row, rank], step.place[row, rank]
        is_open = step.levels[row, rank] == 0
        score, _ = decoded(rows.open_key[row, place])
        parent = rows.open_parent[row, place]
        above = torch.zeros_like(node)
        if step.deepest:
            is_parent = step.node[:, None] == self.trie.parent[step.node][..., None]
            first = step.take.cumsum(0) - step.take
            above = torch.where(is_open, 0, first[row] + is_parent.int().argmax(2)[row, rank])
            parent = torch.where(is_open, parent, tree.expansions + above)
        rows.open_key = rows.open_key.index_put((row, place), torch.full_like(row, NOTHING))
        rows.expansions = rows.expansions + step.take
        expansion = tree.expansions + torch.arange(step.nodes, device=row.device)
        return _Nodes(row, node, score, expansion, parent, is_open, above, step.deepest)

    def _receive(
        self,
        rows: Rows,
        nodes: _Nodes,
        sizes: _Sizes,
        hidden: torch.Tensor,
        logits: torch.Tensor | None = None,
        chains: _Chains | None = None,
    ) -> None:
        """Score the children of the nodes and put them among the finished items or the open nodes of their rows.

        `logits` are the children's, before the temperature, where they are known.
        """
        counts = self.expansion.sizes[nodes.node, 1]
        owner, place = ragged(counts, sizes.entries)
        of_leaf = self.is_leaf[nodes.node][owner]
        entry = torch.where(of_leaf, nodes.node[owner], self.trie.first_child[nodes.node][owner] + place)
        token = self.trie.first_token[entry].clamp(min=0)
        chain_score = None
        if self.config.score == "valid":
            if logits is None:
                logits, _ = self.logits(hidden, owner, token, normalise=False)
            else:
                logits = logits / (self.config.temperature or 1.0)
            step_score = log_softmax_within(logits, counts, owner)
        elif chains is None:
            logits, norm = self.logits(hidden, owner, token, normalise=True)
            step_score = logits - norm[owner]
        else:
            everywhere = torch.arange(len(hidden), device=hidden.device)
            position = torch.cat([everywhere, chains.last[owner]])
            logits, norm = self.logits(hidden, position, torch.cat([chains.following, token]), normalise=True)
            chain_score, step_score = (logits - norm[position]).split([len(everywhere), sizes.entries])
            chain_score = torch.where(chains.is_scored, chain_score, 0.0)
            chain_score = torch.segment_reduce(chain_score, "sum", lengths=chains.length, unsafe=True)
            step_score = torch.where(of_leaf, 0.0, step_score)

        score = nodes.score if chain_score is None else nodes.score + chain_score
        if nodes.deepest:  # which entry a node is that was chosen before its score was known
            at = (counts.cumsum(0) - counts)[nodes.above] + nodes.node - self.trie.first_child[nodes.node[nodes.above]]
            at = torch.where(nodes.is_open, sizes.entries, at)
            step_of = torch.where(nodes.is_open, 0, at)
        for _ in range(nodes.deepest):
            arrived = torch.where(nodes.is_open, nodes.score, score[nodes.above] + step_score[step_of])
            score = arrived if chain_score is None else arrived + chain_score
        key = keys_of(score[owner] + step_score, self.trie.first_item[entry])
        if nodes.deepest:
            key = torch.cat([key, key[:1]]).index_fill(0, at, NOTHING)[:-1]

        row = nodes.row[owner]
        if rows.allowed is not None:
            below = rows.allowed.within(rows.index[row], self.trie.lo[entry], self.trie.hi[entry])
            key = torch.where(below > 0, key, NOTHING)
        is_finished = of_leaf | self.expansion.finished_at_sight[entry]
        limit = self.config.node_budget if self.config.mode == "exact" else self.config.width
        rows.add(row, key, entry, nodes.expansion[owner], is_finished, sizes.widest, limit)

    def logits(
        self, hidden: torch.Tensor, position: torch.Tensor, token: torch.Tensor, normalise: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 logits / temperature of the queries (position, token) [T], and logsumexp per position [P] if asked.

        Logits [P, V] exist block by block only.
        """
        temperature = self.config.temperature or 1.0
        if not normalise and self._reads_single_logits:
            return self.backbone.logits_of(hidden, position, token) / temperature, hidden
        block = max(1, _LOGITS_AT_ONCE // self.backbone.vocabulary)
        picked = torch.zeros(len(token), device=hidden.device)
        norms = []
        for begin in range(0, len(hidden), block):
            logits = self.backbone.logits(hidden[begin : begin + block])
            if normalise:
                norms.append(torch.logsumexp(logits.float() / temperature, dim=-1))
            if len(hidden) <= block:
                picked = logits[position, token].float() / temperature
            else:
                inside = torch.nonzero((position >= begin) & (position < begin + block)).squeeze(1)
                picked[inside] = logits[position[inside] - begin, token[inside]].float() / temperature
        return picked, torch.cat(norms) if normalise else picked


# -------------------------------------------------------------------------------------------------- what a step holds


@dataclass(frozen=True)
class _Expansion:
    """What it is to expand a node under one of the scores."""

    sizes: torch.Tensor  # [nodes, 2], tokens to append, and entries that come of it: the children or, of a leaf, itself
    finished_at_sight: torch.Tensor  # [nodes], whether an entry has its whole score as soon as it is seen
    below: Below  # the nodes that may be expanded

    @classmethod
    def of(cls, radix: RadixTrie, trie: TrieTensors, score: Score) -> _Expansion:
        is_leaf = trie.child_count == 0
        if score == "valid":
            length, entries, finished = trie.chain_length, trie.child_count, is_leaf
        else:
            # What follows the last token of an identifier is never asked for, so that token is not run. An expanded
            # leaf is its own single entry: its chain has then been scored.
            length = trie.chain_length - is_leaf.long()
            entries = torch.where(is_leaf, 1, trie.child_count)
            finished = is_leaf & (trie.chain_length == 1)
        below = radix.below(~finished.cpu().numpy()).to(finished.device)
        return cls(torch.stack([length, entries], 1), finished, below)


@dataclass
class _Sizes:
    entries: int  # children to score, over all rows
    widest: int  # the most of any row


@dataclass
class _Step:
    take: torch.Tensor  # [rows], nodes to expand, the first of each row below
    node: torch.Tensor  # [rows, width]
    levels: torch.Tensor  # [rows, width], how far below an open node; 0: it is one
    place: torch.Tensor  # [rows, width], where that is among the open ones
    rows_alive: int
    nodes: int
    deepest: int  # the most levels
    tokens: int  # to append, over all rows
    longest: int  # the most of any row
    sizes: _Sizes


@dataclass
class _Nodes:
    """Nodes under expansion, row by row: [N] each."""

    row: torch.Tensor
    node: torch.Tensor
    score: torch.Tensor  # float32, up to the first token of the node's chain; of an open node
    expansion: torch.Tensor  # ordinal in the appended tree
    parent: torch.Tensor  # the parent's ordinal there
    is_open: torch.Tensor  # the others were chosen before their scores
    above: torch.Tensor  # where among these the parent is, of such others
    deepest: int  # the most levels of such others below an open node


@dataclass
class _Chains:
    """Tokens that were appended for nodes, for the `full` score."""

    last: torch.Tensor  # [N], where a node's last token is
    length: torch.Tensor  # [N]
    following: torch.Tensor  # [tokens], the next token of the chain
    is_scored: torch.Tensor  # [tokens], False where the chain ends


def log_softmax_within(logits: torch.Tensor, counts: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Log-softmax of float32 `logits` [T] within consecutive groups of `counts` [N]; never above 0."""
    shifted = logits - torch.segment_reduce(logits, "max", lengths=counts, unsafe=True)[owner]
    total = torch.segment_reduce(shifted.exp().double(), "sum", lengths=counts, unsafe=True)
    return shifted - total.log().float()[owner]
