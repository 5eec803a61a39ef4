"""Render the sample `rooms`: small pictures of furnished rooms with exact maps of six kinds.

A room is a box of floor, walls and ceiling; in it stand tables, chairs, lamps, balls and crates, which are made of
boxes, cylinders and spheres. A pixel's colour is the mean of four rays; its classes, parts, depth and normals are those of its middle. One lamp with its shadow, textures and noise make the colours. All of it follows from the number of the scene.

    python data_templates/samples/render_rooms.py            rewrite the files
    python data_templates/samples/render_rooms.py --check    render some again; exit 1 if a map differs

Axes are the camera's: x to the right, y down, z into the scene, in metres.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent / "rooms"
HEIGHT, WIDTH, FOCAL = 96, 128, 96.0  # pixels
CLASSES = ("wall", "floor", "ceiling", "table", "chair", "lamp", "ball", "crate")
PARTS = ("none", "top", "leg", "seat", "back", "pole", "shade", "body")
SPLITS = {"train": range(96), "validation": range(96, 104), "test": range(104, 136)}
NEAR, FAR = 0.8, 9.0  # of depth codes: near (far / near)^(v / 255)
NOTHING = 1e9
CHECKED = 12  # --check renders every so many-th scene

Array = np.ndarray


@dataclass
class Solid:
    """A box, cylinder or sphere that stands upright.

    Attributes:
        kind: `box`, `cylinder` or `sphere`.
        centre: in the room's axes: x right, y up, z away, metres.
        half: half of its size along its own axes; of a cylinder radius, half height, radius.
        turn: about the vertical, radians.
        colour: RGB, 0 to 1.
        stripes: of its texture, 0 or so many a metre.
        kinds: its class and its part.
        piece: number of the piece of furniture; 0 is the room.
    """

    kind: str
    centre: Array
    half: Array
    turn: float
    colour: Array
    stripes: float
    kinds: tuple[int, int]
    piece: int


@dataclass
class Scene:
    """Solids, the lamp's place, and how the camera looks at them."""

    solids: list[Solid] = field(default_factory=list)
    lamp: Array = field(default_factory=lambda: np.zeros(3))
    eye: Array = field(default_factory=lambda: np.zeros(3))
    yaw: float = 0.0
    pitch: float = 0.0


def _turned(points: Array, angle: float) -> Array:
    """About the vertical."""
    c, s = np.cos(angle), np.sin(angle)
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    return np.stack([c * x + s * z, y, c * z - s * x], axis=-1)


def _hit(solid: Solid, start: Array, rays: Array) -> tuple[Array, Array]:
    """Distance along each ray [N] to the solid, `NOTHING` where it is missed, and the normal there [N, 3]."""
    o, d = _turned(start - solid.centre, -solid.turn), _turned(rays, -solid.turn)
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.kind == "sphere":
            t, n = _sphere(o, d, solid.half[0])
        elif solid.kind == "box":
            t, n = _box(o, d, solid.half)
        else:
            t, n = _cylinder(o, d, solid.half)
    return t, _turned(n, solid.turn)


def _sphere(o: Array, d: Array, radius: float) -> tuple[Array, Array]:
    b = (o * d).sum(-1)
    inside = b * b - ((o * o).sum(-1) - radius**2)
    t = np.where(inside > 0, -b - np.sqrt(np.maximum(inside, 0)), NOTHING)
    t = np.where(t > 1e-4, t, NOTHING)
    return t, (o + t[:, None].clip(max=1e4) * d) / radius


def _box(o: Array, d: Array, half: Array) -> tuple[Array, Array]:
    first, second = (-half - o) / d, (half - o) / d
    near, far = np.minimum(first, second), np.maximum(first, second)
    t = near.max(-1)
    found = (t < far.min(-1)) & (t > 1e-4)
    n = np.zeros(d.shape)
    axis = near.argmax(-1)
    rows = np.arange(len(d))
    n[rows, axis] = -np.sign(d[rows, axis])
    return np.where(found, t, NOTHING), n


