"""Keeping other libraries' remarks out of ours."""

from __future__ import annotations

import logging as python_logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_deepspeed() -> None:
    """DeepSpeed looks for cards, compilers and launchers aloud when it is imported.

    accelerate imports it where transformers saves or loads a model, asked or not.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    python_logging.getLogger("DeepSpeed").setLevel(python_logging.ERROR)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers' own bars while loading weights say nothing that our lines do not."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """transformers' own warnings about what we look at ourselves."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
