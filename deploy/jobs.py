"""Experiments as jobs of a Ray cluster: submitted, followed and stopped through its job server (the dashboard)."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from aiohttp import ClientError
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from rich.console import Console
from rich.table import Column, Table

from recommender.custom import travelling
from recommender.errors import UserError
from trainer.cluster import check_fits
from trainer.experiment import Experiment, custom_classes
from trainer.parts import Say

_CHECKOUT = Path(__file__).parents[1]
_LARGEST_UPLOAD = 100 * 2**20  # Ray keeps packages in the head's memory
_PATIENCE = 5  # seconds to connect
_PATHS = (
    "cluster.storage",
    "data.interactions",
    "data.items",
    "data.train",
    "data.validation",
    "data.test",
    "backbone.path",
    "init_from",
    "collaborative.path",
)
_MODELS = ("init_from", "collaborative.path")  # may be names, which are looked up in the storage there


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server at `address`, http://<head>:8265.

    Ray's client sends the cluster's token by itself where RAY_AUTH_MODE=token.

    Raises:
        UserError: nothing answers there within seconds, or the token is missing or wrong.
    """
    check_reachable(address, {"http": 80, "https": 443}, "the cluster's dashboard, http://<head>:8265")
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers this variable, or else RAY_ADDRESS, to an argument
    with explained(address):
        return JobSubmissionClient(address)


def check_reachable(address: str, ports: Mapping[str, int], meant: str) -> None:
    """Refuse an address where nothing answers.

    Args:
        ports: by the schemes that it may have, the port where it gives none.
        meant: what it should be.

    Raises:
        UserError: it has another scheme, or there is no connection within seconds.
    """
    parts = urlsplit(address)
    if parts.scheme not in ports or not parts.hostname:
        raise UserError(f"--address {address}: give {meant}")
    try:
        socket.create_connection((parts.hostname, parts.port or ports[parts.scheme]), _PATIENCE).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--address {address}: no connection: {error}. Is it {meant}, and reachable from here?"
        ) from None


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn what Ray's clients raise into messages."""
    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"{address}: {str(error).splitlines()[0]}. Set RAY_AUTH_MODE=token and give the cluster's token: in "
            "RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
        ) from None
    except (RayError, RuntimeError, OSError, ValueError, ClientError) as error:  # requests' own errors are OSErrors
        raise UserError(f"{address}: {error}") from None


def check_paths(values: Mapping[str, Any], storage: str) -> None:
    """Refuse relative paths: a job runs in a directory of its own on another machine.

    Args:
        values: the experiment as its file gives it.
        storage: its `cluster.storage`, the default where it gives none.

    Raises:
        UserError: names the fields.
    """
    given = {field: _at(values, field) for field in _PATHS} | {"cluster.storage": storage}
    local = [
        f"  {field}: {path}"
        for field, path in given.items()
        if path is not None and not (field == "backbone.path" and _is_hub_name(path))
        if not (field in _MODELS and not path.startswith((".", "~")) and "/" not in path)
        if not path.startswith("/") and "://" not in path
    ]
    if local:
        raise UserError(
            "a job runs on other machines; give paths that are absolute, of files that all of them see (NFS, a mounted "
            "bucket, the image):\n" + "\n".join(local)
        )


def _at(values: Any, field: str) -> str | None:
    for key in field.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _is_hub_name(path: str) -> bool:
    return not path.startswith((".", "~")) and not Path(path).exists()


