"""Values read from a card while it computes what was asked of it after them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Readout:
    """Values on their way to the host.

    A card does what it is told one thing after another: asked for when they are needed, values would wait for all
    that was begun meanwhile. So they are sent off at once, and whoever needs them waits for them alone.

    Args:
        values: on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values.double(), None
        if values.is_cuda:
            here = torch.empty(values.shape, dtype=torch.float64, pin_memory=True)
            self._values = here.copy_(self._values, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()

    def numpy(self) -> np.ndarray:
        """The values, float64; they are waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: np.ndarray = self._values.numpy()
        return found
