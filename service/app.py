"""The endpoint on Ray Serve: one deployment whose replicas hold the recommender and the HTTP interface."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import Field, ValidationError
from ray import serve
from ray.serve.schema import LoggingConfig

from recommender.bundle import read_manifest
from recommender.config import StrictModel
from recommender.errors import UserError
from recommender.models import Version, default_storage, find_version
from recommender.quiet import quiet
from service.auth import read_tokens
from service.config import ServingConfig

# Of Serve's processes: the controller starts proxies and replicas and gives them its own environment.
_ENVIRONMENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # on busy cores the default of 5 s is missed, again and again
    "RAY_SERVE_SLOW_STARTUP_WARNING_S": "600",  # a large model is opened for minutes
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "service.ingress:middlewares",
    # A request changes threads less often, and crosses from proxy to replica by gRPC instead of as a Ray task.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class UserConfig(StrictModel):
    """What a Serve config file passes in the deployment's `user_config`; `serve deploy` with another is a hot swap."""

    models: dict[str, str] = Field(
        min_length=1,
        description="By the name that requests call it by, the default first: a model's name in `serving.storage` "
        "(`shop`: what is promoted, now and later), name and version (`shop@2`, `shop@latest`), or the path of a "
        "bundle. Every node that runs a replica must see them there.",
    )


class Arguments(StrictModel):
    """What a Serve config file passes in `args`; a change of these starts new replicas."""

    serving: ServingConfig = Field(
        ServingConfig(), description="Limits and batching; host and port are Serve's own `http_options` there."
    )


@serve.ingress()
class Endpoint:
    """A replica: opens the bundles, lets each repeat its golden request, then serves."""

    def __init__(self, serving: ServingConfig):
        quiet()
        from service.logs import to_stderr
        from service.metrics import Metrics
        from service.models import Models

        to_stderr(logging.ERROR if serving.log == "off" else logging.INFO)
        self.models = Models(serving, Metrics())
        self._following: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        from service.api import create_api

        return create_api(self.models, answer_request_id=False)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve these models: at the start, and whenever the deployment's `user_config` changes."""
        try:
            references = UserConfig.model_validate(user_config).models
        except ValidationError as error:  # raised, it would take the replica down
            self.models.keep(f"user_config: {error}")
        else:
            await self.models.swap(references)
        if self._following is None:
            self._following = asyncio.create_task(self.models.follow())

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        self.models.check()


def build(args: dict[str, Any]) -> serve.Application:
    """The Serve application; a Serve config file names it as `import_path: service.app:build`.

    Args:
        args: the fields of `Arguments`.
    """
    return application(Arguments.model_validate(args).serving, None)


def application(serving: ServingConfig, models: UserConfig | None) -> serve.Application:
    """The Serve application.

    Args:
        serving: the endpoint.
        models: what it serves; None: a Serve config file says.
    """
    serving = _with_storage(serving)
    options: dict[str, Any] = {"num_replicas": serving.replicas}
    if serving.max_replicas is not None:
        options["autoscaling_config"] = {
            "min_replicas": serving.replicas,
            "max_replicas": serving.max_replicas,
            "target_ongoing_requests": serving.target_ongoing_requests,
        }
        options["num_replicas"] = None
    # A replica refuses what it has no room for by itself, and there is always room for /health.
    ongoing = serving.max_queue + 100
    deployment = serve.deployment(
        **options,
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        backpressure_config={"retry_after_s": 1},
        health_check_period_s=2,  # how soon a replica that died is missed
        graceful_shutdown_timeout_s=serving.drain_seconds,
        user_config=None if models is None else models.model_dump(),
        ray_actor_options={"num_cpus": serving.threads, "num_gpus": serving.gpus_per_replica},
    )
    return deployment(Endpoint).bind(serving)


