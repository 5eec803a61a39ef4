"""A recipe that says everything, and a way to write one down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

COMPLETE = """\
base_model: some/model
dtype: float32
quantization: none
engine: auto
base_compute: dtype
prompt_format: chat
chat: {template_kwargs: {}, answers: conversation, date: "2026-11-30"}
control_tokens: text
blank_fields: error
images: {size: [224, 224], augment: {flip: true, scale: [0.5, 2.0]}}
adapter:
  method: mtl-lora
  rank: 4
  alpha: 8.0
  up_projections: 2
  temperature: 0.5
  transform: full
  transform_start: 0.5
  transform_bases: 4
  gate: weights
  gate_start: 1.0
  embedding_size: 4
  task_rank: 1
  up_rank: 1
  gate_spread: 0.5
  gate_form: softmax
  tied: false
  task_modules: null
  scaling: sqrt_rank
  down_start: normal
  rank_pattern: {v_proj: 2}
  experts: each
  whole_modules: [embed_tokens]
  streams: null
  dropout: 0.1
  target_modules: [q_proj, v_proj]
tasks:
  - name: first
    template: glue/rte
    source: {path: data/rte, splits: {train: a.jsonl}}
    objective: causal_lm
    conversation: null
    metrics: [accuracy]
    tags: [one, two]
    sampling_weight: 2.0
    loss_weight: 0.5
    repeat: 2.0
    max_examples: 10
  - name: second
    template: glue/sst2
    source: {hub: owner/name, config: sst2, revision: main}
mixing: {temperature: 2.0}
training:
  epochs: 1.5
  max_steps: 3
  learning_rate: 3e-4
  weight_decay: 0.0
  parts: {up: {learning_rate: 0.001, weight_decay: 0.2}}
  schedule: linear
  warmup: 0.1
  adam_beta2: 0.98
  max_gradient_norm: 1.0
  shuffled_tasks: true
  rows: mixed
  share_beginnings: false
  balance: {method: gradnorm, rate: 0.01, alpha: 1.0, every: 5}
  stages: []
  clipping: {relative: 1.1, decay: 0.9, after: 10}
  row_length: 64
  rows_per_step: 2
  rows_per_pass: 1
  on_overflow: drop
  loss_on: answer
  gradient_checkpointing: false
  memory: manual
  memory_limit: null
  expanded_layers: 0
  checkpoint_every: 2
  keep_checkpoints: 1
  diagnose: {every: 10}
  validation: {every: 20, examples: 30, metric: true, best: macro, patience: 3}
  seed: 7
distributed: {zero_stage: 2, offload: optimizer, deepspeed: ds.json}
run: {name: here, directory: there, trackers: [tensorboard], project: mine, router: true}
extensions: []
"""


@pytest.fixture(scope="session")
def complete() -> str:
    """A recipe with every key."""
    return COMPLETE


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    """`written(text)` puts a recipe into a file."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
