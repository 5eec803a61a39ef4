"""Statements that a script makes of NLVR's pictures, as people wrote them: of all three boxes, and of one.

Two thirds of the pictures show towers of blocks, the others things that lie about. What a box holds stands in NLVR's rows, a
tower's blocks from its base on, but not in the order of the picture: `in_order` finds that by the pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, permutations
from typing import Any

import numpy as np

Row = dict[str, Any]
Claim = tuple[str, bool]
COLOURS = {"#0099ff": "blue", "Black": "black", "Yellow": "yellow"}
PIXELS = {"blue": (0, 153, 255), "black": (0, 0, 0), "yellow": (255, 255, 0)}
GROUND = 211  # of a box, grey
SHAPES = ("square", "triangle", "circle")
AREAS = {"square": 1.0, "triangle": 0.5, "circle": 0.785}  # of a square as wide
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]


def in_order(boxes: Sequence[Sequence[Row]], crops: Sequence[np.ndarray]) -> list[list[Row]]:
    """What is in each of three crops, uint8 [100, 100, 3]: the order in which towers, or areas of colours, agree best."""
    if are_towers(boxes):
        seen = np.array([_tower(crop) for crop in crops])
        said = np.array([[*(_number(one) for one in box), 0, 0, 0, 0][:4] for box in boxes])
        unlike = (said[:, None] != seen).sum(-1)
    else:
        seen = np.array([[shown(crop, colour).sum() for colour in PIXELS] for crop in crops])
        said = np.array([[_area(box, colour) for colour in PIXELS] for box in boxes])
        unlike = abs(said[:, None] - seen).sum(-1)
    best = min(permutations(range(3)), key=lambda order: sum(unlike[list(order), range(3)]))
    return [list(boxes[number]) for number in best]


def _number(block: Row) -> int:
    return 1 + list(PIXELS).index(COLOURS[block["color"]])


def _tower(crop: np.ndarray) -> list[int]:
    """Which colour each of four blocks of 20 pixels has, from the base on: its number, or 0."""
    found = []
    for y in (90, 70, 50, 30):
        counts = [shown(crop[y : y + 1], colour).sum() for colour in PIXELS]
        found.append(1 + int(np.argmax(counts)) if max(counts) > 5 else 0)
    return found


def _area(box: Sequence[Row], colour: str) -> float:
    own = [one for one in box if COLOURS[one["color"]] == colour]
    return sum(AREAS[one["type"]] * one["size"] ** 2 for one in own)


def shown(crop: np.ndarray, colour: str) -> np.ndarray:
    """Where a crop has a colour, bool [100, 100]: NLVR's yellow is (254, 254, 0)."""
    found: np.ndarray = (abs(crop.astype(int) - PIXELS[colour]) <= 16).all(-1)
    return found


def touching(crop: np.ndarray) -> dict[str, set[str]]:
    """Colour → the walls of its box that something of it touches, be it by a pixel that is nearly the ground's."""
    return _touching(crop.tobytes(), crop.shape)


@lru_cache(maxsize=8)
def _touching(pixels: bytes, shape: tuple[int, ...]) -> dict[str, set[str]]:
    crop = np.frombuffer(pixels, np.uint8).reshape(shape).astype(float) - GROUND
    lines = {"top": crop[0], "bottom": crop[-1], "left": crop[:, 0], "right": crop[:, -1]}
    found = {}
    for colour, full in PIXELS.items():
        whole = np.array(full, float) - GROUND
        share = {wall: line @ whole / (whole @ whole) for wall, line in lines.items()}
        mixed = {
            wall: abs(lines[wall] - own[:, None] * whole).max(-1) < 12
            for wall, own in share.items()
        }
        found[colour] = {wall for wall in lines if (mixed[wall] & (share[wall] > 0.1)).any()}
    return found


def are_towers(boxes: Sequence[Sequence[Row]]) -> bool:
    """Whether a picture shows towers: blocks of one size, four of them at most."""
    return all(
        len(box) <= 4 and all((one["type"], one["size"]) == ("square", 20) for one in box)
        for box in boxes
    )


