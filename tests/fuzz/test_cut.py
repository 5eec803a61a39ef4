"""The cut between prompt and answer: behind each other they are the whole text, whatever tokenizer and template."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.written import one_turn
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Chat

Fuzz = settings.get_profile("fuzz")
LETTERS = "aB1 :\n<é"
CONTROL = ("<s>", "</s>", "<end>", "<u>", "<m>")
TEXTS = st.text(LETTERS, min_size=1, max_size=12).map(str.strip).filter(bool)
PIECES = st.lists(st.sampled_from([*CONTROL, *LETTERS, "A:", "\n\n", "<x></x>"]), max_size=4).map(
    "".join
)


@st.composite
def tokenizers(draw: st.DrawFn) -> Any:
    """Bytes with merges drawn at random, also across words and lines."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    used = [w for w in words if w in "aB1Ġ:Ċ<Ã©"]
    for _ in range(draw(st.integers(0, 12))):
        pair = draw(st.sampled_from(used)), draw(st.sampled_from(used))
        if "".join(pair) not in words:
            merges.append(pair)
            words.append("".join(pair))
            used.append("".join(pair))
    backend = Tokenizer(models.BPE(vocab={w: n for n, w in enumerate(words)}, merges=merges))
    regular = draw(st.booleans())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regular)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": list(CONTROL[2:])})
    return made


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Something before and behind each message, and a generation prompt that may not fit."""
    head, user, behind, model, lead, tail, more = (draw(PIECES) for _ in range(7))
    trim = draw(st.sampled_from(["", "|trim"]))
    prompt = draw(st.sampled_from([model, model + lead, model + more]))
    parts = [
        f"{{{{ {one!r} }}}}" if one else ""
        for one in (head, user, behind, model + lead, tail, prompt)
    ]
    return (
        parts[0] + "{% for m in messages %}{% if m.role == 'user' %}" + parts[1]
        + f"{{{{ m.content{trim} }}}}" + parts[2] + "{% else %}" + parts[3]
        + f"{{{{ m.content{trim} }}}}" + parts[4] + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + parts[5] + "{% endif %}"
    )  # fmt: skip


@settings(Fuzz)
@given(tokenizers(), templates(), TEXTS, st.lists(TEXTS, min_size=1, max_size=4, unique=True))
def test_a_chat_is_its_rendered_conversation(
    tokenizer: Any, template: str, prompt: str, answers: list[str]
) -> None:
    tokenizer.chat_template = template
    try:
        encoder = Encoder(tokenizer, "chat")
    except UsageError as error:
        assert "contradicts itself" in str(error)
        encoder = Encoder(tokenizer, "chat", Chat(answers="conversation"))
    pairs = [one_turn(prompt, answer) for answer in answers]
    whole = [tokenizer.apply_chat_template(pair, tokenize=True)["input_ids"] for pair in pairs]
    (before,), (following,) = encoder.continuations([prompt], [answers])
    found = encoder.conversations(pairs)
    for one, answer, ids, ours in zip(found, answers, whole, following, strict=True):
        # Behind the token that ends an answer no other one stands; an end that nobody wrote is set.
        written = one.tokens if one.tokens == ids[: len(one.tokens)] else one.tokens[:-1]
        assert one.tokens[len(written) :] in ([], [tokenizer.eos_token_id])
        assert written == ids[: len(written)]
        left = ids[len(written) :]
        assert not set(left) & set(tokenizer.added_tokens_decoder)
        assert before.tokens + ours == ids[: len(before) + len(ours)]
        assert answer in tokenizer.decode(one.tokens[one.turns[0].text :])
        assert answer in tokenizer.decode(ours)
        assert all(one.mask[one.turns[0].begin :])
        assert not any(one.mask[: one.turns[0].begin])
    begin, end = before.own
    assert tokenizer.decode(before.tokens[begin:end]) in prompt or end - begin < 2 or "é" in prompt
    assert prompt in tokenizer.decode(before.tokens + following[0])


@settings(Fuzz)
@given(tokenizers(), TEXTS, st.lists(TEXTS, min_size=1, max_size=4, unique=True))
def test_plain_is_prompt_space_answer(tokenizer: Any, prompt: str, answers: list[str]) -> None:
    encoder = Encoder(tokenizer, "plain", control_tokens="token")
    (before,), (following,) = encoder.continuations([prompt], [answers])
    for answer, ours in zip(answers, following, strict=True):
        assert before.tokens + ours == tokenizer(f"{prompt} {answer}")["input_ids"]
        assert answer in tokenizer.decode(ours)
    # An answer that is not known leaves a prompt, too, and the same for training as for predicting.
    (unknown,), _ = encoder.continuations([prompt], [[""]])
    assert prompt.startswith(tokenizer.decode(unknown.tokens).rstrip("�"))


@settings(Fuzz)
@given(
    tokenizers(),
    st.lists(st.sampled_from([*CONTROL, "a", " ", "</", "s>"]), min_size=1, max_size=6),
)
def test_control_tokens_of_a_row_are_text(tokenizer: Any, parts: list[str]) -> None:
    encoder = Encoder(tokenizer, "chat" if tokenizer.chat_template else "plain")
    text = "".join(parts).strip() or "a"
    marked = encoder.control_tokens.marked(text)
    (one,) = encoder.conversations([one_turn(marked, "a")])
    known = set(tokenizer.added_tokens_decoder)
    assert not known & set(one.tokens[:-1])
    assert tokenizer.decode(one.tokens) == f"{text} a</s>"
