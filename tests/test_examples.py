"""The examples in docstrings: formulas worked out by hand."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "objectives.losses",
        "objectives.rewards",
        "objectives.temperature",
        "recommender.metrics",
        "recommender.search.logits",
        "recommender.search.oracle",
        "service.batching",
    ],
)
def test_examples_hold(module: str) -> None:
    found = doctest.testmod(import_module(module))
    assert found.attempted
    assert not found.failed
