"""The plain engine: transformers' own layers over a packed batch, in one of three layouts.

| layout | a pass takes | for |
| --- | --- | --- |
| packed | all examples one after another; our attention keeps them apart | models whose layers meet other positions in attention alone |
| rows | one example a row, rows of similar length filled up on the right | models whose state runs on, or whose attention is their own |
| single | one example | what even another row's length would change |

Nothing reads what a row is filled up with: in a causal model later positions reach no earlier one.
Which layout a model wants is measured (`trust.py`). Where a rotary embedding depends on the length of
the sequence, examples beyond its limit run one by one in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.engine.decoder import Deeper
from mtl_lora_cli.engine.plan import text_body, towers_of
from mtl_lora_cli.engine.segment_forms import alike
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.models import registered
from mtl_lora_cli.models.batch import PackedBatch, Pictures
from mtl_lora_cli.models.quiet import quiet_warnings
from mtl_lora_cli.models.sight import embeddings, tower_dtype
from mtl_lora_cli.models.vision import vision_class

Layout = Literal["packed", "rows", "single"]
LAYOUTS: tuple[Layout, ...] = ("packed", "rows", "single")
Made = tuple[
    Tensor, Deeper | None
]  # embeddings of all positions, and what of pictures enters deeper layers


@dataclass(frozen=True)
class Way:
    """How transformers' layers are asked.

    Attributes:
        layout: see the module.
        bare_head: the model's logits are its output layer's product with the last hidden state, and
            nothing else. Otherwise its own forward pass makes them: scales and soft caps are in it.
        together: positions up to which examples may share a pass; None: any number.
    """

    layout: Layout = "packed"
    bare_head: bool = False
    together: int | None = None

    def __str__(self) -> str:
        words = {
            "packed": "packed rows",
            "rows": "one example a row",
            "single": "one example a pass",
        }
        beyond = "" if self.together is None else f", one by one beyond {self.together} positions"
        return words[self.layout] + beyond


@dataclass(frozen=True)
class _Piece:
    """What one call of the model takes, and where its answers go.

    Attributes:
        input_ids: int64 [B, L].
        embeddings: [B, L, d], in their place where the pass has pictures and our attention keeps examples apart.
        others: what else the model takes: the pictures of examples that go through it as they are, or what goes
            with embeddings of pictures.
        position_ids, segments: for packed sequences; None where each row is one example.
        task_ids: int64 [B, L], on the CPU.
        row, column: int64 [K], the asked positions.
        asked: int64 [K], their places among the batch's `positions`.
        places: int64 [B, L], where the tokens stand in the batch, on the CPU.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    segments: Segments | None
    task_ids: Tensor
    row: Tensor
    column: Tensor
    asked: Tensor
    places: Tensor
    embeddings: Tensor | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """What the model reads."""
        if self.embeddings is not None:
            return {"inputs_embeds": self.embeddings, **self.others}
        return {"input_ids": self.input_ids, **self.others}


