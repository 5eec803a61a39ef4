"""Candidates' log-probabilities as llama.cpp itself computes them, through llama-cpp-python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mtl_lora_cli.errors import MtlLoraError, UsageError

if TYPE_CHECKING:
    from mtl_lora_cli.evaluation.requests import Request


GELU_TABLE = 2e-2  # in log-probabilities; up to 6.1e-3 was seen of Gemma 3 270M


def table_tolerance(config: Any) -> float:
    """How far llama.cpp may be from a model's own float32: ggml reads GELU from a table of 16-bit floats.

    Args:
        config: transformers' configuration.

    Returns:
        0 where the model has another activation.
    """
    text = config.get_text_config()
    names = (getattr(text, key, None) for key in ("hidden_act", "hidden_activation"))
    return GELU_TABLE if any("gelu" in str(name) for name in names) else 0.0


def require_llama_cpp() -> None:
    """Refuse to go on where llama.cpp is not there to run what is written.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        raise UsageError(
            "what is written for llama.cpp is run with it, and it is not installed; get it with: "
            "pip install llama-cpp-python, or write without comparing: --no-check"
        ) from None


@contextmanager
def llama(model: Path, lora: Path | None, requests: Sequence[Request]) -> Iterator[Any]:
    """A model in llama.cpp on the CPU, with room for these requests, its attention in float32.

    Args:
        model: a GGUF file.
        lora: an adapter's, or None.
        requests: what will be asked.

    Raises:
        MtlLoraError: llama.cpp does not read one of the files.
    """
    import llama_cpp

    longest = max(len(one.prompt) + max(map(len, one.choices)) for one in requests)
    try:
        opened = llama_cpp.Llama(
            str(model),
            lora_path=None if lora is None else str(lora),
            n_ctx=longest,
            n_batch=longest,
            n_ubatch=longest,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            n_gpu_layers=0,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,  # keys and values are float16 by default
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise MtlLoraError(f"llama.cpp does not read what was written: {error}") from None
    try:
        yield opened
    finally:
        opened.close()


def score(opened: Any, requests: Sequence[Request]) -> list[np.ndarray]:
    """Log-probabilities of every candidate of every request, as `evaluation.choices.score` gives them.

    Each prompt is computed once; a candidate's tokens follow it in the cache.
    """
    return [_score_one(opened, request) for request in requests]


def _score_one(opened: Any, request: Request) -> np.ndarray:
    start = len(request.prompt)
    opened.reset()
    opened.eval(request.prompt)
    sums = []
    for choice in request.choices:
        opened.n_tokens = start  # what stood behind the prompt is dropped from the cache
        opened.eval(choice[:-1])
        rows = torch.from_numpy(opened.scores[start - 1 : start + len(choice) - 1]).double()
        chosen = rows.log_softmax(-1)[torch.arange(len(choice)), torch.tensor(choice)]
        sums.append(float(chosen.sum()))
    return np.array(sums)
