"""docs/families.md: what the last whole run of the matrix found."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .models import Tiny
from .results import Result

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
HEAD = """\
# Model families

What was tried with which model type of transformers. `make families` writes this page; nothing in it is
written by hand. A later run of some of the types writes their lines anew.

Every model here is a tiny one with random weights, of the type's own layers, windows, caps, scales, sinks
and positions: some 64 features, two to four layers, a window of 32 tokens, weights so large that attention
and logits are far from even. Examples of 9 to 150 tokens of three tasks and of none go through our path
together, and each of them alone through transformers with eager attention, where the adapter stands as
W + s Σ g_i B_i Λ A in place of each adapted weight. All numbers are float32 on a CPU. *Right* means that none
of these is above {enough}:

- forward: the largest difference of a token's log-probability, in nats;
- candidates: the same for whole candidate answers that share a prompt, as evaluation asks them;
- gradient: the largest difference of the adapter's gradients, of the largest of their kind;
- and no token's log-probability moves when only later ones, or other examples, change.

*Commands* means: ten steps of `train` on the three sample tasks, `eval` by choices and by generating, `merge`
and `export --format peft`; then transformers and PEFT alone, in another process, give the run's answers with
what was written. Adapters are on every linear layer of the text part but the output layer, unless a layer is
one that cannot carry one.

Where the table says *fused*, the fused engine runs; all others run on transformers' own layers, in one of
three layouts: packed rows; one example a row, where a state runs on or attention is the type's own; one
example a pass, where even the length of another row would be felt. Before the first step of every run, and in
`validate`, the same comparison is made with the model itself, which chooses the layout or refuses the model.
So a type that is not in this table is right, or refused, too.

Run with {versions}: {right} models of {types} types are right, none is wrong, {refused} are refused.
"""
RIGHT = """
## Right

| type | variant | engine | forward | candidates | gradient | commands |
| --- | --- | --- | --- | --- | --- | --- |
"""
REFUSED = """
## Refused

| type | variant | what is said |
| --- | --- | --- |
"""
PACKAGES = ("transformers", "torch", "peft")


@dataclass(frozen=True)
class Row:
    """A line of one of the page's tables."""

    model_type: str
    variant: str
    refused: bool
    numbers: tuple[float, ...] = ()
    engine: str = ""


def rendered(
    models: Sequence[Tiny], results: Sequence[Result], enough: float, commands: Sequence[Tiny]
) -> str:
    """The page; the lines of models that did not run are those that it has.

    Args:
        models: all.
        results: of those that ran.
        enough: the tolerance.
        commands: models whose commands were run to their end, with the right answers.
    """
    lines = {line.split(" | ", 2)[0] + line.split(" | ", 2)[1]: line for line in _lines()}
    for result in results:
        line = (
            _refused(result) if result.verdict is None else _right(result, result.model in commands)
        )
        lines[_key(result.model)] = line
    own = {str(model): lines[_key(model)] for model in models}
    refused = [model for model in models if own[str(model)].count(" | ") == 2]
    right = [model for model in models if model not in refused]
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    head = HEAD.format(
        enough=_number(enough),
        versions=", ".join([f"Python {platform.python_version()}", *versions]),
        right=len(right),
        types=len({model.model_type for model in right}),
        refused=len(refused),
    )
    tables = ["".join(own[str(model)] for model in some) for some in (right, refused)]
    return head + RIGHT + tables[0] + REFUSED + tables[1]


def _key(model: Tiny) -> str:
    return "| " + _name(model).replace(" | ", "")


def _lines() -> list[str]:
    """Those of the page's tables."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return [line for line in page.splitlines(keepends=True) if line.startswith("| `")]


def _right(result: Result, commands: bool) -> str:
    verdict = result.verdict
    assert verdict is not None
    did = "–" if not commands else "yes, but PEFT" if result.model.not_for_peft else "yes"
    numbers = (verdict.forward, verdict.candidates, verdict.gradient)
    return _line(_name(result.model), verdict.engine, *map(_number, numbers), did)


def _refused(result: Result) -> str:
    said = re.sub(r"base_model: '[^']*'", "base_model", result.refusal).replace("|", "\\|")
    return _line(_name(result.model), said)


def _name(model: Tiny) -> str:
    return f"`{model.model_type}` | {model.variant or '–'}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _number(value: float) -> str:
    return f"{value:.1e}"


def rows() -> list[Row]:
    """What the page says."""
    found = []
    for line in _lines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        refused = len(cells) == 3
        variant = "" if cells[1] == "–" else cells[1]
        numbers = () if refused else tuple(float(cell) for cell in cells[3:6])
        engine = "" if refused else cells[2]
        found.append(Row(cells[0].strip("`"), variant, refused, numbers, engine))
    return found
