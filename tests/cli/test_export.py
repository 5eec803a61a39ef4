"""`export` at a lower rank says what is lost, for people and for machines."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

Finished = subprocess.CompletedProcess[str]


@pytest.mark.parametrize("kind", ["peft", "gguf"])
def test_what_a_lower_rank_loses(
    invoke: Callable[..., Finished],
    small_run: tuple[Path, Finished],
    tmp_path: Path,
    kind: str,
) -> None:
    run, _ = small_run
    call = ("export", "--task", "warm", "--format", kind, "--run", str(run), "--no-check")
    finished = invoke(*call, "--rank", "2", "--json", "--output", "reduced")
    assert finished.returncode == 0, finished.stderr
    (written,) = json.loads(finished.stdout)
    assert (written["task"], written["path"], written["checked"]) == ("warm", "reduced", False)
    reduced = written["reduced"]
    assert reduced["rank"] == 2
    assert (
        0 < reduced["mean_error"] <= reduced["largest_error"] == max(reduced["errors"].values()) < 1
    )
    shown = invoke(*call, "--rank", "2")
    path, error = shown.stdout.splitlines()
    folder = "exported/small/warm" if kind == "peft" else "exported/gguf/small/warm"
    assert path == f"{folder}: not checked"
    assert error == (
        f"at rank 2 the relative Frobenius error of the update is {reduced['mean_error']:.2e} on "
        f"average over {len(reduced['errors'])} layers, {reduced['largest_error']:.2e} at most"
    )
    assert error in (tmp_path / folder / "README.md").read_text(encoding="utf-8")


def test_at_its_own_rank_nothing_is_lost(
    invoke: Callable[..., Finished], small_run: tuple[Path, Finished], tmp_path: Path
) -> None:
    run, _ = small_run
    call = ("export", "--task", "warm", "--run", str(run), "--no-check", "--json", "--output")
    (whole,) = json.loads(invoke(*call, "whole").stdout)
    (same,) = json.loads(invoke(*call, "same", "--rank", "8").stdout)
    assert "reduced" not in whole
    assert same["reduced"]["largest_error"] == 0
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "same")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_commands_of_servers_name_all_tasks(
    small_run: tuple[Path, Finished], invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    """And nothing of it stands on stdout; ranks are those that vLLM takes."""
    run = str(small_run[0])
    ended = invoke("export", "--task", "all", "--run", run, "--no-check", "--json")
    assert [one["task"] for one in json.loads(ended.stdout)] == ["warm", "cold"]
    words = said(ended, "vLLM serves them")
    named = dict(word.split("=") for word in words[words.index("--lora-modules") + 1 :])
    assert list(named) == ["warm", "cold"]
    ranks = []
    for folder in named.values():
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == words[2]
        ranks.append(config["r"])
    assert int(words[words.index("--max-lora-rank") + 1]) >= max(ranks)
    assert int(words[words.index("--max-loras") + 1]) == 2
    others = said(ended, "SGLang")
    assert others[:3] == ["python", "-m", "sglang.launch_server"]
    assert others[others.index("--model-path") + 1] == words[2]
    assert dict(word.split("=") for word in others[others.index("--lora-paths") + 1 :]) == named
    assert int(others[others.index("--max-lora-rank") + 1]) == max(ranks)

    ended = invoke("export", "--task", "all", "--run", run, "--no-check", "--format", "gguf")
    words = said(ended, "llama.cpp serves them")
    files = [word for before, word in pairwise(words) if before == "--lora"]
    assert words[0] == "llama-server" and "--lora-init-without-apply" in words
    assert [(tmp_path / file).parent.name for file in files] == ["warm", "cold"]
    assert all((tmp_path / file).is_file() for file in files)
    words = said(ended, "Ollama")
    assert [words[n + 1] for n, word in enumerate(words) if word == "create"] == ["warm", "cold"]
    made = [word.removesuffix(";") for before, word in pairwise(words) if before == "-f"]
    assert len(made) == 2 and all((tmp_path / file).is_file() for file in made)


def said(ended: Finished, who: str) -> list[str]:
    """The words of a command that stderr says for a server."""
    (line,) = [one for one in ended.stderr.splitlines() if one.startswith(f"{who}: ")]
    return shlex.split(line.partition(": ")[2])
