"""A start of the projector between tower and language model, in closed form, from the words of the rows' own texts.

A fresh projector says nothing that the language model reads; thousands of steps are spent until it does. Here it begins
where a picture's parts say the words that stand beside the picture. With x a part as the tower gives it, its first
layer becomes h(x) = act(R (x − m) / s), m and s the mean and deviation of parts, R the layer's own rows at length 1.
Of picture i let h̄_i be the mean of its parts, and y_i the sum of the embeddings of its examples' tokens, prompts and
answers, less the mean of the task's examples. If each part says some of the words, their sum is linear in h̄_i:

    W = argmin Σ_i |y_i − ȳ − Wᵀ (h̄_i − h̄)|² + λ |W|²

The penalty λ is the largest of a grid whose error on a fifth of the pictures, drawn by the seed from the training rows, is within one
standard error of the least (Breiman et al., Classification and Regression Trees, 1984); W is then of all of
them. The second layer gives e + k Wᵀ (h(x) − h̄): e is the mean of the embedding's rows, and k makes a part stray from it
as far as a row of the embedding does on average. The words of single parts are never known, nor are held-out rows used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.data.kept_features import Tower, why_not
from mtl_lora_cli.data.pictured import Eyes
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.vision import KEPT, around
from mtl_lora_cli.pictures.shown import Picture

WORD_START = "projector_start.json"  # in a run folder: what it was found to be
MOST = 4096  # examples' pictures that are looked at
LEAST = 20  # different ones
_SOME = 256  # of which means, deviations and lengths of parts are taken
_PENALTIES = [10 ** (power / 2) for power in range(-6, 7)]  # of the mean of HᵀH's diagonal
_KEY = "images.projector_start: words"
Shown = tuple[Picture, ...]


@dataclass(frozen=True)
class WordStart:
    """What a projector's start was found to be.

    Attributes:
        pictures: that were looked at; examples that show several count once.
        penalty: λ over the mean of the diagonal of HᵀH.
        explained: share of the words' variance that it explains of the pictures that it was not fitted to.
        used: the projector begins there; False: it explains nothing, and the projector is the base model's.
    """

    pictures: int
    penalty: float
    explained: float
    used: bool

    def __str__(self) -> str:
        told = f"{100 * self.explained:.1f} % of the words beside pictures that were left out"
        if not self.used:
            return (
                f"note: {_KEY}: pictures tell {told}; the projector starts as the base model has it"
            )
        return (
            f"projector: starts at the words of {self.pictures:,} pictures' rows, and tells {told}"
        )

    def to_json(self) -> dict[str, Any]:
        """For the run folder."""
        return asdict(self)


def require_projector(
    model: Any, adapter: Adapter, eyes: Eyes, splits: Sequence[EncodedSplit]
) -> None:
    """Refuse a model or a recipe that has no such start; before anything is written.

    Args:
        model: transformers' own.
        adapter: in it.
        eyes: of the model.
        splits: of each task the training rows.

    Raises:
        UsageError: the projector has not two layers with biases or does not learn whole, the tower learns, or there are
            fewer than 20 different pictures.
    """
    reason = why_not(eyes.vision, adapter, model)
    if reason is not None:
        raise UsageError(f"{_KEY}: {reason}; leave the key out")
    kind, path = eyes.vision.config.model_type, eyes.vision.connector
    projector = None if path is None else getattr(around(model), path, None)
    layers = [getattr(projector, name, None) for name in ("linear_1", "linear_2")]
    if not all(isinstance(one, nn.Linear) and one.bias is not None for one in layers):
        raise UsageError(
            f"{_KEY}: is for projectors of two linear layers with biases (llava, llava_next), and "
            f"base_model is a {kind}; leave the key out"
        )
    if any(one is None for one in _learned(adapter, path).values()):
        raise UsageError(
            f"{_KEY}: {path} is to learn whole, and adapter.whole_modules does not name all of it"
        )
    different = {shown for split in splits for shown in split.pictures or () if shown}
    if len(different) < LEAST:
        raise UsageError(
            f"{_KEY}: the training rows show {len(different)} different pictures, and {LEAST} are the least"
        )


def _learned(adapter: Adapter, path: str | None) -> dict[str, nn.Parameter | None]:
    """The parameters of the two layers that learn, by their names in the projector."""
    layers = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    whole = adapter.whole.items()
    return {
        name: next((one for full, one in whole if full.endswith(f"{path}.{name}")), None)
        for name in layers
    }


def start_by_words(
    model: Any, adapter: Adapter, eyes: Eyes, splits: Sequence[EncodedSplit], seed: int
) -> WordStart:
    """Give a fresh projector its start, where pictures tell anything of the words beside them.

    Args:
        model: transformers' own, with `require_projector` held.
        adapter: fresh; the projector learns whole in it.
        eyes: of the model.
        splits: of each task the training rows.
        seed: of which pictures are left out while the penalty is chosen.
    """
    embedding = model.get_input_embeddings().weight.detach()
    words = _words(splits, embedding)
    fit = _Projector(model, adapter, eyes)
    units = list(words)
    some = units[:: -(-len(units) // _SOME)]
    before = {name: value.detach().clone() for name, value in fit.values.items()}
    fit.standardise(some)
    hidden = torch.stack([fit.hidden(unit).mean(0) for unit in units]).double()
    fitted = ridge(hidden, torch.stack(list(words.values())), seed)
    if fitted.tells:
        fit.speak(some, fitted.weight, hidden.mean(0), embedding)
    else:
        fit.put(before)
    return WordStart(len(units), fitted.penalty, fitted.explained, fitted.tells)


def _words(splits: Sequence[EncodedSplit], embedding: Tensor) -> dict[Shown, Tensor]:
    """Of pictures that are shown together, the mean over their examples of y, float64 [d]."""
    units = list(dict.fromkeys(one for split in splits for one in split.pictures or () if one))
    chosen = units[:: max(1, -(-len(units) // MOST))]
    each = -(-4 * MOST // max(1, len(chosen)))  # examples of each in a task
    sums: dict[Shown, list[Tensor]] = {one: [] for one in chosen}
    for split in splits:
        if split.pictures is None:
            continue
        numbers = _some_of_each(split.pictures, sums, each)
        bags = [_bag(split, number, embedding) for number in numbers]
        if not bags:
            continue
        mean = torch.stack(bags).mean(0)
        for number, bag in zip(numbers, bags, strict=True):
            sums[split.pictures[number]].append(bag - mean)
    return {shown: torch.stack(sums[shown]).mean(0) for shown in chosen}


def _some_of_each(pictures: Sequence[Shown], wanted: Collection[Shown], most: int) -> list[int]:
    """The first examples that show each of the wanted pictures, so many at most."""
    left = dict.fromkeys(wanted, most)
    numbers = []
    for number, shown in enumerate(pictures):
        if left.get(shown, 0):
            left[shown] -= 1
            numbers.append(number)
    return numbers


def _bag(split: EncodedSplit, number: int, embedding: Tensor) -> Tensor:
    tokens = torch.from_numpy(split.example(number).astype(np.int64))
    text = tokens[tokens != split.picture_token].to(embedding.device)
    return embedding[text].double().sum(0)


class _Projector:
    """Two layers that learn, and what they are given of pictures."""

    def __init__(self, model: Any, adapter: Adapter, eyes: Eyes) -> None:
        path = eyes.vision.connector
        self._module = around(model).get_submodule(path)
        self._tower, self._eyes = Tower(model, eyes.vision, learns=True), eyes
        self._device = model.get_input_embeddings().weight.device
        learned = _learned(adapter, path)
        self.values = {name: one for name, one in learned.items() if one is not None}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give the layers these values, by their names."""
        for name, value in values.items():
            self.values[name].data.copy_(value)

    def parts(self, unit: Shown) -> Tensor:
        """What the tower gives of pictures, [N, in]."""
        many = self._eyes.seen(unit)
        if not any(name.startswith(KEPT) for name in many[0]):
            many = self._tower.see(many, self._eyes.counts(unit))
        return torch.cat([one[f"{KEPT}.0"].flatten(0, -2) for one in many]).to(self._device)

    @torch.no_grad()
    def hidden(self, unit: Shown) -> Tensor:
        """h of their parts, float32 [N, hidden]."""
        parts = self.parts(unit)
        module = self._module
        return module.act(module.linear_1(parts.to(module.linear_1.weight.dtype))).float()

    def standardise(self, units: Sequence[Shown]) -> None:
        """Have the first layer read parts at mean 0 and deviation 1."""
        seen = (self.parts(unit).double() for unit in units)
        sums = [(len(one), one.sum(0), one.square().sum(0)) for one in seen]
        count = sum(number for number, _, _ in sums)
        mean = torch.stack([total for _, total, _ in sums]).sum(0) / count
        squares = torch.stack([square for _, _, square in sums]).sum(0) / count
        deviation = (squares - mean.square()).clamp_min(0).sqrt()
        deviation = deviation.clamp_min(1e-3 * float(deviation.mean()) + 1e-12)
        rows = self.values["linear_1.weight"].detach().double()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12) / deviation
        self.put({"linear_1.weight": rows, "linear_1.bias": -rows @ mean})

    def speak(
        self, units: Sequence[Shown], weight: Tensor, middle: Tensor, embedding: Tensor
    ) -> None:
        """Have the second layer give words, as far from the embedding's mean as its rows are."""
        lengths = [((self.hidden(unit).double() - middle) @ weight).norm(dim=1) for unit in units]
        centre = embedding.double().mean(0)
        away = (embedding.double() - centre).norm(dim=1).mean()
        spoken = away / torch.cat(lengths).mean() * weight.T
        self.put({"linear_2.weight": spoken, "linear_2.bias": centre - spoken @ middle})


