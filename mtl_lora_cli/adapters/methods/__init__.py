"""The methods by name: a file each. What a file declares is in `base`; docs/method.md has an example.

Nothing here loads torch: recipes are checked, and help is shown, without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.extensions import require_new

if TYPE_CHECKING:
    from mtl_lora_cli.adapters.methods.base import Settings

DEFAULT = "mtl-lora"
BUILT_IN = (
    "mtl-lora",
    "mtl-lora-fine",
    "lora",
    "dora",
    "pissa",
    "mtlora",
    "moelora",
    "multilora",
    "hydralora",
)

S = TypeVar("S", bound="type[Settings]")


class _Methods(Mapping[str, "type[Settings]"]):
    """Name → settings; the built-in files are imported when somebody asks for the first time."""

    def __init__(self) -> None:
        self._known: dict[str, type[Settings]] = {}
        self._whole = False

    def add(self, kind: type[Settings]) -> None:
        name = kind.model_fields["method"].default
        if not isinstance(name, str):
            raise UsageError(
                f"{kind.__name__}: a method names itself: method: Literal['NAME'] = 'NAME'"
            )
        if not kind.__module__.startswith(f"{__name__}."):
            require_new("method", name, self.get(name))
        self._known[name] = kind

    def _all(self) -> dict[str, type[Settings]]:
        if not self._whole:
            self._whole = True
            for name in BUILT_IN:
                import_module(f"{__name__}.{name.replace('-', '_')}")
            order = dict.fromkeys([*BUILT_IN, *self._known])
            self._known = {name: self._known[name] for name in order}
        return self._known

    def __getitem__(self, name: str) -> type[Settings]:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


METHODS = _Methods()


def method(kind: S) -> S:
    """Declare a method: a class decorator for its settings.

    Raises:
        UsageError: there is one of that name.
    """
    METHODS.add(kind)
    return kind


def find_method(name: str) -> type[Settings]:
    """The settings of a method.

    Raises:
        UsageError: nobody declares it.
    """
    if name not in METHODS:
        raise UsageError(unknown_method(name))
    return METHODS[name]


def unknown_method(name: object) -> str:
    """What is said of a method that nobody declares."""
    return (
        f"unknown method '{name}'{did_you_mean(str(name), METHODS)}; methods: {', '.join(METHODS)}"
    )


def configure(method: str = DEFAULT, **settings: Any) -> Settings:
    """The settings of a method, what is left out at its default.

    Raises:
        UsageError: nobody declares the method.
        ValueError: a setting is unknown, of the wrong type, or cannot be; in one line.
    """
    from pydantic import ValidationError

    from mtl_lora_cli.adapters.methods.base import first_fault

    try:
        return find_method(method)(method=method, **settings)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None


def common_keys() -> tuple[str, ...]:
    """The settings of every method, `method` among them."""
    from mtl_lora_cli.adapters.methods.base import Settings

    return tuple(Settings.model_fields)


def every_key() -> tuple[str, ...]:
    """The settings of any method, those of all first."""
    own = [name for kind in METHODS.values() for name in kind.model_fields]
    return tuple(dict.fromkeys([*common_keys(), *own]))


def reads(method: str, key: str) -> bool:
    """Whether a setting means anything to a method."""
    return key in METHODS[method].model_fields
