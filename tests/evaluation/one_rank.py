"""One of several processes that score and answer together; `test_ranks.py` starts them.

    python one_rank.py RANK COUNT FOLDER

FOLDER holds the adapter and `work.json`: the base model's folder and the requests. Writes what this
process knows in the end to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mtl_lora_cli.adapters.files import load_adapter, read_adapter_file
from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.generate import generate
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.machine.processes import Processes
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel


def main(rank: int, count: int, folder: Path) -> None:
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    requests = [Request(*parts) for parts in work["requests"]]
    device = torch.device("cpu")
    model = load_model(find_base_model(work["base"]), dtype=torch.float32, device=device)
    file = read_adapter_file(folder)
    adapter = inject(model, file.config, file.tasks)
    load_adapter(adapter, folder)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    packed, processes = PackedModel(model, adapter).eval(), Processes.of_group()
    advanced: list[int] = []
    scores = score(
        packed,
        requests,
        device=device,
        tokens_per_pass=700,
        processes=processes,
        advance=advanced.append,
    )
    answers = generate(
        packed,
        requests[:9],
        ends=[2],
        new_tokens=[4] * 9,
        device=device,
        tokens_per_pass=700,
        processes=processes,
    )
    found = {
        "own": sum(advanced),
        "scores": [values.tolist() for values in scores],
        "answers": answers,
    }
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
