"""Tokens of prompts and answers: the boundary between them, and what happens for want of room."""

from __future__ import annotations

from typing import Any

import pytest

from mtl_lora_cli.data.encoded import EncodedSplit, encode_split
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.rendering import Example

TEXTS = [
    ("Question: is it?\nAnswer:", ["yes", "no"]),
    ("Once upon a time there was a", ["little girl", "big, red dog."]),
    ("Sum of 12 and 30:", ["42", "4"]),
    ("Ünïcode — ?", ["é", "日本"]),
    ("x", ["x"]),
]


def lm_eval_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The rule of lm-evaluation-harness, `_encode_pair`, as it is written there."""
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole = tokenizer(context + continuation)["input_ids"]
    before = tokenizer(context)["input_ids"]
    return before, whole[len(before) :]


def split(
    encoder: Encoder, pairs: list[tuple[str, str]], limit: int, on_overflow: Any = "error"
) -> EncodedSplit:
    examples = [Example(prompt, answer, (), -1) for prompt, answer in pairs]
    wheres = [f"train.jsonl:{number}" for number in range(1, len(pairs) + 1)]
    return encode_split(examples, wheres, encoder, task="t", limit=limit, on_overflow=on_overflow)


@pytest.mark.parametrize("which", ["stories_tokenizer", "small_tokenizer"])
@pytest.mark.parametrize(("prompt", "answers"), TEXTS)
def test_the_boundary_is_that_of_lm_eval(
    request: pytest.FixtureRequest, which: str, prompt: str, answers: list[str]
) -> None:
    tokenizer = request.getfixturevalue(which)
    (found,), (following,) = Encoder(tokenizer, "plain").continuations([prompt], [answers])
    whole = [tokenizer(f"{prompt} {answer}")["input_ids"] for answer in answers]
    assert [found.tokens + ours for ours in following] == whole
    theirs = [lm_eval_pair(tokenizer, prompt, " " + answer) for answer in answers]
    if [before + after for before, after in theirs] == whole:  # its way has lost no token
        assert [(found.tokens, ours) for ours in following] == theirs


def test_a_token_across_the_boundary_is_the_answers(small_tokenizer: Any) -> None:
    """`A:` + ` yes` is `A`, `: y`, `es` together: counting off `A:` would leave `es` alone."""
    (prompt,), ((answer,),) = Encoder(small_tokenizer, "plain").continuations(["A:"], [["yes"]])
    assert small_tokenizer.convert_ids_to_tokens(prompt.tokens) == ["A"]
    assert small_tokenizer.convert_ids_to_tokens(answer) == [":Ġy", "es"]


def test_answers_share_the_prompt_that_all_of_them_leave(small_tokenizer: Any) -> None:
    """`A: no` alone would leave `A` and `: `, but `: y` is another token."""
    (prompt,), (answers,) = Encoder(small_tokenizer, "plain").continuations(["A:"], [["no", "yes"]])
    assert small_tokenizer.decode(prompt.tokens) == "A"
    assert [small_tokenizer.decode(answer) for answer in answers] == [": no", ": yes"]


def test_the_start_token_is_the_tokenizers(stories_tokenizer: Any, small_tokenizer: Any) -> None:
    for tokenizer, starts in ((stories_tokenizer, True), (small_tokenizer, False)):
        (tokens,), _ = Encoder(tokenizer, "plain").continuations(["a girl"], [["x"]])
        assert tokens.tokens == tokenizer("a girl")["input_ids"]
        assert (tokens.tokens[0] == tokenizer.bos_token_id) == starts


def test_many_texts_give_what_each_gives_alone(stories_tokenizer: Any) -> None:
    encoder = Encoder(stories_tokenizer, "plain")
    prompts, answers = zip(*TEXTS, strict=True)
    together = encoder.continuations(prompts, answers)
    alone = [encoder.continuations([p], [a]) for p, a in TEXTS]
    assert together == ([p for (p,), _ in alone], [a for _, (a,) in alone])


def test_an_example_is_prompt_answer_and_end(stories_tokenizer: Any) -> None:
    encoded = split(Encoder(stories_tokenizer, "plain"), [("Once upon a", "time"), ("A", "b")], 64)
    end = stories_tokenizer.eos_token_id
    for number, (prompt, answer) in enumerate([("Once upon a", "time"), ("A", "b")]):
        tokens = encoded.example(number).tolist()
        assert tokens == [*stories_tokenizer(f"{prompt} {answer}")["input_ids"], end]
        assert tokens[: encoded.prompt_lengths[number]] == stories_tokenizer(prompt)["input_ids"]
    assert encoded.lengths.tolist() == [len(encoded.example(0)), len(encoded.example(1))]
    assert encoded.supervised == sum(encoded.lengths) - sum(encoded.prompt_lengths)


def test_a_chat_prompt_ends_where_the_model_begins(small_tokenizer: Any) -> None:
    encoder = Encoder(small_tokenizer, "chat")
    encoded = split(encoder, [("Hi", "yes")], 64)
    tokens = encoded.example(0).tolist()
    names = small_tokenizer.convert_ids_to_tokens(tokens)
    assert names == ["<user>", "H", "i", "<end>", "<model>", "y", "es", "<end>"]
    assert encoded.prompt_lengths.tolist() == [5]


def test_chat_needs_a_template(stories_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="prompt_format: chat needs a tokenizer with a chat"):
        Encoder(stories_tokenizer, "chat")


LONG = "one two three four five six seven eight nine ten"


def test_too_long_is_an_error_that_says_where_and_how_many(stories_tokenizer: Any) -> None:
    encoder = Encoder(stories_tokenizer, "plain")
    length = len(stories_tokenizer(LONG + " yes")["input_ids"]) + 1
    pairs = [("a", "b"), (LONG, "yes"), ("a", "c"), (LONG, "no")]
    with pytest.raises(UsageError) as caught:
        split(encoder, pairs, limit=12)
    (line,) = caught.value.lines
    assert line == (
        f"train.jsonl:2: task 't': the example has {length} tokens, rows hold 12 (2 of 4 examples "
        "are too long); raise training.row_length, or set training.on_overflow to drop or "
        "truncate_prompt"
    )


def test_exactly_as_long_as_a_row_is_no_overflow(stories_tokenizer: Any) -> None:
    encoder = Encoder(stories_tokenizer, "plain")
    length = len(stories_tokenizer(LONG + " yes")["input_ids"]) + 1
    assert split(encoder, [(LONG, "yes")], length).lengths.tolist() == [length]
    with pytest.raises(UsageError):
        split(encoder, [(LONG, "yes")], length - 1)


def test_drop_leaves_out_and_counts(stories_tokenizer: Any) -> None:
    encoder = Encoder(stories_tokenizer, "plain")
    encoded = split(encoder, [("a", "b"), (LONG, "yes"), ("a", "c")], 12, "drop")
    assert (len(encoded), encoded.dropped, encoded.truncated, encoded.rows) == (2, 1, 0, 3)
    kept = split(encoder, [("a", "b"), ("a", "c")], 12)
    assert encoded.tokens.tolist() == kept.tokens.tolist()


def test_nothing_left_is_an_error(stories_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no example is left of 1"):
        split(Encoder(stories_tokenizer, "plain"), [(LONG, "yes")], 12, "drop")


def test_truncation_keeps_the_start_token_the_prompts_end_and_the_whole_answer(
    stories_tokenizer: Any,
) -> None:
    encoder = Encoder(stories_tokenizer, "plain")
    encoded = split(encoder, [("a", "b"), (LONG, "yes")], 12, "truncate_prompt")
    assert (len(encoded), encoded.dropped, encoded.truncated) == (2, 0, 1)
    tokens = encoded.example(1).tolist()
    prompt, answer = lm_eval_pair(stories_tokenizer, LONG, " yes")
    room = 12 - len(answer) - 1
    assert tokens == [prompt[0], *prompt[-(room - 1) :], *answer, stories_tokenizer.eos_token_id]
    assert tokens[0] == stories_tokenizer.bos_token_id
    assert len(tokens) == 12
    assert encoded.prompt_lengths.tolist()[1] == room


def test_truncation_without_a_start_token_keeps_the_prompts_end(small_tokenizer: Any) -> None:
    encoder = Encoder(small_tokenizer, "plain")
    tokens = split(encoder, [("abcdefgh", "yes")], 7, "truncate_prompt").example(0)
    assert small_tokenizer.decode(tokens) == "efgh yes<end>"


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_a_shortened_prompt_has_the_length_asked_for(stories_tokenizer: Any, room: int) -> None:
    encoder = Encoder(stories_tokenizer, "plain")
    (prompt,), _ = encoder.continuations([LONG], [["yes"]])
    short = prompt.shortened(room)
    assert len(short) == room
    assert short[0] == stories_tokenizer.bos_token_id
    assert short[1:] == (prompt.tokens[-(room - 1) :] if room > 1 else [])


def test_an_answer_that_alone_is_too_long_is_an_error(stories_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"train.jsonl:1: task 't': the answer alone has \d+ tok"):
        split(Encoder(stories_tokenizer, "plain"), [("a", LONG)], 12, "truncate_prompt")


def test_an_answer_without_a_token_of_its_own_is_an_error(small_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"train.jsonl:1: task 't': the answer has no token"):
        split(Encoder(small_tokenizer, "plain"), [("A:", "")], 12)


def test_taking_examples_keeps_them_whole(stories_tokenizer: Any) -> None:
    import numpy as np

    encoder = Encoder(stories_tokenizer, "plain")
    pairs = [("a girl", "b"), ("the dog was", "happy"), ("x", "yes")]
    encoded = split(encoder, pairs, 40)
    taken = encoded.take(np.array([2, 0]))
    assert [taken.example(i).tolist() for i in range(2)] == [
        encoded.example(2).tolist(),
        encoded.example(0).tolist(),
    ]
    assert taken.prompt_lengths.tolist() == encoded.prompt_lengths[[2, 0]].tolist()
