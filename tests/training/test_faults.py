"""What goes wrong on a real machine: each fault is provoked, told in one line, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine.launch import equivalent
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.run import resume, start

from .conftest import Poison
from .faults_worker import ENDLESS, STEPS

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("faults_worker.py")
NAMESPACE = ("unshare", "--map-root-user", "--mount")


def _namespaces() -> bool:
    """Whether this system lets us have file systems of our own."""
    probe = "mount -t tmpfs tmpfs /mnt"
    try:
        tried = subprocess.run([*NAMESPACE, "sh", "-c", probe], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return tried.returncode == 0


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code.
        lines: what it said on stderr.
    """

    code: int
    lines: list[str]

    @property
    def error(self) -> str:
        """The one line of its failure."""
        # Of two processes that are stopped at once each may say so.
        (line,) = {line for line in self.lines if line.startswith("error: ")}
        assert not any("Traceback" in line for line in self.lines)
        return line


@dataclass(frozen=True)
class Faults:
    """The folder in which `faults_worker.py` worked."""

    folder: Path
    namespace: bool

    def ended(self, name: str) -> Ended:
        return Ended(**json.loads((self.folder / f"{name}.json").read_text()))

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / name)

    def require_namespace(self) -> None:
        if not self.namespace:
            pytest.skip("this system grants no mount namespace: no disk can be made full here")