def _cylinder(o: Array, d: Array, half: Array) -> tuple[Array, Array]:
    flat_o, flat_d = o[:, [0, 2]], d[:, [0, 2]]
    a, b = (flat_d**2).sum(-1), (flat_o * flat_d).sum(-1)
    inside = b * b - a * ((flat_o**2).sum(-1) - half[0] ** 2)
    side = np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, NOTHING)
    height = o[:, 1] + side * d[:, 1]
    side = np.where((side > 1e-4) & (np.abs(height) <= half[1]), side, NOTHING)
    cap = (np.sign(-d[:, 1]) * half[1] - o[:, 1]) / d[:, 1]
    at = flat_o + cap[:, None] * flat_d
    cap = np.where((cap > 1e-4) & ((at**2).sum(-1) <= half[0] ** 2), cap, NOTHING)
    t = np.minimum(side, cap)
    n = np.zeros(d.shape)
    on_side = side <= cap
    point = flat_o + np.minimum(t, 1e4)[:, None] * flat_d
    n[:, 0], n[:, 2] = (np.where(on_side, point[:, i] / half[0], 0.0) for i in (0, 1))
    n[:, 1] = np.where(on_side, 0.0, -np.sign(d[:, 1]))
    return t, n


# ------------------------------------------------------------------------------------ what stands in a room


def _piece(
    scene: Scene, name: str, at: Array, turn: float, colour: Array, number: int, size: float
) -> None:
    """Put one piece of furniture on the floor."""

    def put(
        kind: str, offset: list[float], half: list[float], part: str, stripes: float = 0.0
    ) -> None:
        place = at + _turned(np.array(offset) * size, turn)
        kinds = CLASSES.index(name), PARTS.index(part)
        shade = colour * (1.0 if part not in ("leg", "pole") else 0.6)
        scene.solids.append(
            Solid(kind, place, np.array(half) * size, turn, shade, stripes, kinds, number)
        )

    if name == "table":
        put("box", [0, 0.72, 0], [0.65, 0.05, 0.45], "top", 6.0)
        for x in (-0.55, 0.55):
            for z in (-0.35, 0.35):
                put("box", [x, 0.335, z], [0.06, 0.335, 0.06], "leg")
    elif name == "chair":
        put("box", [0, 0.45, 0], [0.26, 0.05, 0.26], "seat")
        put("box", [0, 0.78, 0.23], [0.26, 0.28, 0.04], "back", 9.0)
        for x in (-0.2, 0.2):
            for z in (-0.2, 0.2):
                put("box", [x, 0.2, z], [0.045, 0.2, 0.045], "leg")
    elif name == "lamp":
        put("cylinder", [0, 0.03, 0], [0.2, 0.03, 0.2], "leg")
        put("cylinder", [0, 0.7, 0], [0.035, 0.7, 0.035], "pole")
        put("cylinder", [0, 1.5, 0], [0.27, 0.18, 0.27], "shade")
    elif name == "ball":
        put("sphere", [0, 0.32, 0], [0.32, 0.32, 0.32], "body", 5.0)
    else:
        put("box", [0, 0.32, 0], [0.38, 0.32, 0.32], "body", 7.0)


