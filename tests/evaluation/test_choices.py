"""Scores of candidate answers: what they are, and everything that must not change them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation import choices
from mtl_lora_cli.evaluation.choices import Passes, score
from mtl_lora_cli.evaluation.requests import Request, build_requests
from mtl_lora_cli.evaluation.trees import Tree
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.models.packed import PackedBatch, PackedModel
from mtl_lora_cli.tasks.messages import Dialogue
from mtl_lora_cli.tasks.rendering import Example


def scored(packed: PackedModel, requests: list[Request], tokens: int = 2048) -> list[np.ndarray]:
    return score(packed, requests, device=torch.device("cpu"), tokens_per_pass=tokens)


def naive(packed: PackedModel, request: Request) -> list[float]:
    """Every candidate behind the whole prompt, a pass of its own each."""
    sums = []
    for choice in request.choices:
        tokens = torch.tensor(request.prompt + choice)
        places = torch.arange(len(request.prompt) - 1, len(tokens) - 1)
        batch = PackedBatch(
            input_ids=tokens[None],
            position_ids=torch.arange(len(tokens))[None],
            task_ids=torch.full((1, len(tokens)), request.task),
            segments=Segments.build([len(tokens)]),
            positions=places,
            owner=torch.arange(len(places)),
            targets=tokens[places + 1],
        )
        with torch.no_grad(), packed.routed(batch):
            sums.append(float(packed(batch).double().sum()))
    return sums


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for one, two in zip(ours, theirs, strict=True):
        assert one.shape == two.shape
        assert int(one.argmax()) == int(two.argmax())
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def together(packed: PackedModel, requests: list[Request]) -> list[np.ndarray]:
    return scored(packed, requests)


def test_the_requests_are_worth_testing(requests: list[Request]) -> None:
    assert {len(request.choices) for request in requests} >= {2, 3, 4, 11}
    assert any((request.tree.reach < request.cost).any() for request in requests)
    assert any(len(set(map(len, request.choices))) > 1 for request in requests)


def test_scores_equal_whole_sequences_one_by_one(
    packed: PackedModel, requests: list[Request], together: list[np.ndarray]
) -> None:
    same(together, [np.asarray(naive(packed, request)) for request in requests])


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_predictions_are_those_of_padded_batches(
    packed: PackedModel,
    requests: list[Request],
    together: list[np.ndarray],
    side: str,
    size: int,
) -> None:
    """The same through transformers' own attention over rows filled up to one length, tasks mixed."""
    asked = [
        (number, request.prompt, choice)
        for number, request in enumerate(requests)
        for choice in request.choices
    ]
    sums: list[list[float]] = [[] for _ in requests]
    for start in range(0, len(asked), size):
        some = asked[start : start + size]
        longest = max(len(prompt) + len(choice) for _, prompt, choice in some)
        ids = torch.zeros(len(some), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (_, prompt, choice) in enumerate(some):
            tokens = torch.tensor(prompt + choice)
            place = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
        tasks = torch.tensor([requests[number].task for number, _, _ in some])
        with torch.no_grad(), packed.over_rows(tasks) as model:
            places = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
        logprobs = logits.double().log_softmax(-1)
        for row, (number, prompt, choice) in enumerate(some):
            begin = int(mask[row].argmax()) + len(prompt) - 1
            picked = logprobs[row, begin : begin + len(choice)]
            sums[number].append(float(picked[torch.arange(len(choice)), choice].sum()))
    same(together, [np.asarray(values) for values in sums])


@pytest.mark.parametrize("tokens", [1, 300, 10**6])
def test_scores_do_not_depend_on_what_passes_together(
    packed: PackedModel, requests: list[Request], together: list[np.ndarray], tokens: int
) -> None:
    same(together, scored(packed, requests, tokens))


@pytest.mark.parametrize("shared_up_to", [None, 0])
def test_passes_by_another_hand_are_alike_and_score_the_same(
    packed: PackedModel,
    requests: list[Request],
    together: list[np.ndarray],
    shared_up_to: int | None,
) -> None:
    whole = Passes.build(requests, shared_up_to, 10**6)
    assert len(whole.batches) == 1
    total = whole.batches[0].input_ids.numel()
    found = Passes.build(
        requests, shared_up_to, int(total / 3.3)
    )  # 4 where all but the last are full
    sizes = [batch.input_ids.numel() for batch in found.batches]
    assert (len(sizes), sum(sizes)) == (3, total)
    assert min(sizes) > 0.5 * max(sizes)
    with torch.no_grad():
        values = []
        for batch in found.batches:
            with packed.routed(batch):
                values.append(packed(batch).double().numpy())
    same(together, found.scores(values))


def test_scores_do_not_depend_on_the_place_in_a_batch(
    packed: PackedModel,
    requests: list[Request],
    together: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Passes put together at random, with anything before and behind."""
    order = np.random.default_rng(1).permutation(len(requests)).tolist()
    passes = [order[:1], order[1:9], order[9:]]
    monkeypatch.setattr("mtl_lora_cli.evaluation.choices.fill_passes", lambda costs, tokens: passes)
    same(together, scored(packed, requests))


def test_scores_do_not_depend_on_what_fills_a_pass_up(
    packed: PackedModel,
    requests: list[Request],
    together: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a card; trees stand among them, and passes of any size."""
    sizes = []

    def batch(some: list[Request]) -> PackedBatch:
        own = choices.filled(real(some))
        sizes.append((own.input_ids.numel(), own.task_ids.numel(), len(own.positions)))
        return own

    real = choices._batch
    monkeypatch.setattr(choices, "_batch", batch)
    same(together, scored(packed, requests, 300))
    assert not np.any(np.asarray(sizes) % 16)


def test_scores_do_not_depend_on_the_order(
    packed: PackedModel, requests: list[Request], together: list[np.ndarray]
) -> None:
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = scored(packed, [requests[number] for number in order])
    same([together[number] for number in order], shuffled)


def test_scores_of_a_task_do_not_depend_on_the_others(
    packed: PackedModel, requests: list[Request], together: list[np.ndarray]
) -> None:
    for task in range(4):
        numbers = [i for i, request in enumerate(requests) if request.task == task]
        alone = scored(packed, [requests[number] for number in numbers])
        same([together[number] for number in numbers], alone)


def test_another_task_gives_other_scores(packed: PackedModel, requests: list[Request]) -> None:
    first = requests[0]
    scores = [
        scored(packed, [Request(task, first.prompt, first.choices)])[0] for task in range(-1, 4)
    ]
    for i, one in enumerate(scores):
        for two in scores[:i]:
            assert np.abs(one - two).max() > 1e-3


def test_advance_counts_every_request(packed: PackedModel, requests: list[Request]) -> None:
    seen: list[int] = []
    score(packed, requests, device=torch.device("cpu"), tokens_per_pass=500, advance=seen.append)
    assert sum(seen) == len(requests)
    assert len(seen) > 3


def test_dropout_is_off_and_the_mode_comes_back(
    packed: PackedModel, requests: list[Request], together: list[np.ndarray]
) -> None:
    packed.train()
    try:
        again = scored(packed, requests)
        assert packed.training
    finally:
        packed.eval()
    assert all(np.array_equal(one, two) for one, two in zip(together, again, strict=True))


@given(
    st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(3, 511), min_size=1, max_size=5),
)
@settings(max_examples=25, deadline=None)
def test_any_candidates(packed: PackedModel, choices: list[list[int]], prompt: list[int]) -> None:
    """Also equal ones, one that begins another, and all of one token."""
    request = Request(1, prompt, choices)
    same(scored(packed, [request]), [np.asarray(naive(packed, request))])


def test_a_tree_by_hand() -> None:
    """5 and 6 begin two candidates, 5 three: each is computed once, and no last token at all."""
    tree = Tree.build([1, 2], [[5, 7, 3], [5, 6, 8, 9], [5, 6, 8, 4], [5, 6, 0], [2]])
    #                            1  2  5  6  8  7
    assert tree.tokens.tolist() == [1, 2, 5, 6, 8, 7]
    assert tree.places.tolist() == [0, 1, 2, 3, 4, 3]
    assert tree.reach.tolist() == [6, 6, 6, 5, 5, 6]
    assert tree.targets.tolist() == [5, 7, 3, 5, 6, 8, 9, 5, 6, 8, 4, 5, 6, 0, 2]
    assert tree.owner.tolist() == [1, 2, 5, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 1]
    assert tree.lengths.tolist() == [3, 4, 4, 3, 1]


@given(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=5))
def test_a_tree_holds_what_the_candidates_say(choices: list[list[int]]) -> None:
    """Every question's ancestors and itself are the prompt and what stands before it."""
    tree = Tree.build([7, 8], choices)
    assert len(tree.tokens) == 2 + len({tuple(c[:n]) for c in choices for n in range(1, len(c))})
    place = np.arange(len(tree.tokens))
    at = 0
    for choice in choices:
        for number, token in enumerate(choice):
            owner = tree.owner[at]
            seen = (place <= owner) & (owner < tree.reach)
            assert tree.tokens[seen].tolist() == [7, 8, *choice[:number]]
            assert tree.places[seen].tolist() == list(range(2 + number))
            assert tree.targets[at] == token
            at += 1
    assert at == len(tree.owner)


