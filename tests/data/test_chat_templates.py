"""Public chat templates, as trl ships them: what is read and learned is what transformers writes and tokenises."""

from __future__ import annotations

import importlib.util
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.written import one_turn
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Chat

FOUND = importlib.util.find_spec("trl")
if FOUND is None or FOUND.origin is None:
    pytest.skip("trl is not installed: pip install --no-deps trl", allow_module_level=True)
FOLDER = Path(FOUND.origin).parent / "chat_templates"
TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted(FOLDER.glob("*.jinja"))
    if not path.stem.endswith("_training")
}
PICTURES = ("idefics3", "lfm2_2_5_vl", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm")
IN_PARTS = ("idefics3", "llava_next", "smolvlm")  # they read no content that is a text
REFUSED = {
    "deepseek_r1_distill": "contradicts itself",  # its prompt opens a think block, its answers have none
    "deepseekv3": "contradicts itself",
}
# What ends a turn, by what the names of the templates begin with.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4": "<|endoftext|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "llava": "</s>",
    "muse": "<|eot|>",
    "phi3": "<|end|>",
    "smolvlm": "<end_of_utterance>",
}
CHATML = "<|im_end|>"  # all others
CONTROL = re.compile(r"<[|｜][^\s<>'\"{}]*?[|｜]>|<\|\w+>|<\w+\|>|</?(?:think|s|bos|\w+_of_\w+)>")
PROMPT, ANSWER = "Good or bad?\n  A fine film, was it: ", "Yes, it was."


def tokenizer_of(name: str, template: str) -> Any:
    """Bytes, and the template's control tokens as single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = next((end for start, end in ENDS.items() if name.startswith(start)), CHATML)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Y"), (":", "Ġ"), ("e", "s")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={w: n for n, w in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=end)
    made.add_special_tokens({"additional_special_tokens": sorted(set(CONTROL.findall(template)))})
    made.chat_template = template
    return made


def taken(name: str, messages: list[Any]) -> list[Any]:
    """Messages as this template reads them."""
    if name not in IN_PARTS:
        return messages
    return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]


def test_trl_ships_what_is_listed_here() -> None:
    assert set(PICTURES) | set(REFUSED) | set(IN_PARTS) <= set(TEMPLATES)
    assert len(set(TEMPLATES) - set(PICTURES)) >= 35
    assert len(set(TEMPLATES) - set(PICTURES) - set(REFUSED)) >= 30


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_an_example_is_the_rendered_conversation(name: str) -> None:
    tokenizer = tokenizer_of(name, TEMPLATES[name])
    chat = Chat(date=datetime.now().isoformat())
    if name in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[name]):
            Encoder(tokenizer, "chat", chat)
        return
    encoder = Encoder(tokenizer, "chat", chat)
    pair = one_turn(PROMPT.rstrip(), ANSWER)
    (ours,) = encoder.conversations([pair])
    whole = tokenizer.apply_chat_template(taken(name, pair), tokenize=True)["input_ids"]
    if (
        tokenizer.eos_token not in TEMPLATES[name]
    ):  # written nowhere, so it is set behind the answer
        assert name == "glm4moe"
        whole = [*whole, tokenizer.eos_token_id]
    assert ours.tokens == whole[: len(ours.tokens)]
    assert not tokenizer.decode(whole[len(ours.tokens) :]).strip()

    (turn,) = ours.turns
    assert tokenizer.decode(ours.tokens[turn.text : turn.close]).strip() == ANSWER
    assert tokenizer.eos_token_id in ours.tokens[turn.close :]
    assert encoder.stops >= {tokenizer.eos_token_id}
    (prompt,), ((answer,),) = encoder.continuations([PROMPT.rstrip()], [[ANSWER]])
    assert prompt.tokens + answer + list(encoder.answer_end) == ours.tokens


@pytest.mark.parametrize(
    "name", [name for name in TEMPLATES if (FOLDER / f"{name}_training.jinja").is_file()]
)
def test_what_is_learned_is_what_trl_marks(name: str) -> None:
    """Its own templates for training mark what an assistant says; some mark the role's header, too."""
    tokenizer = tokenizer_of(name, TEMPLATES[name])
    if name in REFUSED or name == "glm4moe":  # there it marks the next turn's header as an end
        return
    pair = one_turn(PROMPT.rstrip(), ANSWER)
    (ours,) = Encoder(tokenizer, "chat", Chat(date=datetime.now().isoformat())).conversations(
        [pair]
    )
    learned = [token for token, counts in zip(ours.tokens, ours.mask, strict=True) if counts]
    training = (FOLDER / f"{name}_training.jinja").read_text(encoding="utf-8")
    theirs = tokenizer.apply_chat_template(
        taken(name, pair),
        chat_template=training,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    pairs = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
    marked = tokenizer.decode([token for token, counts in pairs if counts]).rstrip()
    assert marked.endswith(tokenizer.decode(learned))
    header = marked.removesuffix(tokenizer.decode(learned))
    assert tokenizer.decode(ours.tokens[: ours.turns[0].begin]).endswith(header.removeprefix("\n"))
