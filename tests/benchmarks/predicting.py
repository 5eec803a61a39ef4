"""Prediction in parts on one device: rows a second beside the model alone, and beside what the arithmetic would take.

    python tests/benchmarks/predicting.py MODEL DATA FOLDER --shape own llama3-8b --rows 200000 --seconds 15

MODEL is a base model (a folder or a GGUF file), DATA has `glue/` and `ads/` as docs/real-data.md says. Rows of four tasks,
mixed, an adapter of four tasks far from its start. `own` is MODEL itself, another shape has random weights in NF4 on a
card, and MODEL's tokenizer. Of each shape, in one process:

- *alone*: passes that were made ready before go through the model: no file, no template, no tokenizer, no answer. Of as many
  rows (`--alone-rows`) as there are different ones, for some are longer than others.
- *parts*: the same rows from Parquet files to Parquet files, and from JSON lines to JSON lines; rows a second from the
  first question that a lane puts to the last row that is written.
- *memory*: `Predictor.predict` over a list of rows, in one thread.

Of both it says where the time of the model's thread goes: passes launched, the card waited for, rows waited for, parts noted
down, Python's collector, the rest; and the card's share without a pass. `--busy N` measures *alone* again beside so many
processes that compute: what cores cost that are not free, without any row.

*Floor* is 2 N + 2 H σ FLOP a token at the rate of the device's own products, σ = positions that are asked / tokens.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import itertools
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from mtl_lora_cli.adapters.files import save_adapter
from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.bench.random_model import random_model
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.engine.plan import matrix_weights
from mtl_lora_cli.evaluation.choices import Passes, shared_up_to
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.machine.rate import measure_rate
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.prediction.course import Course, Scorer
from mtl_lora_cli.prediction.desks import How
from mtl_lora_cli.prediction.in_hand import Question
from mtl_lora_cli.prediction.order import Order, opened_work
from mtl_lora_cli.recipe.load import dump_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.runs.folder import RunFolder, save_json
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.task import Task

FILES = {
    "sst2": "glue/sst2/validation",
    "rte": "glue/rte/validation",
    "home_depot": "ads/home_depot/test",
    "stsb": "glue/stsb/validation",
}
OWN = "own"
LABELS = ("label", "answer", "output", "score")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def real_rows(data: Path, count: int) -> list[dict[str, Any]]:
    """Rows of all tasks, mixed, again and again."""
    kinds = []
    for name, file in FILES.items():
        with gzip.open(data / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
            read = [json.loads(line) for line in itertools.islice(lines, 2000)]
        kept = [{k: v for k, v in row.items() if k not in LABELS} for row in read]
        kinds.append(itertools.cycle([{"task": name, **row} for row in kept]))
    mixed = itertools.chain.from_iterable(zip(*kinds, strict=True))
    return [{**row, "id": number} for number, row in enumerate(itertools.islice(mixed, count))]


def make_run(model: str, folder: RunFolder) -> Any:
    """A run of the four tasks, as files; returns its adapted model."""
    folder.adapter.mkdir(parents=True)
    base = find_base_model(model)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    loaded = load_model(base, dtype=dtype, device=DEVICE)
    save_adapter(adapted(loaded), folder.adapter, base.identity())
    tasks = []
    for number, name in enumerate(FILES):
        _, path, template = find_template(name, None)
        text = path.read_text(encoding="utf-8")
        tasks.append(Task(name, number, name, text, template, Source(path="nowhere")))
    named = [{"name": task.name, "template": task.name} for task in tasks]
    recipe = Recipe.model_validate({"base_model": str(base.folder), "tasks": named})
    folder.recipe.write_text(dump_recipe(recipe))
    save_json(folder.tasks, {"tasks": [task.to_json() for task in tasks]})
    return loaded


def adapted(model: Any) -> Any:
    adapter = inject(model, configure(target_modules=("*_proj",)), tuple(FILES))
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.01 * torch.randn_like(tensor))
    return adapter


def asked_model(shape: str, folder: RunFolder) -> PackedModel:
    """The run's own model, or another shape in its place."""
    if shape == OWN:
        return Run(folder).packed
    kind = "nf4" if CUDA else "none"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    model = random_model(
        find_config(shape), dtype=dtype, device=DEVICE, quantization=kind, attention="sdpa"
    )
    return PackedModel(model, adapted(model)).eval()


