"""Conversations about pictures: their tokens are those of the model's own chat template, and answers alone are learned."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mtl_lora_cli.data.encoded import EncodedSplit, encode_split
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.rendering import Example, Renderer

from ..sights import TOKENS

FOUND = importlib.util.find_spec("trl")
SIZES = {"a.png": (40, 60), "b.png": (64, 33)}  # height, width
CONTROL = re.compile(r"<\|\w+\|?>|<\w+\|>|<\w+_of_\w+>|</?s>")
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_FIRST = (  # as LLaVA 1.5: all pictures of a message, then its text; answers marked
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% else %} ASSISTANT:{% generation %} {{ message['content'][0]['text'] }}</s>{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_TEXT = (  # of a language model: contents are texts
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN = {"internvl": _CHATML, "llava": _FIRST}
# PaliGemma has no conversations, and one Gemma 4 is like the other here.
SHIPPED = {kind: kind for kind in TOKENS if kind not in ("internvl", "paligemma", "gemma4_small")}

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A house."}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And here?"}, {"type": "image"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Another house, and a tree."}]},
    {"role": "user", "content": [{"type": "text", "text": "Which is red?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "None of them."}]},
]


def as_text(one: dict[str, Any]) -> str:
    parts = (part.get("text", "<image>") for part in one["content"])
    return "\n".join(parts)


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """The same conversation in each of the forms, and the template that reads it."""
    names = {"user": "human", "assistant": "gpt"}
    llava = [{"from": names[one["role"]], "value": as_text(one)} for one in MESSAGES]
    factory = [{"role": one["role"], "content": as_text(one)} for one in MESSAGES]
    shown = list(SIZES)
    parts, rest = [], iter(shown)
    for one in MESSAGES:
        own = [
            {"type": "image_url", "image_url": {"url": next(rest)}}
            if part["type"] == "image"
            else part
            for part in one["content"]
        ]
        parts.append({"role": one["role"], "content": own})
    return {
        "llava": ("instruct/llava", {"images": shown, "conversations": llava}),
        "factory": ("instruct/messages_images", {"images": shown, "messages": factory}),
        "openai": ("instruct/messages_images", {"messages": parts}),
        "trl": ("instruct/messages_images", {"images": shown, "messages": MESSAGES}),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    for name, (height, width) in SIZES.items():
        Image.new("RGB", (width, height), (200, 60, len(name))).save(folder / name)
    return folder


@pytest.fixture
def tokenizer(models: Callable[[str], BaseModel], llava: BaseModel) -> Callable[..., Any]:
    def made(kind: str, template: str) -> Any:
        found = load_tokenizer(llava if kind == "llava" else models(kind))
        known = set(CONTROL.findall(template)) - set(found.get_vocab())
        found.add_special_tokens({"additional_special_tokens": sorted(known)}, False)
        found.chat_template = template
        return found

    return made


def example(place: Path, form: str = "openai", **changes: Any) -> Example:
    template, row = rows()[form]
    return Renderer(find_template(template, None)[2], "talk", place).render(
        {**row, **changes}, "rows:1"
    )


def encoded(tokenizer: Any, one: Example, **others: Any) -> EncodedSplit:
    encoder = Encoder(tokenizer, "chat")
    given = {"task": "talk", "limit": 4096, "on_overflow": "error", **others}
    return encode_split([one], ["rows:1"], encoder, **given)


def rendered(tokenizer: Any, count: int, **how: Any) -> str:
    """The first messages by the template itself, each mark of a picture as the model's processor writes it."""
    text: str = tokenizer.apply_chat_template(MESSAGES[:count], tokenize=False, **how)
    vision = tokenizer.vision()
    for sides in SIZES.values():
        text = text.replace(vision.mark, vision.text(*sides).replace(vision.mark, "\0"), 1)
    return text.replace("\0", vision.mark)


def naive(tokenizer: Any, ids: list[int]) -> list[bool]:
    """Between where an answer's own words begin and the token that ends its turn, by looking at the words alone."""
    mask = [False] * len(ids)
    vision_end = 0
    for number in (1, 3, 5):
        words = tokenizer.decode(ids)
        answer = as_text(MESSAGES[number])
        begin = words.index(answer, vision_end)
        end = vision_end = begin + len(answer)
        spans = [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]
        for n in range(len(ids)):
            if spans[n + 1] > begin and spans[n] < end:
                mask[n] = True
        following = max(n for n in range(len(ids)) if mask[n]) + 1
        mask[following] = True
    return mask


