"""Which tensor of the files is which weight of the model, as transformers maps them on loading.

A wrapper's files say `model.language_model.layers.0…` where the model for text has `model.layers.0…`; older
files lack a prefix, or have names that were changed since. transformers renames each tensor by rules
that belong to the model's class, and makes some weights of several tensors. The same rules are asked here;
nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from mtl_lora_cli.errors import CheckError, UsageError
from mtl_lora_cli.export.shards import read_shard
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.files import weight_files
from mtl_lora_cli.models.load import load_config, skeleton
from mtl_lora_cli.models.prequantised import method_of


@dataclass(frozen=True)
class Piece:
    """A tensor of the files that is some rows of one expert's matrix in a stack.

    Attributes:
        tensor: its name.
        expert: e.
        start, stop: the rows of W_e.
    """

    tensor: str
    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class WeightNames:
    """Names in a base model's files.

    Attributes:
        base: whose files.
        tensors: weight of the model → the tensor of the files that holds its values.
        made: the tensors of the files of which transformers makes other weights, put together or cut.
        renamed: weights whose own names would be changed by transformers' rules, too.
        pieces: stacks of experts → the tensors of the files that transformers stacks to them.
    """

    base: BaseModel
    tensors: Mapping[str, str]
    made: frozenset[str]
    renamed: frozenset[str] = frozenset()
    pieces: Mapping[str, Sequence[Piece]] = field(default_factory=dict)

    def tensor(self, weight: str) -> str:
        """The tensor that a weight is.

        Raises:
            UsageError: there is none, or none that is this weight alone.
        """
        if weight in self.tensors:
            return self.tensors[weight]
        why = (
            ": what the files hold in pieces, or as one piece for several weights, cannot be changed "
            "there; export --format peft needs no merge"
            if self.made
            else ""
        )
        raise UsageError(f"{self.base.folder}: no weight '{weight}' to merge into{why}")


def same_names(base: BaseModel, weights: Iterable[str]) -> WeightNames | None:
    """Names that are called alike in files and model; None where one is not among the files' own.

    Nothing of transformers is loaded to see that. Whether they mean the same is for `require_meant` to say, when there
    is time.
    """
    found = set(_names(base))
    wanted = list(weights)
    if not found.issuperset(wanted) or method_of(base) is not None:
        return None
    return WeightNames(base, {name: name for name in wanted}, frozenset())


def require_meant(names: WeightNames) -> None:
    """Refuse names that transformers' rules read otherwise.

    Raises:
        CheckError: naming the first.
    """
    meant = weight_names(names.base)
    for weight, tensor in names.tensors.items():
        if meant.tensors.get(weight) != tensor:
            raise CheckError(
                f"tensor '{tensor}' is not the weight of that name: transformers loads it as another one"
            )


@lru_cache(maxsize=4)
def weight_names(base: BaseModel, kind: Any = None) -> WeightNames:
    """Where the weights of a base model lie.

    Args:
        base: with its files.
        kind: transformers' class whose weights are asked for; None: the one that loads the base model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    model = skeleton(base, kind)
    weights, prefix = model.state_dict(), model.base_model_prefix
    rules = get_model_conversion_mapping(model)
    renaming = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converting = [rule for rule in rules if isinstance(rule, WeightConverter)]
    tensors: dict[str, str] = {}
    made = set()
    parts: dict[str, dict[str, list[str]]] = {}
    # In transformers' order: a rule may wait for the name that another one has seen.
    for name in sorted(_names(base), key=dot_natural_key):
        weight, converted = rename_source_key(name, renaming, converting, prefix, weights)
        if weight not in weights and name in weights:
            weight, converted = rename_source_key(name, [], [], prefix, weights)
        if weight in weights and converted is None:
            tensors.setdefault(weight, name)
        elif weight in weights and converted is not None:
            made.add(name)
            parts.setdefault(weight, {}).setdefault(converted, []).append(name)
    renamed = {name for name in tensors if rename_source_key(name, renaming, [])[0] != name}
    pieces = {
        weight: found
        for weight, some in parts.items()
        if (found := _pieces(some, converting, tuple(weights[weight].shape)))
    }
    return WeightNames(base, tensors, frozenset(made), frozenset(renamed), pieces)


def _pieces(
    parts: Mapping[str, Sequence[str]], rules: Iterable[Any], shape: tuple[int, ...]
) -> list[Piece]:
    """The pieces of a stack [E, rows, columns]; none where transformers makes the weight in another way.

    Args:
        parts: pattern of a rule → the tensors that it takes, in transformers' order.
        rules: transformers' own for weights that are made of others.
        shape: of the weight.
    """
    rule = next((one for one in rules if set(parts) == set(one.source_patterns)), None)
    steps = [] if rule is None else [(type(one).__name__, one.dim) for one in rule.operations]
    known = [("MergeModulelist", 0)] + [("Concatenate", 1)] * (len(parts) > 1)
    even = all(len(names) == shape[0] for names in parts.values())
    if rule is None or len(shape) != 3 or steps != known or not even or shape[1] % len(parts):
        return []
    rows = shape[1] // len(parts)
    return [
        Piece(name, expert, place * rows, (place + 1) * rows)
        for place, pattern in enumerate(rule.source_patterns)
        for expert, name in enumerate(parts[pattern])
    ]


@cache
def wrapper_class(base: BaseModel) -> Any:
    """transformers' class for images and text, where the base model loads as one for text; else None.

    Qwen 3.5 and Llama 4 come as such wrappers, which is what their configuration and servers call them.
    """
    from transformers import AutoModelForImageTextToText

    kind = type(load_config(base))
    mapping = AutoModelForImageTextToText._model_mapping
    if kind not in mapping or isinstance(skeleton(base), mapping[kind]):
        return None
    return mapping[kind]


def wrapper_names(base: BaseModel, weights: Iterable[str]) -> dict[str, str]:
    """Weights of the model → their names in `wrapper_class`; none where there is no such class."""
    kind = wrapper_class(base)
    if kind is None:
        return {}
    own, wrapped = weight_names(base), weight_names(base, kind)
    places = {tensor: weight for weight, tensor in wrapped.tensors.items()}
    found = {weight: places.get(own.tensors.get(weight, "")) for weight in weights}
    return {weight: name for weight, name in found.items() if name is not None}


def _names(base: BaseModel) -> Iterator[str]:
    for path in weight_files(base.folder):
        for stored in read_shard(path)[0]:
            yield stored.name
