"""What an output folder remembers: of which run, rows and options it is, and which parts are done.

`_manifest.json` says what is being answered, and `_parts.jsonl` has a line for each part that is done, written when its
file lies in its place. So a part is either whole or not there, whenever a process ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.prediction.inputs import InputFile, Part
from mtl_lora_cli.runs.folder import read_json, save_json

MANIFEST, JOURNAL = "_manifest.json", "_parts.jsonl"
UNFINISHED = ".partial"
MAPS = "maps"  # the folder of maps, below the output folder


@dataclass(frozen=True)
class Done:
    """A part that is answered.

    Attributes:
        part: its name.
        digest: the fingerprint of its rows.
        file: its answers, below the output folder.
        rows: that were answered.
        truncated: how many of them were longer than the model reads.
        bytes, sha256: of the file.
        bad: rows that were passed over, see `reading.Fault`.
    """

    part: str
    digest: str
    file: str
    rows: int
    truncated: int
    bytes: int
    sha256: str
    bad: list[dict[str, Any]]


@dataclass(frozen=True)
class Begun:
    """What an output folder is of.

    Attributes:
        run: the run's name, its checkpoint, its tasks and its base model.
        input: the input folder, for people: only its files' content counts.
        options: of the command, by name.
        files: of the input.
        complete: every part is done.
    """

    run: Mapping[str, Any]
    input: str
    options: Mapping[str, Any]
    files: Sequence[InputFile]
    complete: bool = False

    @property
    def parts(self) -> list[Part]:
        """All of them, in order."""
        return [part for file in self.files for part in file.parts]

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "files": [file.to_json() for file in self.files]}


class Output:
    """An output folder.

    Args:
        folder: it need not be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begun(self) -> Begun | None:
        """What it was begun with; None: it is empty, or not there.

        Raises:
            UsageError: something else lies in it, or its manifest is damaged.
        """
        if not (self.folder / MANIFEST).exists():
            if self.folder.is_dir() and any(one.name[0] != "." for one in self.folder.iterdir()):
                raise UsageError(
                    f"--output {self.folder}: the folder is not empty and has no {MANIFEST}; "
                    "expected a new folder, or one that predict has begun"
                )
            return None
        try:
            content = read_json(self.folder / MANIFEST)
            files = [InputFile.from_json(one) for one in content.pop("files")]
            content.pop("format_version")
            return Begun(files=files, **content)
        except (KeyError, TypeError) as error:
            raise UsageError(f"{self.folder / MANIFEST}: damaged: {error}") from None
        except MtlLoraError as error:
            raise UsageError(str(error)) from None

    def is_unanswered(self) -> bool:
        """Whether no file of answers lies in it."""
        return not any(
            path.is_file() and not path.name.startswith(("_", "."))
            for path in self.folder.rglob("*")
        )

    def begin(self, begun: Begun) -> None:
        """Write what it is of."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_json(self.folder / MANIFEST, begun.to_json())

    def done(self) -> dict[str, Done]:
        """Parts that are done, by name; a line that was cut off, and a file that is gone, do not count."""
        found: dict[str, Done] = {}
        for line in self._lines():
            try:
                one = Done(**json.loads(line))
            except (ValueError, TypeError):
                continue
            path = self.folder / one.file
            if path.is_file() and path.stat().st_size == one.bytes:
                found[one.part] = one
        return found

    def _lines(self) -> Iterator[bytes]:
        path = self.folder / JOURNAL
        if path.exists():
            yield from path.read_bytes().split(b"\n")

    def add(self, done: Done) -> None:
        """Remember a part whose file lies in its place."""
        line = json.dumps(asdict(done), ensure_ascii=False) + "\n"
        with (self.folder / JOURNAL).open("ab+") as file:
            if file.tell() and not _ends_line(file):
                line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def sweep(self) -> None:
        """Remove what a killed process has left; nobody else writes here."""
        for pattern in (f"**/.*{UNFINISHED}", f".{MANIFEST}.*", f"{MAPS}/**/.*"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def require_same(before: Begun, now: Begun, output: Path) -> None:
    """Refuse to go on with another run or other options.

    Raises:
        UsageError: what differs.
    """
    elsewhere = "go on with the same, or give another --output"
    for key, value in now.run.items():
        if before.run.get(key) != value:
            raise UsageError(
                f"--output {output}: was begun with another run: its {key.replace('_', ' ')} was "
                f"{_shown(before.run.get(key))}, received {_shown(value)}; {elsewhere}"
            )
    for key, value in now.options.items():
        if before.options.get(key) != value:
            option, was = f"--{key.replace('_', '-')}", before.options.get(key)
            with_it = f"without {option}" if was is None else f"with {option} {_shown(was)}"
            received = "none" if value is None else _shown(value)
            raise UsageError(
                f"--output {output}: was begun {with_it}, received {received}; {elsewhere}"
            )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("fingerprint", value)
    return "none" if value is None else f"{value!s:.60}"


def require_unchanged(now: Begun, done: Mapping[str, Done], output: Path) -> None:
    """Refuse rows that were answered already and are others now.

    Raises:
        UsageError: the file, and which rows.
    """
    parts = {part.name: part for part in now.parts}
    for name, one in done.items():
        part = parts.get(name)
        if part is None or part.digest != one.digest:
            file = "a file of the input" if part is None else f"{now.input}: {part.file}"
            what = "is gone" if part is None else "has changed"
            rows = (
                "" if part is None else f", rows {part.first + 1:,} to {part.first + part.rows:,}"
            )
            raise UsageError(
                f"{file}: {what} since its part {name} was answered{rows}; "
                f"give another --output than {output}"
            )