def test_candidates_of_one_token_cost_nothing() -> None:
    assert Request(0, [1, 2, 3], [[5], [6]]).cost == 3
    assert Request(0, [1, 2, 3], [[5, 6, 7, 8], [5, 6, 9]]).cost == 3 + 2 + 1


def test_a_long_prompt_is_cut_at_its_beginning_and_marked(stories_folder: Path) -> None:
    tokenizer = load_tokenizer(find_base_model(str(stories_folder)))
    encoder = Encoder(tokenizer, "plain")
    long = Example("one two three four five six seven eight nine ten", "yes", ("yes", "no"), 0)
    short = Example("a", "yes", ("yes", "no"), 0)
    whole = build_requests([long], 0, encoder, 512)[0]
    cut, kept = build_requests([long, short], 0, encoder, 12)
    assert (cut.truncated, kept.truncated, whole.truncated) == (True, False, False)
    assert cut.choices == whole.choices
    assert len(cut.prompt) + max(map(len, cut.choices)) == 12
    assert cut.prompt[0] == tokenizer.bos_token_id
    assert cut.prompt[1:] == whole.prompt[-(len(cut.prompt) - 1) :]
    (shorter,) = build_requests([long], 0, encoder, 12, new_tokens=5)
    assert len(shorter.prompt) + 5 == 12


@pytest.mark.parametrize("limit", [30, 60, 200])
def test_an_answer_to_a_conversation_gets_the_room_that_there_is(
    stories_folder: Path, limit: int
) -> None:
    """The right one need not fit; a question loses its beginning before the answer has less than half."""
    tokenizer = load_tokenizer(find_base_model(str(stories_folder)))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoder = Encoder(tokenizer, "chat")
    for question, answer in (("dog " * 50, "cat " * 90), ("dog", "cat"), ("dog " * 50, "cat")):
        talk = Dialogue.of(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )
        example = Example("", answer, (), -1, dialogue=talk)
        (one,) = build_requests([example], 0, encoder, limit, generated=True, wheres=["a.jsonl:1"])
        assert 1 <= one.room <= 2 * len(one.choices[0]) + 32
        assert len(one.prompt) + one.room <= limit
        assert one.room >= min(limit // 2, 2 * len(one.choices[0]) + 32)
    with pytest.raises(UsageError, match=r"^a\.jsonl:1: the longest answer and what stands around"):
        build_requests([example], 0, encoder, 3, generated=True, wheres=["a.jsonl:1"])
