"""A process that answers for folders by transformers and PEFT alone: nothing of ours is loaded.

It reads a question a line from its standard input, as JSON, and writes an answer a line:

    {"folder": …, "adapter": … or null, "asked": [[prompt, [candidate, …]], …], "said": [text, …]}
    {"scores": [[log p of each candidate], …], "continued": [text, …]}

Prompts and candidates are texts; a candidate follows its prompt after a space. What is said to have been
generated is given, so that only as many tokens are. Every sequence goes through the model by itself, without padding, packing or a cache.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
import transformers

NEW_TOKENS = 40


def load(folder: str, adapter: str | None) -> Any:
    """The model as its own `config.json` calls it, with PEFT's adapter where there is one."""
    (architecture,) = transformers.AutoConfig.from_pretrained(folder).architectures
    kind = getattr(transformers, architecture)
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[n, vocabulary] of n tokens."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def score(model: Any, tokenizer: Any, prompt: str, candidate: str) -> float:
    """log p(candidate | prompt)."""
    before, whole = tokenizer(prompt).input_ids, tokenizer(f"{prompt} {candidate}").input_ids
    assert whole[: len(before)] == before, "the candidate's text changes the prompt's tokens"
    answer = torch.tensor(whole[len(before) :])
    rows = logits(model, whole[:-1])[len(before) - 1 :].double().log_softmax(-1)
    return float(rows.gather(1, answer[:, None]).sum())


def continued(model: Any, tokenizer: Any, prompt: str, said: str) -> str:
    """The likeliest tokens after the prompt: as many as say what was said, or else too many."""
    tokens = before = tokenizer(prompt).input_ids
    text = ""
    for _ in range(NEW_TOKENS):
        if text.strip() == said.strip():
            break
        tokens = [*tokens, int(logits(model, tokens)[-1].argmax())]
        text = tokenizer.decode(tokens[len(before) :], skip_special_tokens=True)
    return text


@torch.no_grad()
def main() -> None:
    """Answer until nobody asks any more."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print what they like
    for line in sys.stdin:
        try:
            answer = answered(json.loads(line))
        except Exception:  # whatever it is: who asked shall see it, and may ask about other folders
            answer = {"error": traceback.format_exc()}
        assert not any(name.partition(".")[0] == "mtl_lora_cli" for name in sys.modules)
        print(json.dumps(answer), file=answers, flush=True)


def answered(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one line."""
    model = load(question["folder"], question["adapter"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(question["folder"])
    asked, said = question["asked"], question["said"]
    return {
        "scores": [
            [score(model, tokenizer, prompt, candidate) for candidate in candidates]
            for prompt, candidates in asked
        ],
        "continued": [
            continued(model, tokenizer, prompt, text)
            for (prompt, _), text in zip(asked, said, strict=False)
        ],
    }


if __name__ == "__main__":
    main()
