"""The tiny real model and batches over it, as the tests of models have them."""

from __future__ import annotations

from ..models.conftest import base, make_batch

__all__ = ["base", "make_batch"]