@pytest.fixture(scope="module")
def faults(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Faults:
    folder, namespace = tmp_path_factory.mktemp("faults"), _namespaces()
    command = [sys.executable, str(WORKER), str(recipe_file), str(folder)]
    command = [*NAMESPACE, *command, "namespace"] if namespace else [*command, "none"]
    kept = {name: value for name, value in os.environ.items() if name != "RANK"}
    finished = subprocess.run(
        command,
        env=kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=570,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return Faults(folder, namespace)


def steps_of(run: RunFolder) -> list[int]:
    return [event["step"] for event in run.events() if event["event"] == "step"]


def same_adapter(one: RunFolder, other: RunFolder) -> bool:
    file = "mtl_lora.safetensors"
    return (one.adapter / file).read_bytes() == (other.adapter / file).read_bytes()


def test_out_of_memory(faults: Faults) -> None:
    ended = faults.ended("memory")
    assert ended.code == 1
    found = re.fullmatch(
        r"error: out of memory on the CPU: ([\d.]+) GiB in use by this process, [\d.]+ of [\d.]+ "
        r"GiB available, asked for ([\d.]+) MiB more; by estimate a step takes ([\d.]+) GiB: "
        r"weights [\d.]+, adapter, optimiser and buffers [\d.]+, a pass of 16,384 tokens ([\d.]+); "
        r"what would help: (.+)",
        ended.error,
    )
    assert found, ended.error
    assert all(float(number) > 0 for number in found.groups()[:4])
    helpful = re.findall(r"(\S+: \S+) \(−([\d.]+) GiB\)", found[5])
    assert {setting for setting, _ in helpful} == {
        "training.rows_per_pass: 16",
        "training.gradient_checkpointing: true",
        "dtype: bfloat16",
    }
    saved = [float(number) for _, number in helpful]
    assert saved == sorted(saved, reverse=True)
    assert saved[-1] > 0


def test_a_disk_that_is_full_when_a_checkpoint_is_written(faults: Faults) -> None:
    faults.require_namespace()
    ended = faults.ended("full")
    assert ended.code == 1
    run = faults.folder / "small" / "full"
    assert re.fullmatch(
        rf"error: {run} cannot be written: .*No space left on device.* \([\d.]+ MiB free\); "
        rf"step-000004 is intact; when it can, go on with: mtl-lora train --resume --run {run}",
        ended.error,
    )
    then = faults.run("full-then")
    assert [path.name for path in sorted(then.checkpoints.iterdir())] == [
        "step-000002",
        "step-000004",
    ]
    assert newest_checkpoint(then.checkpoints) == then.checkpoints / "step-000004"


def test_with_room_again_the_run_is_what_it_would_have_been(faults: Faults) -> None:
    faults.require_namespace()
    ended = faults.ended("full-resumed")
    assert ended.code == 0
    assert "resuming full after step 4" in ended.lines
    after = faults.run("full-after")
    assert same_adapter(after, faults.run("whole"))
    assert steps_of(after) == list(range(1, STEPS + 1))


def test_a_disk_that_is_full_when_a_line_is_written(faults: Faults) -> None:
    faults.require_namespace()
    ended = faults.ended("lines")
    assert ended.code == 1
    assert "No space left on device (0.0 MiB free); no checkpoint was written yet" in ended.error
    torn = (faults.folder / "lines-then" / "metrics.jsonl").read_text()
    assert not torn.endswith("\n")
    assert 5 < torn.count("\n") < 60
    assert faults.ended("lines-resumed").code == 0
    after = faults.run("lines-after")
    assert steps_of(after) == list(range(1, 61))
    for line in after.metrics.read_text().splitlines():
        json.loads(line)


def test_a_disk_that_became_read_only(faults: Faults) -> None:
    faults.require_namespace()
    resumed = faults.ended("read-only-resumed")
    assert resumed.code == 1
    assert "cannot be written: Read-only file system" in resumed.error
    assert f"step-{STEPS - 2:06d} is intact; when it can, go on with: mtl-lora train" in (
        resumed.error
    )
    new = faults.ended("read-only-new")
    assert new.code == 2
    place = faults.folder / "read-only" / "read-only-new"
    assert new.error == f"error: run folder {place} cannot be made: Read-only file system"


def test_a_terminated_run_finishes_its_step_and_saves(faults: Faults) -> None:
    ended, run = faults.ended("terminated"), faults.run("terminated")
    assert ended.code == 130
    done = steps_of(run)[-1]
    assert ended.error == (
        f"error: stopped after step {done} and saved; go on with: "
        f"mtl-lora train --resume --run {run.path}"
    )
    assert newest_checkpoint(run.checkpoints) == run.checkpoints / f"step-{done:06d}"


def test_a_second_signal_leaves_at_once_with_the_last_checkpoint(faults: Faults) -> None:
    ended, run = faults.ended("twice"), faults.run("twice")
    assert ended.code == 130
    assert ended.error == "error: interrupted"
    last = newest_checkpoint(run.checkpoints)
    assert last is not None
    assert int(last.name.removeprefix("step-")) % 4 == 0
    assert not list(run.checkpoints.glob(".*"))


def test_a_poisoned_row_is_named_with_its_file_and_line(
    recipe_file: Path, poison: Callable[[Prepared, int], Poison], tmp_path: Path
) -> None:
    settings = ["training.max_steps=60", "training.row_length=64", "training.checkpoint_every=1"]
    found = poison(prepare(load_recipe(recipe_file, settings)), 2)
    prepared = prepare(load_recipe(recipe_file, [*settings, f"base_model={found.folder}"]))
    with pytest.raises(MtlLoraError) as caught:
        start(prepared, tmp_path / "poisoned")
    (line,) = caught.value.lines
    assert f"no longer a finite number at step {found.step} (tasks " in line
    assert f"examples: {found.example}; step-{found.step - 1:06d} is intact; " in line
    assert re.search(r"of 1 of \d+ examples", line)
    run = RunFolder(tmp_path / "poisoned")
    good = newest_checkpoint(run.checkpoints)
    assert good == run.checkpoints / f"step-{found.step - 1:06d}"
    json.dumps(list(run.events()), allow_nan=False)


# Going on with something else than what began.


@pytest.fixture
def stopped(prepared: Prepared, small_data: Path, tmp_path: Path) -> Callable[..., RunFolder]:
    """A run of data of its own that was killed after step 4."""
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    recipe = prepared.recipe.model_dump(mode="json", exclude={"run"})
    for task in recipe["tasks"]:
        task["source"] = str(data / task["name"])
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(recipe))

    def make() -> RunFolder:
        run = start(prepare(load_recipe(file)), tmp_path / "killed")
        shutil.rmtree(run.adapter)
        shutil.rmtree(run.checkpoints / "step-000006")
        return run

    return make


def test_changed_rows_are_refused(stopped: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = stopped()
    file = tmp_path / "data" / "cola" / "train.jsonl"
    file.write_text(file.read_text().replace('"sentence": "', '"sentence": "Well, ', 1))
    with pytest.raises(UsageError) as caught:
        resume(run, None, [])
    assert re.fullmatch(
        r"task 'cola': its training rows changed since run 'killed' began "
        r"\(fingerprint \w{16}, recorded \w{16}\); go on with the rows of then, or start a new run",
        str(caught.value),
    )
    assert not run.adapter.exists()


def test_another_recipe_is_shown_where_it_differs(
    stopped: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = stopped()
    with pytest.raises(UsageError) as caught:
        resume(run, tmp_path / "own.yaml", ["training.learning_rate=1e-4", "adapter.rank=8"])
    line = str(caught.value)
    assert line.startswith("the recipe differs from that of run 'killed': ")
    assert "adapter.rank: 4 → 8" in line
    assert "training.learning_rate: 0.003 → 0.0001" in line


def test_what_does_not_matter_may_differ(stopped: Callable[..., RunFolder]) -> None:
    """A run of stage 2 goes on without ZeRO, with checkpoints of another rhythm."""
    run = stopped()
    text = run.recipe.read_text()
    assert "zero_stage: 0" in text
    run.recipe.write_text(text.replace("zero_stage: 0", "zero_stage: 2"))
    run.deepspeed.write_text("{}")
    with run.metrics.open("a") as file:
        file.write('{"event": "step", "st')
    resume(run, None, ["distributed.zero_stage=0", "training.checkpoint_every=1"])
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in run.checkpoints.iterdir()} >= {"step-000005", "step-000006"}
    assert not run.deepspeed.exists()  # it says what is so now


# Two processes: one run is terminated, then killed in part, twice.

Started = subprocess.Popen[str]


class Story:
    """A run of two processes that does not end by itself.

    Args:
        recipe: of the run.
        folder: of its run folder's folder.
    """

    def __init__(self, recipe: Path, folder: Path) -> None:
        self.run = RunFolder(folder / "story")
        where = (f"run.directory={folder}", "run.name=story")
        self._first = ("train", str(recipe), *where, *ENDLESS)

    def start(self, *, torchrun: bool = False) -> Started:
        """Begin, or go on."""
        arguments = list(self._first)
        if self.run.path.exists():
            arguments = ["train", "--resume", "--run", str(self.run.path)]
        command = [sys.executable, "-m", "mtl_lora_cli.cli.main", *arguments]
        command += ["--num-processes", "2"]
        if torchrun:
            command = equivalent(arguments, 2).split()
        kept = {name: value for name, value in os.environ.items() if name != "RANK"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.Popen(
            command,
            env=kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_default_signals,
        )

    def learn(self, process: Started, steps: int = 6) -> None:
        """Until so many more steps are done."""
        wanted = self._lines() + steps
        deadline = time.monotonic() + 240
        seen = self._lines()
        while seen < wanted:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
            now = self._lines()
            if now < seen:  # lines after the checkpoint were cut off
                wanted = now + steps
            seen = now

    def _lines(self) -> int:
        return self.run.metrics.read_bytes().count(b"\n") if self.run.metrics.is_file() else 0

    def rank(self, process: Started, number: int) -> int:
        """The process id of one of the two."""
        import psutil

        for child in psutil.Process(process.pid).children(recursive=True):
            if child.environ().get("RANK") == str(number) and child.environ().get("WORLD_SIZE"):
                return int(child.pid)
        raise AssertionError(f"no process of rank {number}")

    @property
    def newest(self) -> str:
        found = newest_checkpoint(self.run.checkpoints)
        assert found is not None
        return found.name


def _default_signals() -> None:
    # A shell that runs the tests in the background has made SIGINT ignored for its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def story(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story(recipe_file, tmp_path_factory.mktemp("story"))


def ended(process: Started, within: float = 60) -> Ended:
    _, stderr = process.communicate(timeout=within)
    return Ended(process.returncode, stderr.splitlines())


def test_two_processes_are_terminated_together(story: Story) -> None:
    process = story.start()
    story.learn(process)
    process.send_signal(signal.SIGTERM)
    found = ended(process)
    assert found.code == 130
    done = steps_of(story.run)[-1]
    assert found.error.startswith(f"error: stopped after step {done} and saved; go on with: ")
    assert story.newest == f"step-{done:06d}"


def test_two_processes_leave_at_once_at_a_second_signal(story: Story) -> None:
    # Too near, and the system makes one of two; too far, and the first one has ended the run.
    for pause in (0.01, 0.03, 0.1, 0.02, 0.05, 0.2):
        before = story.newest
        process = story.start()
        story.learn(process, 1)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        found = ended(process)
        assert found.code == 130
        if not found.error.startswith("error: stopped after step"):
            break
    assert found.error == "error: interrupted"
    assert story.newest >= before
    assert int(story.newest.removeprefix("step-")) % 4 == 0 or story.newest == before


@pytest.mark.parametrize(
    ("rank", "torchrun"), [(1, False), pytest.param(0, True, marks=pytest.mark.long)]
)
def test_a_killed_process_is_named_by_the_others(story: Story, rank: int, torchrun: bool) -> None:
    before = story.newest if story.run.path.exists() else ""  # alone it begins the story
    process = story.start(torchrun=torchrun)
    story.learn(process)
    victim = story.rank(process, rank)
    os.kill(victim, signal.SIGKILL)
    found = ended(process)
    name = f"process {rank + 1} of 2"
    said = [line for line in found.lines if line.startswith("error: ")]
    host = os.uname().nodename
    assert (
        f"error: {name} (on {host}, process id {victim}) is gone; the run stops here: "
        "its last checkpoint is intact"
    ) in said
    if torchrun:
        assert found.code == 1
    else:
        assert found.code == 128 + signal.SIGKILL
        assert said[0] == (
            f"error: {name} (process id {victim}) was ended by SIGKILL; the others are ended, too"
        )
    assert story.newest >= before
