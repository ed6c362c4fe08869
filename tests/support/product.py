"""Which cells of a product of cases every run meets, and which only `make test-all`."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def alternating(first: Sequence[Any], *others: Sequence[Any]) -> list[Any]:
    """Every combination as parameters: each value of `first` is met once, with the others taking turns.

    The remaining combinations carry the mark `product`, and run with `--product`.
    """
    combinations = list(itertools.product(*others))
    return [
        pytest.param(value, *rest, marks=() if turn == number % len(combinations) else pytest.mark.product)
        for number, value in enumerate(first)
        for turn, rest in enumerate(combinations)
    ]
