"""The endpoint on Ray Serve: one deployment whose replicas hold the recommender and the HTTP interface."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import time
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
from service.auth import read_tokens
from service.config import ServingConfig

# Of Serve's processes: the controller starts proxies and replicas and gives them its own environment.
_ENVIRONMENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # on busy cores the default of 5 s is missed, again and again
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
        description="Directory of the bundle by the name that requests call it by, the default first; every node that "
        "runs a replica must see them there.",
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
        from transformers.utils import logging as transformers_logging

        from service.logs import to_stderr
        from service.metrics import Metrics
        from service.models import Models

        transformers_logging.disable_progress_bar()
        to_stderr(logging.ERROR if serving.log == "off" else logging.INFO)
        self.models = Models(serving, Metrics())

    def __serve_build_asgi_app__(self) -> FastAPI:
        from service.api import create_api

        return create_api(self.models, answer_request_id=False)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve these bundles: at the start, and whenever the deployment's `user_config` changes."""
        try:
            bundles = UserConfig.model_validate(user_config).models
        except ValidationError as error:  # raised, it would take the replica down
            self.models.keep(f"user_config: {error}")
        else:
            await self.models.swap(bundles)

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


def run(bundle: str | Path, config: ServingConfig, blocking: bool) -> None:
    """Serve a bundle on the Ray cluster at RAY_ADDRESS, or on a Ray of its own.

    Args:
        bundle: the directory that `ilrec train` wrote.
        config: the endpoint.
        blocking: serve until Ctrl-C or SIGTERM, then shut down; else return as soon as requests are answered, and
            leave the shutting down (`ray.serve.shutdown()`) to the caller.

    Raises:
        UserError: the bundle cannot be served, the tokens cannot be read, the port is taken, or Serve runs on this
            cluster already.
    """
    directory = Path(bundle).expanduser().absolute()
    models = UserConfig(models={read_manifest(directory).name: str(directory)})
    read_tokens(config)
    endpoint = application(config, models)
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
        _deploy(endpoint, bundle)
        print(_greeting(config), flush=True)
        while blocking:
            time.sleep(3600)
    except BaseException as error:
        _stop(owns_ray)
        if not (blocking and isinstance(error, KeyboardInterrupt)):
            raise


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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_ADDRESS"):
        if "://" in os.environ["RAY_ADDRESS"]:
            raise UserError("RAY_ADDRESS: run this on a machine of the cluster, or deploy with `serve deploy`")
        ray.init(logging_level=logging.WARNING)
        return False
    ray.init(logging_level=logging.WARNING, address="local", include_dashboard=False)
    return True


def _start(config: ServingConfig) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
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


def _deploy(application: serve.Application, bundle: str | Path) -> None:
    try:
        serve.run(application, logging_config=_QUIET)
    except RuntimeError as error:
        [deployment] = serve.status().applications["default"].deployments.values()
        raise UserError(_reason(deployment.message, bundle)) from error


def _reason(message: str, bundle: str | Path) -> str:
    """What a replica raised, from the traceback that Serve hands over as text."""
    *_, raised = re.split(r"^(?=[\w.]+: )", message, flags=re.MULTILINE)
    kind, _, text = raised.strip().partition(": ")
    return text if kind.endswith("UserError") else f"{bundle}: cannot be served: {raised.strip()}"


def _greeting(config: ServingConfig) -> str:
    url = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}"
    return f"""ready: {url}  (a page to try it; documentation: {url}/docs)

curl -s {url}/v1/recommendations -H 'content-type: application/json' \\
     -d '{{"history": ["<item id or title>"], "k": 5}}'
"""
