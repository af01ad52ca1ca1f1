from __future__ import annotations

import time
from itertools import chain

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from recommender.backbone.backbone import Backbone
from recommender.backbone.cache import TreeCache
from recommender.backbone.packing import Packing
from recommender.config import SearchConfig
from recommender.items.trie import RadixTrie
from recommender.search.frontier import Ranking
from recommender.search.search import TreeSearch

END, VOCABULARY = 0, 24
Identifiers = list[list[int]]


def llama(seed: int = 0, vocabulary: int = VOCABULARY, scale: float = 8.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return scaled(LlamaForCausalLM(config), scale)


def scaled(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    """Peak the predictions, as training does."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * scale / head.weight.std() / 32**0.5 / 2)
    return model.eval()


class Counting(Backbone):
    """Counts the forwards and the tokens that go through the model."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, tokenizer=None)  # type: ignore[arg-type]
        self.forwards: list[int] = []

    def appended(self, tokens, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.forwards.append(len(tokens))
        return super().appended(tokens, *args, **kwargs)


def catalogue(
    seed: int, items: int = 30, alphabet: int = 3, opening: tuple[int, ...] = (), longest: int = 6
) -> Identifiers:
    """Random titles over a short alphabet (they share prefixes), each with a tail that only it has now and then."""
    generator = np.random.default_rng(seed)
    titles: set[tuple[int, ...]] = set()
    while len(titles) < items:
        body = generator.integers(1, alphabet + 1, generator.integers(1, longest + 1)).tolist()
        tail = generator.integers(alphabet + 1, VOCABULARY, generator.integers(0, 4)).tolist()
        titles.add((*opening, *body, *tail, END))
    shuffled = sorted(titles)
    generator.shuffle(shuffled)
    return [list(title) for title in shuffled]


def histories(seed: int, count: int = 4) -> list[list[int]]:
    generator = np.random.default_rng(seed + 1000)
    return [generator.integers(1, VOCABULARY, length).tolist() for length in generator.integers(1, 12, count)]


def build(identifiers: Identifiers) -> RadixTrie:
    return RadixTrie.build(np.array(list(chain(*identifiers)), np.int32), np.cumsum([0, *map(len, identifiers)]))


def tree_search(model: PreTrainedModel, identifiers: Identifiers, **settings: object) -> TreeSearch:
    return TreeSearch(Counting(model), build(identifiers), SearchConfig.model_validate(settings))


@torch.no_grad()
def scores_of_all_items(
    model: PreTrainedModel, prompt: list[int], identifiers: Identifiers, score: str, temperature: float = 1.0
) -> np.ndarray:
    """One plain forward for each item; the valid tokens from sets of prefixes."""
    continuations: dict[tuple[int, ...], set[int]] = {}
    for identifier in identifiers:
        for position, token in enumerate(identifier):
            continuations.setdefault(tuple(identifier[:position]), set()).add(token)
    scores = []
    for identifier in identifiers:
        logits = model(torch.tensor([prompt + identifier])).logits[0, len(prompt) - 1 : -1].double() / temperature
        total = 0.0
        for position, token in enumerate(identifier):
            if score == "valid":
                valid = sorted(continuations[tuple(identifier[:position])])
                total += float(logits[position, valid].log_softmax(0)[valid.index(token)])
            else:
                total += float(logits[position].log_softmax(0)[token])
        scores.append(total)
    return np.array(scores)


def random_terms(seed: int, rows: int, items: int) -> np.ndarray:
    """Terms of both signs; many are equal, so that whole scores tie as well."""
    generator = np.random.default_rng(seed)
    return np.round(generator.normal(0, 4, (rows, items)) * (generator.random((rows, items)) < 0.5)).astype(np.float32)


def assert_true_top(ranking: Ranking, scores: np.ndarray, k: int, allowed: np.ndarray | None = None) -> None:
    """The answer's scores are the items' own, and no other allowed item has a better one."""
    candidates = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
    expected = np.sort(scores[candidates])[::-1][:k]
    assert ranking.exact
    assert len(set(ranking.items.tolist())) == len(ranking.items) == len(expected)
    assert set(ranking.items.tolist()) <= set(candidates.tolist())
    np.testing.assert_allclose(ranking.scores, scores[ranking.items], atol=2e-4)
    np.testing.assert_allclose(ranking.scores, expected, atol=2e-4)


@pytest.mark.parametrize("score", ["valid", "full"])
@pytest.mark.parametrize("opening", [(), (9, 8)], ids=["open", "common-opening"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_exact_equals_enumeration_of_every_item(score: str, opening: tuple[int, ...], temperature: float) -> None:
    for seed in range(3):
        model, identifiers, prompts = llama(seed), catalogue(seed, opening=opening), histories(seed)
        search = tree_search(model, identifiers, score=score, width=1 + 2 * seed, temperature=temperature)
        ks = [1, 5, 10, 100]
        for prompt, k, ranking in zip(prompts, ks, search.search(prompts, ks), strict=True):
            assert_true_top(ranking, scores_of_all_items(model, prompt, identifiers, score, temperature), k)


@pytest.mark.parametrize("score", ["valid", "full"])
def test_filters_prune_and_never_change_a_score(score: str) -> None:
    for seed in range(4):
        model, identifiers, prompts = llama(seed), catalogue(seed, items=40), histories(seed)
        allowed = np.random.default_rng(seed).random((4, 40)) < 0.2
        allowed[0], allowed[1, :] = False, np.arange(40) == 7
        # Lists of what is allowed, of what is not, and one less the other.
        left_out = [np.flatnonzero(~row) for row in allowed]
        exclude = [(), (), left_out[2], left_out[3][:9]]
        allow = [(), [7], None, np.flatnonzero(allowed[3]).tolist() + left_out[3][:9].tolist()]
        rankings = tree_search(model, identifiers, score=score).search(prompts, 10, exclude, allow)
        assert len(rankings[0].items) == 0
        assert rankings[0].exact
        assert rankings[0].expansions == 0
        assert rankings[1].items.tolist() == [7]
        for prompt, ranking, row in zip(prompts, rankings, allowed, strict=True):
            assert_true_top(ranking, scores_of_all_items(model, prompt, identifiers, score), 10, row)


@pytest.mark.parametrize("few", [0, 10**6], ids=["single logits", "all logits"])
def test_logits_of_children_alone_are_those_of_all(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recommender.search.logits._FEW", few)
    for seed in range(2):
        model, identifiers, prompts = llama(seed), catalogue(seed), histories(seed)
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
        for prompt, ranking in zip(prompts, tree_search(model, identifiers).search(prompts, 10), strict=True):
            assert_true_top(ranking, scores_of_all_items(model, prompt, identifiers, "valid"), 10)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_other_backbones(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.2, **shape))
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = Qwen2(Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.2, **shape))
    model, identifiers, prompts = scaled(model, 8.0), catalogue(5), histories(5)
    for prompt, ranking in zip(prompts, tree_search(model, identifiers, width=3).search(prompts, 5), strict=True):
        assert_true_top(ranking, scores_of_all_items(model, prompt, identifiers, "valid"), 5)


@pytest.mark.parametrize("score", ["valid", "full"])
def test_ties_rank_the_lower_index_first(score: str) -> None:
    """Without a head every branch is uniform, so that many items tie exactly."""
    model, identifiers, prompts = llama(), catalogue(2, items=40, alphabet=2), histories(2)
    model.lm_head.weight.data.zero_()
    scores = scores_of_all_items(model, prompts[0], identifiers, score).round(4)
    assert len(set(scores)) < 30
    expected = np.lexsort((np.arange(40), -scores))
    for k in (1, 3, 7, 12, 40):
        for ranking in tree_search(model, identifiers, score=score, width=4).search(prompts, k):
            assert ranking.exact
            assert ranking.items.tolist() == expected[:k].tolist()


@pytest.mark.parametrize("score", ["valid", "full"])
def test_unequal_prompts_together_equal_one_by_one(score: str) -> None:
    model, identifiers, prompts = llama(3), catalogue(3, items=60), histories(3, count=9)
    search = tree_search(model, identifiers, score=score, width=4)
    ks = [1, 2, 3, 4, 5, 6, 7, 20, 40]
    together = search.search([np.array(prompt) for prompt in prompts], ks)
    for prompt, k, ranking in zip(prompts, ks, together, strict=True):
        (alone,) = search.search([prompt], k)
        assert ranking.items.tolist() == alone.items.tolist()
        np.testing.assert_allclose(ranking.scores, alone.scores, atol=1e-4)
        assert (ranking.exact, ranking.expansions) == (alone.exact, alone.expansions)


@torch.no_grad()
def token_synchronous_beam(
    model: PreTrainedModel, prompt: list[int], identifiers: Identifiers, width: int
) -> list[tuple[float, int]]:
    """`generate`'s constrained beam search in plain Python: all hypotheses advance by one token at a time."""
    prefixes = {tuple(identifier[:length]) for identifier in identifiers for length in range(1, len(identifier) + 1)}
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []
    while running:
        candidates = []
        for score, prefix in running:
            log_probabilities = model(torch.tensor([prompt + list(prefix)])).logits[0, -1].log_softmax(0)
            for token in range(VOCABULARY):
                if (*prefix, token) in prefixes:
                    candidates.append((score + float(log_probabilities[token]), (*prefix, token)))
        candidates.sort(reverse=True)
        finished += [candidate for candidate in candidates[:width] if candidate[1][-1] == END]
        finished = sorted(finished, reverse=True)[:width]
        running = [candidate for candidate in candidates if candidate[1][-1] != END][:width]
        if len(finished) == width and running and running[0][0] <= finished[-1][0]:
            break
    return [(score, identifiers.index(list(prefix))) for score, prefix in finished]


def test_token_synchronous_reference_equals_generate_and_full_scores_equal_its_scores() -> None:
    width = 4
    for seed in range(6):
        model, identifiers, (prompt, *_) = llama(seed), catalogue(seed, items=25), histories(seed)
        reference = token_synchronous_beam(model, prompt, identifiers, width)

        prefixes = {tuple(i[:length]) for i in identifiers for length in range(1, len(i) + 1)}

        def valid(_row: int, tokens: torch.Tensor, start: int = len(prompt), prefixes: set = prefixes) -> list[int]:
            prefix = tuple(tokens[start:].tolist())
            return [token for token in range(VOCABULARY) if (*prefix, token) in prefixes] or [END]

        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            prefix_allowed_tokens_fn=valid,
            length_penalty=0.0,
            early_stopping=False,
            do_sample=False,
            max_new_tokens=max(map(len, identifiers)),
            eos_token_id=END,
            pad_token_id=END,
            bos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        spelled = [sequence[len(prompt) :].tolist() for sequence in generated.sequences]
        ended = [sequence[: sequence.index(END) + 1] for sequence in spelled]
        assert ended == [identifiers[item] for _, item in reference]
        np.testing.assert_allclose(generated.sequences_scores, [score for score, _ in reference], atol=1e-4)

        (ours,) = tree_search(model, identifiers, score="full").search([prompt], len(identifiers))
        score_of = dict(zip(ours.items.tolist(), ours.scores.tolist(), strict=True))
        for score, item in reference:
            assert score_of[item] == pytest.approx(score, abs=1e-4)
        # Where the beam kept the best, ours lists the same; the true top is never worse.
        assert (ours.scores[:width] >= np.array([score for score, _ in reference]) - 1e-4).all()


def test_spent_budget_is_not_called_exact() -> None:
    model, identifiers, prompts = llama(1, scale=1.0), catalogue(1, items=60, alphabet=2), histories(1)
    for budget in (1, 3, 5):
        for ranking in tree_search(model, identifiers, node_budget=budget, width=2).search(prompts, 20):
            assert not ranking.exact
            assert ranking.expansions == budget
            assert (np.diff(ranking.scores) <= 0).all()
    assert all(ranking.exact for ranking in tree_search(model, identifiers, node_budget=60).search(prompts, 20))


@pytest.mark.parametrize("score", ["valid", "full"])
def test_beam_keeps_width_nodes_per_level_and_certifies_only_the_truth(score: str) -> None:
    outcomes = set()
    for seed in range(3):
        model, identifiers, prompts = llama(seed), catalogue(seed, items=40, alphabet=2), histories(seed, count=3)
        for width in (1, 3, 60):
            search = tree_search(model, identifiers, score=score, mode="beam", width=width)
            for prompt, ranking in zip(prompts, search.search(prompts, 5), strict=True):
                scores = scores_of_all_items(model, prompt, identifiers, score)
                np.testing.assert_allclose(ranking.scores, scores[ranking.items], atol=2e-4)
                if ranking.exact:
                    assert_true_top(ranking, scores, 5)
                outcomes.add((width, ranking.exact))
    assert (60, False) not in outcomes
    assert {(1, False), (60, True)} <= outcomes


def test_beam_equals_a_level_wise_reference() -> None:
    """`valid`: at every level the best `width` branching nodes go on, whatever their depth in tokens."""
    width, k = 2, 4
    for seed in range(6):
        model, identifiers, (prompt, *_) = llama(seed), catalogue(seed, items=40), histories(seed)
        scores = scores_of_all_items(model, prompt, identifiers, "valid")
        search = tree_search(model, identifiers, mode="beam", width=width)
        trie = build(identifiers)
        beam, finished = [0], []
        while beam:
            children = [c for n in beam for c in range(trie.first_child[n], trie.first_child[n] + trie.child_count[n])]
            finished += [int(trie.item_of_leaf[trie.lo[c]]) for c in children if trie.child_count[c] == 0]
            # A node's score is the mass under it, since log-probabilities of children sum to their parent's.
            mass = {c: np.logaddexp.reduce(scores[trie.item_of_leaf[trie.lo[c] : trie.hi[c]]]) for c in children}
            beam = sorted((c for c in children if trie.child_count[c]), key=lambda c: -mass[c])[:width]
        expected = sorted(finished, key=lambda item: -scores[item])[:k]
        assert search.search([prompt], k)[0].items.tolist() == expected


def test_a_catalogue_that_parts_at_the_first_token_needs_the_prompt_alone() -> None:
    identifiers = [[token, 1, 2, 3, END] for token in range(4, 20)]
    search = tree_search(llama(), identifiers)
    rankings = search.search([[1, 2, 3], [4]], 5)
    assert search.backbone.forwards == [3 + 1]  # type: ignore[attr-defined]
    assert all(ranking.exact and ranking.expansions == 0 for ranking in rankings)


def test_a_chain_costs_one_append_of_its_tokens() -> None:
    identifiers = [[5, 6, 7, 8, 9, END], [5, 6, 7, 8, 10, 11, END], [5, 6, 7, 12, END]]
    valid = tree_search(llama(), identifiers, width=1)
    full = tree_search(llama(), identifiers, score="full", width=1)
    assert valid.search([[1, 2]], 3)[0].expansions == 2
    assert valid.backbone.forwards == [2, 3, 1]  # type: ignore[attr-defined]  # prompt; 5 6 7; 8
    # prompt; 5 6 7; then 8, 12, 9 and 10 11 in some order. No end token is run: nothing follows it.
    assert full.search([[1, 2]], 3)[0].expansions == 5
    assert full.backbone.forwards[:2] == [2, 3]  # type: ignore[attr-defined]
    assert sorted(full.backbone.forwards[2:]) == [1, 1, 1, 2]  # type: ignore[attr-defined]


def test_what_will_probably_be_wanted_is_expanded_in_the_same_forward() -> None:
    identifiers = [[5, 6, 7, 8, 9, END], [5, 6, 7, 8, 10, 11, END], [5, 6, 7, 12, END]]
    valid, full = tree_search(llama(), identifiers), tree_search(llama(), identifiers, score="full")
    assert valid.search([[1, 2]], 3)[0].expansions == 2
    assert valid.backbone.forwards == [2, 3 + 1]  # type: ignore[attr-defined]  # prompt; 5 6 7 and 8
    assert full.search([[1, 2]], 3)[0].expansions == 5
    assert full.backbone.forwards == [2, 3 + 1 + 1 + 1 + 2]  # type: ignore[attr-defined]

    for seed in range(4):
        few, many = (tree_search(llama(seed), catalogue(seed, items=60), width=width) for width in (1, 40))
        for one, other in zip(few.search(histories(seed), 10), many.search(histories(seed), 10), strict=True):
            assert one.items.tolist() == other.items.tolist()
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
        assert len(many.backbone.forwards) < len(few.backbone.forwards) / 3  # type: ignore[attr-defined]


def test_steps_widen_for_those_who_need_many_nodes() -> None:
    identifiers, (prompt, *_) = catalogue(1, items=60, alphabet=2), histories(1)
    search = tree_search(llama(1, scale=1.0), identifiers, width=2)
    (ranking,) = search.search([prompt], 60)
    steps = len(search.backbone.forwards) - 1  # type: ignore[attr-defined]
    assert ranking.exact
    assert ranking.expansions > 2 * steps  # two at a time for four steps, then four, and so on
    assert ranking.expansions <= sum(2 << step // 4 for step in range(steps))


def test_rows_that_are_done_are_dropped_once_they_are_more_than_half(monkeypatch: pytest.MonkeyPatch) -> None:
    model, identifiers, prompts = llama(3, scale=1.0), catalogue(3, items=60, alphabet=2), histories(3, count=5)
    kept: list[int] = []
    own = TreeCache.keep_rows
    monkeypatch.setattr(TreeCache, "keep_rows", lambda cache, rows: (kept.append(len(rows)), own(cache, rows)))
    search = tree_search(model, identifiers, width=2)
    rankings = search.search(prompts, [1, 1, 60, 1, 60])
    assert kept[0] == 2
    for prompt, k, ranking in zip(prompts, [1, 1, 60, 1, 60], rankings, strict=True):
        assert_true_top(ranking, scores_of_all_items(model, prompt, identifiers, "valid"), k)


@pytest.mark.parametrize("score", ["valid", "full"])
def test_one_item(score: str) -> None:
    model, identifiers = llama(), [[3, 4, END]]
    for ranking in tree_search(model, identifiers, score=score).search([[1], [2, 5]], 10):
        assert ranking.items.tolist() == [0]
        assert ranking.exact
    np.testing.assert_allclose(ranking.scores, scores_of_all_items(model, [2, 5], identifiers, score), atol=1e-4)


@pytest.mark.parametrize(("prompts", "k"), [([[1], []], 3), ([[1]], 0), ([[1], [2]], [3])])
def test_refuses(prompts: list[list[int]], k: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 is empty|k must be"):
        tree_search(llama(), catalogue(0)).search(prompts, k)


def test_refuses_a_model_in_training_mode() -> None:
    with pytest.raises(RuntimeError, match="eval"):
        tree_search(llama().train(), catalogue(0)).search([[1]], 1)


def test_the_cache_grows_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    search, prompts = tree_search(llama(4), catalogue(4, items=60), width=2), histories(4)
    roomy = search.search(prompts, 40)
    monkeypatch.setattr("recommender.search.search.HEADROOM", 0)
    for one, other in zip(roomy, search.search(prompts, 40), strict=True):
        assert one.items.tolist() == other.items.tolist()
        np.testing.assert_array_equal(one.scores, other.scores)


def test_the_cache_puts_tokens_into_their_rows() -> None:
    cache = TreeCache(layers=1, rows=2, capacity=6)

    def write(row: list[int], slot: list[int], end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        new = torch.rand(1, 3, len(row), 8)  # of 3 heads
        cache.write_at(Packing(torch.tensor(row), torch.tensor(slot), end, []))
        keys, values = cache.update(new, new + 1, 0)
        assert torch.equal(keys[row, :, slot], new[0].transpose(0, 1))
        written = keys != 0
        assert torch.equal(values[written], keys[written] + 1)
        return new, keys, written

    first, keys, written = write([0, 0, 1], [0, 1, 0], 2)
    assert written.sum() == first.numel()
    second, later, written = write([0, 1, 1], [2, 4, 2], 5)
    assert later.data_ptr() == keys.data_ptr()
    assert written.sum() == first.numel() + second.numel()
    assert torch.equal(later[0, :, :2], first[0, :, :2])
    assert cache.end == 5
    third, grown, written = write([1], [6], 7)
    assert grown.shape[2] == 14
    assert torch.equal(grown[:, :, :6].masked_fill(~written[:, :, :6], 0), later)
    assert written.sum() == first.numel() + second.numel() + third.numel()


def test_blocks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    identifiers, prompts = catalogue(4), histories(4)
    for score in ("valid", "full"):
        search = tree_search(llama(4), identifiers, score=score)
        whole = search.search(prompts, 8)
        with monkeypatch.context() as patch:
            patch.setattr("recommender.search.logits._AT_ONCE", 3 * VOCABULARY)
            for one, other in zip(whole, search.search(prompts, 8), strict=True):
                assert one.items.tolist() == other.items.tolist()
                np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_a_hundred_thousand_items() -> None:
    generator = np.random.default_rng(0)
    tokens = np.unique(generator.integers(1, 1000, (100_000, 5)), axis=0)
    tokens[:, -1] = END
    tokens = np.unique(tokens, axis=0)
    trie = RadixTrie.build(tokens.ravel(), np.arange(len(tokens) + 1) * 5)
    search = TreeSearch(Counting(llama(vocabulary=1000, scale=12.0)), trie, SearchConfig())
    started = time.perf_counter()
    rankings = search.search([[1, 2, 3], [4, 5]], 10)
    assert time.perf_counter() - started < 5
    assert all(ranking.exact and len(ranking.items) == 10 for ranking in rankings)


# -- Terms that are added to the items' scores ------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["valid", "full"])
@pytest.mark.parametrize("opening", [(), (9, 8)], ids=["open", "common-opening"])
@pytest.mark.parametrize("seed", range(6))
def test_the_top_with_terms_is_that_of_enumeration(seed: int, opening: tuple[int, ...], score: str) -> None:
    model, identifiers, prompts = llama(seed), catalogue(seed, opening=opening), histories(seed)
    terms = random_terms(seed, len(prompts), len(identifiers))
    found = tree_search(model, identifiers, score=score, node_budget=1000).search(
        prompts, 7, terms=torch.from_numpy(terms)
    )
    for prompt, ranking, row in zip(prompts, found, terms, strict=True):
        assert_true_top(ranking, scores_of_all_items(model, prompt, identifiers, score) + row, 7)


@pytest.mark.parametrize("score", ["valid", "full"])
@pytest.mark.parametrize("seed", range(4))
def test_filters_and_terms(seed: int, score: str) -> None:
    model, identifiers, prompts = llama(seed), catalogue(seed, items=40), histories(seed)
    terms = random_terms(seed, len(prompts), len(identifiers))
    generator = np.random.default_rng(seed)
    best = [np.argsort(-row)[:5].tolist() for row in terms]  # what the terms like most is what may not come
    allow = [None, generator.permutation(40)[:12].tolist(), best[2] + [0, 1, 2], None]
    exclude = [best[0], best[1], [], generator.permutation(40)[:30].tolist()]
    search = tree_search(model, identifiers, score=score, node_budget=1000)
    found = search.search(prompts, 6, exclude, allow, torch.from_numpy(terms))
    for row, (prompt, ranking) in enumerate(zip(prompts, found, strict=True)):
        allowed = np.ones(40, bool) if allow[row] is None else np.isin(np.arange(40), allow[row])
        allowed[exclude[row]] = False
        scores = scores_of_all_items(model, prompt, identifiers, score) + terms[row]
        assert_true_top(ranking, scores, 6, allowed)


def test_a_list_with_terms_is_the_same_in_any_batch() -> None:
    model, identifiers, prompts = llama(), catalogue(0, items=60), histories(0, 6)
    terms = torch.from_numpy(random_terms(0, 6, 60))
    search = tree_search(model, identifiers, node_budget=1000)
    together = search.search(prompts, 5, terms=terms)
    for row, prompt in enumerate(prompts):
        [alone] = search.search([prompt], 5, terms=terms[row : row + 1])
        assert alone.items.tolist() == together[row].items.tolist()


def test_terms_of_nothing_change_nothing() -> None:
    model, identifiers, prompts = llama(), catalogue(0), histories(0)
    search = tree_search(model, identifiers)
    plain, zeros = search.search(prompts, 5), search.search(prompts, 5, terms=torch.zeros(len(prompts), 30))
    for one, other in zip(plain, zeros, strict=True):
        assert one.items.tolist() == other.items.tolist()
        assert one.scores.tolist() == other.scores.tolist()
        assert one.expansions == other.expansions


def test_equal_scores_rank_in_the_order_of_the_catalogue() -> None:
    """Where the terms outweigh everything, items of one term come by what the model says, and ties by their index."""
    model, identifiers = llama(), [[1, 2, END], [1, 3, END], [2, 1, END], [2, 4, END]]
    [plain] = tree_search(model, identifiers).search([[5]], 4)
    terms = torch.zeros(1, 4)
    terms[0, plain.items.tolist()] = -torch.from_numpy(plain.scores)
    [ranking] = tree_search(model, identifiers).search([[5]], 4, terms=terms)
    assert ranking.items.tolist() == sorted(
        ranking.items.tolist(),
        key=lambda i: (-np.float32(plain.scores[plain.items.tolist().index(i)] + terms[0, i].item()), i),
    )
    assert ranking.scores.tolist() == [0.0] * 4
    assert ranking.items.tolist() == [0, 1, 2, 3]


def test_good_terms_make_a_search_shorter() -> None:
    """A prior that knows where the good items are bounds the others away."""
    model, identifiers, prompts = llama(scale=2.0), catalogue(3, items=80, alphabet=4), histories(3)
    search = tree_search(model, identifiers, node_budget=1000, width=1)
    plain = search.search(prompts, 3)
    terms = torch.full((len(prompts), 80), -20.0)
    for row, ranking in enumerate(plain):
        terms[row, ranking.items.tolist()] = 0.0
    found = search.search(prompts, 3, terms=terms)
    assert [each.items.tolist() for each in found] == [each.items.tolist() for each in plain]
    assert sum(each.expansions for each in found) < sum(each.expansions for each in plain)