def scene_of(number: int) -> Scene:
    """The scene of a number: three to six pieces that do not stand in each other."""
    generator = np.random.default_rng([2403, 20320, number])
    wide, deep, high = generator.uniform(4.2, 5.6), generator.uniform(4.4, 6.0), 2.6
    scene = Scene(eye=np.array([0.0, generator.uniform(1.3, 1.7), 0.0]))
    scene.yaw, scene.pitch = generator.uniform(-0.25, 0.25), generator.uniform(0.12, 0.3)
    scene.lamp = np.array([generator.uniform(-1.2, 1.2), 2.35, generator.uniform(1.0, 3.0)])
    walls, floor = generator.uniform(0.5, 0.85, 3), generator.uniform(0.3, 0.6, 3)
    ceiling = np.full(3, generator.uniform(0.8, 0.92))
    room = (
        ("floor", [0, -0.5, deep / 2], [wide, 0.5, deep], floor, 2.0),
        ("ceiling", [0, high + 0.5, deep / 2], [wide, 0.5, deep], ceiling, 0.0),
        ("wall", [-wide / 2 - 0.5, 1.3, deep / 2], [0.5, 2, deep], walls, 0.0),
        ("wall", [wide / 2 + 0.5, 1.3, deep / 2], [0.5, 2, deep], walls, 0.0),
        ("wall", [0, 1.3, deep + 0.5], [wide, 2, 0.5], walls * 0.92, 3.0),
        ("wall", [0, 1.3, -1.5], [wide, 2, 0.5], walls, 0.0),
    )
    for name, centre, half, colour, stripes in room:
        kinds = CLASSES.index(name), 0
        scene.solids.append(
            Solid("box", np.array(centre), np.array(half), 0.0, colour, stripes, kinds, 0)
        )
    taken: list[tuple[float, float, float]] = []
    wanted, tries = int(generator.integers(3, 7)), 0
    radii = {"table": 0.85, "chair": 0.42, "lamp": 0.35, "ball": 0.38, "crate": 0.55}
    while len(taken) < wanted and tries < 200:
        tries += 1
        name, size = str(generator.choice(list(radii))), float(generator.uniform(0.9, 1.25))
        radius = radii[name] * size
        x = generator.uniform(-wide / 2 + radius, wide / 2 - radius)
        z = generator.uniform(1.7 + radius, deep - radius - 0.1)
        if any((x - a) ** 2 + (z - b) ** 2 < (radius + c) ** 2 for a, b, c in taken):
            continue
        taken.append((x, z, radius))
        colour, turn = generator.uniform(0.1, 0.9, 3), float(generator.uniform(0, 2 * np.pi))
        _piece(scene, name, np.array([x, 0.0, z]), turn, colour, len(taken), size)
    return scene


# ------------------------------------------------------------------------------------ rays and maps


def _rays(scene: Scene, dy: float, dx: float) -> tuple[Array, Array]:
    """Directions of all pixels [N, 3] in the room, and the camera's axes as rows [3, 3]."""
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH]
    x, y = (u + dx - WIDTH / 2) / FOCAL, (v + dy - HEIGHT / 2) / FOCAL
    cy, sy, cp, sp = np.cos(scene.yaw), np.sin(scene.yaw), np.cos(scene.pitch), np.sin(scene.pitch)
    ahead = np.array([sy * cp, -sp, cy * cp])
    right = np.array([cy, 0.0, -sy])
    axes = np.stack([right, -np.cross(ahead, right), ahead])
    rays = x[..., None] * axes[0] + y[..., None] * axes[1] + axes[2]
    flat = rays.reshape(-1, 3)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True), axes


def _seen(scene: Scene, rays: Array) -> tuple[Array, Array, Array]:
    """Of each ray the distance, the normal, and the number of the solid that it meets first."""
    start = np.broadcast_to(scene.eye, rays.shape)
    best, normal = np.full(len(rays), NOTHING), np.zeros(rays.shape)
    which = np.zeros(len(rays), dtype=np.int64)
    for number, solid in enumerate(scene.solids):
        t, n = _hit(solid, start, rays)
        nearer = t < best
        best[nearer], normal[nearer], which[nearer] = t[nearer], n[nearer], number
    return best, normal, which


def _colours(scene: Scene, rays: Array) -> Array:
    """What the rays see, RGB [N, 3]."""
    t, normal, which = _seen(scene, rays)
    points = scene.eye + t[:, None] * rays
    colour = np.stack([solid.colour for solid in scene.solids])[which]
    stripes = np.array([solid.stripes for solid in scene.solids])[which]
    centre = np.stack([solid.centre for solid in scene.solids])[which]
    own = points - centre
    wave = np.sin(2 * np.pi * stripes * own[:, 0]) * np.sin(
        np.pi * stripes * (own[:, 1] + own[:, 2])
    )
    colour = colour * (1 + 0.18 * np.sign(wave) * (stripes > 0))[:, None]
    to_lamp = scene.lamp - points
    distance = np.linalg.norm(to_lamp, axis=1)
    to_lamp /= distance[:, None]
    lit = np.ones(len(rays), dtype=bool)
    for solid in scene.solids:
        if solid.piece:
            lit &= _hit(solid, points + 1e-3 * normal, to_lamp)[0] > distance
    facing = (normal * to_lamp).sum(-1).clip(0)
    light = 0.38 + 1.5 * facing * lit / (1 + 0.25 * distance**2)
    return colour * light[:, None]