def submit(
    client: JobSubmissionClient,
    verb: str,
    experiment: Experiment,
    values: Mapping[str, Any],
    options: Sequence[str],
    wheel: Path | None,
    say: Say,
) -> str:
    """Submit `ilrec <verb>` with its code and its config.

    Args:
        values: the experiment as its file gives it; travels as `experiment.yaml`.
        options: further arguments of the verb.
        wheel: take the code from this file, and not from the checkout that runs here.

    Returns:
        The job's id.

    Raises:
        UserError: the cluster is too small, there is no code to send or too much of it, or the server refuses.
    """
    with explained(client.get_address()), packed(experiment, values, wheel, say) as directory:
        check_room(verb, experiment, _resources(client.get_address()))
        return client.submit_job(
            entrypoint=shlex.join(["python", "-m", *command(verb, options)]),
            runtime_env={"working_dir": str(directory)},
            submission_id=f"{experiment.name}-{verb}-{secrets.token_hex(3)}",
        )


@contextmanager
def packed(experiment: Experiment, values: Mapping[str, Any], wheel: Path | None, say: Say) -> Iterator[Path]:
    """The directory that travels, while the block runs: the code, with the user's classes, and the config as
    `experiment.yaml`.

    Raises:
        UserError: the config has paths of this machine, there is no code to send or too much of it, or that code does
            not know the config.
    """
    check_paths(values, experiment.cluster.storage)
    with tempfile.TemporaryDirectory(prefix="ilrec-") as staging:
        directory = Path(staging)
        _copy_code(wheel, directory)
        _copy_own(experiment, directory)
        (directory / "experiment.yaml").write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))
        if wheel is not None:
            _check_reads_config(wheel, directory)
        say(f"{_checked_size(directory) / 2**20:.1f} MB of code travel from {wheel or _CHECKOUT}")
        yield directory


def command(verb: str, options: Sequence[str]) -> list[str]:
    """What is run in a directory that was packed, after `python -m`."""
    return ["ilrec", verb, "experiment.yaml", *options]


def check_room(verb: str, experiment: Experiment, has: Mapping[str, float]) -> None:
    """Refuse a training that the cluster, with resources `has` in all, is too small for.

    Raises:
        UserError: says what is missing.
    """
    if verb in ("train", "tune"):
        workers = experiment.cluster.fewest_workers if verb == "train" else experiment.cluster.workers
        check_fits(experiment.cluster, workers, has)


def _resources(address: str) -> dict[str, float]:
    """What all nodes of the cluster have together."""
    total: dict[str, float] = {}
    for node in list_nodes(address, filters=[("state", "=", "ALIVE")], limit=10_000, timeout=10):
        for resource, amount in (node.resources_total or {}).items():
            total[resource] = total.get(resource, 0) + amount
    return total


def _copy_code(wheel: Path | None, directory: Path) -> None:
    """Copy what is imported: a wheel's files, or ilrec.py and the packages beside it."""
    if wheel is not None:
        if not zipfile.is_zipfile(wheel):
            raise UserError(f"--wheel {wheel}: no wheel; make one with `pip wheel --no-deps .`")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
        return
    if not (_CHECKOUT / "pyproject.toml").exists():
        raise UserError("ilrec is installed here, there is no checkout whose code could travel: give --wheel")
    shutil.copy(_CHECKOUT / "ilrec.py", directory)
    for package in _CHECKOUT.glob("*/__init__.py"):
        if package.parent.name not in ("tests", "benchmarks"):
            shutil.copytree(
                package.parent, directory / package.parent.name, ignore=shutil.ignore_patterns("__pycache__")
            )