@pytest.mark.parametrize("name", [*OWN, *SHIPPED])
def test_tokens_are_the_templates_own_and_answers_alone_are_learned(
    tokenizer: Callable[..., Any], place: Path, name: str
) -> None:
    if name not in OWN and (FOUND is None or FOUND.origin is None):
        pytest.skip("trl is not installed: pip install --no-deps trl")
    if name in OWN:
        kind, template = name, OWN[name]
    else:
        assert FOUND is not None and FOUND.origin is not None
        kind = SHIPPED[name]
        template = (Path(FOUND.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
    own = tokenizer(kind, template)
    split = encoded(own, example(place))
    ids = split.example(0).tolist()
    whole = own(rendered(own, 6), add_special_tokens=False)["input_ids"]
    assert ids == whole[: len(ids)] and not own.decode(whole[len(ids) :]).strip()
    assert ids.count(own.vision().token_id) == sum(own.vision().count(*s) for s in SIZES.values())
    learned = split.learned(0).tolist()
    assert own.vision().token_id not in {ids[n] for n in learned}
    wanted = [n for n, marked in enumerate(naive(own, ids)) if marked]
    extra = own.decode([ids[n] for n in sorted(set(learned) ^ set(wanted))])
    assert not extra.strip(), (extra, own.decode([ids[n] for n in learned]))
    every = split.learned(0, "all").tolist()
    assert own.vision().token_id not in {ids[n] for n in every} and len(every) > len(learned)
    # An answer that is asked for stands behind what the template writes before it.
    (prompt,), _ = Encoder(own, "chat").asked(
        [example(place).dialogue], known=False, shown=[example(place).images]
    )
    assert prompt.tokens == own(
        rendered(own, 5, add_generation_prompt=True), add_special_tokens=False
    )["input_ids"] or name in ("llava_next",)


def test_all_forms_are_the_same_conversation(tokenizer: Callable[..., Any], place: Path) -> None:
    own = tokenizer("internvl", _CHATML)
    found = [encoded(own, example(place, form)).example(0).tolist() for form in rows()]
    assert all(one == found[0] for one in found)
    # A single picture that the text says nothing of stands before the first question.
    _, row = rows()["llava"]
    bare = [{**row["conversations"][0], "value": "What is it?"}, row["conversations"][1]]
    one = example(place, "llava", images=["a.png"], conversations=bare)
    marked = [{**bare[0], "value": "<image>\nWhat is it?"}, bare[1]]
    two = example(place, "llava", image="a.png", images=None, conversations=marked)
    assert encoded(own, one).example(0).tolist() == encoded(own, two).example(0).tolist()


def test_a_language_models_template_has_pictures_in_its_texts(
    tokenizer: Callable[..., Any], place: Path
) -> None:
    own = tokenizer("llava", _TEXT)
    ids = encoded(own, example(place, "factory")).example(0).tolist()
    vision = own.vision()
    text = own.apply_chat_template(
        [{**one, "content": as_text(one)} for one in MESSAGES], tokenize=False
    ).replace("<image>", vision.text(1, 1))
    assert own.decode(ids) == own.decode(own(text.rstrip(), add_special_tokens=False)["input_ids"])


def test_bytes_in_a_row_and_rows_of_text_alone(tokenizer: Callable[..., Any], place: Path) -> None:
    own = tokenizer("internvl", _CHATML)
    held = base64.b64encode((place / "a.png").read_bytes()).decode()
    one = example(place, "llava", images=["data:image/png;base64," + held, "b.png"])
    assert encoded(own, one).example(0).tolist() == encoded(own, example(place)).example(0).tolist()
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello to you."}]
    alone = example(place, "llava", images=None, conversations=talk)
    assert alone.images == () and own.vision().token_id not in encoded(own, alone).example(0)


def test_earliest_turns_leave_with_their_pictures(
    tokenizer: Callable[..., Any], place: Path
) -> None:
    own = tokenizer("internvl", _CHATML)
    one = example(place)
    whole = encoded(own, one)
    split = encoded(own, one, limit=len(whole.example(0)) - 1, on_overflow="truncate_prompt")
    assert split.turns == 2 and split.pictures is not None
    assert [shown.address for shown in split.pictures[0]] == ["b.png"]
    ids = split.example(0).tolist()
    assert ids.count(own.vision().token_id) == own.vision().count(*SIZES["b.png"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": ["a.png"]}, "2 times <image> in the messages and 1 pictures"),
        ({"images": ["a.png", "b.png", "a.png"]}, "2 times <image> in the messages and 3 pictures"),
        ({"images": ["http://x/a.png", "b.png"]}, "nothing is fetched"),
        ({"images": [7, "b.png"]}, "expected the path of a picture, received 7"),
        ({"images": ["data:image/png,abc", "b.png"]}, "expected data:image/…;base64"),
        ({"images": ["data:image/png;base64,a", "b.png"]}, "base64: expected a picture.s bytes"),
        (
            {"messages": [{"role": "assistant", "content": "<image>"}]},
            r"messages\[0\].content: a message of assistant shows a picture",
        ),
        (
            {"messages": [{"role": "system", "content": [{"type": "image"}]}]},
            "a message of system shows a picture",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a"}]}]},
            "a part of type 'audio' is no text",
        ),
        (
            {"messages": [{"role": "user", "content": ["<image>", {"type": "image"}]}]},
            "has <image> in a text and pictures as parts",
        ),
    ],
)
def test_what_is_wrong_is_said_of_the_row(place: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"^rows:1: task 'talk': (images|conversation): .*{said}"):
        example(place, "factory", **changes)


def test_a_row_that_writes_the_templates_mark_itself_is_refused(
    tokenizer: Callable[..., Any], place: Path
) -> None:
    own = tokenizer("internvl", _CHATML)
    talk = json.loads(json.dumps(MESSAGES))
    talk[4]["content"][0]["text"] = "What is <IMG_CONTEXT>?"
    with pytest.raises(UsageError, match="writes <IMG_CONTEXT> 3 times for 2 pictures"):
        encoded(own, example(place, "trl", messages=talk))