class PlainEngine:
    """See the module.

    Args:
        model: a transformers causal language model.
        adapter: the adapter in it, or None.
        way: how it is asked.

    Raises:
        registered.NotHonoured: `packed` is asked for, and the model's attention cannot be replaced.
    """

    def __init__(self, model: Any, adapter: Adapter | None, way: Way) -> None:
        self._model = model
        self._adapter = adapter
        self.way = way
        self._some_logits = _knows_positions(model) and not _adapted_behind(model, adapter)
        self.take_attention()

    def take_attention(self) -> None:
        """Give the model the attention of its layout, as after somebody else used it."""
        if self.way.layout == "packed":
            registered.register()
            if not use_attention(self._model, registered.NAME):
                raise registered.NotHonoured("its attention cannot be replaced")
        else:
            use_attention(self._model, own_attention(self._model))

    def shares(self, length: int) -> bool:
        """Whether sequences of up to so many positions that begin alike may share what they begin with."""
        limit = self.way.together
        return self.way.layout == "packed" and (limit is None or length <= limit)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Hidden states [U, d] of the positions asked for where the head is bare, else logits [U, V]."""
        found, order = [], []
        made = self._embedded(batch)
        for whole in self._pieces(batch):
            piece = self._with_pictures(whole, batch, made)
            found.append(self._run(piece))
            order.append(piece.asked)
        asked = torch.cat(order)
        answers = found[0] if len(found) == 1 else torch.cat(found)
        if bool((asked[1:] > asked[:-1]).all()):
            return answers
        return answers.index_select(0, asked.argsort().to(answers.device))

    def _embedded(self, batch: PackedBatch) -> Made | None:
        """With pictures in their places, where our attention keeps examples apart; else None."""
        if batch.pictures is None or self.way.layout != "packed":
            return None
        table = self._model.get_input_embeddings()
        look_up = lambda ids: cast(Tensor, table(ids)[0])  # noqa: E731
        return embeddings(self._model, batch, look_up, self._adapter)

    def _with_pictures(self, piece: _Piece, batch: PackedBatch, made: Made | None) -> _Piece:
        """A piece with the pictures of its examples."""
        if batch.pictures is None:
            return piece
        if made is not None:
            return self._seen(piece, batch.pictures, *made)
        own = batch.pictures.within(piece.places[0])
        if not own:
            return piece
        kind = vision_class(self._model.config)
        assert kind is not None
        shown = torch.isin(piece.places, batch.pictures.places.cpu()).to(piece.input_ids.device)
        wide = tower_dtype(self._model)
        given = kind.alone(own, shown, shown.shape[1]).items()
        others = {name: v.to(wide) if v.is_floating_point() else v for name, v in given}
        return replace(piece, others=others)

    def _seen(self, piece: _Piece, shown: Pictures, x: Tensor, deeper: Deeper | None) -> _Piece:
        """A packed piece with what takes the places of picture tokens, and all that goes with it."""
        places = piece.places.to(x.device)
        others: dict[str, Any] = {}
        if deeper is not None:
            there = torch.isin(deeper.places, places)
            others["visual_pos_masks"] = torch.isin(places, deeper.places)
            others["deepstack_visual_embeds"] = [level[there] for level in deeper.levels]
        body = cast(Any, text_body(self._model))
        if getattr(
            body.config, "hidden_size_per_layer_input", None
        ):  # of tokens; a picture's are padding
            ids = piece.input_ids.masked_fill(
                torch.isin(places, shown.places), body.config.pad_token_id
            )
            own = self._model.get_input_embeddings()(ids)
            others["per_layer_inputs"] = body.get_per_layer_inputs(ids, own)
        positions = piece.position_ids
        if shown.grid is not None:
            positions = shown.grid[:, :, places[0]]
        return replace(piece, embeddings=x[places], others=others, position_ids=positions)

    def _run(self, piece: _Piece) -> Tensor:
        extra = {}
        if piece.segments is not None:
            extra = {"position_ids": piece.position_ids, "segments": piece.segments}
        device = piece.input_ids.device
        row, column = piece.row.to(device), piece.column.to(device)
        routed = (
            nullcontext() if self._adapter is None else self._adapter.routing.assign(piece.task_ids)
        )
        if self.way.together is not None:
            forget_lengths(self._model)
        with routed:
            if self.way.bare_head:
                out = text_body(self._model)(**piece.given, use_cache=False, **extra)
                return cast(Tensor, out.last_hidden_state[row, column])
            if not self._some_logits:
                out = self._model(**piece.given, use_cache=False, **extra)
                return cast(Tensor, out.logits[row, column])
            columns, place = column.unique(return_inverse=True)
            out = self._model(**piece.given, use_cache=False, logits_to_keep=columns, **extra)
            return cast(Tensor, out.logits[row, place])

    def _pieces(self, batch: PackedBatch) -> Iterator[_Piece]:
        limit = self.way.together
        apart = limit is not None and batch.segments.longest > limit
        if self.way.layout == "packed" and not apart:
            yield _whole(batch)
            return
        paths = batch.segments.paths()
        lone = [path for path in paths if apart and len(path) > cast(int, limit)]
        others = [path for path in paths if not (apart and len(path) > cast(int, limit))]
        owner = _owners(batch, paths)
        if self.way.layout == "packed" and others:
            yield _packed(batch, others, owner)
        elif self.way.layout == "rows" and batch.pictures is None:
            for group in _similar(others):
                yield _filled_up(batch, group, owner)
        elif self.way.layout != "packed":  # pictures go with their own example alone
            lone = paths
        one = _packed if self.way.layout == "packed" else _filled_up
        for path in lone:
            yield one(batch, [path], owner)


def _whole(batch: PackedBatch) -> _Piece:
    places = batch.positions.cpu()
    return _Piece(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=batch.segments,
        task_ids=batch.task_ids,
        row=torch.zeros_like(places),
        column=places,
        asked=torch.arange(len(places)),
        places=torch.arange(batch.input_ids.shape[1])[None],
    )


def _owners(batch: PackedBatch, paths: Sequence[Tensor]) -> Tensor:
    """For each position the number of the first path through it, int64 [N]."""
    owner = torch.empty(batch.input_ids.shape[1], dtype=torch.long)
    for number in range(len(paths) - 1, -1, -1):
        owner[paths[number]] = number
    return owner


def _asked(batch: PackedBatch, owner: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
    """The batch's questions that a path answers: their places, and their columns in it.

    The last position of a path is its own.
    """
    positions = batch.positions.cpu()
    mine = torch.nonzero(owner[positions] == owner[path[-1]])[:, 0]
    return mine, torch.searchsorted(path, positions[mine])


def _packed(batch: PackedBatch, paths: Sequence[Tensor], owner: Tensor) -> _Piece:
    """Some of the batch's examples, one after another."""
    asked, columns, start = [], [], 0
    for path in paths:
        mine, column = _asked(batch, owner, path)
        asked.append(mine)
        columns.append(column + start)
        start += len(path)
    places = torch.cat(list(paths))
    lengths = [len(path) for path in paths]
    device = batch.input_ids.device
    column = torch.cat(columns)
    return _Piece(
        input_ids=batch.input_ids[:, places.to(device)],
        position_ids=batch.position_ids[:, places.to(device)],
        segments=Segments.build(
            lengths,
            None,
            None if batch.segments.blocks is None else batch.segments.blocks[places],
            in_windows=batch.segments.in_windows,
        ).to(device),
        task_ids=batch.task_ids[:, places],
        row=torch.zeros_like(column),
        column=column,
        asked=torch.cat(asked),
        places=places[None],
    )