def _copy_own(experiment: Experiment, directory: Path) -> None:
    """Copy the modules of the user's classes; those that are installed have to be so there as well.

    Raises:
        UserError: there is no such module, or it has the name of one of ours.
    """
    for found, field in {travelling(each, field): field for field, each in custom_classes(experiment)}.items():
        target = directory / found.name
        if "site-packages" in found.parts or (target.exists() and found.parent == _CHECKOUT):
            continue
        if target.exists():
            raise UserError(f"{field}.class: {found.name} is the name of a module of ours; choose another one")
        if found.is_dir():
            shutil.copytree(found, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(found, target)


def _check_reads_config(wheel: Path, directory: Path) -> None:
    """Let a wheel's code, unpacked in `directory`, read the config there: it may be of another version than ours."""
    read = "from pathlib import Path; from trainer.experiment import load_experiment as r; r(Path('experiment.yaml'))"
    environment = os.environ | {"PYTHONPATH": str(directory)}
    done = subprocess.run([sys.executable, "-c", read], cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"--wheel {wheel}: its version cannot read this config; make the wheel anew, or leave out what it does not "
            f"know:\n{done.stderr.partition('UserError: ')[2] or done.stderr}".rstrip()
        )


def _checked_size(directory: Path) -> int:
    """Bytes of all files below."""
    sizes = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    total, largest = sum(sizes.values()), max(sizes, key=sizes.__getitem__)
    if total > _LARGEST_UPLOAD:
        raise UserError(
            f"the code to send has {total / 2**20:.0f} MB, {_LARGEST_UPLOAD / 2**20:.0f} are allowed; the largest file "
            f"is {largest.relative_to(directory)}. Keep data out of the packages: a job reads them from shared storage"
        )
    return total


def follow(client: JobSubmissionClient, job: str, say: Say) -> int:
    """Print a job's log until it ends; Ctrl-C stops the following, not the job.

    Returns:
        The job's exit status; 1 where it was stopped or never started, 130 after Ctrl-C.
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    address = client.get_address()
    try:
        with explained(address):
            details = client.get_job_info(job)
            asyncio.run(tail())
            while not (details := client.get_job_info(job)).status.is_terminal():
                time.sleep(0.5)
    except KeyboardInterrupt:
        say(f"\n{job} goes on. {_commands(job, address)}")
        return 130
    say(f"{job}: {details.status}")
    if details.driver_exit_code is None:
        if details.status == JobStatus.FAILED:
            print(f"error: {details.message}", file=sys.stderr)
        return 0 if details.status == JobStatus.SUCCEEDED else 1
    return details.driver_exit_code if details.driver_exit_code >= 0 else 128 - details.driver_exit_code


def _commands(job: str, address: str) -> str:
    return (
        f"Follow it: ilrec jobs logs {job} --follow --address {address}\n"
        f"Stop it: ilrec jobs stop {job} --address {address}"
    )


def submitted(client: JobSubmissionClient, job: str) -> str:
    """What to do next with a job that nobody follows."""
    return f"submitted: {job}\n{_commands(job, client.get_address())}"


def logs(client: JobSubmissionClient, job: str) -> str:
    """All that a job has printed."""
    with explained(client.get_address()):
        return client.get_job_logs(job)


def stop(client: JobSubmissionClient, job: str, say: Say) -> None:
    """Stop a job and wait until its processes are gone. Its checkpoints stay."""
    with explained(client.get_address()):
        if not client.stop_job(job):
            say(f"{job} has ended already: {client.get_job_status(job)}")
            return
        while not (status := client.get_job_status(job)).is_terminal():
            time.sleep(0.5)
    say(f"{job}: {status}. Submit the same experiment again to go on from its latest checkpoint.")


def show(client: JobSubmissionClient, job: str | None = None) -> None:
    """Print a table of all submitted jobs, or of one with its message."""
    with explained(client.get_address()):
        found = client.list_jobs() if job is None else [client.get_job_info(job)]
    table = Table(Column("job", no_wrap=True), "status", "started", "took")
    for details in sorted(found, key=lambda details: details.start_time or 0):
        if details.submission_id is not None:
            table.add_row(details.submission_id, str(details.status), *_times(details))
    Console().print(table)
    if job is not None and details.message:
        Console().print(details.message, markup=False)


def _times(details: JobDetails) -> tuple[str, str]:
    if details.start_time is None:
        return "", ""
    end = details.end_time or time.time() * 1000
    started = datetime.fromtimestamp(details.start_time / 1000).isoformat(" ", "seconds")
    return started, str(timedelta(seconds=round((end - details.start_time) / 1000)))
