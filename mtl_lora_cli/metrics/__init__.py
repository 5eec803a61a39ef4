"""Metrics, each declared once, and how sure their values are.

`declare.py` says what a metric is, `declared.py`, `texts.py`, `vqa.py`, `cider.py` and `maps.py` have the built-in ones, `intervals.py` a value with its
interval, `paired.py` two models on the same examples, `seeds.py` methods over seeds.
"""

from __future__ import annotations

from mtl_lora_cli.metrics import declared, maps, texts  # noqa: F401 - declare them

# isort: split
from mtl_lora_cli.metrics import cider, vqa  # noqa: F401 - the first of a kind is its default

# isort: split
from mtl_lora_cli.metrics.declare import CHOICES, FREE, LABELS, METRICS, TWO, VALUES, metric
from mtl_lora_cli.metrics.outcome import Outcome

__all__ = ["CHOICES", "FREE", "LABELS", "METRICS", "TWO", "VALUES", "Outcome", "metric"]
