"""Experiments on a Ray cluster through Ray Client, at ray://<head>:10001: they end with the command that began them."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from deploy.jobs import check_reachable, check_room, command, explained, packed
from trainer.experiment import Experiment
from trainer.parts import Say

_INTERRUPTED = 130
_TRIES = 3  # the cluster forks a server for each client while it talks to others, and now and then that one dies


def run(
    address: str,
    verb: str,
    experiment: Experiment,
    values: Mapping[str, Any],
    options: Sequence[str],
    wheel: Path | None,
    say: Say,
) -> int:
    """Run `ilrec <verb>` on the head of a cluster and print what it says. Ctrl-C ends it there; its checkpoints stay.

    Args:
        address: of the cluster's Ray Client server.
        values: the experiment as its file gives it.
        options: further arguments of the verb.
        wheel: take the code from this file, and not from the checkout that runs here.

    Returns:
        Its exit status; 130 after Ctrl-C.

    Raises:
        UserError: nothing answers there within seconds, the token is missing or wrong, the cluster is too small, or
            there is no code to send or too much of it.
    """
    check_reachable(address, {"ray": 10001}, "the cluster's Ray Client server, ray://<head>:10001")
    for name in ("INITIAL", "MAX"):
        os.environ.setdefault(f"RAY_CLIENT_{name}_CONNECTION_TIMEOUT_S", "3")  # of which Ray waits three
    with packed(experiment, values, wheel, say) as directory, explained(address):
        _connect(address, directory)
        try:
            check_room(verb, experiment, ray.cluster_resources())
            there: Any = ray.remote(Command)
            head = {"node:__internal_head__": 0.001}
            return _follow(
                there.options(num_cpus=0, resources=head, max_concurrency=2).remote(command(verb, options)), say
            )
        finally:
            ray.shutdown()


def _connect(address: str, directory: Path) -> None:
    for left in reversed(range(_TRIES)):
        try:
            ray.init(
                address, runtime_env={"working_dir": str(directory)}, logging_level=logging.ERROR, log_to_driver=False
            )
            return
        except ConnectionAbortedError:
            if not left:
                raise


def _follow(there: Any, say: Say) -> int:
    """Print what a command says until it ends; returns its exit status."""
    interrupted, said = False, there.read.remote()
    while True:
        try:
            text = ray.get(said)
            if not text:
                status = int(ray.get(there.status.remote()))
                return _INTERRUPTED if interrupted else status
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
            said = there.read.remote()
        except KeyboardInterrupt:
            if interrupted:
                raise  # twice: whatever is left ends with the connection
            interrupted = True
            say("\nending it; what it has saved stays")
            ray.get(there.interrupt.remote())


class Command:
    """A command on the head, as a job's is: a driver of its own. It ends with this actor, and that with the client.

    Args:
        arguments: of Python, after `-m`.
    """

    def __init__(self, arguments: Sequence[str]):
        context = ray.get_runtime_context()
        environment = os.environ | {
            "RAY_ADDRESS": context.gcs_address,
            RAY_JOB_CONFIG_JSON_ENV_VAR: json.dumps({"runtime_env": dict(context.runtime_env)}),
            "PYTHONUNBUFFERED": "1",
        }
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray blocks it here, and a child inherits that
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def read(self) -> bytes:
        """What it has said since; waits for something. Empty at the end."""
        assert self._process.stdout is not None
        return os.read(self._process.stdout.fileno(), 1 << 16)

    def status(self) -> int:
        """Its exit status, as a shell's."""
        status = self._process.wait()
        return status if status >= 0 else 128 - status

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)
