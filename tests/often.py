"""Which of many alike cases every run of the tests has; `make long` has the others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest


def often(cases: Collection[Any], usual: Collection[Any]) -> list[Any]:
    """All cases for `parametrize`; those that are not usual are long: a usual one shows the same kind of fault."""
    marked = [one if one in usual else pytest.param(one, marks=pytest.mark.long) for one in cases]
    assert sum(one in usual for one in cases) == len(usual), "a usual case is none of them"
    return marked
