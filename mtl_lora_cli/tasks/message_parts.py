"""What a message holds: texts, parts of several types, tool calls as objects or as JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mtl_lora_cli.tasks.pictured import MARK, PLACE

_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("reasoning", "thinking")
_PICTURE_PARTS = ("image", "image_url", "input_image")


class FormError(ValueError):
    """A part of a conversation is not what it should be; it begins with the part's place."""


@dataclass(frozen=True)
class Content:
    """A message's text, None where it has none; the reasoning and the tool calls that stand in it.

    Attributes:
        pictures: what each `PLACE` in the text shows: a picture as the part has it; None: the row's next one.
    """

    text: str | None
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    pictures: tuple[Any, ...] = ()


def content_of(value: Any, place: str, role: str, *, shows: bool = False) -> Content:
    """What a message says.

    Args:
        value: the message's content.
        place: for errors.
        role: whose message it is.
        shows: the row may show pictures, and `<image>` in a text is where one stands.

    Raises:
        FormError: it is no text, and holds more than texts, reasoning, calls and pictures.
    """
    if value is None or isinstance(value, str):
        found = Content(value)
    elif isinstance(value, list | tuple) and all(_is_part(part) for part in value):
        found = _parts(value, place, shows)
    else:
        return _as_json(value, place, role)
    if not shows or found.text is None:
        return found
    shown = (None,) * found.text.count(MARK)
    if shown and found.pictures:
        raise FormError(
            f"{place}: has {MARK} in a text and pictures as parts, expected one of both"
        )
    return replace(found, text=found.text.replace(MARK, PLACE), pictures=shown or found.pictures)


def _as_json(value: Any, place: str, role: str) -> Content:
    """What a tool gave back, or a call.

    Raises:
        FormError: nobody else has such content.
    """
    kinds = {"tool": Mapping | list | tuple | int | float, "call": Mapping | list | tuple}
    if role in kinds and isinstance(value, kinds[role]):
        return Content(json.dumps(value, ensure_ascii=False))
    raise FormError(f"{place}: expected a text, received {short(value)}")


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, Mapping) and isinstance(part.get("type"), str)
    )


def _parts(value: Sequence[Any], place: str, shows: bool) -> Content:
    """Parts of a message in order, each with a type and what it holds."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    pictures: list[Any] = []
    for number, part in enumerate(value):
        own = {"type": "text", "text": part} if isinstance(part, str) else part
        held = next((own[key] for key in ("text", "value", "thinking") if key in own), None)
        if own["type"] in _TEXT_PARTS and isinstance(held, str):
            texts.append(held)
        elif own["type"] in _THOUGHT_PARTS and isinstance(held, str):
            thoughts.append(held)
        elif own["type"] == "tool_call" and held is not None:
            calls += called(held, f"{place}[{number}]")
        elif shows and own["type"] in _PICTURE_PARTS:
            texts.append(PLACE)
            pictures.append(_picture(own))
        else:
            raise FormError(f"{place}[{number}]: a part of type '{own['type']:.40}' is no text")
    return Content("".join(texts), "\n".join(thoughts), tuple(calls), tuple(pictures))


def _picture(part: Mapping[str, Any]) -> Any:
    """What a part shows; None: the row's next picture."""
    names = ("image_url", "image", "url", "path", "file")
    held = next((part[name] for name in names if part.get(name)), None)
    if isinstance(held, Mapping) and "url" in held:
        return held["url"]
    return held


def called(text: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls that stand as the text of a message."""
    value = parsed(text, place)
    listed = value if isinstance(value, list) else [value]
    return calls_of(listed, place)


def calls_of(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls, each with its arguments as a dictionary.

    Raises:
        FormError: one has no name, or arguments that are none.
    """
    value = parsed(value, place)
    if not isinstance(value, list | tuple):
        raise FormError(f"{place}: expected a list of tool calls, received {short(value)}")
    return [_call(one, f"{place}[{number}]") for number, one in enumerate(value)]


def _call(one: Any, place: str) -> dict[str, Any]:
    own = one if isinstance(one, Mapping) else {}
    function = own.get("function", own)
    below = f"{place}.function" if "function" in own else place
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise FormError(f"{below}.name: expected the name of a function, received {short(one)}")
    key = next((key for key in ("arguments", "parameters", "args") if key in function), "arguments")
    given = function.get(key)
    arguments = {} if given in (None, "") else parsed(given, f"{below}.{key}")
    if not isinstance(arguments, Mapping):
        raise FormError(f"{below}.{key}: expected a JSON object, received {short(given)}")
    if not isinstance(given, str):  # JSON that is written as such means its nulls
        arguments = without_nulls(arguments)
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    return {"id": own["id"], **call} if isinstance(own.get("id"), str) else call


def without_nulls(value: Any) -> Any:
    """Without keys whose value is null: a table of structs has the keys of all rows in each of them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(one) for one in value]
    return value


def parsed(value: Any, place: str) -> Any:
    """What a text holds as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise FormError(f"{place}: not valid JSON: {error}; received {short(value)}") from None


def short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
