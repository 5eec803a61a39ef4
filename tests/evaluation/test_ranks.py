"""Examples shared among processes: each does its part, and all know what one alone would know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mtl_lora_cli.adapters.files import save_adapter
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.generate import generate
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.models.packed import PackedModel

CPU = torch.device("cpu")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(
    packed: PackedModel, requests: list[Request], stories_folder: Path, tmp_path: Path
) -> None:
    assert packed._adapter is not None
    save_adapter(packed._adapter, tmp_path, {})
    work = {
        "base": str(stories_folder.resolve()),
        "requests": [[r.task, r.prompt, r.choices] for r in requests],
    }
    (tmp_path / "work.json").write_text(json.dumps(work), encoding="utf-8")
    script = Path(__file__).parent / "one_rank.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    both = [json.loads((tmp_path / f"{r}.json").read_text(encoding="utf-8")) for r in range(2)]
    assert [one["own"] for one in both] == [len(requests) // 2] * 2
    assert both[0]["scores"] == both[1]["scores"]
    assert both[0]["answers"] == both[1]["answers"]
    alone = score(packed, requests, device=CPU, tokens_per_pass=2048)
    for ours, theirs in zip(both[0]["scores"], alone, strict=True):
        assert int(np.argmax(ours)) == int(theirs.argmax())
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    answers = generate(
        packed, requests[:9], ends=[2], new_tokens=[4] * 9, device=CPU, tokens_per_pass=2048
    )
    assert both[0]["answers"] == answers
