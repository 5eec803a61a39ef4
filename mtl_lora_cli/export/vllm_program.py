"""What vLLM is asked, run by the interpreter of its own environment: `python vllm_program.py REQUEST ANSWER`.

It knows nothing of this package; both files are JSON. A candidate's log-probability is asked token by token: one
answer of one token, of which no other is allowed, gives log p of that token before anything was masked. (Prompts'
log-probabilities, `prompt_logprobs`, fail beside LoRA on a CPU.)

    request   model, dtype, rank, length; adapters: task → folder; questions: task, prompt, choices; and where
              the answer is free, `asked`, the prompt that it follows, limit and ends
    answer    version; answers: scores of the choices, and the tokens of a free answer
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}
_MOST = 32  # adapters in one batch; others take turns


def main(request: str, answer: str) -> None:
    """Answer one request."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with open(request, encoding="utf-8") as file:  # noqa: PTH123 - nothing but what every Python has
        asked = json.load(file)
    found = answers(asked)
    with open(answer, "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(found, file)


def answers(asked: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    import vllm
    from vllm.lora.request import LoRARequest

    adapters, questions = asked["adapters"], asked["questions"]
    engine = vllm.LLM(
        model=asked["model"],
        dtype=asked["dtype"],
        enable_lora=True,
        max_loras=min(_MOST, len(adapters)),
        max_cpu_loras=len(adapters),
        max_lora_rank=asked["rank"],
        max_model_len=asked["length"],
        enforce_eager=True,
        seed=0,
    )
    loras = {
        task: LoRARequest(task, number, folder)
        for number, (task, folder) in enumerate(adapters.items(), start=1)
    }
    steps = list(dict.fromkeys(step for one in questions for step in _steps(one)))
    free = [number for number, one in enumerate(questions) if one.get("limit")]
    prompts = [list(before) for _, before, _ in steps]
    settings = [
        vllm.SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=[token], logprobs=0)
        for _, _, token in steps
    ]
    tasks = [task for task, _, _ in steps]
    for number in free:
        one = questions[number]
        prompts.append(one["asked"])
        settings.append(
            vllm.SamplingParams(
                temperature=0, max_tokens=one["limit"], stop_token_ids=one["ends"], logprobs=0
            )
        )
        tasks.append(one["task"])
    said = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        settings,
        lora_request=[loras[task] for task in tasks],
        use_tqdm=False,
    )
    known = {
        step: one.outputs[0].logprobs[0][step[2]].logprob
        for step, one in zip(steps, said, strict=False)
    }
    answered = dict(zip(free, (one.outputs[0] for one in said[len(steps) :]), strict=True))
    return {
        "version": vllm.__version__,
        "answers": [
            {
                "scores": [
                    sum(known[step] for step in _of(one, choice)) for choice in one["choices"]
                ],
                "answer": list(answered[number].token_ids) if number in answered else None,
            }
            for number, one in enumerate(questions)
        ],
    }


def _steps(question: dict[str, Any]) -> list[tuple[str, tuple[int, ...], int]]:
    """Task, all tokens before, and the token that is asked for, of all candidates."""
    return [step for choice in question["choices"] for step in _of(question, choice)]


def _of(question: dict[str, Any], choice: list[int]) -> list[tuple[str, tuple[int, ...], int]]:
    prompt = question["prompt"]
    return [
        (question["task"], (*prompt, *choice[:place]), token) for place, token in enumerate(choice)
    ]


if __name__ == "__main__":
    main(*sys.argv[1:3])
