"""What gets no gradient is named once; what was not drawn yet is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl_lora_cli.training.signs import signs, undrawn
from mtl_lora_cli.training.unreached import FIRST, Unreached, still_at_zero

TRAINED = (
    "model.layers.0.q_proj.lora_A",
    "model.layers.0.q_proj.lora_B",
    "tower.layers.1.q_proj.lora_A",
    "tower.layers.1.q_proj.lora_B",
    "whole:projector.weight",
    "decoder:depth:head.weight",
    "task_embedding",
)


class Held:
    """Parameters, and AdamW after a backward pass that reaches some of them."""

    tasks = ("one", "depth")

    def __init__(self, *reached: str) -> None:
        self.parameters = {name: torch.ones(2, requires_grad=True) for name in TRAINED}
        self.optimizer = torch.optim.AdamW(self.parameters.values())
        self.step(*reached)

    def step(self, *reached: str) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = torch.full((2,), float(name in reached))
        self.optimizer.step()

    def trained(self) -> dict[str, torch.Tensor]:
        return dict(self.parameters)

    def state(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        every = self.optimizer.state
        return {f"{n}/{key}": v for n, t in tensors.items() for key, v in every[t].items()}


def drawn(step: int, *tasks: str) -> dict[str, Any]:
    return {"event": "step", "step": step, "examples": dict.fromkeys(tasks, 1)}


def looking(held: Held, total: int = 40, known: tuple[str, ...] = ()) -> Unreached:
    host: Any = held
    return Unreached(host, host, held.tasks, total, known)


REACHED = ("model.layers.0.q_proj.lora_B", "whole:projector.weight", "decoder:depth:head.weight")


def test_a_module_is_named_when_all_tasks_were_learned_from() -> None:
    observer = looking(Held(*REACHED))
    observer.hear(drawn(1, "one"))
    assert observer.look(FIRST) is None  # `depth` may reach it yet
    assert observer.every == 2 * FIRST
    observer.hear(drawn(11, "depth"))
    seen = observer.look(2 * FIRST)
    assert seen is not None and seen.line is not None
    assert seen.event["modules"] == ["tower.layers.1.q_proj"]
    assert seen.line.startswith(
        "note: 1 module got no gradient in 20 steps and learned nothing: tower."
    )
    assert signs([seen.event]) == [seen.line.removeprefix("note: ")]
    assert observer.look(40) is None  # once


def test_one_of_two_tensors_is_enough_and_what_is_known_is_not_said_again() -> None:
    held = Held(*REACHED)
    assert still_at_zero(held.trained(), held.state(held.trained()), ()) == [
        "tower.layers.1.q_proj"
    ]
    observer = looking(held, known=("tower.layers.1.q_proj",))
    observer.hear(drawn(1, "one", "depth"))
    seen = observer.look(FIRST)
    assert seen is not None and seen.line is None
    held.step(
        "tower.layers.1.q_proj.lora_A"
    )  # it was reached later: the last word is that nothing is silent
    last = observer.look(40)
    assert last is not None and last.event["modules"] == [] and last.line is None
    assert signs([seen.event, last.event]) == []


def test_a_task_that_no_step_had_is_named_at_the_end_and_its_decoder_is_not() -> None:
    observer = looking(Held(*REACHED[:2], "tower.layers.1.q_proj.lora_A"))
    steps = [drawn(1, "one"), drawn(2, "one")]
    for event in steps:
        observer.hear(event)
    assert observer.look(FIRST) is None and observer.look(40) is None
    (line,) = undrawn(steps, Held.tasks)
    assert line == "no step had a row of depth: what is theirs alone learned nothing"
    assert undrawn([*steps, drawn(3, "depth")], Held.tasks) == undrawn([], Held.tasks) == []


def test_after_a_resume_it_is_not_said_again() -> None:
    held = Held(*REACHED)
    first = looking(held)
    first.hear(drawn(1, "one", "depth"))
    seen = first.look(FIRST)
    assert seen is not None
    again = looking(held)
    for event in (drawn(1, "one", "depth"), seen.event):
        again.hear(event)
    assert again.look(40) is None and again.every > 10**6


@pytest.mark.parametrize("step", [1, 40])
def test_nothing_is_said_where_all_learns(step: int) -> None:
    observer = looking(Held(*TRAINED))
    observer.hear(drawn(1, "one", "depth"))
    assert observer.look(step) is None
