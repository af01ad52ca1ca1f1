"""Fixtures that several packages' tests share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from recommender.config import PresetBackbone, PromptConfig
from trainer.config import ClusterConfig, EvaluationConfig, TrainingConfig
from trainer.experiment import Experiment
from trainer.parts import Prepared
from trainer.world.config import WorldConfig

# Before anything imports torch and Ray, which read them once. The tensors are tiny: threads would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process for each run; test_survival.py has it


_CLUSTERS = ("service/", "deploy/", "trainer/loop/test_survival.py")  # Serve, job servers, clusters of several nodes


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """In two processes (`pytest -n 2`): what shares a Ray runs in one of them, so do endpoints and clusters; all else
    goes by file to whoever is free.

    By files, since xdist 3.8 does not see the groups of tests under pytest 9.2 (pytest-dev/pytest-xdist#1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    here = Path(__file__).parent

    @cache
    def group(file: str) -> str:
        path = config.rootpath / file
        if path.relative_to(here).as_posix().startswith(_CLUSTERS):
            return "clusters"
        return "ray" if "ray_cluster" in path.read_text() else file

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid.partition("::")[0])

    return ByGroup(config, log)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for the whole session: starting it takes seconds. It has more CPUs than many a machine."""
    import ray

    from trainer.cluster import connect

    connect(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A world of 200 items and 60 users, a preset with a small vocabulary; an epoch is six steps."""
    return Experiment(
        name="tiny",
        world=WorldConfig(items=200, users=60, kinds=10, brands=8, uses=3, mean_length=8, min_length=5, max_length=20),
        prompt=PromptConfig(history=8),
        backbone=PresetBackbone(size="tiny", vocabulary=400),
        training=TrainingConfig(epochs=3, batch_tokens=700, learning_rate=1e-3, checkpoint_every=2, patience=3),
        cluster=ClusterConfig(workers=2, storage=str(tmp_path_factory.mktemp("runs"))),
        evaluation=EvaluationConfig(exclude_seen=True, batch=16, bootstrap=100),
    )


@pytest.fixture(scope="session")
def tiny_prepared(tiny_experiment: Experiment) -> Prepared:
    """What `ilrec prepare` makes for the tiny world."""
    from trainer.prepare import prepare

    return prepare(tiny_experiment, lambda text: None)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_experiment: Experiment, tiny_prepared: Prepared) -> Path:
    """A bundle with random weights over the tiny world, made without Ray. Not to be changed."""
    from recommender.backbone.backbone import load_backbone
    from recommender.bundle import Manifest
    from recommender.items.item_space import ItemSpace
    from recommender.recommender import Recommender
    from trainer.run import begin

    space = ItemSpace.load(tiny_prepared.items)
    backbone = load_backbone(tiny_experiment.backbone, space.tokenizer, seed=1)
    random = tiny_experiment.model_copy(update={"name": "random"})
    version = begin(random, tiny_prepared, say=lambda text: None)
    Recommender(space, backbone, Manifest(name="tiny", metrics={"validation_NDCG@10": 0.1})).save(version.bundle)
    return version.bundle


def add_version(storage: Path, name: str, bundle: Path) -> Path:
    """A copy of a bundle as the next version of a model, complete. Returns where it lies."""
    from recommender.bundle import MANIFEST
    from recommender.models import Model

    version = Model(storage, name).begin()
    shutil.copytree(bundle, version.bundle)
    path = version.bundle / MANIFEST
    manifest = json.loads(path.read_text()) | {"name": name, "version": version.number}
    path.write_text(json.dumps(manifest))
    return version.bundle
