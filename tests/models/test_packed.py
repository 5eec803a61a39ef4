"""Packed rows: no example sees another, and each gets what it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.models.packed import PackedBatch, PackedModel
from mtl_lora_cli.models.registered import NotHonoured

LogProbs = Callable[..., list[Tensor]]


def draw(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 512, (length,), generator=generator) for length in lengths]


@pytest.fixture(scope="module")
def plain(stories_folder: Path) -> Any:
    """The same weights as transformers loads them, attention included."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(stories_folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("replaced", [0, 1, 3])
def test_another_example_of_the_same_length_changes_no_bit(
    adapted: PackedModel, logprobs: LogProbs, replaced: int
) -> None:
    examples, tasks = draw(17, 40, 9, 23), [0, 2, 1, 0]
    before = logprobs(adapted, examples, tasks)
    others = [*examples]
    (others[replaced],) = draw(len(examples[replaced]), seed=1)
    after = logprobs(adapted, others, tasks)
    for number in range(4):
        assert torch.equal(before[number], after[number]) == (number != replaced)


@pytest.mark.parametrize("length", [2, 100])
def test_another_example_of_another_length_changes_only_rounding(
    adapted: PackedModel, logprobs: LogProbs, length: int
) -> None:
    examples, tasks = draw(17, 40, 9, 23), [0, 2, 1, 0]
    before = logprobs(adapted, examples, tasks)
    (examples[1],) = draw(length, seed=1)
    after = logprobs(adapted, examples, tasks)
    for number in (0, 2, 3):
        assert (before[number] - after[number]).abs().max() < 5e-4


def test_another_task_of_a_neighbour_changes_only_rounding(
    adapted: PackedModel, logprobs: LogProbs
) -> None:
    examples = draw(17, 40, 9)
    before = logprobs(adapted, examples, [0, 1, 2])
    after = logprobs(adapted, examples, [0, -1, 2])
    assert (before[1] - after[1]).abs().max() > 0.05
    for number in (0, 2):
        assert (before[number] - after[number]).abs().max() < 5e-4


def test_packed_rows_equal_the_plain_model_one_example_at_a_time(
    bare: PackedModel, logprobs: LogProbs, plain: Any
) -> None:
    examples = draw(17, 2, 300, 64)
    together = logprobs(bare, examples, [0] * 4)
    for example, ours in zip(examples, together, strict=True):
        with torch.no_grad():
            theirs = plain(example.unsqueeze(0)).logits[0].log_softmax(-1)
        expected = theirs[:-1].gather(1, example[1:, None])[:, 0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_without_a_task_the_adapted_model_is_the_base(
    adapted: PackedModel, bare: PackedModel, logprobs: LogProbs
) -> None:
    examples = draw(17, 40)
    theirs = logprobs(bare, examples, [0, 0])
    mixed = logprobs(adapted, examples, [-1, 1])
    torch.testing.assert_close(mixed[0], theirs[0], rtol=0, atol=1e-4)
    assert (mixed[1] - theirs[1]).abs().max() > 0.05


def test_a_packed_example_of_a_task_equals_it_alone(
    adapted: PackedModel, logprobs: LogProbs
) -> None:
    examples, tasks = draw(17, 40, 9), [2, 0, 1]
    together = logprobs(adapted, examples, tasks)
    for example, task, ours in zip(examples, tasks, together, strict=True):
        torch.testing.assert_close(logprobs(adapted, [example], [task])[0], ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_branches_equal_whole_sequences(
    adapted: PackedModel, logprobs: LogProbs, engine: Any
) -> None:
    prompt, first, second, third, other = draw(20, 3, 6, 2, 15)
    choices = [first, second, third]
    # another example, then the prompt with its branches
    tokens = torch.cat([other, prompt, *choices])
    lengths = [len(choice) for choice in choices]
    starts = (35 + torch.tensor([0, *lengths]).cumsum(0)).tolist()
    places = torch.cat(
        [torch.arange(15), torch.arange(20), *(20 + torch.arange(n) for n in lengths)]
    )
    reach = [15] * 15 + [len(tokens)] * 20
    positions = []
    for start, length in zip(starts, lengths, strict=False):
        reach += [start + length] * length
        positions += [34, *range(start, start + length - 1)]
    distinct, owner = torch.tensor(positions).unique(return_inverse=True)
    batch = PackedBatch(
        input_ids=tokens.unsqueeze(0),
        position_ids=places.unsqueeze(0),
        task_ids=torch.ones(1, len(tokens), dtype=torch.long),
        segments=Segments.build([15, len(tokens) - 15], torch.tensor(reach, dtype=torch.int32)),
        positions=distinct,
        owner=owner,
        targets=torch.cat(choices),
    )
    model = adapted
    if engine == "plain":
        model = PackedModel(adapted.model, adapted._adapter, engine=engine).eval()
    with torch.no_grad(), model.routed(batch):
        branched = model(batch).split(lengths)
    for choice, ours in zip(choices, branched, strict=True):
        whole = logprobs(adapted, [torch.cat([prompt, choice])], [1])[0][19:]
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-4)


def test_the_head_sees_only_the_positions_asked_for(
    adapted: PackedModel, logprobs: LogProbs
) -> None:
    seen: list[int] = []
    head = adapted.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    try:
        logprobs(adapted, draw(17, 40), [0, 1])
    finally:
        handle.remove()
    assert seen == [16 + 39]


def test_an_adapted_head_knows_the_tasks_of_the_positions_asked_for(
    stories_folder: Path, logprobs: LogProbs
) -> None:
    from mtl_lora_cli.adapters.inject import inject
    from mtl_lora_cli.adapters.methods import configure
    from mtl_lora_cli.models.base import find_base_model
    from mtl_lora_cli.models.load import load_model

    base = find_base_model(str(stories_folder))
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    untied = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    model.lm_head.weight = untied
    torch.manual_seed(0)
    adapter = inject(model, configure(target_modules=("lm_head",)), ("one", "two"))
    adapter.layers["lm_head"].lora_B.data.normal_(std=0.05)
    packed = PackedModel(model, adapter).eval()
    examples = draw(17, 12, 9)
    together = logprobs(packed, examples, [1, -1, 0])
    for example, task, ours in zip(examples, [1, -1, 0], together, strict=True):
        torch.testing.assert_close(logprobs(packed, [example], [task])[0], ours, rtol=0, atol=1e-4)
    assert isinstance(model.lm_head, MultiTaskLinear)


def test_the_model_refuses_to_run_without_segments(bare: PackedModel) -> None:
    plain = PackedModel(bare.model, engine="plain")
    with pytest.raises(NotHonoured, match="do not pass the bounds of examples on"):
        plain.model(torch.tensor([[5, 6]]))