def run(references: Sequence[str | Path], config: ServingConfig, blocking: bool) -> None:
    """Serve models on the Ray cluster at RAY_ADDRESS, or on a Ray of its own.

    Args:
        references: names, versions or paths, as `find_bundle` takes them, the default first; requests call a model by
            the name in its manifest, or as `name=reference` says.
        config: the endpoint.
        blocking: say where it listens and serve until Ctrl-C or SIGTERM, then shut down; else return as soon as
            requests are answered, and leave the shutting down (`ray.serve.shutdown()`) to the caller.

    Raises:
        UserError: a bundle cannot be served, two have one name, the tokens cannot be read, the port is taken, or Serve
            runs on this cluster already.
    """
    quiet()
    config = _with_storage(config)
    models = _named(references, config)
    read_tokens(config)
    endpoint = application(config, UserConfig(models=models))
    _check_address(config)
    owns_ray = _connect()
    if serve.status().proxies:
        raise UserError(
            "Ray Serve runs on this cluster already: deploy to it with `serve deploy` (deploy/serve.yaml shows how), "
            "or end it with `serve shutdown`"
        )
    if blocking:  # a service manager's way to say Ctrl-C; Ray would abort
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it puts behind
    try:
        _start(config)
        _deploy(endpoint, ", ".join(map(str, references)))
        if blocking:
            print(_greeting(config, models), flush=True)
        while blocking:
            time.sleep(3600)
    except BaseException as error:
        _stop(owns_ray)
        if not (blocking and isinstance(error, KeyboardInterrupt)):
            raise


def _with_storage(config: ServingConfig) -> ServingConfig:
    """Replicas run elsewhere, in directories of their own: what they are told is absolute."""
    return config.model_copy(update={"storage": config.storage or str(default_storage())})


def _named(references: Sequence[str | Path], config: ServingConfig) -> dict[str, str]:
    """What replicas are to open, by the names that requests use, each bundle whole.

    Only a bare name stays one, so that promotions are followed.
    """
    storage = Path(str(config.storage))
    models: dict[str, str] = {}
    given: dict[str, str] = {}
    for each in map(str, references):
        name, equals, reference = each.partition("=")
        if not equals or os.sep in name or Path(each).exists():
            name, reference = "", each
        found = find_version(reference, storage)
        bundle = found.bundle if isinstance(found, Version) else found
        manifest = read_manifest(bundle)
        name = name or manifest.name
        if name in models:
            raise UserError(
                f"{given[name]} and {each}: both are called {name}; give one another name: ilrec serve {given[name]} "
                f"other={reference}"
            )
        followed = isinstance(found, Version) and (found.storage, found.name) == (storage, reference)
        models[name], given[name] = reference if followed else str(bundle), each
    return models


def _check_address(config: ServingConfig) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another port or host"
            ) from error


def _connect() -> bool:
    """Join Ray, or start one. Returns whether it was started here."""
    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        if "://" in os.environ["RAY_ADDRESS"]:
            raise UserError("RAY_ADDRESS: run this on a machine of the cluster, or deploy with `serve deploy`")
        ray.init(logging_level=logging.ERROR)
        return False
    try:
        ray.init(logging_level=logging.ERROR, address="local", include_dashboard=False)
    except Exception as error:  # of which kind depends on what did not answer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"Ray did not start on this machine: {reason}; on a busy machine the same command may do next time"
        ) from error
    return True


def _start(config: ServingConfig) -> None:
    environment = {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()}
    serve.start(
        http_options={"host": config.host, "port": config.port},
        logging_config=_QUIET,
        controller_options={"runtime_env": {"env_vars": environment}},
    )


def _stop(owns_ray: bool) -> None:
    """Let running requests finish and take everything down that was started here."""
    if owns_ray:
        serve.delete("default")
        ray.shutdown()
    else:
        serve.shutdown()


def _deploy(application: serve.Application, what: str) -> None:
    try:
        serve.run(application, logging_config=_QUIET)
    except RuntimeError as error:
        [deployment] = serve.status().applications["default"].deployments.values()
        raise UserError(_reason(deployment.message, what)) from error


def _reason(message: str, what: str) -> str:
    """What a replica raised, from the traceback that Serve hands over as text."""
    *_, raised = re.split(r"^(?=[\w.]+: )", message, flags=re.MULTILINE)
    kind, _, text = raised.strip().partition(": ")
    return text if kind.endswith("UserError") else f"{what}: cannot be served: {raised.strip()}"


def _greeting(config: ServingConfig, models: dict[str, str]) -> str:
    url = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}"
    served = "".join(f"\n  {name}  ({reference})" for name, reference in models.items())
    return f"""serving, until Ctrl-C:{served}
ready: {url}  (a page to try it; documentation: {url}/docs)

curl -s {url}/v1/recommendations -H 'content-type: application/json' \\
     -d '{{"history": ["<item id or title>"], "k": 5}}'
"""