def _similar(paths: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Paths in groups of similar length, as stacks of attention have them."""
    bounds, start = [], 0
    for path in paths:
        bounds.append((start, start + len(path)))
        start += len(path)
    by_start = {bound[0]: path for bound, path in zip(bounds, paths, strict=True)}
    for some in alike(bounds):
        yield [by_start[first] for first, _ in some]


def _filled_up(batch: PackedBatch, paths: Sequence[Tensor], owner: Tensor) -> _Piece:
    """One example a row; a shorter one repeats its last token."""
    longest = max(len(path) for path in paths)
    rows = torch.stack([torch.cat([path, path[-1:].expand(longest - len(path))]) for path in paths])
    asked, row, column = [], [], []
    for number, path in enumerate(paths):
        mine, columns = _asked(batch, owner, path)
        asked.append(mine)
        row.append(torch.full_like(mine, number))
        column.append(columns)
    device = batch.input_ids.device
    return _Piece(
        input_ids=batch.input_ids[0, rows.to(device)],
        position_ids=None,
        segments=None,
        task_ids=batch.task_ids[0, rows],
        row=torch.cat(row),
        column=torch.cat(column),
        asked=torch.cat(asked),
        places=rows,
    )


def _knows_positions(model: Any) -> bool:
    """Whether the model can make logits of chosen positions alone."""
    return "logits_to_keep" in signature(model.forward).parameters


def _adapted_behind(model: Any, adapter: Adapter | None) -> bool:
    """Whether an adapted layer stands behind the last hidden state: it must see all positions."""
    inside = {id(module) for module in text_body(model).modules()}
    towers = towers_of(model)
    return adapter is not None and any(
        id(layer) not in inside and not path.startswith(towers)
        for path, layer in adapter.layers.items()
    )


def forget_lengths(model: Any) -> None:
    """Take back what a dynamic rotary embedding keeps of longer sequences that it has seen."""
    for module in model.modules():
        first = getattr(module, "original_max_seq_len", None)
        if first is None:
            continue
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, first)
            prefix = name.removesuffix("max_seq_len_cached")
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if original is not None:
                device = getattr(module, f"{prefix}inv_freq").device
                module.register_buffer(
                    f"{prefix}inv_freq", original.to(device, copy=True), persistent=False
                )


def own_attention(model: Any) -> str:
    """transformers' attention for the model: the faster one where the model knows it."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def use_attention(model: Any, name: str) -> bool:
    """Let the layers that read text attend in another way; False: they go on as they did.

    A tower beside them keeps transformers' own attention.
    """
    if model.config.get_text_config()._attn_implementation == name:
        return True
    whole = vision_class(model.config) is None
    try:
        with quiet_warnings():
            (model if whole else cast(Any, text_body(model))).set_attn_implementation(name)
    except (ValueError, ImportError, KeyError):
        return False
    return bool(model.config.get_text_config()._attn_implementation == name)