def write_rows(rows: list[dict[str, Any]], folder: Path, files: int) -> None:
    """The same rows as Parquet and as JSON lines."""
    import pyarrow
    from pyarrow import parquet

    for kind in ("parquet", "jsonl"):
        (folder / kind).mkdir(parents=True)
    step = -(-len(rows) // files)
    for number in range(files):
        own = rows[number * step : (number + 1) * step]
        table = pyarrow.Table.from_pylist(own, schema=schema_of(rows))
        parquet.write_table(table, folder / "parquet" / f"{number:03d}.parquet")
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in own)
        (folder / "jsonl" / f"{number:03d}.jsonl").write_text(lines, encoding="utf-8")


def schema_of(rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    firsts = {row["task"]: row for row in rows[:100]}
    merged = {name: value for row in firsts.values() for name, value in row.items()}
    return pyarrow.Table.from_pylist([merged]).schema


def alone(opened: Run, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The model over passes that lie ready, as long as that."""
    predictor = Predictor(opened)
    placed = [(row, f"row {number}") for number, row in enumerate(rows)]
    limit, tokens = shared_up_to(opened.packed), opened.tokens_per_pass
    size = 2048 if CUDA else 256
    ready = []
    for start in range(0, len(placed), size):
        asked = predictor.questions(placed[start : start + size], task_column="task")
        ready.append((len(asked.together), Passes.build(asked.together, limit, tokens).batches))
    scorer = Timed(opened)
    warming = time.perf_counter()
    for _, batches in ready:  # until all kernels are compiled
        scorer.ask(batches, Future())
        if time.perf_counter() - warming > 3:
            break
    flush(scorer)
    pure = pure_pass(scorer, ready)
    scorer.clear()
    done = sent = questions = passes = 0
    began = time.perf_counter()
    for count, batches in itertools.cycle(ready):
        scorer.ask(batches, Future())
        done, passes = done + count, passes + len(batches)
        sent += sum(batch.input_ids.numel() for batch in batches)
        questions += sum(len(batch.positions) for batch in batches)
        if time.perf_counter() - began > seconds:
            break
    flush(scorer)
    took = time.perf_counter() - began
    return {"rows_s": done / took, "tokens_s": sent / took, "asked": questions / sent,
            "tokens_row": sent / done, "tokens_pass": sent / passes, "pure": pure,
            "where": scorer.where(took)}  # fmt: skip


def pure_pass(scorer: Timed, ready: list[Any]) -> float:
    """Milliseconds that a card takes for a pass that was launched before it begins."""
    if not CUDA:
        return 0.0
    torch.cuda._sleep(1_000_000_000)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    scorer.begin(ready[0][1][0])
    marks[1].record()
    torch.cuda.synchronize()
    return float(marks[0].elapsed_time(marks[1]))


class Timed(Scorer):
    """A scorer whose steps are timed."""

    def __init__(self, opened: Run) -> None:
        super().__init__(opened)
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.seconds = {"launch": 0.0, "card": 0.0, "rows": 0.0, "noted": 0.0, "collector": 0.0}
        self.launches: list[float] = []
        self.marks: list[Any] = []

    def begin(self, batch: Any) -> Any:
        started = time.perf_counter()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if CUDA else []
        for mark in marks[:1]:
            mark.record()
        found = super().begin(batch)
        for mark in marks[1:]:
            mark.record()
        self.launches.append(time.perf_counter() - started)
        self.seconds["launch"] += self.launches[-1]
        self.marks.append(marks)
        return found

    def read(self) -> None:
        started = time.perf_counter()
        super().read()
        self.last = time.perf_counter()
        self.seconds["card"] += self.last - started

    def collected(self, phase: str, info: Any) -> None:
        """For `gc.callbacks`."""
        at = time.perf_counter()
        if phase == "start":
            self._since = at
        else:
            self.seconds["collector"] += at - self._since

    def where(self, took: float) -> str:
        """A line."""
        parts = ", ".join(f"{name} {value / took:.1%}" for name, value in self.seconds.items())
        rest = 1 - sum(v for n, v in self.seconds.items() if n != "collector") / took
        launches = sorted(self.launches)
        middle, high = launches[len(launches) // 2], launches[int(len(launches) * 0.95)]
        line = f"{parts}, rest {rest:.1%}; a launch {middle * 1e3:.1f} ms (95 %: {high * 1e3:.1f})"
        if not CUDA:
            return line
        torch.cuda.synchronize()
        own = sorted(one.elapsed_time(other) for one, other in self.marks)
        gaps = sum(
            max(0.0, one[1].elapsed_time(other[0])) for one, other in itertools.pairwise(self.marks)
        )
        return f"{line}; a pass on the card {own[len(own) // 2]:.1f} ms, between passes {gaps / 1e3 / took:.1%}"


def busy_beside(count: int) -> list[Any]:
    """So many processes that compute."""
    code = "import os\nos.nice(5)\nwhile True: sum(i * i for i in range(10000))"
    return [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]


def flush(scorer: Scorer) -> None:
    while scorer.busy:
        scorer.read()


class Watched:
    """The model's inbox: when the first question came, and how long there was none while the model had nothing to do.

    Args:
        inbox: of a course.
    """

    def __init__(self, inbox: Any) -> None:
        self._inbox, self.began, self.waited = inbox, 0.0, 0.0
        self.scorer: Timed | None = None

    def _seen(self, message: Any) -> Any:
        if not self.began and isinstance(message, Question):
            self.began = time.perf_counter()
        return message

    def get_nowait(self) -> Any:
        return self._seen(self._inbox.get_nowait())

    def get(self) -> Any:
        asked = time.perf_counter()
        message = self._inbox.get()
        waited = (time.perf_counter() - asked) * bool(self.began)
        self.waited += waited
        if self.scorer is not None:
            self.scorer.seconds["rows"] += waited
        return self._seen(message)


def parts(opened: Run, order: Order, lanes: int | None) -> dict[str, Any]:
    """Everything, from files to files; the time is that from the first question to the last row that is written."""
    shutil.rmtree(order.output, ignore_errors=True)
    times: list[float] = []
    written: list[int] = []

    def told_of(rows: int) -> None:
        times.append(time.perf_counter())
        written.append(rows)

    began = time.perf_counter()
    with opened_work(opened, order) as work:
        planned = time.perf_counter() - began
        total = work.totals.rows
        course = Course(opened, work.job, lanes, processes=None if CUDA or lanes is None else True)
        inbox: Any = Watched(course._inbox)
        course._inbox = inbox
        if course._scorer is not None:
            inbox.scorer = course._scorer = Timed(opened)
            gc.callbacks.append(inbox.scorer.collected)
        started = time.perf_counter()
        try:
            run = course.run(work.missing, told_of)
            work.follow(noted(run, inbox.scorer))
        finally:
            gc.callbacks.clear()
            course.close()
    took = times[-1] - inbox.began
    done = list(itertools.accumulate(written))
    tenth = next(place for place, rows in enumerate(done) if 10 * rows >= total)
    steady = (total - done[tenth]) / (times[-1] - times[tenth])
    return {"rows_s": total / took, "steady": steady, "waited": inbox.waited / took, "plan_s": planned, "lanes": course._lanes.count,
            "first_s": inbox.began - started, "parts": work.totals.parts,
            "where": inbox.scorer.where(took) if inbox.scorer else "",
            "tail": times[-1] - inbox.scorer.last if inbox.scorer else 0.0}  # fmt: skip


def noted(answers: Any, scorer: Timed | None) -> Any:
    """Answers; what is done with them is timed."""
    for done in answers:
        at = time.perf_counter()
        yield done
        if scorer is not None:
            scorer.seconds["noted"] += time.perf_counter() - at


def memory(opened: Run, rows: list[dict[str, Any]], seconds: float) -> float:
    """Rows a second of `Predictor.predict`, in one thread."""
    predictor = Predictor(opened)
    predictor.predict(rows[:256], task_column="task")
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = done % max(1, len(rows) - 256)
        predictor.predict(rows[start : start + 256], task_column="task")
        done += 256
    return done / (time.perf_counter() - began)


def told(*facts: Any) -> None:
    print(*facts, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", nargs="+", default=[OWN])
    parser.add_argument("--rows", type=int, nargs="+", default=[20000])
    parser.add_argument("--part-rows", type=int, nargs="+", default=[4096])
    parser.add_argument("--alone-rows", type=int, default=16384)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--lanes", type=int)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--forms", nargs="+", default=["parquet", "jsonl"])
    wanted = parser.parse_args()
    began = time.perf_counter()
    folder = RunFolder(wanted.folder / "run")
    make_run(wanted.model, folder)
    rate = measure_rate(DEVICE)
    told(
        f"{DEVICE}, products {rate.measured / 1e12:.0f} TFLOP/s; {time.perf_counter() - began:.0f} s"
    )
    counts = itertools.chain(wanted.rows, itertools.repeat(wanted.rows[-1]))
    sizes = itertools.chain(wanted.part_rows, itertools.repeat(wanted.part_rows[-1]))
    for shape, count, part_rows in zip(wanted.shape, counts, sizes, strict=False):
        rows = real_rows(wanted.data, count)
        place = wanted.folder / Path(shape).name
        write_rows(rows, place, 4)
        opened = Run(folder, instead=asked_model(shape, folder))
        layers, head = matrix_weights(opened.packed.model)
        found = alone(opened, rows[: wanted.alone_rows], wanted.seconds)
        flop = 2 * layers + 2 * head * found["asked"]
        share = found["tokens_s"] * flop / rate.measured
        told(
            f"{shape}: {layers / 1e6:,.0f} M weights; {opened.packed.engine_line()}; at "
            f"{time.perf_counter() - began:.0f} s"
        )
        found_busy = ""
        if wanted.busy:
            beside = busy_beside(wanted.busy)
            own = alone(opened, rows[: wanted.alone_rows], wanted.seconds)
            for process in beside:
                process.kill()
                process.wait()
            found_busy = (
                f"  beside {wanted.busy} busy processes {own['rows_s']:,.0f} rows/s; {own['where']}"
            )
        told(
            f"  alone    {found['rows_s']:9,.0f} rows/s {found['tokens_s']:11,.0f} tokens/s, {share:.3f} of the floor "
            f"({found['tokens_row']:.0f} tokens a row, {found['tokens_pass']:,.0f} a pass, asked {found['asked']:.3f}); "
            f"a pass whose launches lie ready: {found['pure']:.1f} ms; {found['where']}"
        )
        if found_busy:
            told(found_busy)
        for form in wanted.forms:
            how = How(task_column="task")
            order = Order(place / form, place / f"{form}-out", how, {}, part_rows=part_rows)
            try:
                own = parts(opened, order, wanted.lanes)
            except Exception as error:  # the other figures are wanted all the same
                told(f"  {form}: {type(error).__name__}: {error}")
                continue
            ratio = own["rows_s"] / found["rows_s"]
            told(
                f"  {form:8s} {own['rows_s']:9,.0f} rows/s = {ratio:.3f} of alone, {share * ratio:.3f} of the floor "
                f"(behind the first tenth {own['steady']:,.0f} = {own['steady'] / found['rows_s']:.3f}); "
                f"planned in {own['plan_s']:.2f} s, first question after {own['first_s']:.1f} s, {own['parts']} parts, "
                f"{own['lanes']} lanes, the model waited {own['waited']:.1%}; last pass to last row {own['tail']:.2f} s; at "
                f"{time.perf_counter() - began:.0f} s"
            )
            told(f"           {own['where']}")
        if not wanted.no_memory:
            rate_of = memory(opened, rows, min(4.0, wanted.seconds))
            told(f"  memory   {rate_of:9,.0f} rows/s, one thread")
        del opened
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
