"""What Ollama is told of a GGUF file: a Modelfile beside it.

Ollama writes a prompt by a Go template over `.System` and `.Messages`, not by the Jinja template that the GGUF file
holds. Ours is found by asking the tokenizer's chat template, as the run used it, for conversations of made-up
texts: what stands between those are its pieces. Where no pieces write every conversation that is tried
exactly as the chat template does, fewer of its parts are taken: no system message, then one user message alone.

Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.md and template.md there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtl_lora_cli.data.chat_rendering import Rendering
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.card import licence_text
from mtl_lora_cli.export.order import Order
from mtl_lora_cli.models.load import load_config

MODELFILE = "Modelfile"
PLAIN = "{{ .Prompt }}"
# Texts that no template writes itself: of the system, of two users, of an assistant.
_S, _U, _V, _W, _A, _B = (
    "4817203956", "7391846250", "9052648137", "6150937284", "2850614937", "3169407528",
)  # fmt: skip
Talk = Sequence[tuple[str, str]]  # role and text


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around texts.

    Attributes:
        start: before everything, where there is no system message.
        user, answer: before and behind a user's text, and an assistant's.
        prompt: behind everything, where the model begins.
        system: before and behind a system message; None: there is no place for one.
        inside: that stands inside the first user's turn, in the place of what begins it.
    """

    start: str
    user: tuple[str, str]
    answer: tuple[str, str]
    prompt: str
    system: tuple[str, str] | None = None
    inside: bool = False

    def written(self, talk: Talk) -> str:
        """What Ollama writes by `go`, in Python: a conversation that ends with a user's message."""
        system = next((text for role, text in talk if role == "system"), "")
        out = "" if system else self.start
        if system and self.system is not None:
            out = system.join(self.system)
        begun = False
        for role, text in talk:
            if role == "user":
                out += "" if self.inside and system and not begun else self.user[0]
                out += text + self.user[1]
                begun = True
            elif role == "assistant":
                out += self.answer[0] + text + self.answer[1]
        return out + self.prompt

    def go(self) -> str:
        """The same as a Go template."""
        begin, end = (_literal(text) for text in self.user)
        head = _literal(self.start)
        first = begin
        if self.system is not None:
            before, behind = (_literal(text) for text in self.system)
            otherwise = f"{{{{ else }}}}{head}" if head else ""
            head = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{otherwise}{{{{ end }}}}"
        if self.inside:
            head += "{{ $begun := not .System }}"
            first = f"{{{{ if $begun }}}}{begin}{{{{ end }}}}{{{{ $begun = true }}}}"
        return (
            f"{head}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{first}{{{{ .Content }}}}{end}'
            f'{{{{ else if eq .Role "assistant" }}}}{_literal(self.answer[0])}{{{{ .Content }}}}'
            f"{_literal(self.answer[1])}{{{{ end }}}}{{{{ end }}}}{_literal(self.prompt)}"
        )


def find_pieces(render: Callable[[Talk], str]) -> Pieces | None:
    """The pieces of a chat template, or None where it cannot be taken apart.

    Args:
        render: writes a conversation and the generation prompt; may raise UsageError.
    """
    talk = (("user", _U), ("assistant", _A), ("user", _V))
    parts = _between(render, talk)
    if parts is None:
        return None
    first, answer, again, last = parts
    begin = _same_start(first[::-1], again[::-1])[::-1]
    end = _same_start(answer, last)
    found = Pieces(
        start=first.removesuffix(begin),
        user=(begin, end),
        answer=(answer.removeprefix(end), again.removesuffix(begin)),
        prompt=last.removeprefix(end),
    )
    longer = (*talk, ("assistant", _B), ("user", _W))
    if any(_asked(render, one) != found.written(one) for one in (talk[:1], longer)):
        return None
    return _with_system(render, found, talk) or found


def _with_system(render: Callable[[Talk], str], pieces: Pieces, talk: Talk) -> Pieces | None:
    """The same with a place for a system message, where there is one."""
    whole = (("system", _S), *talk)
    parts = _between(render, whole)
    if parts is None:
        return None
    before, behind = parts[:2]
    own = behind.endswith(pieces.user[0])
    place = (before, behind.removesuffix(pieces.user[0]) if own else behind)
    found = Pieces(
        pieces.start, pieces.user, pieces.answer, pieces.prompt, system=place, inside=not own
    )
    holds = all(_asked(render, one) == found.written(one) for one in (whole, whole[:2]))
    return found if holds else None


