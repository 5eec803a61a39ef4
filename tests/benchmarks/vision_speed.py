"""Models that read pictures by the clock: ours, the strongest stack of public parts, padded rows, and kept features.

    python tests/benchmarks/vision_speed.py --case llava-7b:none:ours,kept,padded,liger --out results.jsonl
    torchrun --standalone --nproc-per-node 2 tests/benchmarks/vision_speed.py \
        --case llava-7b/qwen3-vl-8b:nf4:ours:alone --case llava-7b:nf4:ours:2

Random weights, the same rows for all columns: a picture a row's example, words before it and an answer behind. The
tower is frozen and its features are made without a gradient. `liger` is PEFT over the same packed rows, with torch's
attention of variable length, Liger's kernels, fused AdamW, and the head where something is asked; `padded` is one
example a row, as an ordinary SFT of such models has it. Tokens are those of examples, never padding.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.bench import packed_baseline as packed_rows
from mtl_lora_cli.bench.random_model import _four_bit, _replace, layer_linears
from mtl_lora_cli.bench.timing import time_steps
from mtl_lora_cli.data.kept_features import KeptFeatures, Tower
from mtl_lora_cli.engine.memory import GIB, peak_bytes, sizes_of
from mtl_lora_cli.engine.plan import text_body
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.engine.sizes import Load
from mtl_lora_cli.machine.cards import pick_device, pick_dtype, release, reset_peak
from mtl_lora_cli.machine.processes import ALONE, Processes, joined
from mtl_lora_cli.memory.pictures import sizes_at_sight
from mtl_lora_cli.memory.situation import together
from mtl_lora_cli.models import registered
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.load import adapt
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.sight import features_of, with_pictures
from mtl_lora_cli.models.vision import Seen, Vision, vision_class
from mtl_lora_cli.recipe.schema import Distributed
from mtl_lora_cli.training.capacity import PassSizes
from mtl_lora_cli.training.step import Stepper, StepPlan
from mtl_lora_cli.training.update import ParameterGroup
from mtl_lora_cli.training.zero import deepspeed_config

TASKS, RANK, RATE, WARM_UP = 4, 8, 1e-4, 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PICTURE = 31_999  # the token of pictures in all shapes


@dataclass(frozen=True)
class Shape:
    """A model's configuration, and what its tower takes of one picture."""

    config: Any
    seen: Seen
    count: int


def llama(
    width: int, inner: int, layers: int, heads: int, groups: int, words: int, tied: bool
) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=words, max_position_embeddings=8192, tie_word_embeddings=tied,
        pad_token_id=0,
    )  # fmt: skip


