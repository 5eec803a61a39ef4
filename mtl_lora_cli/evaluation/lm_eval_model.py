"""The adapted model as lm-evaluation-harness knows models: text in, log-likelihoods or text out.

Only the harness decides what is asked. How a text becomes tokens is its way, too (`TemplateLM`, and what
its own `HFLM` adds to that), so that its figures are those that it would find for a merged model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mtl_lora_cli.data.chat_variables import template_arguments
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.errors import NoNumbersError, UsageError
from mtl_lora_cli.evaluation.choices import ask
from mtl_lora_cli.evaluation.generate import generate
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.evaluation.scored import NO_NUMBERS
from mtl_lora_cli.machine.processes import Processes

if TYPE_CHECKING:
    from mtl_lora_cli.evaluation.opened import Run
    from mtl_lora_cli.models.batch import PackedBatch

_MOST_NEW_TOKENS = 256  # HFLM's default


class AdaptedLM(TemplateLM):
    """One task of a run.

    Where torch.distributed is running, each of its processes runs the harness on all examples, and they
    share the work on each list of requests.

    Args:
        opened: the run with its model.
        task: task id, or -1 for the base model alone.
    """

    def __init__(self, opened: Run, task: int) -> None:
        super().__init__()
        self._opened, self._task = opened, task
        self._device = opened.device
        self.tokenizer = opened.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def answer_end(self) -> tuple[int, ...]:
        """What training teaches behind an answer."""
        return self._encoder.answer_end

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder.of(self.tokenizer, self._opened.recipe, lenient=True)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """Part of the names of the harness's cached requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text, a start token before it where the tokenizer sets one."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(
                string, self.tokenizer.decode(self.prefix_token_id)
            )
        found: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the tokenizer's template writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **template_arguments(self.tokenizer, self._opened.recipe.chat),
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether it is the greedy one.

        Continuations of one context go through the model as one tree. What is too long loses its
        beginning, each continuation's context by itself, as in `HFLM`.
        """
        longest = self._opened.longest + 1  # the last token takes no position
        places: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-longest:]
            cut = len(whole) - len(continuation)
            if cut < 1:
                raise UsageError(
                    f"the harness asks for {len(continuation)} tokens, more than the model's "
                    f"{longest - 1} positions"
                )
            places.setdefault(tuple(whole[:cut]), []).append(number)
        asked = [
            Request(self._task, list(context), [requests[number][2] for number in numbers])
            for context, numbers in places.items()
        ]
        found = ask(
            self._opened.packed,
            asked,
            self._judge,
            device=self._opened.device,
            tokens_per_pass=self._opened.tokens_per_pass,
            processes=Processes.of_group(),
        )
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for numbers, sums in zip(places.values(), found, strict=True):
            if np.isnan(sums[:, 0]).any():
                raise NoNumbersError(
                    f"the model finds no finite log-probability for a continuation that the harness asks for: {NO_NUMBERS}"
                )
            for number, (logprob, missed) in zip(numbers, sums.tolist(), strict=True):
                results[number] = (logprob, missed == 0)
                text = requests[number][0]
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, results[number])
        return results

    def with_ends(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """log p of each continuation, and of the end that training teaches behind it."""
        whole = [(None, context, [*text, *self.answer_end]) for context, text in asked]
        return [logprob for logprob, _ in self._loglikelihood_tokens(whole)]

    def _judge(self, batch: PackedBatch) -> torch.Tensor:
        logprobs, likeliest = self._opened.packed.judge(batch)
        return torch.stack([logprobs, (~likeliest).to(logprobs.dtype)], dim=1)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts; what is longer than the model's positions in windows."""
        windows, counts = [], []
        for request in requests:
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._opened.longest,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in found]
            windows += own
            counts.append(len(own))
        each = iter(self._loglikelihood_tokens(windows))
        return [sum(next(each)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the first of the request's stop texts.

        Raises:
            UsageError: a request wants to sample.
        """
        groups: dict[tuple[str, ...], list[int]] = {}
        asked, limits = [], []
        end = self.tokenizer.decode(self.eot_token_id)
        for number, request in enumerate(requests):
            context, wishes = request.args
            kwargs = normalize_gen_kwargs(wishes, _MOST_NEW_TOKENS)
            if kwargs["do_sample"]:
                raise UsageError("the harness's task wants sampled answers; ours are greedy")
            until = kwargs["until"]
            until = [until] if isinstance(until, str) else list(until or [])
            groups.setdefault((*until, end), []).append(number)
            room = self._opened.longest - kwargs["max_gen_toks"]
            if room < 1:
                raise UsageError(
                    f"the harness's task wants {kwargs['max_gen_toks']} new tokens, the model has "
                    f"{self._opened.longest} positions"
                )
            asked.append(Request(self._task, self.tok_encode(context)[-room:], [[]]))
            limits.append(kwargs["max_gen_toks"])
        texts = [""] * len(requests)
        for stops, numbers in groups.items():

            def stopped(answer: list[int], stops: tuple[str, ...] = stops) -> bool:
                text = self.tokenizer.decode(answer)
                return any(stop in text for stop in stops)

            answers = generate(
                self._opened.packed,
                [asked[number] for number in numbers],
                ends=self._encoder.stops,
                new_tokens=[limits[number] for number in numbers],
                device=self._opened.device,
                tokens_per_pass=self._opened.tokens_per_pass,
                stopped=stopped,
                processes=Processes.of_group(),
            )
            for number, answer in zip(numbers, answers, strict=True):
                text = self.tokenizer.decode(answer, skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, list(stops), None)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts
