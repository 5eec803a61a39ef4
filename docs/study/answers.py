"""The study's answers: of every stage one compressed file, and what becomes of it.

    python docs/study/answers.py unpack FOLDER         each stage's plan and results, as `compare` reads them
    python docs/study/answers.py pack FOLDER           the other way, of the stages that FOLDER has

The next study's stages are `next/0`, `next/1` and so on, as far as they are in.

`answers.json.xz` of a stage holds every result file of its runs: recipe, versions, metrics, and of each
example the right answer, the model's, and its score, rounded to five decimals; nothing else is left
out. `results.sha256` has the hash of each file that is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STUDY = Path(__file__).resolve().parent
STAGES = ("rates", "forms", "search", "parts", "field", "single", "confirm", "unbalanced")
# Of the next study; a later stage stands here before it has a run.
NEXT = ("next/0", "next/1", "next/2", "next/3", "next/4-0", "next/4-1", "next/4-2")
ANSWERS, HASHES = "answers.json.xz", "results.sha256"
DIGITS = 5
Result = dict[str, Any]


def _scored(result: Result) -> Iterator[dict[str, Any]]:
    """The tasks' entries that have scores, of both splits."""
    for split in ("test", "validation"):
        for entry in (result.get(split) or {}).values():
            if "positive_score" in entry:
                yield entry


def compressed(results: dict[str, Result]) -> bytes:
    """Result files by their paths within a stage.

    Scores stand together behind all else, five digits each without anything between them.
    """
    columns: list[str] = []
    for result in results.values():
        for entry in _scored(result):
            values = [round(float(text) * 10**DIGITS) for text in entry["positive_score"].split()]
            assert all(0 <= value <= 10**DIGITS for value in values)
            # Nothing is certain: the last of six digits would be for 1 alone.
            columns.append("".join(f"{min(value, 10**DIGITS - 1):0{DIGITS}d}" for value in values))
            entry["positive_score"] = len(columns) - 1
    content = json.dumps({"results": results, "scores": columns}, separators=(",", ":"))
    return lzma.compress(content.encode(), preset=9 | lzma.PRESET_EXTREME)


def expanded(content: bytes) -> dict[str, Result]:
    """The inverse of `compressed`, but for the digits of scores."""
    read = json.loads(lzma.decompress(content))
    results: dict[str, Result] = read["results"]
    for result in results.values():
        for entry in _scored(result):
            digits = read["scores"][entry["positive_score"]]
            parts = (digits[start : start + DIGITS] for start in range(0, len(digits), DIGITS))
            entry["positive_score"] = " ".join(f"0.{part}" for part in parts)
    return results


def files(stage: str) -> dict[str, str]:
    """Path within the stage → text of each result file."""
    results = expanded((STUDY / stage / ANSWERS).read_bytes())
    return {path: json.dumps(result, indent=1) + "\n" for path, result in results.items()}


def hashes(texts: dict[str, str]) -> str:
    """As sha256sum writes them."""
    return "".join(
        f"{hashlib.sha256(text.encode()).hexdigest()}  {path}\n" for path, text in texts.items()
    )


def unpack(stage: str, folder: Path) -> None:
    """Write a stage's plans and results below a folder, which `compare --report-only` then reads."""
    for plan in (STUDY / stage).rglob("plan.json"):
        target = folder / stage / plan.relative_to(STUDY / stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(plan, target)
    for path, text in files(stage).items():
        target = folder / stage / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def pack(stage: str, folder: Path) -> None:
    """Keep a stage's plan and compress its result files."""
    (STUDY / stage).mkdir(parents=True, exist_ok=True)
    if (folder / stage / "plan.json").is_file():
        shutil.copy(folder / stage / "plan.json", STUDY / stage / "plan.json")
    paths = sorted((folder / stage).rglob("results/*.json"))
    results = {
        path.relative_to(folder / stage).as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in paths
    }
    (STUDY / stage / ANSWERS).write_bytes(compressed(results))
    (STUDY / stage / HASHES).write_text(hashes(files(stage)), encoding="utf-8")


def main() -> None:
    ways = {"pack": pack, "unpack": unpack}
    if len(sys.argv) != 3 or sys.argv[1] not in ways:
        sys.exit(__doc__)
    there = Path(sys.argv[2]) if sys.argv[1] == "pack" else STUDY
    for stage in (*STAGES, *NEXT):
        if (there / stage).is_dir():
            ways[sys.argv[1]](stage, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
