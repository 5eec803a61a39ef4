"""DeepSpeed's configuration: as it follows from a recipe, with a user's own file over it, and what of it concerns
which of the two engines of `zero.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtl_lora_cli.engine.memory import LIVE_LAYERS
from mtl_lora_cli.errors import Problem, ProblemsError, file_problem
from mtl_lora_cli.recipe.schema import Distributed

_STAYS_WHOLE = 100_000  # values of a frozen tensor that is not worth cutting: norms and biases

# Keys of a user's own file that say what the recipe says already, or what this engine does not do.
_OF_THE_RECIPE = {
    "optimizer": "training.learning_rate, training.weight_decay and training.parts",
    "scheduler": "training.schedule and training.warmup",
    "train_batch_size": "training.rows_per_step",
    "fp16": "dtype: bfloat16 or float32",
    "bf16": "dtype",
    "amp": "dtype",
    "activation_checkpointing": "training.gradient_checkpointing",
    "tensorboard": "run.trackers",
    "wandb": "run.trackers",
}

# What would write elsewhere than into the run folder.
_WRITES = ("csv_monitor", "comet", "nebula", "autotuning")
_PLACES = ("output_path", "output_file", "results_dir", "exps_dir", "nvme_path")


def deepspeed_config(
    distributed: Distributed, *, max_gradient_norm: float | None, on_card: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration as it follows from a recipe.

    Args:
        distributed: the recipe's.
        max_gradient_norm: the recipe's; None: DeepSpeed does not clip, `training.clipping` does.
        on_card: whether there is a card.
    """
    stage, offload = distributed.zero_stage, distributed.offload
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_card}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_card}
    if stage == 3:
        # A layer is let go however soon it comes again; the head, next in the backward pass, is not.
        zero["stage3_max_reuse_distance"] = 1
        zero["stage3_param_persistence_threshold"] = _STAYS_WHOLE
    return {
        # Rows are dealt out by ourselves; DeepSpeed sees one pass after the other.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_gradient_norm or 0.0,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, which ZeRO's tests do not name
        "zero_force_ds_cpu_optimizer": False,  # no C++ has to be compiled for so few parameters
        "zero_optimization": zero,
    }


def merged_config(own: dict[str, Any], path: Path) -> dict[str, Any]:
    """A user's DeepSpeed file over the derived configuration; `auto` is ours.

    Raises:
        ProblemsError: it cannot be read, or contradicts the recipe: every key that does.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise file_problem(path, f"cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise file_problem(path, f"not valid JSON: {error.msg}", line=error.lineno) from None
    if not isinstance(given, dict):
        raise file_problem(path, f"expected an object, received {type(given).__name__}")
    problems = [
        Problem(str(path), None, key, f"not here: the recipe says it in {where}")
        for key, where in _OF_THE_RECIPE.items()
        if given.get(key, "auto") != "auto"
    ]
    problems += [
        Problem(str(path), None, key, "is not done: it writes outside of the run folder")
        for key in _writing(given)
    ]
    result = _over(own, given, (), problems, str(path))
    if problems:
        raise ProblemsError(problems)
    return result


def _writing(given: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[str]:
    """Keys of a user's file by which something would be written to a place of its own."""
    for key, value in given.items():
        if key in _PLACES or (not place and key in _WRITES):
            yield ".".join((*place, key))
        elif isinstance(value, dict) and not (not place and key in _OF_THE_RECIPE):
            yield from _writing(value, (*place, key))


def _is_tuning(key: str) -> bool:
    """Whether a key changes speed and memory alone, so that a user's value goes before ours."""
    return key.startswith("stage3_") or key in ("contiguous_gradients", "pin_memory")


def _over(
    own: Mapping[str, Any],
    given: Mapping[str, Any],
    place: tuple[str, ...],
    problems: list[Problem],
    file: str,
) -> dict[str, Any]:
    result = dict(own)
    for key, value in given.items():
        if value == "auto" or (not place and key in _OF_THE_RECIPE):
            continue
        if isinstance(value, dict) and isinstance(own.get(key, {}), dict):
            result[key] = _over(own.get(key, {}), value, (*place, key), problems, file)
        elif key in own and own[key] != value and not _is_tuning(key):
            name = ".".join((*place, key))
            message = (
                f"received {json.dumps(value)}, from the recipe follows {json.dumps(own[key])}"
            )
            problems.append(Problem(file, None, name, message))
        else:
            result[key] = value
    return result


def of_the_trained(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration concerns the engine of the adapter: stage 2 at most."""
    zero = {
        key: value
        for key, value in config["zero_optimization"].items()
        if not key.startswith("stage3_") and key != "offload_param"
    }
    zero["stage"] = min(zero["stage"], 2)
    return {**config, "zero_optimization": zero, "steps_per_print": 2**31}


def of_the_base(config: Mapping[str, Any], largest: int) -> dict[str, Any]:
    """What concerns the engine that cuts frozen weights: it has no optimiser.

    Args:
        config: the whole configuration.
        largest: values of the largest layer. So many layers are there at once that in the end one is
            fetched for each that is done: of several together DeepSpeed would make copies.
    """
    zero = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
    zero.setdefault("stage3_prefetch_bucket_size", 2 * largest)
    zero.setdefault("stage3_max_live_parameters", LIVE_LAYERS * largest)
    kept = {key: value for key, value in config.items() if key != "gradient_clipping"}
    return {**kept, "zero_optimization": zero, "steps_per_print": 2**31}