@dataclass(frozen=True)
class Fitted:
    """A regression by the penalty that is chosen as the module says.

    Attributes:
        weight: W, float64 [h, d].
        penalty: over the mean of HᵀH's diagonal.
        explained: share of the variance that it explains where it was not fitted.
        tells: that is two standard errors above nothing.
    """

    weight: Tensor
    penalty: float
    explained: float
    tells: bool


def ridge(hidden: Tensor, words: Tensor, seed: int) -> Fitted:
    """Words [n, d] by hidden values [n, h], both float64.

    Args:
        hidden: of each picture.
        words: likewise.
        seed: of which fifth is left out while the penalty is chosen.
    """
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))
    out, kept = order.to(hidden.device).tensor_split([len(order) // 5])
    solved = _Solved(hidden[kept], words[kept])
    given, wanted = hidden[out] - solved.given, words[out] - solved.wanted
    errors = [(wanted - given @ solved(one)).square().sum(1) for one in _PENALTIES]
    means = [float(one.mean()) for one in errors]
    least = means.index(min(means))
    bound = means[least] + _standard_error(errors[least])
    place = max(n for n, mean in enumerate(means) if mean <= bound)
    without = wanted.square().sum(1)
    gain = without - errors[place]
    return Fitted(
        _Solved(hidden, words)(_PENALTIES[place]),
        _PENALTIES[place],
        float(gain.mean() / without.mean().clamp_min(1e-300)),
        float(gain.mean()) > 2 * _standard_error(gain),
    )


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / len(values) ** 0.5


class _Solved:
    """Ridge regression with any penalty, from one decomposition HᵀH = Q Λ Qᵀ."""

    def __init__(self, hidden: Tensor, words: Tensor) -> None:
        self.given, self.wanted = hidden.mean(0), words.mean(0)
        away = hidden - self.given
        self._values, self._vectors = torch.linalg.eigh(away.T @ away)
        self._rest = self._vectors.T @ (away.T @ (words - self.wanted))

    def __call__(self, penalty: float) -> Tensor:
        """W with this penalty, over the mean of HᵀH's diagonal."""
        values = self._values.clamp_min(0)
        damped = values + penalty * values.mean()
        return self._vectors @ (self._rest / damped.clamp_min(1e-300).unsqueeze(1))
