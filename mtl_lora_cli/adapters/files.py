"""Reading and writing adapters: `mtl_lora_config.json` beside `mtl_lora.safetensors`.

The names differ from PEFT's on purpose: PEFT would try to read the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtl_lora_cli.adapters.experts import MultiTaskStack, StackFrame
from mtl_lora_cli.adapters.inject import DECODER, WHOLE, Adapter, inject
from mtl_lora_cli.adapters.layer import TaskLayer
from mtl_lora_cli.adapters.methods import METHODS
from mtl_lora_cli.adapters.methods.base import Settings, first_fault
from mtl_lora_cli.errors import MtlLoraError, did_you_mean

CONFIG_FILE = "mtl_lora_config.json"
TENSOR_FILE = "mtl_lora.safetensors"
FORMAT_VERSION = 7  # since 5 the method's own keys alone
_OLDEST = 3
# Formats 3 and 4 had the keys of every method, whether it reads them or not.
_OF_ALL_METHODS = (
    "up_projections",
    "temperature",
    "transform",
    "transform_start",
    "transform_bases",
    "gate",
    "gate_start",
    "embedding_size",
    "task_rank",
    "task_modules",
)
# Format → keys that came with it: an older file does not say them, and means their defaults.
_SINCE = {
    4: ("transform_start", "transform_bases", "task_modules"),
    6: ("whole_modules", "streams", "experts", "gate_form"),
    7: ("tied",),
}
_BEFORE = {"mtl-lora-fine": {"tied"}}  # keys that a method had from its beginning
_PARTS = ("tasks", "base_model", "modules", "checksums")


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What an adapter folder says; its weights are read when they are asked for.

    Attributes:
        config: sizes and kinds.
        tasks: names in the order of their ids.
        base_model: name, revision and fingerprint of the base model, as the writer gave them.
        modules: module path → its kind and sizes.
        checksums: tensor name → SHA-256 of its bytes.
        folder: where it lies.
        digest: 16 digits of the SHA-256 of the configuration's bytes, which names the adapter: the
            tensors' checksums are in it.
    """

    config: Settings
    tasks: tuple[str, ...]
    base_model: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Any]]
    checksums: Mapping[str, str]
    folder: Path
    digest: str

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The weights, read when they are first asked for, each checked against its checksum.

        Raises:
            MtlLoraError: the file is missing or damaged, or a tensor is missing or damaged.
        """
        path = self.folder / TENSOR_FILE
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            raise MtlLoraError(f"{path}: no such file") from None
        except SafetensorError as error:
            raise MtlLoraError(f"{path}: damaged: {error}") from None
        for name, checksum in self.checksums.items():
            if name not in tensors:
                raise MtlLoraError(f"{path}: tensor '{name}' is missing")
            if tensor_checksum(tensors[name]) != checksum:
                raise MtlLoraError(f"{path}: tensor '{name}' is damaged: its checksum differs")
        return tensors

    def alone(self) -> Adapter:
        """The adapter on the CPU without its base model, whatever that one's size.

        Its layers hold the adapter's tensors, and of the base model's weights nothing but their sizes.

        Raises:
            MtlLoraError: a tensor is missing, unexpected, misshapen or damaged.
        """
        adapter = framed(self, self.tasks)
        adapter.decoders = decoder_frames(self.tensors)
        load_tensors(adapter, self.tensors, self.folder / TENSOR_FILE)
        return adapter


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes in memory order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def config_checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything that a configuration says beside its own checksum."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class AdapterState:
    """An adapter at one moment: what its two files say.

    Attributes:
        content: of the configuration, without checksums.
        tensors: under their names in the file; the adapter's own, or copies of them.
    """

    content: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def state_of(adapter: Adapter, base_model: Mapping[str, Any]) -> AdapterState:
    """What the files of an adapter say; its tensors are those that training changes."""
    content = {
        "format_version": FORMAT_VERSION,
        **adapter.config.model_dump(),
        "tasks": list(adapter.tasks),
        "base_model": dict(base_model),
        "modules": {
            path: {
                **_kind_of(layer),
                "in_features": layer.in_features,
                "out_features": layer.out_features,
                "rank": layer.rank,
                "tied_to": None,
            }
            for path, layer in adapter.layers.items()
        },
    }
    return AdapterState(content, {name: t.detach() for name, t in adapter.tensors().items()})


def save_adapter(adapter: Adapter, folder: Path, base_model: Mapping[str, Any]) -> None:
    """Write the two files into `folder`, which must exist. Tensors are written as trained."""
    save_state(state_of(adapter, base_model), folder)


def save_state(state: AdapterState, folder: Path) -> None:
    """`save_adapter`, of a state."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    sums = {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
    content = {**state.content, "checksums": sums}
    content["checksum"] = config_checksum(content)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _kind_of(layer: TaskLayer) -> dict[str, Any]:
    """What of a layer its sizes do not say."""
    if not isinstance(layer, MultiTaskStack):
        return {"kind": "linear"}
    frozen = layer.frozen
    return {"kind": "experts", "experts": frozen.experts, "transposed": frozen.transposed}


