"""Top-K of a catalogue by best-first search over the radix trie, on one row of the key-value cache per history.

The prompt is run once. Each step takes the best open nodes of every row, appends the tokens of their chains to the
*same* cache rows, and lets a token see its prompt and its ancestors (tree attention). The prediction head then scores
the children of those nodes. `recommender/search/oracle.py` is the same search in plain Python, a node at a time.

A forward of few tokens costs nearly as much as one of many, so an exact step does not wait for the scores of nodes
that will probably be wanted: nodes further down compete with the open ones, at the score of the open node above them
and the logarithm of their share of its items. Whatever is expanded, scores and certificates are the same.

Two scores, each the sum of log-probabilities along an identifier:

- `valid`: at a node that branches, `log_softmax(logits[children] / temperature)`; a forced token adds 0. So a child
  with one item under it is finished without a forward.
- `full`: `log_softmax(logits / temperature)` over the whole vocabulary, for every token.

Log-probabilities only fall along a path: a node's score bounds everything under it. When the best open node cannot
beat the K-th finished item, the answer is the true top-K of the catalogue (`exact`). Ties rank the lower item index
first. Terms of items may be added to the scores; then an open node is as good as its score and the best term below it
(`recommender/search/bounds.py`).

Shapes, here and in the modules beside this one:

    R   rows: the histories that are still searched        N   nodes of a step, of all rows, laid end to end
    K   items that the longest answer wants                T   tokens of their chains, laid end to end
    M   open nodes that a row has places for               E   entries (children, mostly) of theirs, laid end to end
    W   nodes that a step takes of a row, at most          P   positions: hidden states whose logits are asked for
    F   nodes looked at below an open one, and itself      V   vocabulary;  D   width of hidden states
"""

from __future__ import annotations

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
from recommender.items.trie import RadixTrie
from recommender.ragged import ragged
from recommender.recommendation import allowed_items
from recommender.search.appended_tree import AppendedTree
from recommender.search.bounds import Bounds
from recommender.search.expansion import Chains, Entries, Expansion, Nodes, Sizes, Step
from recommender.search.frontier import NOTHING, Answers, Ranking, Rows, decoded, keys_of, place_in_row, selected
from recommender.search.logits import TokenLogits, log_softmax_within
from recommender.search.prefill import prefill
from recommender.search.prefixes import Prefixes

if TYPE_CHECKING:
    from recommender.backbone.backbone import Backbone

HEADROOM = 128  # slots of a cache row for what a search appends, before it has to grow
_FURTHER = 32  # F: nodes, the largest below an open one, that compete with the open ones
_STEPS_OF_A_WIDTH = 4  # after which it doubles


