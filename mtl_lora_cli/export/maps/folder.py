"""A folder of merged maps: the trunk, what tasks have beside it, and the program that runs them.

The check reads the program out of the README and runs it in a process of its own, which imports torch and
transformers and never this package.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_lora_cli.dense.backbones import family_of, load_backbone
from mtl_lora_cli.dense.host import way_of
from mtl_lora_cli.dense.merged import MergedMaps, merged_maps, require_one_trunk
from mtl_lora_cli.dense.plain_code import SPEC, TENSORS, described, plain_code
from mtl_lora_cli.errors import CheckError, MtlLoraError
from mtl_lora_cli.export.card import licence_text
from mtl_lora_cli.export.maps.check import MapDifference, difference, in_words
from mtl_lora_cli.export.maps.order import MapsOrder
from mtl_lora_cli.export.write import require_empty, require_space, set_aside
from mtl_lora_cli.models.quiet import quiet_loading
from mtl_lora_cli.runs.atomic import new_folder, write_json, write_text

_ASKED = """
import sys
from safetensors.torch import save_file
pixels = load_file(sys.argv[1])["pixels"]
found = [predict(some) for some in pixels.split(8)]
save_file({task: torch.cat([one[task] for one in found]).contiguous() for task in found[0]}, sys.argv[2])
if "mtl_lora_cli" in sys.modules:
    sys.exit("the program imports mtl_lora_cli")
"""


def merge_maps(order: MapsOrder) -> dict[str, MapDifference]:
    """Write tasks of a run of maps into one folder, run it by itself, compare, and only then put it in its place.

    Returns:
        Task → how it compared; nothing where nothing was compared.

    Raises:
        UsageError: the folder is not empty, there are no held-out pictures, or the tasks have no trunk in
            common.
        CheckError: what was written differs; it lies aside.
    """
    return written(
        order,
        lambda merged, folder: _write(order, merged, folder),
        lambda folder: run_plainly(folder, order.pictures),
        lambda found: _readme(order, found),
        "plain transformers and torch",
    )


def written(
    order: MapsOrder,
    write: Callable[[MergedMaps, Path], None],
    run: Callable[[Path], dict[str, Tensor]],
    readme: Callable[[Mapping[str, MapDifference]], str],
    by: str,
) -> dict[str, MapDifference]:
    """The one course of all that leaves a run of maps: refuse, merge, write, run by another party, compare.

    Args:
        order: what is asked for.
        write: fills an empty folder.
        run: puts the order's pictures to what was written.
        readme: of how it compared.
        by: who runs it, for the progress line.

    Raises:
        UsageError, CheckError: as `merge_maps`.
    """
    require_empty(order.folder)
    require_one_trunk(order.run.adapter, [task.name for task in order.tasks])
    if order.checked:
        order.pictures  # noqa: B018 - that there are any is known before the work
    require_space(_size(order), order.folder)
    order.say("merging")
    merged = _merged(order)
    with new_folder(order.folder) as temporary:
        write(merged, temporary)
        found: dict[str, MapDifference] = {}
        if order.checked:
            order.say(f"running it by {by}, and comparing")
            answers = run(temporary)
            ours = order.answers()
            found = {
                task: difference(ours[task], answers[task], s) for task, s in order.specs.items()
            }
            _require_held(order, found, temporary)
        write_text(temporary / "README.md", readme(found))
    return found


def _size(order: MapsOrder) -> int:
    trunk = sum(parameter.numel() for parameter in order.host.model.parameters())
    return 4 * trunk * (1 + len(order.tasks))


def _merged(order: MapsOrder) -> MergedMaps:
    trunk = load_backbone(
        order.run.base, size=order.size, dtype=torch.float32, device=torch.device("cpu")
    )
    adapter = order.host.adapter
    return merged_maps(trunk, order.host.stages, adapter, [task.name for task in order.tasks])


def _write(order: MapsOrder, merged: MergedMaps, folder: Path) -> None:
    with quiet_loading():
        merged.trunk.save_pretrained(folder)  # names as transformers' own conversion has them
    save_file({k: v.contiguous() for k, v in merged.tensors.items()}, folder / TENSORS)
    write_described(order, folder)
    write_text(folder / "README.md", _readme(order, {}))


def write_described(order: MapsOrder, folder: Path) -> None:
    """maps.json: what the maps hold, and what pixels are."""
    normal = order.normalisation
    content = described(order.specs, order.host.stages.blocks, order.size, normal.mean, normal.std)
    write_json(folder / SPEC, content)


def run_plainly(folder: Path, pixels: Tensor) -> dict[str, Tensor]:
    """What the program in a folder's README answers to pictures [N, 3, H, W], in a process of its own.

    Raises:
        MtlLoraError: it fails, with its last line.
    """
    text = (folder / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert program is not None, "the README shows a program"
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place, "pixels.safetensors"), Path(place, "answers.safetensors")
        save_file({"pixels": pixels.contiguous()}, asked)
        # -I: neither the working directory nor PYTHONPATH is searched.
        call = [sys.executable, "-I", "-c", program[1] + _ASKED, str(asked), str(answered)]
        ended = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
        if ended.returncode:
            last = (ended.stderr.strip() or f"code {ended.returncode}").splitlines()[-1]
            raise MtlLoraError(f"{folder}: its program fails: {last}")
        return load_file(answered)


def _require_held(order: MapsOrder, found: Mapping[str, MapDifference], temporary: Path) -> None:
    """Raises:
    CheckError: something differs.
    """
    wrong = {task: one for task, one in found.items() if not one.holds}
    if wrong:
        reason = f"what was written differs from the run: {in_words(wrong)}"
        raise CheckError(set_aside(temporary, order.folder, reason))


def _readme(order: MapsOrder, found: Mapping[str, MapDifference]) -> str:
    run, adapter = order.run, order.host.adapter
    own = way_of(adapter) == "stages"
    config = order.host.model.config
    code = plain_code(family_of(run.base, config), config, list(order.specs.values()), own=own)
    names = ", ".join(task.name for task in order.tasks)
    compared = (
        f"On {len(order.pictures)} held-out pictures, by the program above in a process of its own: "
        f"{in_words(found)}."
        if found
        else "It was not compared."
    )
    return (
        f"---\nlibrary_name: transformers\n---\n# {names} of {run.folder.name}\n\n"
        f"{_what_it_is(order, own)}\n\n"
        f"## Use\n\nIn this folder, with transformers and torch alone:\n\n```python\n{code}```\n\n"
        f"It learned pictures of {order.size[0]} x {order.size[1]}; `{SPEC}` has their mean and "
        f"deviation, and what each map holds.\n\n## Check\n\n{compared}\n\n"
        f"## Licence\n\n{licence_text(run.base)}\n"
    )


def _what_it_is(order: MapsOrder, own: bool) -> str:
    kind, run = type(order.host.model).__name__, order.run
    trunk = f"`{kind}` of transformers, an ordinary folder of {run.recipe.base_model}"
    quantised = (
        ""
        if run.recipe.quantization == "none"
        else f" These are the **original** weights, not the {run.recipe.quantization} ones that the run saw."
    )
    if own:
        return (
            f"The trunk, {trunk}, and in `{TENSORS}` for each task a second copy of the last block of each "
            "stage, with weights of its own, and a decoder. Together they are no stock class of transformers; "
            f"the program below runs them.{quantised}"
        )
    return f"{trunk[0].upper()}{trunk[1:]}, and in `{TENSORS}` a decoder for each task.{quantised}"