def read_adapter_file(folder: Path) -> AdapterFile:
    """Read the configuration of an adapter folder.

    Raises:
        MtlLoraError: it is missing, not JSON, of a format that is not read, lacks or adds a key, is
            damaged, or says what cannot be.
    """
    path = folder / CONFIG_FILE
    try:
        written = path.read_bytes()
        content = json.loads(written.decode("utf-8"))
    except FileNotFoundError:
        raise MtlLoraError(f"{path}: no such file; the folder holds no finished adapter") from None
    except (ValueError, RecursionError) as error:
        raise MtlLoraError(f"{path}: not valid JSON: {error}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or not _OLDEST <= version <= FORMAT_VERSION:
        raise MtlLoraError(
            f"{path}: format_version {version!r} is not known; "
            f"this release reads {_OLDEST} to {FORMAT_VERSION}"
        )
    config = _config(path, content, version)
    for name, fits in _FORMS.items():
        if not fits(content.get(name)):
            raise MtlLoraError(f"{path}: {name}: received {content[name]!r:.60}")
    return AdapterFile(
        config=config,
        tasks=tuple(content["tasks"]),
        base_model=content["base_model"],
        modules=content["modules"],
        checksums=content["checksums"],
        folder=folder,
        digest=hashlib.sha256(written).hexdigest()[:16],
    )


def _config(path: Path, content: Mapping[str, Any], version: int) -> Settings:
    """The method's settings, of a file whose keys are the right ones and which is as it was written.

    Raises:
        MtlLoraError: it is not.
    """
    _require_keys(path, content, {"method", "format_version", "checksum", *_PARTS}, others=True)
    if content["checksum"] != config_checksum(content):
        raise MtlLoraError(f"{path}: damaged, or changed by hand: its own checksum differs")
    method = content["method"]
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(METHODS)
        raise MtlLoraError(f"{path}: method: {method!r:.60} is not known; known: {known}")
    names = set(METHODS[method].model_fields)
    written = set(names)
    if version < 5:
        written = {*Settings.model_fields, *_OF_ALL_METHODS}
    for since, keys in _SINCE.items():
        if version < since:
            written -= set(keys) - _BEFORE.get(method, set())
    _require_keys(path, content, {*written, "format_version", "checksum", *_PARTS}, others=False)
    try:
        return METHODS[method](**{name: content[name] for name in names & written})
    except ValidationError as error:
        raise MtlLoraError(f"{path}: {first_fault(error)}") from None


def _require_keys(
    path: Path, content: Mapping[str, Any], expected: set[str], *, others: bool
) -> None:
    """Refuse a file that lacks one of these keys, or, where no `others` may be, has another one."""
    for key in sorted(expected ^ set(content)):
        if key not in content:
            raise MtlLoraError(f"{path}: missing key '{key}'")
        if not others:
            raise MtlLoraError(f"{path}: unknown key '{key}'")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str | None) for v in value.values())


def _is_modules(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(one, dict)
        and all(type(one.get(key)) is int and one[key] > 0 for key in _SIZES)
        and (one.get("kind") != "experts" or type(one.get("experts")) is int)
        for one in value.values()
    )


