"""Families of models that the fused engine knows, by transformers' `model_type` of their text part.

A family is one function: a configuration in, a `Plan` out, or `NotPlanned` with the reason. A file of the
user's own, named by `extensions` in a recipe, adds one in the same way:

    @family("my_model")
    def plan(config: Any) -> Plan: ...
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from mtl_lora_cli.engine.plan import NotPlanned, Plan
from mtl_lora_cli.extensions import origin, require_new

Family = Callable[[Any], Plan]
_families: dict[str, Family] = {}


def family(*model_types: str) -> Callable[[Family], Family]:
    """Declare the family of some model types.

    Raises:
        UsageError: one of them has a family already.
    """

    def declare(function: Family) -> Family:
        for name in model_types:
            require_new("model family", name, _families.get(name))
            _families[name] = function
        return function

    return declare


@cache
def _load_built_in() -> None:
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def known_types() -> tuple[str, ...]:
    """All model types that have a family."""
    _load_built_in()
    return tuple(_families)


def plan_of(config: Any) -> Plan:
    """The plan for a configuration, or for the text part of a wrapper's.

    Raises:
        NotPlanned: there is none, and why; its family's own errors among the reasons.
    """
    _load_built_in()
    text = config.get_text_config()
    function = _families.get(text.model_type)
    if function is None:
        raise NotPlanned(f"model type {text.model_type}")
    try:
        plan = function(text)
        if not isinstance(plan, Plan):
            raise TypeError(f"expected a Plan, received {type(plan).__name__}")
    except NotPlanned:
        raise
    except Exception as error:  # a configuration may lack what the function reads
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise NotPlanned(
            f"the family of '{text.model_type}' ({origin(function)}) failed: {what}"
        ) from error
    return plan
