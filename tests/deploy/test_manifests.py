"""The manifests against KubeRay's schemas, and against what they run."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.jobs import check_paths
from service.app import Arguments, UserConfig
from trainer.experiment import Experiment
from tune.space import check_sweep

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
SCHEMAS = json.loads((Path(__file__).parent / "kuberay-1.7.0.schema.json").read_text())


def documents(path: Path) -> dict[str, Any]:
    """By kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


def resource(path: Path) -> Any:
    return next(document for kind, document in documents(path).items() if kind.startswith("Ray"))


def cluster(path: Path) -> Any:
    spec = resource(path)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def problems(document: Any) -> list[str]:
    schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": SCHEMAS["$defs"]}
    return [error.json_path for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kuberay_knows_every_field(path: Path) -> None:
    document = resource(path)
    assert problems(document) == []
    document["spec"]["entrypont"] = "ilrec train"
    assert problems(document) == ["$.spec"]


def test_each_kind_is_there() -> None:
    assert {path.name: resource(path)["kind"] for path in MANIFESTS} == {
        "cluster.yaml": "RayCluster",
        "serve.yaml": "RayService",
        "train.yaml": "RayJob",
        "tune.yaml": "RayJob",
    }


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_share_image_storage_and_ray(path: Path) -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    spec = cluster(path)
    assert pinned is not None
    assert spec["rayVersion"] == pinned[1]
    assert spec["authOptions"]["mode"] == "token"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert container["image"] == f"ilrec:{version}"
        assert {"name": "shared", "mountPath": "/mnt/ilrec"} in container["volumeMounts"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", ["train.yaml", "tune.yaml"])
def test_jobs_run_a_valid_experiment_on_enough_gpus(name: str) -> None:
    path = ROOT / "deploy" / "kubernetes" / name
    values = yaml.safe_load(documents(path)["ConfigMap"]["data"]["experiment.yaml"])
    experiment = Experiment.model_validate(values)
    if name == "tune.yaml":
        check_sweep(experiment)
    check_paths(values, experiment.cluster.storage)
    assert all(file.startswith("/mnt/ilrec/") for file in (experiment.cluster.storage, values["data"]["items"]))
    [workers] = cluster(path)["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert workers["replicas"] * int(limits["nvidia.com/gpu"]) >= experiment.cluster.workers
    assert int(limits["cpu"]) >= experiment.cluster.cpus_per_worker
    verbs = re.findall(r"ilrec (\w+) /etc/ilrec/experiment.yaml", resource(path)["spec"]["entrypoint"])
    assert verbs == {"train.yaml": ["train", "evaluate"], "tune.yaml": ["tune"]}[name]


def test_the_endpoint_is_that_of_the_serve_config() -> None:
    theirs = yaml.safe_load(resource(ROOT / "deploy" / "kubernetes" / "serve.yaml")["spec"]["serveConfigV2"])
    ours = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    for config in (theirs, ours):
        ServeDeploySchema.model_validate(config)
        [application] = config["applications"]
        Arguments.model_validate(application["args"])
        [deployment] = application["deployments"]
        UserConfig.model_validate(deployment["user_config"])
        application["args"] = deployment["user_config"] = config["http_options"]["host"] = None
    assert theirs == ours
