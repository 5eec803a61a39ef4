"""`validate` says of a recipe what `train` would say, without reading a weight."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Finished = subprocess.CompletedProcess[str]

REFUSED = {
    "adapter.target_modules=[q_porj]": "adapter.target_modules: 'q_porj' matches no linear layer of the "
    "model; did you mean 'q_proj'?; linear layers: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, "
    "up_proj, v_proj",
    "adapter.target_modules=[lm_head]": "adapter.target_modules: 'lm_head' shares its weight with "
    "'model.embed_tokens' and cannot be adapted alone",
    "adapter.rank_pattern={k_porj: 3}": "adapter.rank_pattern: 'k_porj' matches no adapted layer; "
    "did you mean 'k_proj'?",
    "training.parts.transform.learning_rate=1": "training.parts: this adapter (method lora) has no "
    "transform; its parts: down, up",
}


@pytest.fixture
def recipe(small_recipe: Callable[[], Path]) -> Path:
    return small_recipe()


@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.parametrize("words", ["validate", "train"])
def test_what_the_adapter_cannot_fit(
    recipe: Path, invoke: Callable[..., Finished], change: str, words: str, tmp_path: Path
) -> None:
    lora = ("adapter.method=lora", "adapter.gate=weights") if "parts" in change else ()
    finished = invoke(words, str(recipe), *lora, change)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == f"error: {REFUSED[change]}\n"
    assert not (tmp_path / "runs").exists()


def test_targets_are_looked_at_before_weights(
    recipe: Path, stories_folder: Path, invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    """A header tells of tensors, and not a byte of them is there."""
    model = Path(shutil.copytree(stories_folder, tmp_path / "model"))
    weights = (model / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(weights[:8], "little")
    (model / "model.safetensors").write_bytes(weights[:begin])
    for change, message in list(REFUSED.items())[:3]:
        finished = invoke("validate", str(recipe), f"base_model={model}", change)
        assert finished.returncode == 2
        assert finished.stderr == f"error: {message}\n"


@pytest.fixture
def larger_vocabulary(stories_folder: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has two tokens more than its embedding has rows."""
    model = Path(shutil.copytree(stories_folder, tmp_path / "model"))
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, word in enumerate(("<pad>", "<more>"), start=512):
        more = {"id": number, "content": word, "special": False, **flags}
        content["added_tokens"].append(more)
    (model / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return model


@pytest.mark.parametrize("words", ["validate", "train"])
def test_a_token_that_the_model_does_not_have(
    recipe: Path, larger_vocabulary: Path, invoke: Callable[..., Finished], words: str
) -> None:
    template = recipe.parent / "color.yaml"
    template.write_text(template.read_text("utf-8").replace("is a", "<more> is a"), "utf-8")
    finished = invoke(words, str(recipe), f"base_model={larger_vocabulary}")
    assert finished.returncode == 2
    assert finished.stderr == (
        "error: base_model: the tokenizer gives token 513 ('<more>'), the model has 512 (0 to 511)\n"
    )


def test_an_end_token_that_the_model_does_not_have(
    recipe: Path, larger_vocabulary: Path, invoke: Callable[..., Finished]
) -> None:
    path = larger_vocabulary / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) | {"eos_token": "<pad>"}
    path.write_text(json.dumps(config), encoding="utf-8")
    finished = invoke("validate", str(recipe), f"base_model={larger_vocabulary}")
    assert finished.returncode == 2
    assert "the tokenizer gives token 512 ('<pad>'), the model has 512" in finished.stderr


def test_a_token_that_is_never_used_does_no_harm_until_a_row_has_it(
    recipe: Path, larger_vocabulary: Path, invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    finished = invoke(
        "train", str(recipe), f"base_model={larger_vocabulary}", "training.max_steps=1"
    )
    assert finished.returncode == 0, finished.stderr
    for word, code in (("red", 0), ("<pad>", 2)):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"word": word}) + "\n", encoding="utf-8")
        finished = invoke("predict", "rows.jsonl", "--task", "warm")
        assert finished.returncode == code, finished.stderr
    assert "the tokenizer gives token 512 ('<pad>'), the model has 512" in finished.stderr


def test_a_share_of_nothing_is_told(recipe: Path, invoke: Callable[..., Finished]) -> None:
    """The larger of two tasks has all where the temperature is near zero."""
    more = recipe.parent / "warm" / "train.jsonl"
    more.write_text(more.read_text("utf-8") * 2, encoding="utf-8")
    finished = invoke("validate", str(recipe), "mixing.temperature=0.001")
    assert finished.returncode == 0, finished.stderr
    told = "note: cold: its share of an epoch's 36 examples is none: it is not learned"
    assert told in finished.stdout.splitlines()


def test_a_run_of_few_steps_is_told(recipe: Path, invoke: Callable[..., Finished]) -> None:
    for steps, told in ((499, True), (500, False)):
        words = ("validate", str(recipe), f"training.max_steps={steps}", "training.epochs=200")
        finished = invoke(*words)
        assert finished.returncode == 0, finished.stderr
        lines = [
            line for line in finished.stdout.splitlines() if "a task is often not learned" in line
        ]
        assert len(lines) == told
        found = json.loads(invoke(*words, "--json").stdout)
        assert found["steps"] == steps
        assert any("in fewer than 500" in line for line in found["findings"]) is told


@pytest.mark.parametrize("model", ["a folder", "a GGUF file"])
def test_a_cache_that_cannot_be_written(
    recipe: Path,
    invoke: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
) -> None:
    """Encoded data do without, and it is said once; a converted model cannot."""
    monkeypatch.setenv("MTL_LORA_CACHE", "/proc/none")
    cure = "; MTL_LORA_CACHE names another folder\n"
    if model == "a folder":
        finished = invoke("validate", str(recipe))
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr.startswith("note: /proc/none/encoded cannot be written (")
        assert finished.stderr.endswith(f"): encoded data are not kept{cure}")
        assert finished.stderr.count("\n") == 1
        return
    (tmp_path / "model.gguf").write_bytes(b"GGUF and more")
    finished = invoke("validate", str(recipe), f"base_model={tmp_path / 'model.gguf'}")
    assert finished.returncode == 2
    assert finished.stderr.startswith(
        "error: the cache folder /proc/none/models cannot be written: "
    )
    assert finished.stderr.endswith(cure)
    assert finished.stderr.count("\n") == 1