def _between(render: Callable[[Talk], str], talk: Talk) -> list[str] | None:
    """What stands before, between and behind the texts; None: one is dropped, changed or written twice."""
    rest, found = _asked(render, talk), []
    for _, text in talk:
        if rest is None or rest.count(text) != 1:
            return None
        before, _, rest = rest.partition(text)
        found.append(before)
    return None if rest is None else [*found, rest]


def _asked(render: Callable[[Talk], str], talk: Talk) -> str | None:
    try:
        return render(talk)
    except UsageError:
        return None


def _same_start(one: str, other: str) -> str:
    """What two texts begin with."""
    pairs = zip(one, other, strict=False)
    return one[: next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]


def _literal(text: str) -> str:
    """Text that Go's templates leave as it is."""
    return text.replace("{{", '{{ "{{" }}')


class _Asked(Rendering):
    """A chat template that is asked for whole prompts."""

    def __call__(self, talk: Talk) -> str:
        """What is written, without the start token that whoever reads it sets itself."""
        text = self._render(
            [{"role": role, "content": content} for role, content in talk], generation_prompt=True
        )
        start = self._tokenizer.bos_token
        sets = bool(start) and self._tokenizer("x")["input_ids"][:1] == [
            self._tokenizer.bos_token_id
        ]
        return text.removeprefix(start) if sets else text


def template_of(order: Order) -> tuple[str, str]:
    """A Go template, and what is to be said of it."""
    run = order.run
    if run.recipe.prompt_format != "chat":
        return PLAIN, (
            "A prompt is the text that the task's template makes of a row (README.md shows it): nothing is "
            "put around it. The answer follows it behind a space."
        )
    render = _Asked(run.tokenizer, run.recipe.chat)
    pieces = find_pieces(render)
    if pieces is None:
        begin, _, end = render([("user", _U)]).partition(_U)
        note = "The chat template of the base model, for one user message alone: more cannot be said in Go here."
        return f"{_literal(begin)}{PLAIN}{_literal(end)}", note
    missing = "" if pieces.system else " It has no place for a system message: one is left out."
    return pieces.go(), f"The chat template of the base model, as the run used it.{missing}"


def modelfile(order: Order, *, model: str, adapter: str | None = None) -> str:
    """The text of a Modelfile.

    Args:
        order: what was written.
        model, adapter: the files, as seen from the Modelfile.
    """
    run, task = order.run, order.task
    template, note = template_of(order)
    config = load_config(run.base).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or run.recipe.training.row_length
    base = (
        []
        if adapter is None
        else [f"# {model}: the base model as a GGUF file; README.md says how."]
    )
    files = [f"FROM {model}"] + ([] if adapter is None else [f"ADAPTER {adapter}"])
    lines = [
        f"# {task.name} of {run.folder.name}. In this folder: ollama create {task.name} -f {MODELFILE}",
        *base,
        *files,
        "",
        f"# {note}",
        f"TEMPLATE {_quoted(template)}",
        "",
        *(f"PARAMETER stop {_quoted(text)}" for text in stops(order)),
        "PARAMETER temperature 0",
        f"PARAMETER num_ctx {min(positions, run.recipe.training.row_length)}",
        "",
        f"LICENSE {_quoted(licence_text(run.base))}",
    ]
    return "\n".join(lines) + "\n"


def stops(order: Order) -> list[str]:
    """What ends an answer, as text: tokens, or what the chat template writes there."""
    run = order.run
    encoder = Encoder.of(run.tokenizer, run.recipe, lenient=True)
    tokens = [str(run.tokenizer.convert_ids_to_tokens(one)) for one in sorted(encoder.stops)]
    return [*tokens, *([encoder.stop_text] if encoder.stop_text else [])]


def _quoted(text: str) -> str:
    r"""A value of a Modelfile: in quotes of one or three marks, which nothing inside may be.

    Raises:
        UsageError: the text holds three quotation marks.
    """
    if "\n" not in text and '"' not in text:
        return f'"{text}"'
    if '"""' in text or text.endswith('"'):
        raise UsageError(
            "a Modelfile cannot hold a text with three quotation marks, or one at its end"
        )
    return f'"""{text}"""'


def write_modelfile(order: Order, folder: Path, *, model: str, adapter: str | None = None) -> None:
    """The Modelfile in a folder."""
    (folder / MODELFILE).write_text(
        modelfile(order, model=model, adapter=adapter), encoding="utf-8"
    )
