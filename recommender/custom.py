"""Classes of your own by import path, `my.losses:Focal`: found, checked and made. Nothing of them is ever pickled.

They are looked for where Python looks, and in the directory that the program was started from. Ray's workers look there
as well, and `ilrec submit` sends the module, or its whole package, along.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from difflib import get_close_matches
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, TypeVar

from recommender.config import CustomClass
from recommender.errors import UserError

Made = TypeVar("Made")


def made(config: CustomClass, base: type[Made], field: str) -> Made:
    """An instance of the class, made with its options.

    Args:
        base: what it must be a subclass of.
        field: of the experiment, for messages.

    Raises:
        UserError: the module cannot be found or imported, holds no such class, the class is of another kind, or it
            refuses the options.
    """
    found = _imported(config, field)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise UserError(f"{field}.class: {config.path} is no subclass of {base.__module__}.{base.__name__}")
    try:
        return found(**config.options)
    except UserError:
        raise
    except Exception as error:  # whatever it says to what it is given
        raise UserError(f"{field}.options: {config.path} refuses them: {type(error).__name__}: {error}") from error


def source_of(config: CustomClass, field: str) -> Path:
    """The file of the class's module.

    Raises:
        UserError: there is none.
    """
    found = _spec(config, field)
    if found.origin is None or not Path(found.origin).is_file():
        raise UserError(f"{field}.class: the module of {config.path} is no file")
    return Path(found.origin)


def travelling(config: CustomClass, field: str) -> Path:
    """What another machine needs to import the class: the module's file, or the directory of its outermost package.

    Raises:
        UserError: there is none.
    """
    source = source_of(config, field)
    names = config.path.partition(":")[0].split(".")
    is_package = source.name == "__init__.py"
    if len(names) == 1 and not is_package:
        return source
    return source.parents[len(names) - (1 if is_package else 2)]


def _imported(config: CustomClass, field: str) -> Any:
    module, _, name = config.path.partition(":")
    _spec(config, field)
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # of the module's own code
        raise UserError(f"{field}.class: {module} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(imported, name):
        close = get_close_matches(name, dir(imported), n=1)
        raise UserError(f"{field}.class: {module} holds no {name}" + (f"; did you mean {close[0]}?" if close else ""))
    return getattr(imported, name)


def _spec(config: CustomClass, field: str) -> ModuleSpec:
    here, module = os.getcwd(), config.path.partition(":")[0]
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that it hides nothing
    try:
        found = importlib.util.find_spec(module)  # imports the packages above it
    except ModuleNotFoundError:
        found = None
    except Exception as error:
        raise UserError(f"{field}.class: {module} cannot be imported: {type(error).__name__}: {error}") from error
    if found is None:
        raise UserError(
            f"{field}.class: there is no module {module}; start from the directory that it lies in, or put that on "
            "PYTHONPATH"
        )
    return found
