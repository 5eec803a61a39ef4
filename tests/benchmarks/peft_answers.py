"""Conversations answered by transformers and PEFT alone, in float32, beside answers that were given before.

    python tests/benchmarks/peft_answers.py BASE ADAPTER ASKED.json NEW_TOKENS

ASKED.json is a list of `messages` and the `answer` to compare. Printed is JSON: how many are the same, of how many, and
of each that is not where the two part, and by how much the one token was likelier than the other there, in
log-probability.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    base, adapter, asked, new = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ends = [tokenizer.eos_token_id]
    items = json.loads(asked.read_text(encoding="utf-8"))
    texts = [
        tokenizer.apply_chat_template(item["messages"], add_generation_prompt=True, tokenize=False)
        for item in items
    ]
    tokenizer.padding_side, tokenizer.pad_token_id = "left", ends[0]
    ids = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
    with torch.no_grad():
        out = model.generate(
            **ids, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=ends[0],
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    same, parted = 0, []
    for number, item in enumerate(items):
        found = out.sequences[number, ids["input_ids"].shape[1] :].tolist()
        theirs = tokenizer.decode(found, skip_special_tokens=True).strip()
        if theirs == item["answer"]:
            same += 1
            continue
        ours = tokenizer(item["answer"] or "", add_special_tokens=False)["input_ids"] + ends
        place = next(
            n for n, (a, b) in enumerate(zip([*found, -1], [*ours, -2], strict=False)) if a != b
        )
        gap = None
        if place < min(len(found), len(ours)):
            likely = out.logits[place][number].float().log_softmax(-1)
            gap = float(likely[found[place]] - likely[ours[place]])
        parted.append(
            {"number": number, "token": place, "log_probability": gap,
             "theirs": theirs[:80], "ours": (item["answer"] or "")[:80]}
        )  # fmt: skip
    print(json.dumps({"same": same, "of": len(items), "parted": parted}))


if __name__ == "__main__":
    main()
