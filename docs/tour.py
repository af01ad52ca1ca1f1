# %% [markdown]
# # A tour in Python
# A small world, a small model, a minute on a laptop: `python docs/tour.py`, or cell by cell in an editor that knows
# `# %%`. What it makes lies in `runs/` of the directory that you start it from.

# %% An experiment is what a YAML file holds
import ilrec

config = {
    "name": "tour",
    "world": {"items": 200, "users": 60, "kinds": 10, "brands": 8, "uses": 3, "mean_length": 8, "max_length": 20},
    "prompt": {"history": 8},
    "backbone": {"kind": "preset", "size": "tiny", "vocabulary": 400},
    "objective": {"kind": "msl"},
    "training": {"epochs": 1, "batch_tokens": 700},
    "cluster": {"workers": 1},
    "evaluation": {"bootstrap": 100, "exclude_seen": True},
}
run = ilrec.experiment(config)

# %% Data: a world is simulated, read, cleaned and split; its titles are spelled in tokens
prepared = run.prepare()
print(prepared.stats()["users"], "users,", prepared.stats()["items"], "items")

# %% One epoch on Ray Train, and the model's first version
first = run.train()
print(first, first.manifest.metrics)

# %% Every test target against the whole catalogue, the floors beside it
evaluation = run.evaluate()
print(evaluation.standing)
print({system: round(of["NDCG@10"], 4) for system, of in evaluation.metrics.items()})
print(evaluation.per_target.select(["user_id", "rank", "history_length"]).slice(0, 3).to_pylist())

# %% Ask it: for a user of the data, with filters
tour = run.recommender()
user, history = next(iter(run.histories().items()))
print(user, [tour.catalogue.titles[tour.catalogue.index_of(item)] for item in history])
best = tour.recommend(history, k=5)
print(best)

brands = dict(zip(tour.catalogue.item_ids, tour.catalogue.columns["brand"].to_pylist(), strict=True))
brand = brands[best[0].item_id]
print(tour.recommend(history, k=3, where={"brand": brand}))
print(tour.recommend(history, k=3, max_per={"brand": 1}))

# %% Why: the tokens that spell an item, and what each of them adds to its score
why = tour.explain(history, best[0].item_id)
print(why)

# %% Another version of the same name: item-to-item counts, fitted in a moment
second = ilrec.experiment(config, set={"recommender": {"kind": "itemknn"}}).train()
shelf = ilrec.models(run.config.storage)["tour"]
print("the name stands for", shelf.promoted, "of", [str(version) for version in shelf.versions])

# %% Let the name stand for it, and take that back
shelf.promote(second)
print(run.recommender())
shelf.rollback()
print(run.recommender())