def kinds_in(items: Sequence[Row]) -> dict[str, int]:
    """How many of each kind of thing are in a box: of a colour, of a shape, of both, in all."""
    found = {"item": len(items)}
    for colour in COLOURS.values():
        own = [one for one in items if COLOURS[one["color"]] == colour]
        found[f"{colour} item"] = len(own)
        for shape in SHAPES:
            found[f"{colour} {shape}"] = sum(one["type"] == shape for one in own)
            found[shape] = found.get(shape, 0) + found[f"{colour} {shape}"]
    return found


def statements_of(
    boxes: Sequence[Sequence[Row]],
    crops: Sequence[np.ndarray],
    draw: random.Random,
    count: int,
) -> list[Claim]:
    """So many statements of a picture, as many of them true as false where there are.

    Args:
        boxes: one or three, in the order of the picture.
        crops: of them.
        draw: what is random.
        count: an even number.
    """
    if len(boxes) == 1:
        make = _of_a_tower if are_towers(boxes) else _of_a_box
    else:
        make = _of_towers if are_towers(boxes) else _of_boxes
    found: dict[str, bool] = {}
    for _ in range(4 * count):
        found.update([make(boxes, crops, draw)])
    some = list(found.items())
    draw.shuffle(some)
    each = [[one for one in some if one[1] == truth][: count // 2] for truth in (True, False)]
    return [*each[0], *each[1]]


def _many(number: int, thing: str, draw: random.Random) -> str:
    word = str(number) if draw.random() < 0.4 else NUMBERS[number]
    return f"{word} {thing}{'' if number == 1 else 's'}"


def _amount(
    number: int, thing: str, draw: random.Random, among: Sequence[str] = ("", "exactly", "at least")
) -> tuple[str, Callable[[int], bool]]:
    """An amount of things in words, and what it says of their number."""
    how = draw.choice(among)
    holds: dict[str, Callable[[int], bool]] = {
        "": lambda found: found == number,
        "exactly": lambda found: found == number,
        "only": lambda found: found == number,
        "at least": lambda found: found >= number,
        "more than": lambda found: found > number,
    }
    return f"{how} {_many(number, thing, draw)}".strip(), holds[how]


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _of_towers(
    boxes: Sequence[Sequence[Row]], _: Sequence[np.ndarray], draw: random.Random
) -> Claim:
    towers = [[COLOURS[one["color"]] for one in box] for box in boxes]
    colour, other = draw.choice(list(PIXELS)), draw.choice(list(PIXELS))
    number, high = draw.randint(1, 2), draw.randint(1, 4)
    end, at = draw.choice([("top", -1), ("base", 0)])
    amount, holds = _amount(number, "tower", draw)
    blocks, fits = _amount(high, "block", draw, ("", "exactly", "only", "at least", "more than"))
    ends = [tower[at] == colour for tower in towers]
    stacked = [(other, colour) in pairwise(tower) for tower in towers]
    said = f"There {_are(number)} {amount}"
    having = draw.choice(["with", "with", "having", "that has", "which has"])
    place = draw.choice([f"at the {end}", f"at the {end}", f"as the {end}"])
    over = draw.choice(["over", "above", "on top of", "on"])
    kind = draw.randrange(21)
    if kind == 18:
        doubled = [(colour, colour) in pairwise(tower) for tower in towers]
        return f"{said} {having} 2 {colour} blocks stacked together", holds(sum(doubled))
    if kind == 19:
        word = NUMBERS[high]
        tall = [one for one, t in zip(ends, towers, strict=True) if len(t) == high]
        return f"The {end} of a {word} block{'' if high == 1 else 's'} tower is {colour}", any(tall)
    if kind == 20:
        many = ["One tower has", "At least two of the towers have", "All 3 towers have"]
        least = draw.randint(1, 3)
        return f"{many[least - 1]} a {colour} {end}", (
            sum(ends) == 1 if least == 1 else sum(ends) >= least
        )
    if kind == 0:
        return f"{said} {having} {blocks}", holds(sum(fits(len(tower)) for tower in towers))
    if kind in (1, 2):
        return f"{said} {having} a {colour} block {place}", holds(sum(ends))
    if kind in (3, 4):
        both = [one and fits(len(tower)) for one, tower in zip(ends, towers, strict=True)]
        first = f"There is a tower {having} {blocks} {having} a {colour} block at the {end}"
        second = f"There is a {colour} block as the {end} of a tower with {blocks}"
        return first if kind == 3 else second, any(both)
    if kind == 5:
        return f"{said} {having} a {colour} block {over} a {other} block", holds(sum(stacked))
    if kind == 6:
        alone = [{*tower} == {colour} for tower in towers]
        return f"{said} {having} only {colour} blocks", holds(sum(alone))
    if kind == 7:
        total, right = _amount(draw.randint(1, 6), f"{colour} block", draw)
        return f"There are {total}", right(sum(tower.count(colour) for tower in towers))
    if kind == 8:
        own, right = _amount(draw.randint(1, 3), f"{colour} block", draw)
        return f"There is a tower {having} {own}", any(right(t.count(colour)) for t in towers)
    if kind == 9:
        step = draw.randint(1, 2)
        named = f"the {['second', 'third'][step - 1]} block from the base is {colour}"
        of_it = [tower[step : step + 1] == [colour] for tower in towers]
        return f"There is a tower where {named}", any(of_it)
    if kind == 10:
        return f"{said} that has only one colour", holds(
            sum(len({*tower}) == 1 for tower in towers)
        )
    if kind == 11:
        return f"There is a {colour} block {over} a {other} block", any(stacked)
    if kind == 12:
        total, right = _amount(number, f"{colour} block", draw, ("", "exactly", "at least", "only"))
        return f"There {_are(number)} {total} as the {end} of a tower", right(sum(ends))
    if kind == 13:
        own, right = _amount(draw.randint(1, 3), f"{colour} block", draw)
        return f"{said} {having} {own}", holds(sum(right(t.count(colour)) for t in towers))
    if kind == 14:
        only = [{*tower} == {colour, other} for tower in towers]
        both_named = f"only {colour} and {other} blocks" if colour != other else f"{colour} blocks"
        some = only if colour != other else [colour in tower for tower in towers]
        return f"{said} {having} {both_named}", holds(sum(some))
    if kind == 15:
        high = draw.choice([len(tower) for tower in towers])
        word = NUMBERS[high]
        right_one = [one for one, t in zip(ends, towers, strict=True) if len(t) == high]
        shown = f"The tower with {word} block{'' if high == 1 else 's'} has"
        return f"{shown} a {colour} block at the {end}", any(right_one)
    if kind == 16:
        all_three = [len({*tower}) == 3 for tower in towers]
        return f"{said} with blocks of all 3 colours", holds(sum(all_three))
    heights = [len(tower) for tower in towers]
    same = max(heights.count(height) for height in heights)
    return f"There are {draw.choice(['', 'at least '])}two towers with the same height", same >= 2


def _of_a_tower(
    boxes: Sequence[Sequence[Row]], _: Sequence[np.ndarray], draw: random.Random
) -> Claim:
    tower = [COLOURS[one["color"]] for one in boxes[0]]
    colour, other = draw.choice(list(PIXELS)), draw.choice(list(PIXELS))
    blocks, fits = _amount(draw.randint(1, 4), "block", draw, ("exactly", "at least", "more than"))
    end, at = draw.choice([("top", -1), ("base", 0)])
    kind = draw.randrange(6)
    if kind == 0:
        return f"The tower has {blocks}", fits(len(tower))
    if kind == 1:
        return f"The tower has a {colour} block at the {end}", tower[at] == colour
    if kind == 2:
        stacked = (other, colour) in pairwise(tower)
        return f"There is a {colour} block above a {other} block", stacked
    if kind == 3:
        own, right = _amount(draw.randint(1, 3), f"{colour} block", draw)
        return f"The tower has {own}", right(tower.count(colour))
    if kind == 4:
        return f"The tower has only {colour} blocks", {*tower} == {colour}
    place = draw.randint(1, 2)
    named = ["second", "third"][place - 1]
    return f"The {named} block from the base is {colour}", tower[place : place + 1] == [colour]


def _thing(draw: random.Random) -> str:
    shape = draw.choice([*SHAPES, "item", "object"])
    colour = draw.choice([*PIXELS, *PIXELS, *([] if shape in ("item", "object") else [""])])
    return f"{colour} {shape}".strip()


def _of_boxes(
    boxes: Sequence[Sequence[Row]], crops: Sequence[np.ndarray], draw: random.Random
) -> Claim:
    thing, colour = _thing(draw), draw.choice(list(PIXELS))
    inside = [kinds_in(box)[thing.replace("object", "item")] for box in boxes]
    colours = [{COLOURS[one["color"]] for one in box} for box in boxes]
    number = draw.randint(1, 2)
    amount, holds = _amount(number, "box", draw)
    amount = amount.replace("boxs", "boxes")
    things, fits = _amount(draw.randint(1, 5), thing, draw)
    kind = draw.randrange(18)
    if kind >= 13:
        return _of_several_things(boxes, draw)
    if kind >= 9:
        told = _edges(boxes, crops, draw)
        if told is not None:
            return told
        kind = draw.randrange(8)
    if kind == 0:
        return f"There is a box with {things}", any(fits(count) for count in inside)
    if kind == 1:
        return f"There are {things}", fits(sum(inside))
    if kind == 2:
        return f"Each box contains at least one {thing}", min(inside) > 0
    if kind == 3:
        return f"There {_are(number)} {amount} with a {thing}", holds(sum(n > 0 for n in inside))
    if kind == 4:
        total = draw.randint(2, 8)
        exactly = any(len(box) == total for box in boxes)
        return f"One of the grey boxes has exactly {NUMBERS[total]} objects", exactly
    if kind == 5:
        return f"There is a box with only {colour} items", {colour} in colours
    if kind == 6:
        return "There is a box with items of only one colour", any(len(c) == 1 for c in colours)
    walls = [touching(crop) for crop in crops]
    if kind == 7:
        wall, names = _wall(draw)
        there = any(names & found[colour] for found in walls)
        return f"There is a {colour} item touching the {wall}", there
    number = draw.randint(1, 2)
    amount, holds = _amount(number, "box", draw)
    touched = [bool(found[colour]) for found in walls]
    amount = amount.replace("boxs", "boxes")
    said = f"There {_are(number)} {amount} with a {colour} item touching the wall"
    return said, holds(sum(touched))


def _of_several_things(boxes: Sequence[Sequence[Row]], draw: random.Random) -> Claim:
    """Of what lies in one box together: two kinds of things, a number of items, colours alone."""
    found = [kinds_in(box) for box in boxes]
    colours = [{COLOURS[one["color"]] for one in box} for box in boxes]
    one, other = draw.sample(list(PIXELS), 2)
    kind, number = draw.randrange(4), draw.randint(1, 3)
    if kind == 0:
        first, second = f"{one} {draw.choice([*SHAPES, 'item'])}", f"{other} {draw.choice(SHAPES)}"
        both = any(box[first] and box[second] for box in found)
        return f"There is a box with a {first} and a {second}", both
    if kind == 1:
        things, fits = _amount(number, f"{other} item", draw)
        thing = f"{one} {draw.choice(SHAPES)}"
        right = any(box[thing] and fits(box[f"{other} item"]) for box in found)
        return f"There is a box with a {thing} and {things}", right
    if kind == 2:
        items = _many(draw.choice([len(box) for box in boxes] + [number]), "item", draw)
        count, many = items.split()[0], draw.randint(1, 3)
        total = int(count) if count.isdigit() else NUMBERS.index(count)
        how = ["of only one colour", f"of only {one} and {other} colour", "of all 3 colours"]
        right = any(
            len(box) == total and (own == {one, other} if many == 2 else len(own) == many)
            for box, own in zip(boxes, colours, strict=True)
        )
        return f"There is a box with {items} {how[many - 1]}", right
    amount, holds = _amount(draw.randint(1, 2), "box", draw)
    amount = amount.replace("boxs", "boxes")
    some = f"{'is' if amount.endswith('box') else 'are'} {amount} with only {one} and {other} items"
    return f"There {some}", holds(sum(own == {one, other} for own in colours))


def _edges(
    boxes: Sequence[Sequence[Row]], crops: Sequence[np.ndarray], draw: random.Random
) -> Claim | None:
    """How many things of a kind touch an edge, or touch none; nothing where the pixels do not say it of each."""
    colour, shape = draw.choice(list(PIXELS)), draw.choice([*SHAPES, "object"])
    reached, free = 0, 0
    for box, crop in zip(boxes, crops, strict=True):
        same = [one for one in box if COLOURS[one["color"]] == colour]
        kept = [one for one in same if shape in (one["type"], "object")]
        there = bool(touching(crop)[colour])
        if there and len(same) > 1 and kept:
            return None
        reached, free = reached + there * len(kept), free + (not there) * len(kept)
    number = draw.randint(1, 3)
    amount, fits = _amount(number, f"{colour} {shape}", draw)
    start = f"There {_are(number)} {amount}"
    if draw.random() < 0.5:
        return f"{start} touching {draw.choice(['the edge', 'an edge', 'the wall'])}", fits(reached)
    return f"{start} not touching {draw.choice(['any edge', 'the edge'])}", fits(free)


def _wall(draw: random.Random) -> tuple[str, set[str]]:
    every = {"top", "bottom", "left", "right"}
    return draw.choice(
        [
            ("wall", every),
            ("edge", every),
            ("base", {"bottom"}),
            ("bottom of a box", {"bottom"}),
            ("side", {"left", "right"}),
            ("top", {"top"}),
            ("right wall of a box", {"right"}),
        ]
    )


def _of_a_box(
    boxes: Sequence[Sequence[Row]], crops: Sequence[np.ndarray], draw: random.Random
) -> Claim:
    thing, colour = _thing(draw), draw.choice(list(PIXELS))
    count = kinds_in(boxes[0])[thing.replace("object", "item")]
    things, fits = _amount(draw.randint(1, 5), thing, draw)
    kind = draw.randrange(5)
    if kind <= 1:
        return f"There are {things}", fits(count)
    if kind == 2:
        return f"There is a {thing}", count > 0
    if kind == 3:
        return f"There are only {colour} items", {one["color"] for one in boxes[0]} == {
            hexed for hexed, name in COLOURS.items() if name == colour
        }
    wall, names = _wall(draw)
    return f"There is a {colour} item touching the {wall}", bool(names & touching(crops[0])[colour])


def described(items: Sequence[Row], crop: np.ndarray) -> str:
    """What is in a box, in words: a tower's blocks from its base on; or how many of each kind, and which walls they touch."""
    if are_towers([items]):
        tower = [COLOURS[one["color"]] for one in items]
        return f"a tower of {len(tower)}: {', '.join(tower)}"
    found: dict[str, int] = {}
    for one in items:
        size = {10: "small", 20: "medium", 30: "big"}[one["size"]]
        kind = f"{size} {COLOURS[one['color']]} {one['type']}"
        found[kind] = found.get(kind, 0) + 1
    walls = touching(crop)
    touched = [f"{colour} {' '.join(sorted(walls[colour]))}" for colour in PIXELS if walls[colour]]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    return f"{len(items)} items: {kinds}; touching: {', '.join(touched) or 'nothing'}"


def counts_of(items: Sequence[Row], draw: random.Random) -> Iterator[tuple[str, int]]:
    """Two kinds of things, one that a box holds and any one, with how many it holds, eight at most."""
    found = kinds_in(items)
    there = [kind for kind, count in found.items() if count]
    for thing in dict.fromkeys([draw.choice(there), draw.choice(list(found))]):
        yield thing, min(found[thing], 8)