def render(number: int) -> dict[str, Array]:
    """The picture of a scene, uint8 [H, W, 3], and its maps as they are stored."""
    scene = scene_of(number)
    generator = np.random.default_rng([2403, 1, number])
    places = ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))
    light = np.mean([_colours(scene, _rays(scene, *place)[0]) for place in places], axis=0)
    light = light.clip(0) ** (1 / 1.6) + generator.normal(0, 0.015, light.shape)
    rays, axes = _rays(scene, 0.5, 0.5)
    t, normal, which = _seen(scene, rays)
    depth = (t * (rays @ axes[2])).reshape(HEIGHT, WIDTH)
    classes, parts, pieces = (
        np.array(values, dtype=np.uint8)[which].reshape(HEIGHT, WIDTH)
        for values in zip(*((*solid.kinds, solid.piece) for solid in scene.solids), strict=True)
    )
    in_view = (normal @ axes.T).reshape(HEIGHT, WIDTH, 3)
    codes = 255 * np.log(depth.clip(NEAR, FAR) / NEAR) / np.log(FAR / NEAR)
    return {
        "image": np.rint(light.reshape(HEIGHT, WIDTH, 3).clip(0, 1) * 255).astype(np.uint8),
        "classes": classes,
        "parts": parts,
        "depth": np.rint(codes).astype(np.uint8),
        "normals": np.rint((in_view + 1) * 127.5).astype(np.uint8),
        "edges": _edges(pieces.astype(np.int64) * 64 + classes * 8 + parts),
        "saliency": _salient(pieces),
    }


def _edges(kinds: Array) -> Array:
    """255 where class, piece or part differs from the pixel to the left or above."""
    found = np.zeros(kinds.shape, dtype=bool)
    found[:, 1:] |= kinds[:, 1:] != kinds[:, :-1]
    found[1:] |= kinds[1:] != kinds[:-1]
    return found.astype(np.uint8) * 255


def _salient(pieces: Array) -> Array:
    """255 on the piece whose pixels are nearest to the middle of the view, large ones before small ones."""
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH]
    nearness = np.exp(-(((v - HEIGHT / 2) / 40) ** 2) - ((u - WIDTH / 2) / 40) ** 2)
    weights = np.bincount(pieces.ravel(), nearness.ravel())
    weights[0] = 0
    return (pieces == weights.argmax()).astype(np.uint8) * 255 * bool(weights.max() > 0)


def _name(kind: str, number: int) -> str:
    return f"{kind}/{number:04d}.{'jpg' if kind == 'image' else 'png'}"


def write() -> None:
    """All files."""
    for split, numbers in SPLITS.items():
        rows = []
        for number in numbers:
            found = render(number)
            for kind, values in found.items():
                path = HERE / _name(kind, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                options = {"quality": 88} if kind == "image" else {"optimize": True}
                Image.fromarray(values).save(path, **options)
            rows.append(json.dumps({kind: _name(kind, number) for kind in found}))
        (HERE / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def faults() -> list[str]:
    """What is not as it would be rendered now, of every so many-th scene; a JPEG is near its picture."""
    found = []
    for numbers in SPLITS.values():
        for number in numbers[::CHECKED]:
            for kind, values in render(number).items():
                path = HERE / _name(kind, number)
                stored = np.asarray(Image.open(path))
                apart = np.abs(stored.astype(int) - values.astype(int))
                # Arithmetic of another machine may move a border by a ray.
                wrong = apart.mean() > 6 if kind == "image" else (apart > 1).mean() > 0.002
                if wrong:
                    found.append(f"{path}: is not what is rendered")
    return found


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        write()
        return 0
    found = faults()
    for line in found:
        print(line, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