def shape_of(name: str) -> Shape:
    """The shape of that name; `tiny` ones are for trying this file out."""
    import transformers as t

    small = name.startswith("tiny-")
    if name in ("alias", "tiny-alias"):
        side = 28 if small else 224
        tower = t.Dinov2Config(
            hidden_size=384, num_hidden_layers=2 if small else 12, num_attention_heads=6,
            mlp_ratio=4, patch_size=14, image_size=side,
        )  # fmt: skip
        text = llama(576, 1536, 2 if small else 30, 9, 3, 49_152, True)
        return _llava(tower, text, side, -1)
    if name in ("llava-7b", "tiny-llava"):
        side = 56 if small else 336
        tower = t.CLIPVisionConfig(
            hidden_size=64 if small else 1024, intermediate_size=128 if small else 4096,
            num_hidden_layers=2 if small else 24, num_attention_heads=2 if small else 16,
            image_size=side, patch_size=14,
        )  # fmt: skip
        text = llama(*((128, 256, 2, 4, 4) if small else (4096, 11008, 32, 32, 32)), 32_064, False)
        return _llava(tower, text, side, -2)
    assert name in ("qwen3-vl-8b", "tiny-qwen"), name
    sizes = (64, 2, 128, 2, [0]) if small else (1152, 27, 4304, 16, [8, 16, 24])
    width, depth, inner, heads, deep = sizes
    text = {
        "hidden_size": 128 if small else 4096,
        "intermediate_size": 256 if small else 12288,
        "num_hidden_layers": 2 if small else 36,
        "num_attention_heads": 4 if small else 32,
        "num_key_value_heads": 2 if small else 8,
        "head_dim": 32 if small else 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [6, 5, 5] if small else [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    tower = {
        "depth": depth, "hidden_size": width, "intermediate_size": inner, "num_heads": heads,
        "patch_size": 16, "spatial_merge_size": 2, "out_hidden_size": text["hidden_size"],
        "deepstack_visual_indexes": deep, "num_position_embeddings": 2304,
    }  # fmt: skip
    config = t.Qwen3VLConfig(vision_config=tower, text_config=text, image_token_id=PICTURE)
    high, wide = (4, 8) if small else (40, 30)
    seen = {
        "pixel_values": torch.randn(high * wide, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([[1, high, wide]]),
    }
    return Shape(config, seen, high * wide // 4)


def _llava(tower: Any, text: Any, side: int, layer: int) -> Shape:
    from transformers import LlavaConfig

    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=PICTURE, vision_feature_layer=layer
    )
    return Shape(config, {"pixel_values": torch.randn(1, 3, side, side)}, (side // 14) ** 2)


def built(
    shape: Shape, device: torch.device, dtype: torch.dtype, quantization: str, cut: bool
) -> Any:
    """The model with random weights, frozen; the language part in 4 bits where that is asked for."""
    from transformers import AutoModelForImageTextToText

    registered.register()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(shape.config, dtype=dtype)
    if quantization == "nf4":
        four_bit = {id(module) for module in layer_linears(model)}
        for path, module in list(model.named_modules()):
            if id(module) in four_bit:
                storage = dtype if cut else torch.uint8
                _replace(model, path, _four_bit(module, dtype, device, storage))
    return model.requires_grad_(False).eval()


def vision_of(config: Any) -> Vision:
    """How pictures are laid into rows, without a processor: they are noise already."""
    kind = vision_class(config)
    assert kind is not None
    vision = object.__new__(kind)
    vision.config, vision.token_id = config, PICTURE
    return vision


_drawn: dict[tuple[Any, ...], list[PackedBatch]] = {}


def rows_of(name: str, shape: Shape, row_length: int, rows: int, steps: int) -> list[PackedBatch]:
    """`drawn_rows`, once for all cases of a shape."""
    key = (name, row_length, rows, steps)
    if key not in _drawn:
        _drawn[key] = drawn_rows(shape, row_length, rows, steps)
    return _drawn[key]


def drawn_rows(shape: Shape, row_length: int, rows: int, steps: int) -> list[PackedBatch]:
    """Of each step one pass: examples of a picture and 20 to 120 words, 4 to 60 of them an answer."""
    draw = np.random.default_rng(0)
    vision, batches = vision_of(shape.config), []
    for step in range(steps):
        parts, prompts, tasks = [], [], []
        for _ in range(rows):
            room = row_length
            while True:
                before, behind, answer = (
                    int(draw.integers(*b)) for b in ((4, 40), (12, 60), (4, 60))
                )
                length = before + shape.count + behind + answer
                if length > room:
                    break
                room -= length
                words = draw.integers(3, 31_000, length)
                words[before : before + shape.count] = PICTURE
                parts.append(words)
                prompts.append(length - answer)
                tasks.append(len(tasks) % TASKS)
        lengths = [len(part) - 1 for part in parts]  # nothing is asked of the last one
        ends = np.cumsum([0, *lengths])
        asked = [np.arange(start + prompt - 1, start + length)
                 for start, prompt, length in zip(ends, prompts, lengths, strict=False)]  # fmt: skip
        flat = torch.from_numpy(np.concatenate([part[:-1] for part in parts]))
        targets = np.concatenate(
            [part[prompt:] for part, prompt in zip(parts, prompts, strict=True)]
        )
        positions = torch.from_numpy(np.concatenate(asked))
        batch = PackedBatch(
            input_ids=flat[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            task_ids=torch.from_numpy(np.repeat(tasks, lengths))[None],
            segments=Segments.build(lengths),
            positions=positions,
            owner=torch.arange(len(positions)),
            targets=torch.from_numpy(targets),
        )
        generator = torch.Generator().manual_seed(step)
        seen = [
            {
                n: v if not v.is_floating_point() else torch.randn(v.shape, generator=generator)
                for n, v in shape.seen.items()
            }
            for _ in parts
        ]
        batches.append(with_pictures(batch, vision, seen, [shape.count] * len(parts), prompts))
    return batches


def tokens_of(batch: PackedBatch) -> int:
    return batch.input_ids.shape[1] + len(batch.segments.bounds)


def stepped(
    step: Callable[[Any], Tensor],
    batches: Sequence[Any],
    tokens: Callable[[Any], int],
    device: torch.device,
) -> dict[str, Any]:
    timing = time_steps(step, batches, tokens, warmup=WARM_UP, device=device).to_json()
    return {
        k: timing[k]
        for k in (
            "tokens_per_second",
            "tokens_per_second_min",
            "tokens_per_second_max",
            "peak_memory_gib",
            "losses",
            "seconds",
        )
    }


def ours(model: Any, shape: Shape, batches: list[PackedBatch], device: torch.device, row_length: int,
         processes: Processes, stage: int, passes: int) -> dict[str, Any]:  # fmt: skip
    names = [f"task{number}" for number in range(TASKS)]
    adapter = adapt(model, configure("mtl-lora", rank=RANK, target_modules=TARGETS), names)
    packed = PackedModel(model, adapter, resident=stage < 3).train()
    zero = None
    if stage:
        zero = deepspeed_config(
            Distributed(zero_stage=stage), max_gradient_norm=1.0, on_card=device.type == "cuda"
        )

    def planned(number: int) -> StepPlan:
        every = batches[number * passes :][:passes]
        own = processes.mine(every)
        weights = [torch.ones(len(one.owner)) for one in own]
        return StepPlan(own, weights, [one.owners for one in own], sum(len(b.owner) for b in every))

    steps = len(batches) // passes
    sizes = PassSizes(row_length, len(adapter.tasks))
    stepper = Stepper(
        packed, adapter, planned, total=steps, max_norm=1.0, sizes=sizes, processes=processes, zero=zero,
        groups=[ParameterGroup(list(adapter.trained().values()), RATE, weight_decay=0.0)],
    )  # fmt: skip

    def step(number: int) -> Tensor:
        running = stepper.launch(number, 1.0)
        return running.losses[:-1].sum() / running.planned.count

    found = stepped(
        step,
        range(steps),
        lambda n: sum(map(tokens_of, batches[n * passes :][:passes])),
        device,
    )
    return {**found, "engine": packed.engine_line(), "trained": adapter.parameter_count()}


def estimated(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str,
    batches: list[PackedBatch],
    kept: bool,
    parts: int,
) -> float:
    """GiB that `doctor` would say, of the tensors alone."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape.config, dtype=dtype)
        adapter: Adapter = adapt(
            model,
            configure("mtl-lora", rank=RANK, target_modules=TARGETS),
            [f"t{n}" for n in range(TASKS)],
        )
    sizes = sizes_of(
        model,
        adapter,
        value=dtype.itemsize,
        on_card=device.type == "cuda",
        quantization=quantization,
        parts=parts,
    )
    sight = sizes_at_sight(model, {} if kept else shape.seen, shape.count, dtype.itemsize)
    most = max(batches, key=lambda batch: batch.input_ids.shape[1])
    shown = 0 if most.pictures is None else len(most.pictures.places)
    load = Load(
        most.input_ids.shape[1],
        max(len(b.positions) for b in batches),
        most.segments.longest,
        shown,
    )
    from mtl_lora_cli.recipe.training import Recompute

    return peak_bytes(replace(sizes, sight=sight), Recompute(), together(sizes, load, 1)) / GIB


def kept(
    model: Any, shape: Shape, batches: list[PackedBatch]
) -> tuple[list[PackedBatch], dict[str, Any]]:
    """The same passes with features that were written to a disk and read again; what that takes."""
    vision = vision_of(shape.config)
    object.__setattr__(vision, "processor", None)
    tower = Tower(model, vision, False)
    with tempfile.TemporaryDirectory() as folder:
        store = KeptFeatures(Path(folder))
        every = [seen for batch in batches for seen in batch.pictures.seen]  # type: ignore[union-attr]
        tower.see(every[:16], [shape.count] * len(every[:16]))
        began = time.perf_counter()
        for start in range(0, len(every), 16):
            some = every[start : start + 16]
            found = tower.see(some, [shape.count] * len(some))
            store.write({f"{start + number}": one for number, one in enumerate(found)})
        seconds = time.perf_counter() - began
        store.look_again()
        size = store.bytes
        began = time.perf_counter()
        read = [
            {k: v.clone() for k, v in store.read(str(number)).items()}
            for number in range(len(every))
        ]
        reading = time.perf_counter() - began
    made, start = [], 0
    for batch in batches:
        count = len(batch.pictures.seen)  # type: ignore[union-attr]
        own = replace(batch.pictures, seen=read[start : start + count])  # type: ignore[type-var]
        made.append(replace(batch, pictures=own))
        start += count
    return made, {
        "pictures": len(every),
        "bytes_a_picture": size / len(every),
        "pictures_a_second_made": len(every) / seconds,
        "pictures_a_second_read": len(every) / reading,
    }


def peft_model(model: Any, dtype: torch.dtype, narrow: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    inside = text_body(model)
    path = next(name for name, module in model.named_modules() if module is inside)
    settings = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=rf"{path}.*\.({'|'.join(TARGETS)})",
        task_type="CAUSAL_LM",
    )
    found = get_peft_model(model, settings, autocast_adapter_dtype=not narrow).train()
    for module in (
        (found.get_base_model().model.vision_tower,)
        if hasattr(found.get_base_model().model, "vision_tower")
        else ()
    ):
        module.eval()
    if narrow:
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return found


@dataclass(frozen=True)
class Fill:
    """What passes are filled up to, so that no graph is compiled twice: tokens, examples, and the longest's tokens."""

    size: int = 0
    most: int = 0
    longest: int = 0


def fill_of(batches: Sequence[PackedBatch]) -> Fill:
    sizes = [batch.input_ids.shape[1] for batch in batches]
    most = max(len(batch.segments.bounds) for batch in batches) + 1
    longest = max(batch.segments.longest for batch in batches)
    return Fill(max(sizes), most, max(longest, max(sizes) - min(sizes)))


def rival(
    model: Any, batches: list[PackedBatch], device: torch.device, dtype: torch.dtype, kernels: str
) -> dict[str, Any]:
    """PEFT over the same packed rows."""
    packed_rows._register()
    found = peft_model(model, dtype, narrow=True)
    inner = found.get_base_model()
    body = text_body(inner)
    body.set_attn_implementation(packed_rows.NAME)
    if kernels == "liger" and device.type == "cuda":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            model=body, cross_entropy=False, fused_linear_cross_entropy=False
        )
    if kernels == "compile":
        for layer in body.layers:
            layer.compile()

    fill = fill_of(batches) if kernels == "compile" else Fill()

    def loss_of(batch: PackedBatch) -> Tensor:
        on = batch.to(device)
        shown, more = on.pictures, max(0, fill.size - batch.input_ids.shape[1])
        assert shown is not None
        with torch.no_grad():
            seen = features_of(inner, shown.seen)
        ids = nn.functional.pad(on.input_ids.index_fill(1, shown.places, 0), (0, more))
        x = inner.get_input_embeddings()(ids)
        x = x[0].index_copy(0, shown.places, seen.tokens.to(x.dtype))[None]
        ends = [end for _, end in batch.segments.bounds]
        bounds = [0, *ends, *[ids.shape[1]] * (fill.most - len(ends))]
        behind = torch.arange(more, device=device)[None]
        hidden = body(
            inputs_embeds=x,
            position_ids=torch.cat([on.position_ids, behind], dim=1),
            bounds=torch.tensor(bounds, dtype=torch.int32, device=device),
            longest=fill.longest or batch.segments.longest,
            use_cache=False,
        ).last_hidden_state
        logits = inner.get_output_embeddings()(hidden[0, on.positions.to(device)]).float()
        return nn.functional.cross_entropy(logits, on.targets)

    return _trained(found, batches, loss_of, device)


def padded(
    model: Any, batches: list[PackedBatch], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One example a row, filled up; the model's own forward pass and loss."""
    found = peft_model(model, dtype, narrow=False)
    inner = found.get_base_model()
    text_body(inner).set_attn_implementation("sdpa")

    def loss_of(batch: PackedBatch) -> Tensor:
        rows, labels = [], []
        asked = dict(zip(batch.positions.tolist(), batch.targets.tolist(), strict=True))
        for start, end in batch.segments.bounds:
            ids = batch.input_ids[0, start:end]
            own = torch.tensor([-100, *(asked.get(n, -100) for n in range(start, end))])
            rows.append(torch.cat([ids, own[-1:]]))
            labels.append(own)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        own = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        kind = vision_class(inner.config)
        assert kind is not None and batch.pictures is not None
        seen = {
            n: v.to(device, dtype if v.is_floating_point() else None)
            for n, v in kind.join(batch.pictures.seen).items()
        }
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = found(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                labels=own.to(device),
                use_cache=False,
                **seen,
            )
        return out.loss

    return _trained(found, batches, loss_of, device)


def _trained(
    found: Any,
    batches: list[PackedBatch],
    loss_of: Callable[[PackedBatch], Tensor],
    device: torch.device,
) -> dict[str, Any]:
    learning = [p for p in found.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.0, fused=device.type == "cuda")

    def step(batch: PackedBatch) -> Tensor:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return stepped(step, batches, tokens_of, device)


def measured(run: str, wanted: argparse.Namespace, processes: Processes, began: float) -> None:
    """One shape with all its columns; each says its line, and one that fails takes no other with it."""
    name, quantization, columns, *others = run.split(":")
    passes = processes.count
    if others == ["alone"]:
        names = name.split("/")
        name, processes, others = names[processes.rank % len(names)], ALONE, []
    stage = int(others[0]) if others else 0
    device = pick_device()
    dtype = pick_dtype("auto", device)
    shape = shape_of(name)
    steps = (WARM_UP + wanted.steps) * passes
    cut = stage == 3
    for column in columns.split(","):
        if processes.same(time.monotonic() - began > wanted.seconds):
            print(f"no time for {run}", flush=True)
            return
        batches = rows_of(name, shape, wanted.row_length, wanted.rows, steps)
        made: dict[str, Any] = {}
        model = None
        try:
            release(device)
            made["held_gib"] = held_gib(device)  # what a case before left behind
            model = built(shape, device, dtype, quantization, cut)
            own = batches
            if column == "kept":
                own, more = kept(model, shape, batches)
                made |= more
            release(device)
            reset_peak(device)
            if column in ("ours", "kept"):
                length = wanted.row_length
                result = ours(model, shape, own, device, length, processes, stage, passes)
                parts = processes.count if cut else 1
                made["estimate_gib"] = estimated(
                    shape, dtype, device, quantization, own, column == "kept", parts
                )
            elif column == "padded":
                result = padded(model, batches, device, dtype)
            else:
                result = rival(model, batches, device, dtype, column)
            if processes.main:
                said = {
                    "shape": name, "quantization": quantization, "column": column,
                    "stage": stage, "processes": processes.count, "passes": passes, **made, **result,
                }  # fmt: skip
                print(f"{_line(said, made)}, at {time.monotonic() - began:.0f} s", flush=True)
                if wanted.out:
                    with wanted.out.open("a") as file:
                        file.write(json.dumps(said) + "\n")
        except Exception:
            traceback.print_exc()
            print(f"{run}: {column} failed", flush=True)
        del model
        gc.collect()
        release(device)


def held_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def _line(said: dict[str, Any], made: dict[str, Any]) -> str:
    rates = (said[f"tokens_per_second{end}"] for end in ("", "_min", "_max"))
    middle, low, high = (f"{rate:,.0f}" for rate in rates)
    found = (
        f"{said['shape']} {said['quantization']} {said['column']} stage {said['stage']} x{said['processes']}: "
        f"{middle} tokens/s ({low} - {high}), peak {said['peak_memory_gib'] or 0.0:.2f} GiB"
    )
    found += "".join(f", {key} {value:,.2f}" for key, value in made.items())
    return f"{found}, losses {said['losses'][0]:.4f} {said['losses'][-1]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--case", action="append", required=True,
        help="SHAPE:none|nf4:COLUMNS[:ZERO STAGE], or SHAPE/SHAPE:none|nf4:ours:alone; columns of ours, kept, "
        "padded, liger, compile, eager; liger last: it changes functions of transformers for the whole process",
    )  # fmt: skip
    parser.add_argument("--row-length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2, help="a pass, and a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600, help="nothing is begun after so many")
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    began = time.monotonic()
    with joined() as processes:
        for run in wanted.case:
            measured(run, wanted, processes, began)


if __name__ == "__main__":
    main()
