"""What is right: each example by itself through transformers' own model, without code of ours.

The adapter is written down once more, from its formula: W_t = W + s Σ_i g_{t,i} B_i Λ_t A takes the
place of each adapted weight, and gradients flow through that sum.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

ELSEWHERE = ("vision", "visual", "image", "audio", "multi_modal", "patch")


class Alone:
    """A model as transformers loads it, in float32, with eager attention.

    Args:
        folder: the model's.
        sees: whether it has a part that sees.

    Attributes:
        model: transformers' own.
    """

    def __init__(self, folder: Path, *, sees: bool = False) -> None:
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self.model = kind.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.config = AutoConfig.from_pretrained(folder)

    def linear_layers(self) -> dict[str, nn.Module]:
        """Path → layer: the linear ones of the text part, without the output layer.

        A class of the model's own that only descends from a linear layer, as routers do, is none.
        """
        head = self.model.get_output_embeddings()
        return {
            path: layer
            for path, layer in self.model.named_modules()
            if type(layer) in (nn.Linear, Conv1D) and layer is not head and not elsewhere(path)
        }

    def targets(self) -> tuple[str, ...]:
        """Last names of all of these."""
        return tuple(sorted({path.rpartition(".")[2] for path in self.linear_layers()}))

    def logprobs(self, example: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """log p of every token but the first, [n - 1].

        Args:
            example: int64 [n].
            weights: parameter → what takes its place.
        """
        logits = self._logits(example[:-1], weights)
        return logits.log_softmax(-1).gather(1, example[1:, None])[:, 0]

    def likeliest(self, tokens: Tensor, weights: Mapping[str, Tensor]) -> int:
        """What follows the tokens."""
        return int(self._logits(tokens, weights)[-1].argmax())

    def _logits(self, tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        model = copy.deepcopy(self.model)  # some rotary embeddings keep what they have seen
        keys = {"input_ids": tokens[None], "use_cache": False}
        return functional_call(model, dict(weights), (), keys).logits[0].float()

    def adapted(
        self, tensors: Mapping[str, Tensor], scale: float, temperature: float, task: int
    ) -> dict[str, Tensor]:
        """W_t of every layer that has an adapter, under the name of its weight.

        Args:
            tensors: `{path of the layer}.{role}`, as the adapter calls them.
            scale: s.
            temperature: τ of g_t = softmax(w_t / τ).
            task: t; below 0 nothing is adapted.
        """
        if task < 0:
            return {}
        weights = {}
        for name in tensors:
            path, _, role = name.rpartition(".")
            if role != "lora_A":
                continue
            down, ups, transforms, gates = (
                tensors[f"{path}.{role}"]
                for role in ("lora_A", "lora_B", "task_transform", "task_gate")
            )
            gate = torch.softmax(gates[task] / temperature, dim=-1)
            update = sum(
                g * up @ transforms[task] @ down[0] for g, up in zip(gate, ups, strict=True)
            )
            layer = self.model.get_submodule(path)
            change = scale * (update.T if isinstance(layer, Conv1D) else update)
            weights[f"{path}.weight"] = layer.weight.detach() + change
        return weights


def elsewhere(path: str) -> bool:
    """Whether a layer belongs to a part that sees or hears, or stands between that and the text."""
    return any(word in path for word in ELSEWHERE)
