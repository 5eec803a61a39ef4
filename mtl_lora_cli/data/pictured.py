"""The pictures of rows: found, known again, looked at once, and given to a model's tower."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.sources import read_split, root_of
from mtl_lora_cli.data.written import Turn, Written
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.pictures.shown import Picture, grey_like
from mtl_lora_cli.runs.atomic import write_bytes
from mtl_lora_cli.runs.paths import cache_folder
from mtl_lora_cli.tasks.pictured import PLACE
from mtl_lora_cli.tasks.rendering import Example, Renderer
from mtl_lora_cli.tasks.task import Task

if TYPE_CHECKING:
    from mtl_lora_cli.data.kept_features import KeptFeatures
    from mtl_lora_cli.models.vision import Seen, Vision

_KEPT = 2**28  # bytes of pictures as numbers that stay in memory
_THREADS = 8
Found = TypeVar("Found")


def picture_root(task: Task) -> Path:
    """The folder that paths of pictures in a task's rows are relative to."""
    if task.source.hub is not None:
        return Path()
    root = root_of(task.source, Path(), task.name)
    return root.parent if root.is_file() else root


def split_print(task: Task, split: str, rows: str) -> str:
    """A hash of one split's rows and of every byte of its pictures.

    Args:
        task: whose rows show pictures.
        split: that it has.
        rows: the hash of the rows alone.

    Raises:
        UsageError: a row shows none, or a file is missing.
    """
    found = read_split(task.source, split, base=Path(), task=task.name)
    assert found is not None, "it has a fingerprint"
    renderer = Renderer(task.template, task.name, picture_root(task))
    shown = [renderer.pictures(row, found.where(n)) for n, row in enumerate(found.rows)]
    return joined_print(rows, shown)


def joined_print(rows: str, shown: Iterable[Sequence[Picture]]) -> str:
    """The hash of rows with the bytes of the pictures that they show, in order."""
    whole = hashlib.sha256(rows.encode())
    pictures = [one for some in shown for one in some]
    with ThreadPoolExecutor(_THREADS) as pool:
        for digest in pool.map(Picture.digest, pictures):
            whole.update(digest)
    return whole.hexdigest()[:16]


def in_files(example: Example) -> Example:
    """An example whose pictures all lie in files: bytes of rows are kept in the cache, once each."""
    if all(one.content is None for one in example.images):
        return example
    return replace(example, images=tuple(map(_in_file, example.images)))


def _in_file(picture: Picture) -> Picture:
    if picture.content is None:
        return picture
    folder = cache_folder() / "pictures"
    name = f"{picture.digest().hex()}{Path(picture.address).suffix}"
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, picture.content)
    return replace(picture, root=folder, address=name, content=None)


def require_readable(examples: Iterable[Example]) -> None:
    """Decode every picture once.

    Raises:
        UsageError: one of them is missing, broken or too large, by the file and line of its row.
    """
    pictures = list(dict.fromkeys(one for example in examples for one in example.images))
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(_decode, pictures):
            pass


def _decode(picture: Picture) -> None:
    picture.read()


def shown_twice(train: Set[bytes], held: Mapping[str, Set[bytes]]) -> list[str]:
    """A line for each held-out split that shows pictures of training rows, whatever is asked of them.

    Args:
        train: digests of the pictures that training rows show.
        held: of each held-out split those of its rows.
    """
    return [
        f"{len(shown & train):,} of {len(shown):,} {split} pictures are shown in train, too"
        for split, shown in held.items()
        if shown & train
    ]


