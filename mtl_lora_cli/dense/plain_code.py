"""The program that runs a merged folder with transformers and torch alone; its README shows it, and the check
runs what the README shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtl_lora_cli.dense.backbones import Family, first_patch
from mtl_lora_cli.tasks.maps import MapSpec

SPEC, TENSORS = "maps.json", "maps.safetensors"
# The whole of it; what a folder does not need is left out.
_HEAD = """\
import copy, json, torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel

spec, weights = json.load(open("maps.json")), load_file("maps.safetensors")
trunk = AutoModel.from_pretrained(".", dtype={dtype}).eval()

def part(name):
    return {key[len(name):]: value for key, value in weights.items() if key.startswith(name)}
"""
_OWN = """\

own = {task: [] for task in spec["tasks"]}  # each task's copy of the last block of each stage
for i, path in enumerate(spec["blocks"]):
    for task in own:
        own[task].append(copy.deepcopy(trunk.get_submodule(path)))
        own[task][i].load_state_dict(part(f"{task}.blocks.{i}."))
"""
_MAP = """\

def to_map(x, i, height, width):  # what stage i gives, as [N, C, h, w]
    {code}
"""
_FEATURES_OWN = """\

def features(pixels, tasks):  # the trunk runs once
    found = {task: [] for task in tasks}
    def keep(i):
        return lambda block, args, named: [found[t].append(own[t][i](*args, **named)) for t in tasks] and None
    blocks = [trunk.get_submodule(path) for path in spec["blocks"]]
    hooks = [b.register_forward_pre_hook(keep(i), with_kwargs=True) for i, b in enumerate(blocks)]
    {run}
    for hook in hooks: hook.remove()
    return found
"""
_FEATURES_ONE = """\

def features(pixels, tasks):  # the trunk runs once
    found = []
    blocks = [trunk.get_submodule(path) for path in spec["blocks"]]
    hooks = [b.register_forward_hook(lambda block, args, x: found.append(x)) for b in blocks]
    {run}
    for hook in hooks: hook.remove()
    return {task: found for task in tasks}
"""
_DECODE = """\

def decode(x, task, height, width):
    w, y = part(f"{task}.decoder."), 0
    for i, out in enumerate(x):
        m = to_map(out[0] if isinstance(out, tuple) else out, i, height, width).permute(0, 2, 3, 1)
        m = F.layer_norm(m, m.shape[-1:], w[f"norms.{i}.weight"], w[f"norms.{i}.bias"])
        m = F.linear(m, w[f"projections.{i}.weight"], w[f"projections.{i}.bias"]).permute(0, 3, 1, 2)
        y = y + F.interpolate(m, size=(-(-height // 4), -(-width // 4)), mode="bilinear")
    y = F.gelu(F.conv2d(F.gelu(y), w["conv.weight"], w["conv.bias"], padding=1))
    y = F.conv2d(y, w["out.weight"], w["out.bias"])
    y = F.interpolate(y, size=(height, width), mode="bilinear")
"""
_FORMS = {
    "normals": """\
    if spec["tasks"][task]["objective"] == "normals": return F.normalize(y, dim=1)
""",
    "linear": """\
    if spec["tasks"][task].get("scale") == "linear":
        low, high = spec["tasks"][task]["range"]
        return low + (high - low) * y.sigmoid()
""",
    "log": """\
    if spec["tasks"][task].get("scale") == "log":
        low, high = spec["tasks"][task]["range"]
        return low * (high / low) ** y.sigmoid()
""",
}
_TAIL = """\
    return y

@torch.no_grad()
def predict(pixels, tasks=tuple(spec["tasks"])):
    \"\"\"[N, 3, height, width], (colour / 255 - spec["mean"]) / spec["std"] → task: [N, C, height, width].\"\"\"
    found = features(pixels, tasks)
    return {task: decode(found[task], task, *pixels.shape[-2:]) for task in tasks}
"""


def plain_code(
    family: Family,
    config: Any,
    specs: Sequence[MapSpec],
    *,
    own: bool,
    dtype: str = "torch.float32",
) -> str:
    """Python that needs torch, transformers and a merged folder in the working directory.

    Args:
        family, config: of the backbone.
        specs: of the tasks in the folder.
        own: tasks have copies of the last blocks.
        dtype: of the weights in the folder.
    """
    patch = getattr(config, "patch_size", 1)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    map_code = family.map_code.format(patch=patch, first=first_patch(config))
    pieces = [
        _HEAD.replace("{dtype}", dtype),
        _OWN if own else "",
        _MAP.replace("{code}", map_code),
        (_FEATURES_OWN if own else _FEATURES_ONE).replace("{run}", family.run_code),
        _DECODE,
        *(text for name, text in _FORMS.items() if any(_has(spec, name) for spec in specs)),
        _TAIL,
    ]
    return "".join(pieces)


def _has(spec: MapSpec, form: str) -> bool:
    if spec.objective == "depth":
        return spec.scale == form
    return spec.objective == form


def described(
    specs: Mapping[str, MapSpec],
    blocks: Sequence[str],
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Any]:
    """What maps.json says.

    Args:
        specs: task → what its map holds.
        blocks: paths of the last blocks of stages.
        size: height and width that were learned.
        mean, std: of each channel of pixels in 0 to 1.
    """
    return {
        "format_version": 1,
        "tasks": {task: _described(spec) for task, spec in specs.items()},
        "blocks": list(blocks),
        "size": list(size),
        "mean": list(mean),
        "std": list(std),
    }


def _described(spec: MapSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"objective": spec.objective}
    if spec.of_classes:
        found["classes"] = list(spec.classes)
    if spec.objective == "depth":
        found |= {"scale": spec.scale, "range": [spec.low, spec.high]}
    return found
