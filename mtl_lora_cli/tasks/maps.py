"""Tasks whose answer is a map of a picture: classes, parts, salience, edges, depth, normals.

    objective: segmentation
    image: image
    target: seg
    classes: [wall, floor, cabinet]
    ignore: 255

`image` and `target` are expressions that give a path of each row. A row whose target is empty has no such
map; the picture is learned for the other tasks all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from mtl_lora_cli.recipe.yaml_file import StrictModel
from mtl_lora_cli.tasks.jinja import Expression

if TYPE_CHECKING:
    from mtl_lora_cli.tasks.template import Template

MAPS = ("segmentation", "parts", "saliency", "edges", "depth", "normals")
OF_CLASSES = ("segmentation", "parts")
_SHARES = ("saliency", "edges")


def _is_expression(source: str) -> str:
    Expression(source)
    return source


_Path = Annotated[str, AfterValidator(_is_expression)]
_ClassName = Annotated[str, Field(min_length=1, max_length=80)]


class MapKeys(StrictModel):
    """The keys of a template whose objective is a map's."""

    image: _Path | None = None  # the path of the picture
    target: _Path | None = None  # the path of its map
    classes: list[_ClassName] = Field(default=[])  # of segmentation and parts, from 0
    first: Annotated[int, Field(ge=0, lt=2**15)] = 0  # the stored value of the first class
    ignore: int | float | None = None  # the stored value that means: not known
    range: Annotated[list[float | int], Field(min_length=2, max_length=2)] | None = None
    scale: Literal["linear", "log"] = "linear"  # of depth codes
    bits: Literal[8, 16] = 8  # of depth codes
    # From another map: normals of planes in depth, edges at borders of classes. `target` is that map then.
    derive: Literal["depth", "classes"] | None = None
    # With derive: depth: focal lengths and centre fx, fy, cx, cy, as shares of width and height.
    camera: Annotated[list[float | int], Field(min_length=4, max_length=4)] | None = None
    # Classes that a mirror changes into each other.
    left_right: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(default=[])


@dataclass(frozen=True)
class MapSpec:
    """What a task's map holds, and how it is stored.

    Attributes:
        objective: one of `MAPS`.
        channels: what a decoder gives for each pixel: a value of each class, 3 of normals, else 1.
        classes: their names, from 0; of segmentation and parts.
        first: the stored value of the first class.
        ignore: the stored value that means not known.
        low, high: least and largest depth, in its unit; of edges and saliency the stored values of 0 and 1.
        scale, bits: of depth codes.
        derive: the kind of map that it is computed from.
        camera: fx, fy, cx, cy as shares of width and height; with derive: depth.
        left_right: pairs of classes that a mirror changes into each other.
    """

    objective: str
    channels: int
    classes: tuple[str, ...] = ()
    first: int = 0
    ignore: float | None = None
    low: float = 0.0
    high: float = 1.0
    scale: Literal["linear", "log"] = "linear"
    bits: int = 8
    derive: Literal["depth", "classes"] | None = None
    camera: tuple[float, ...] = ()
    left_right: tuple[tuple[int, int], ...] = ()

    @property
    def of_classes(self) -> bool:
        """Whether each pixel has one of several classes."""
        return self.objective in OF_CLASSES

    @property
    def stored(self) -> str:
        """The kind of map that is stored: its own, or what it is derived from."""
        return {None: self.objective, "depth": "depth", "classes": "segmentation"}[self.derive]


_RANGES = {"saliency": (0.0, 255.0), "edges": (0.0, 255.0)}


def spec_of(template: Template) -> MapSpec:
    """What a template says of its maps; it has gone through `faults_of`."""
    names = template.classes
    low, high = template.range or _RANGES.get(template.objective, (0.0, 1.0))
    channels = len(names) if template.objective in OF_CLASSES else 1
    pairs = tuple((names.index(one), names.index(two)) for one, two in template.left_right)
    return MapSpec(
        objective=template.objective,
        channels=3 if template.objective == "normals" else channels,
        classes=tuple(names),
        first=template.first,
        ignore=template.ignore,
        low=float(low),
        high=float(high),
        scale=template.scale,
        bits=template.bits,
        derive=template.derive,
        camera=tuple(map(float, template.camera or ())),
        left_right=pairs,
    )


def faults_of(template: Template) -> Iterator[tuple[str, str]]:
    """Key and fault of each key of maps that does not fit the template's objective."""
    objective = template.objective
    if objective not in MAPS:
        keys = MapKeys.model_fields
        for name in (key for key in keys if getattr(template, key) != keys[key].default):
            yield name, f"is for maps ({', '.join(MAPS)}), received objective {objective}"
        return
    for name in ("image", "target"):
        if getattr(template, name) is None:
            yield name, f"is required with objective {objective}: the path of the {name}"
    yield from _class_faults(template)
    yield from _range_faults(template)
    yield from _derive_faults(template)


def _class_faults(template: Template) -> Iterator[tuple[str, str]]:
    names: Sequence[str] = template.classes
    if template.objective not in OF_CLASSES:
        for name in ("classes", "left_right", "first"):
            if getattr(template, name):
                yield name, f"goes with {' and '.join(OF_CLASSES)}, not with {template.objective}"
        return
    if not 2 <= len(names) <= 2**15:
        yield "classes", f"at least two names are needed, received {len(names)}"
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        yield "classes", f"'{repeated[0]}' stands twice"
    if template.ignore is not None and not float(template.ignore).is_integer():
        yield "ignore", f"expected a whole number, received {template.ignore:g}"
    for pair in template.left_right:
        for name in pair:
            if name not in names:
                yield "left_right", f"'{name}' is none of the classes"


def _range_faults(template: Template) -> Iterator[tuple[str, str]]:
    objective, given = template.objective, template.range
    depths = objective == "depth" or template.derive == "depth"
    if given is None:
        if depths:
            yield "range", "is required with depth: what the least and the largest code mean"
        return
    low, high = map(float, given)
    if not depths and objective not in _SHARES:
        yield "range", f"goes with depth, {' and '.join(_SHARES)}, not with {objective}"
    elif not (math.isfinite(low) and math.isfinite(high) and low < high):
        yield "range", f"expected two rising numbers, received {low:g} and {high:g}"
    elif depths and (low < 0 or (low == 0 and template.scale == "log")):
        yield (
            "range",
            f"expected a least depth of 0 or more, with scale: log above 0, received {low:g}",
        )


def _derive_faults(template: Template) -> Iterator[tuple[str, str]]:
    wanted = {"normals": "depth", "edges": "classes"}.get(template.objective)
    if template.derive is not None and template.derive != wanted:
        allowed = f"expected {wanted}" if wanted else "only normals and edges are derived"
        yield "derive", f"received {template.derive} with objective {template.objective}, {allowed}"
    if (template.camera is not None) != (template.derive == "depth"):
        yield (
            "camera",
            "goes with derive: depth, which needs it: fx, fy, cx, cy as shares of the size",
        )
    elif template.camera is not None and not all(value > 0 for value in template.camera[:2]):
        yield "camera", f"expected focal lengths above 0, received {template.camera[:2]}"
