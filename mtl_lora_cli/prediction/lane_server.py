"""What the process has loaded that lanes are forked from: each lane would take two seconds of a core for it."""

from __future__ import annotations

from pyarrow import parquet  # noqa: F401
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel  # noqa: F401

from mtl_lora_cli.prediction import lanes  # noqa: F401