class Eyes:
    """What a model sees of rows' pictures.

    Args:
        vision: how the base model reads pictures.
        blind: it sees grey in their place.

    Attributes:
        store: what a tower made of pictures before; None: it runs.
    """

    def __init__(self, vision: Vision, *, blind: bool = False) -> None:
        self.vision, self.blind = vision, blind
        self.store: KeptFeatures | None = None
        self._kept: OrderedDict[Picture, Seen] = OrderedDict()
        self._bytes = 0

    @property
    def settings(self) -> str:
        """All that decides how many tokens pictures have, and what is in their place."""
        return f"{self.vision.settings} {self.blind}"

    def written(self, text: Written, pictures: Sequence[Picture]) -> Written:
        """A text with its pictures as the model's tokens in their places.

        Args:
            text: with a place for each picture.
            pictures: in the order of their places.

        Raises:
            UsageError: a picture cannot be read; or there are other places than those of pictures.
        """
        parts = text.text.split(PLACE)
        if len(parts) != len(pictures) + 1:
            raise UsageError(f"{len(parts) - 1} places for {len(pictures)} pictures")
        texts = [self._sized(picture, self.vision.text) for picture in pictures]
        ends = list(accumulate(len(part) + len(PLACE) for part in parts[:-1]))
        more = [len(one) - len(PLACE) for one in texts]
        whole = "".join(f"{part}{one}" for part, one in zip(parts, [*texts, ""], strict=True))

        def moved(place: int) -> int:
            return place + sum(n for end, n in zip(ends, more, strict=True) if end <= place)

        turns = tuple(
            Turn(moved(one.begin), moved(one.text), moved(one.close), moved(one.end))
            for one in text.turns
        )
        return replace(text, text=whole, turns=turns, own=(moved(text.own[0]), moved(text.own[1])))

    def require_all(self, tokens: Sequence[int], pictures: Sequence[Picture], where: str) -> None:
        """Refuse tokens in which other picture tokens stand than those of the row's pictures.

        Raises:
            UsageError: how many there are, and how many were expected.
        """
        if self.vision.whole_prompt and not pictures:
            kind = self.vision.config.model_type
            raise UsageError(f"{where}: shows no picture; every prompt of a {kind} has one")
        found = sum(token == self.vision.token_id for token in tokens)
        wanted = sum(self.counts(pictures))
        if found != wanted:
            raise UsageError(
                f"{where}: {found} tokens {self.vision.token} stand in the row, expected {wanted} for its "
                f"{len(pictures)} pictures"
            )

    def behind(self, tokens: Sequence[int], own: tuple[int, int]) -> tuple[int, int]:
        """What may be cut for want of room: nothing up to the end of the last picture."""
        last = max((n for n, one in enumerate(tokens) if one == self.vision.token_id), default=-1)
        begin = max(own[0], last + 1 + self.vision.behind if last >= 0 else own[0])
        return begin, max(begin, own[1])

    def counts(self, pictures: Iterable[Picture]) -> list[int]:
        """Tokens of each."""
        return [self._sized(picture, self.vision.count) for picture in pictures]

    def _sized(self, picture: Picture, of: Callable[[int, int], Found]) -> Found:
        """What follows from a picture's height and width.

        Raises:
            UsageError: it cannot be read, or the model's own processor takes none of such sides.
        """
        height, width = picture.size()
        try:
            return of(height, width)
        except ValueError as error:
            said = " ".join(str(error).split())[:200]
            raise picture.site.fault(
                f"{picture.address}: {height} x {width} pixels: {said}"
            ) from None

    def key(self, picture: Picture) -> str:
        """What tells what the tower sees of a picture from what it sees of others.

        Raises:
            UsageError: the file is missing.
        """
        if self.blind:
            return "grey-{}x{}".format(*picture.size())
        return picture.digest().hex()

    def seen(self, pictures: Sequence[Picture]) -> list[Seen]:
        """Each as the language part is given it: what was kept of it, or as the tower takes it.

        Raises:
            UsageError: one cannot be read.
        """
        if self.store is not None:
            keys = [self.key(one) for one in pictures]
            if all(key in self.store for key in keys):
                return [self.store.read(key) for key in keys]
        return self.looked(pictures)

    def looked(self, pictures: Sequence[Picture]) -> list[Seen]:
        """Each as the tower takes it.

        Raises:
            UsageError: one cannot be read.
        """
        missing = [one for one in dict.fromkeys(pictures) if one not in self._kept]
        with ThreadPoolExecutor(_THREADS) as pool:
            looked = list(pool.map(self._look, missing))
        known = {one: self._kept[one] for one in pictures if one in self._kept}
        known.update(zip(missing, looked, strict=True))
        for one in missing:
            self._keep(one, known[one])
        return [known[one] for one in pictures]

    def _look(self, picture: Picture) -> Seen:
        image = picture.read()
        return self.vision.look(grey_like(image) if self.blind else image)

    def _keep(self, picture: Picture, seen: Seen) -> None:
        self._kept[picture] = seen
        self._bytes += _size(picture, seen)
        while self._bytes > _KEPT and len(self._kept) > 1:
            self._bytes -= _size(*self._kept.popitem(last=False))


def blinded(examples: Examples, eyes: Eyes, how: str) -> Examples:
    """Examples as a blind control is asked.

    Args:
        examples: some of which show pictures.
        eyes: they see grey from now on, where that is how.
        how: `grey`, or `swapped`: each example shows the pictures of the next one that has as many.
    """
    if how == "grey":
        eyes.blind = True
        return examples
    found = list(examples.examples)
    for count in {len(one.images) for one in found}:
        alike = [number for number, one in enumerate(examples.examples) if len(one.images) == count]
        for number, donor in zip(alike, [*alike[1:], *alike[:1]], strict=True):
            found[number] = replace(found[number], images=examples.examples[donor].images)
    return replace(examples, examples=found)


def _size(picture: Picture, seen: Seen) -> int:
    numbers = sum(value.numel() * value.element_size() for value in seen.values())
    return numbers + len(picture.content or b"")