@dataclass
class Run:
    """One call of a search on its way: the rows that are not done, and what their steps append to."""

    rows: Rows
    answers: Answers
    cache: TreeCache
    tree: AppendedTree
    steps: int = 0

    def drop_done(self, step: Step) -> Step:
        """Leave out the rows of which a step takes nothing; their answers stand."""
        self.answers.store(self.rows)
        alive = torch.nonzero(step.take).squeeze(1)
        self.rows = selected(self.rows, alive)
        self.cache.keep_rows(alive)
        return selected(step, alive)


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
        self.logits = TokenLogits(backbone, config.temperature or 1.0, int(trie.child_count[1:].max()))
        self.root_children = int(trie.child_count[0])
        self.is_leaf = self.trie.child_count == 0
        self._radix = trie
        self._expansions: dict[Score, Expansion] = {}

    @property
    def score(self) -> Score:
        """Which of the two."""
        return self.config.score or "valid"

    @property
    def expansion(self) -> Expansion:
        """What it is to expand each node under this search's score; made once for all searches `within` this one."""
        score = self.score
        if score not in self._expansions:
            self._expansions[score] = Expansion.of(self._radix, self.trie, score)
        return self._expansions[score]

    def within(self, limits: SearchConfig) -> TreeSearch:
        """This search with the score, mode, width and node budget of `limits`; the temperature stays."""
        bounded = copy(self)
        bounded.config = limits.model_copy(update={"temperature": self.config.temperature})
        return bounded

    @torch.inference_mode()
    def search(
        self,
        prompts: Sequence[np.ndarray | Sequence[int]],
        k: int | Sequence[int],
        exclude: Filter | None = None,
        allow: Filter | None = None,
        terms: torch.Tensor | None = None,
    ) -> list[Ranking]:
        """Rank the catalogue for every prompt.

        Parameters
        ----------
        prompts : token ids, one sequence per history, of any lengths >= 1
        k : items wanted, for all or for each history; more than there are gives all there are
        exclude : items that may not be recommended, for each history. Filtering never changes a score.
        allow : the only items that may be, for each history; None = all
        terms : float32 [prompts, items], finite; added to the items' scores

        Raises
        ------
        ValueError
            An empty prompt, `k` below 1, or shapes that do not fit.
        """
        if len(prompts) == 0:
            return []
        if self.backbone.model.training:
            raise RuntimeError("dropout would falsify the scores: call model.eval() before a search")
        device, lengths = self.backbone.device, [len(prompt) for prompt in prompts]
        allowed = Allowed.of(self._leaf_of_item, len(prompts), exclude, allow, device)
        bounds = None
        if terms is not None:
            # What may not be recommended does not loosen a bound.
            left = allowed_items(len(prompts), self.items, exclude, allow)
            terms = terms if left is None else terms.masked_fill(~left, -torch.inf)
            bounds = Bounds.of(self.expansion.levels, terms.to(device))
        rows = Rows.opened(lengths, _checked(lengths, k), self.items, allowed, bounds, device)
        answers = Answers(rows)
        filled = prefill(self.backbone, [np.asarray(p, np.int32) for p in prompts], self.prefixes, HEADROOM)
        run = Run(selected(rows, filled.order), answers, filled.cache, AppendedTree(device))
        self._expand_root(run.rows, filled.hidden)
        while self.step(run):
            pass
        answers.store(run.rows)
        return answers.rankings()

    def step(self, run: Run) -> bool:
        """Expand the best open nodes of every row; False where none could change an answer any more."""
        # Who is not done after a few steps needs many more nodes, and few forwards. A beam has no more to choose.
        step = self._choose(run.rows, self.config.width << run.steps // _STEPS_OF_A_WIDTH)
        if step is None:
            return False
        if len(run.rows) > 2 * step.sizes.rows:  # so that all copies together are no larger than the cache was
            step = run.drop_done(step)
        self._expand(run, step)
        run.steps += 1
        return True

    # ------------------------------------------------------------------------------------- which nodes a step expands

    def _choose(self, rows: Rows, width: int) -> Step | None:
        """The best nodes of each row that could still change its answer. The one wait for the device per step.

        A node that is not open has the open one above it chosen as well, and all between: it has fewer leaves.
        """
        bar, below = rows.last_wanted(), self.expansion.below
        live = rows.open_key > bar[:, None]
        at, estimate, is_candidate = self._candidates(rows, bar, live, width)
        ranked = torch.where(is_candidate, estimate, -torch.inf).flatten(1)
        order = ranked.topk(min(width, ranked.shape[1]), dim=1).indices  # [R, W]
        take = is_candidate.flatten(1).sum(1).clamp(max=order.shape[1])
        if self.config.mode == "exact":
            take = torch.minimum(take, self.config.node_budget - rows.expansions)
        chosen = torch.arange(order.shape[1], device=take.device) < take[:, None]
        among_open, at = order // at.shape[2], at.flatten(1).gather(1, order)
        node, levels = below.node[at].long(), torch.where(chosen, below.levels[at], 0)

        of_rows = torch.where(chosen[..., None], self.expansion.sizes[node], 0).sum(1)
        summary = [of_rows.sum(0), of_rows.amax(0)]
        summary += [each[None] for each in (take.sum(), (take > 0).sum(), live.sum(1).max(), levels.max())]
        tokens, entries, longest, widest, nodes, rows_alive, most_live, deepest = torch.cat(summary).tolist()
        if nodes == 0:
            return None
        rows.keep_open(max(most_live, 1))
        sizes = Sizes(rows_alive, nodes, tokens, longest, entries, widest, deepest)
        return Step(take, node, levels, among_open, sizes)

    def _candidates(
        self, rows: Rows, bar: torch.Tensor, live: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first open nodes of each row and, in an exact search, the largest ones below each of them.

        Parameters
        ----------
        bar : int64 [R], the keys to beat
        live : bool [R, M], which open nodes beat them

        Returns
        -------
        Where in `expansion.below` they are, what their scores are or may be, and which of them might change the
        answer: int64, float64 and bool, [R, min(M, width), F].
        """
        below = self.expansion.below
        above, live = rows.open_node[:, :width], live[:, :width, None]
        place = torch.arange(min(width, _FURTHER) if self.config.mode == "exact" else 1, device=above.device)
        at = (below.start[above][..., None] + place).clamp(max=len(below.node) - 1)
        estimate, bar_score = rows.open_score[:, :width, None] + below.log_share[at], decoded(bar)[0]
        if rows.bounds is not None:
            estimate = estimate + rows.bounds.below(rows.index[:, None, None], below.node[at].long())
        is_further = (place < below.count[above][..., None]) & ~(estimate <= bar_score[:, None, None])
        if rows.allowed is not None:
            node = below.node[at]
            row = rows.index[:, None, None].expand_as(node)
            is_further &= rows.allowed.within(row, self.trie.lo[node], self.trie.hi[node]) > 0
        return at, estimate, ((place == 0) | is_further) & live

    def _pop(self, rows: Rows, step: Step, tree: AppendedTree) -> Nodes:
        """Take the chosen nodes out of their rows."""
        row, rank = ragged(step.take, step.sizes.nodes)
        node, place = step.node[row, rank], step.place[row, rank]
        is_open = step.levels[row, rank] == 0
        score, parent = rows.open_score[row, place], rows.open_parent[row, place]
        above = torch.zeros_like(node)
        if step.sizes.deepest:
            is_parent = step.node[:, None] == self.trie.parent[step.node][..., None]
            first = step.take.cumsum(0) - step.take
            above = torch.where(is_open, 0, first[row] + is_parent.int().argmax(2)[row, rank])
            parent = torch.where(is_open, parent, tree.expansions + above)
        rows.open_key = rows.open_key.index_put((row, place), torch.full_like(row, NOTHING))
        rows.expansions = rows.expansions + step.take
        expansion = tree.expansions + torch.arange(step.sizes.nodes, device=row.device)
        return Nodes(row, node, score, expansion, parent, is_open, above)

    # -------------------------------------------------------------------------------------- what comes of their chains

    def _expand_root(self, rows: Rows, hidden: torch.Tensor) -> None:
        """Score the root's children after the prompts, whose last hidden states [R, D] are given."""
        count = len(rows)
        nodes = Nodes.roots(count, hidden.device)
        logits = None
        if self.score == "valid":  # all rows have the same children: one matrix product
            logits = self.backbone.logits_among(hidden, self.trie.first_token[1 : 1 + self.root_children]).flatten()
            logits = logits / self.logits.temperature
        sizes = Sizes(
            rows=count, nodes=count, tokens=0, longest=0,
            entries=count * self.root_children, widest=self.root_children,
        )  # fmt: skip
        self._receive(rows, nodes, sizes, hidden, logits)

    def _expand(self, run: Run, step: Step) -> None:
        """Append the chains of the chosen nodes and score what follows them."""
        rows, cache, sizes = run.rows, run.cache, step.sizes
        nodes = self._pop(rows, step, run.tree)
        length, start = self.expansion.sizes[nodes.node, 0], self.trie.chain_start[nodes.node]
        above = self.trie.depth[self.trie.parent[nodes.node]]
        owner, place = ragged(length, sizes.tokens)
        row = nodes.row[owner]
        slot = place_in_row(row, len(rows))
        tokens = self.trie.leaf_tokens[start[owner] + place].long()
        position = rows.prompt_length[row] + above[owner] + place
        last, filled = length.cumsum(0) - 1, cache.end
        mask = run.tree.append(
            rows.prompt_length, nodes.parent, sizes.deepest, owner, row, slot, slot - place, last, sizes.longest, filled
        )
        end = filled + sizes.longest
        block = Block.of(slice(0, len(rows)), slice(0, sizes.tokens), sizes.longest, end, mask, row, slot)
        hidden = self.backbone.appended(tokens, position, Packing(row, filled + slot, end, [block]), cache)

        if self.score == "valid":
            self._receive(rows, nodes, sizes, hidden[last])
        else:
            chain_left = self.trie.chain_length[nodes.node][owner] - place - 1
            following = self.trie.leaf_tokens[start[owner] + place + (chain_left > 0)].long()
            self._receive(rows, nodes, sizes, hidden, None, Chains(last, length, following, chain_left > 0))

    def _receive(
        self,
        rows: Rows,
        nodes: Nodes,
        sizes: Sizes,
        hidden: torch.Tensor,
        logits: torch.Tensor | None = None,
        chains: Chains | None = None,
    ) -> None:
        """Score the entries of the nodes and put them among the finished items or the open nodes of their rows.

        Parameters
        ----------
        hidden : [N, D], after each node's last token; with `chains` [T, D], after each token
        logits : float32 [E], of the entries, over the temperature, where they are known
        chains : for the score `full`, what was appended; None for the root
        """
        entries = self._entries(nodes, sizes)
        of_chain, of_entry = self._log_probabilities(entries, hidden, logits, chains)
        score = nodes.score if of_chain is None else nodes.score + of_chain
        if sizes.deepest:  # nodes chosen before their scores were known are entries of others: which, and what they add
            at = (entries.counts.cumsum(0) - entries.counts)[nodes.above]
            at += nodes.node - self.trie.first_child[nodes.node[nodes.above]]
            added = of_entry[torch.where(nodes.is_open, 0, at)]
            for _ in range(sizes.deepest):  # one level at a time
                arrived = torch.where(nodes.is_open, nodes.score, score[nodes.above] + added)
                score = arrived if of_chain is None else arrived + of_chain
        row = nodes.row[entries.owner]
        score = reached = score[entries.owner] + of_entry
        if rows.bounds is not None:
            score = score + rows.bounds.below(rows.index[row], entries.node)
        key = keys_of(score, self.trie.first_item[entries.node])
        if sizes.deepest:  # and, having been expanded, they are not open
            at = torch.where(nodes.is_open, sizes.entries, at)
            key = torch.cat([key, key[:1]]).index_fill(0, at, NOTHING)[:-1]

        if rows.allowed is not None:
            below = rows.allowed.within(rows.index[row], self.trie.lo[entries.node], self.trie.hi[entries.node])
            key = torch.where(below > 0, key, NOTHING)
        is_finished = entries.of_leaf | self.expansion.finished_at_sight[entries.node]
        limit = self.config.node_budget if self.config.mode == "exact" else self.config.width
        rows.add(row, key, reached, entries.node, nodes.expansion[entries.owner], is_finished, sizes.widest, limit)

    def _entries(self, nodes: Nodes, sizes: Sizes) -> Entries:
        counts = self.expansion.sizes[nodes.node, 1]
        owner, place = ragged(counts, sizes.entries)
        of_leaf = self.is_leaf[nodes.node][owner]
        node = torch.where(of_leaf, nodes.node[owner], self.trie.first_child[nodes.node][owner] + place)
        return Entries(counts, owner, node, self.trie.first_token[node].clamp(min=0), of_leaf)

    def _log_probabilities(
        self, entries: Entries, hidden: torch.Tensor, logits: torch.Tensor | None, chains: Chains | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What chains add to the scores of their nodes, float32 [N], and entries to those of theirs, float32 [E].

        None where chains add nothing: forced tokens under `valid`, and the root's.
        """
        owner, token = entries.owner, entries.token
        if self.score == "valid":
            logits = self.logits.of(hidden, owner, token) if logits is None else logits
            return None, log_softmax_within(logits, entries.counts, owner)
        if chains is None:
            return None, self.logits.log_probabilities(hidden, owner, token)
        everywhere = torch.arange(len(hidden), device=hidden.device)
        position = torch.cat([everywhere, chains.last[owner]])
        found = self.logits.log_probabilities(hidden, position, torch.cat([chains.following, token]))
        of_token, of_entry = found.split([len(everywhere), len(token)])
        of_token = torch.where(chains.is_scored, of_token, 0.0)
        of_chain = torch.segment_reduce(of_token, "sum", lengths=chains.length, unsafe=True)
        return of_chain, torch.where(entries.of_leaf, 0.0, of_entry)


def _checked(lengths: Sequence[int], k: int | Sequence[int]) -> list[int]:
    """The items wanted for each of the prompts of `lengths` tokens."""
    ks = [k] * len(lengths) if isinstance(k, int) else list(k)
    if len(ks) != len(lengths) or min(ks) < 1:
        raise ValueError(f"k must be at least 1, one for all or one for each of the {len(lengths)} prompts; got {k}")
    if min(lengths) < 1:
        raise ValueError(f"prompt {lengths.index(0)} is empty")
    return ks