_SIZES = ("in_features", "out_features", "rank")
_FORMS = {
    "tasks": _is_names,
    "base_model": _is_texts,
    "checksums": _is_texts,
    "modules": _is_modules,
}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read an adapter's tensors and check each against its checksum.

    Raises:
        MtlLoraError: the file is missing or damaged, or a tensor is missing, unexpected or damaged.
    """
    return read_adapter_file(folder).tensors


def load_tensors(adapter: Adapter, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy tensors into an injected adapter.

    Raises:
        MtlLoraError: a tensor is missing, unexpected or of another shape; nothing is copied then.
    """
    own = adapter.tensors()
    _require_fitting(own, tensors, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _require_fitting(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str | Path
) -> None:
    for name in own:
        if name not in tensors:
            raise MtlLoraError(f"{source}: tensor '{name}' is missing")
    for name, tensor in tensors.items():
        if name not in own:
            raise MtlLoraError(f"{source}: unexpected tensor '{name}'{did_you_mean(name, own)}")
        if tensor.shape != own[name].shape:
            raise MtlLoraError(
                f"{source}: tensor '{name}' has shape {list(tensor.shape)}, "
                f"expected {list(own[name].shape)}"
            )


def load_adapter(adapter: Adapter, folder: Path) -> AdapterFile:
    """Read a folder's tensors into an injected adapter of the same tasks.

    Raises:
        MtlLoraError: task names or sizes and kinds differ, or a tensor is missing, unexpected, misshapen or damaged.
    """
    file = read_adapter_file(folder)
    if file.tasks != adapter.tasks:
        raise MtlLoraError(
            f"{folder / CONFIG_FILE}: tasks are {', '.join(file.tasks)}; "
            f"expected {', '.join(adapter.tasks)}"
        )
    ours, theirs = adapter.config, file.config
    _require_equal(folder, "method", theirs.method, ours.method)
    tensors = file.tensors
    _require_fitting(adapter.tensors(), tensors, folder / TENSOR_FILE)
    for name in type(ours).model_fields:  # what no tensor's shape would tell
        if name not in _OF_THE_LAYERS and name not in ours.start_keys:
            _require_equal(folder, name, getattr(theirs, name), getattr(ours, name))
    load_tensors(adapter, tensors, folder / TENSOR_FILE)
    return file


# Settings that say which layers there are and what training does to their input, not what they compute.
_OF_THE_LAYERS = ("target_modules", "rank_pattern", "rank", "dropout")


def _require_equal(folder: Path, name: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise MtlLoraError(f"{folder / CONFIG_FILE}: {name} is {theirs}, expected {ours}")


def read_alone(folder: Path) -> Adapter:
    """The adapter of a folder on the CPU without its base model, see `AdapterFile.alone`.

    Raises:
        MtlLoraError: as `load_adapter`.
    """
    return read_adapter_file(folder).alone()


def framed(file: AdapterFile, tasks: Sequence[str]) -> Adapter:
    """A fresh adapter of these tasks, of a file's layers and sizes, without a base model."""
    own = None
    if file.config.streams is not None:
        roles = [role.name for role in file.config.all_roles() if role.per_task]
        own = [path for path in file.modules if f"{path}.{roles[0]}" in file.checksums]
    return inject(frame_of(file), file.config, tasks, own_in=own)


def frame_of(file: AdapterFile) -> nn.Module:
    """Modules with the paths and sizes of those that an adapter adapts, and without their weights."""
    frame = nn.Module()
    for path, sizes in file.modules.items():
        parent, name = _place(frame, path)
        if sizes.get("kind") == "experts":
            _add_stack(frame, path, sizes)
        else:
            parent.add_module(name, _sized(sizes["in_features"], sizes["out_features"]))
    if any(name.startswith(WHOLE) for name in file.checksums):
        whole = {n.removeprefix(WHOLE): t for n, t in file.tensors.items() if n.startswith(WHOLE)}
        for name in sorted(
            whole, key=lambda name: -whole[name].ndim
        ):  # a layer is known by its weight
            _add_parameter(frame, name, whole[name])
    return frame


def decoder_frames(tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Task → a module with the parameters of its decoder, of the tensors of an adapter file."""
    frames: dict[str, nn.Module] = {}
    for name, tensor in tensors.items():
        if name.startswith(DECODER):
            task, _, own = name.removeprefix(DECODER).partition(":")
            _add_parameter(frames.setdefault(task, nn.Module()), own, tensor)
    return frames


def _place(frame: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a path lies in, made where it is not there, and the path's last part."""
    *above, name = path.split(".")
    for part in above:
        if part not in frame._modules:
            frame.add_module(part, nn.Module())
        frame = frame.get_submodule(part)
    return frame, name


def _add_parameter(frame: nn.Module, path: str, tensor: Tensor) -> None:
    """A parameter like this one. What may be the weight of a linear layer is in one, as targets name such."""
    owner, name = path.rpartition(".")[::2]
    if name == "weight" and tensor.ndim == 2 and owner:
        parent, last = _place(frame, owner)
        if last not in parent._modules:
            out, width = tensor.shape
            parent.add_module(last, _sized(width, out))
    place, name = _place(frame, path)
    place.register_parameter(name, nn.Parameter(torch.empty_like(tensor)))


def _add_stack(frame: nn.Module, path: str, sizes: Mapping[str, Any]) -> None:
    """A stack of experts, in a module that holds both."""
    owner, _, name = path.rpartition(".")
    parent, last = _place(frame, owner)
    if not isinstance(parent._modules.get(last), StackFrame):
        parent.add_module(last, StackFrame(transposed=bool(sizes["transposed"])))
    experts = cast(StackFrame, parent._modules[last])
    experts.add(name, sizes["experts"], sizes["out_features"], sizes["in_features"])


def _sized(width: int, out: int) -> nn.Linear:
    """A linear layer whose weight takes the memory of one number."""
    layer = nn.Linear(width, out, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(1).expand(out, width), requires_grad=False)
    return layer
