"""What libraries print that nobody can act on, kept off the terminal. Errors are left alone. Nothing heavy is imported.

Called before Ray and transformers are imported, and again where Ray Serve has a level of its own, and in its replicas.
"""

from __future__ import annotations

import logging
import os
import warnings

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # else Ray says that it sends statistics, and sends them
    # A task that Ray repeats is no failure yet; what fails in the end is raised. Serve's controller ends itself while
    # it is asked to, which reads like a crash.
    "RAY_enable_output_error_log_if_still_retry": "0",
    # A later Ray will leave the GPUs visible to actors that ask for none; ask for that now, and it does not tell.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers draws one for every load
}


def quiet() -> None:
    """Silence this process and those it starts; what is set in the environment already is kept."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.serve"):  # a Ray started here says that it asks for a token, which it makes itself
        logging.getLogger(name).setLevel(logging.ERROR)
    # That there is no GPU. DeepSpeed sets its logger's level when it is imported, but leaves filters alone.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    for library in ("transformers", "peft"):  # what they will have to change in each other
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}\.")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
