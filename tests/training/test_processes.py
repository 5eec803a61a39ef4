"""Who starts the processes of a run, how they find each other, and how they end together."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from mtl_lora_cli.cli.app import app
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine import launch, processes
from mtl_lora_cli.machine.processes import Place, place_in, slurm_address

pytestmark = pytest.mark.slow

COMMAND = ("-m", "mtl_lora_cli.cli.main")
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(rank=0, count=1, local_rank=0)),
        (TORCHRUN, Place(rank=3, count=8, local_rank=1)),
        (SLURM, Place(rank=5, count=6, local_rank=2)),
        ({**SLURM, **TORCHRUN}, Place(rank=3, count=8, local_rank=1)),  # torchrun inside of a job
        ({**SLURM, "SLURM_NTASKS": "1"}, Place()),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Place()),  # sbatch alone
    ],
)
def test_the_place_among_the_processes(environment: dict[str, str], place: Place) -> None:
    assert place_in(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set, but LOCAL_RANK is not"),
        (TORCHRUN | {"RANK": "x"}, "received RANK=x, WORLD_SIZE=8, LOCAL_RANK=1"),
        (SLURM | {"SLURM_LOCALID": ""}, "received SLURM_PROCID=5, SLURM_NTASKS=6, SLURM_LOCALID="),
    ],
)
def test_an_incomplete_place_is_an_error(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        place_in(environment)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[03-05,9]", "gpu03"),
        ("gpu7", "gpu7"),
        ("a1,a2", "a1"),
        ("rack1-n[2-3],other", "rack1-n2"),
        ("", "127.0.0.1"),
    ],
)
def test_slurm_processes_meet_on_the_first_host(nodes: str, host: str) -> None:
    assert slurm_address({"SLURM_JOB_NODELIST": nodes, "SLURM_JOB_ID": "123456"}) == (host, "23456")


def test_a_steps_own_hosts_come_first() -> None:
    address = slurm_address({"SLURM_STEP_NODELIST": "b[2-3]", "SLURM_JOB_NODELIST": "a1,b[2-3]"})
    assert address == ("b2", "20000")


def test_the_equivalent_command_is_quoted() -> None:
    arguments = ["train", "my recipe.yaml", "tasks.a.source=${X}"]
    assert launch.equivalent(arguments, 4) == (
        "torchrun --standalone --nproc-per-node 4 --no-python -- "
        "mtl-lora train 'my recipe.yaml' 'tasks.a.source=${X}'"
    )


def test_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_RENDEZVOUS", timedelta(seconds=1))
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MtlLoraError) as caught:
        processes._start_group(Place(rank=1, count=2, local_rank=1))
    (line,) = caught.value.lines
    assert line.startswith("process 2 of 2: the others were not found at 127.0.0.1:9: ")


# The launcher itself, with a program that says what it was given.

PROGRAM = """\
#!{python}
import json, os, pathlib, signal, sys, time
rank = os.environ["RANK"]
folder = pathlib.Path({folder!r})
heard = []
signal.signal(signal.SIGINT, lambda number, frame: heard.append("SIGINT"))
signal.signal(signal.SIGTERM, lambda number, frame: heard.append("SIGTERM"))
if "die" in sys.argv and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if "fail" in sys.argv and rank == "1":
    sys.exit(3)
(folder / f"started-{{rank}}").touch()
if "listen" in sys.argv:
    while not heard:
        time.sleep(0.01)
    time.sleep(0.5)
if "fail" in sys.argv or "die" in sys.argv:
    time.sleep(60)
said = {{"heard": heard, "arguments": sys.argv[1:], "environment": dict(os.environ)}}
(folder / f"said-{{rank}}.json").write_text(json.dumps(said))
sys.exit(130 if heard else 0)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the launcher starts in the place of Python, and its folder."""
    for name in ("RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "program"
    path.write_text(PROGRAM.format(python=sys.executable, folder=str(tmp_path)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(launch.sys, "executable", str(path))
    monkeypatch.setattr(launch, "_GRACE", 0.5)
    return tmp_path


def said(folder: Path, rank: int) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / f"said-{rank}.json").read_text())
    return found


def test_each_process_is_told_its_place(program: Path) -> None:
    assert launch.launch(["train", "x.yaml"], 2) == 0
    ports = set()
    for rank in (0, 1):
        found = said(program, rank)
        assert found["arguments"] == ["-m", "mtl_lora_cli.cli.main", "train", "x.yaml"]
        environment = found["environment"]
        assert isinstance(environment, dict)
        assert place_in(environment) == Place(rank=rank, count=2, local_rank=rank)
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert int(environment["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
        ports.add(environment["MASTER_PORT"])
    assert len(ports) == 1


def test_the_first_failure_is_the_exit_code_and_ends_all(program: Path) -> None:
    began = time.monotonic()
    assert launch.launch(["fail"], 3) == 3
    assert time.monotonic() - began < 20  # the others would sleep for a minute
    assert not (program / "said-0.json").exists()


def test_a_killed_process_is_named(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch.launch(["die"], 2) == 128 + signal.SIGKILL
    error = capfd.readouterr().err
    assert error.startswith("error: process 2 of 2 (process id ")
    assert error.endswith(") was ended by SIGKILL; the others are ended, too\n")
    assert error.count("error: ") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_process_once(program: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def send() -> None:
        while not all((program / f"started-{rank}").exists() for rank in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert launch.launch(["listen"], 2) == 130
    sender.join()
    assert [said(program, rank)["heard"] for rank in (0, 1)] == [[number.name]] * 2
    assert signal.getsignal(number) == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child")
def test_no_process_is_left_behind_by_a_launcher_that_was_killed(program: Path) -> None:
    code = (
        "import sys; from mtl_lora_cli.machine import launch; "
        f"sys.executable = {str(program / 'program')!r}; launch.launch(['listen'], 2)"
    )
    python = Path((program / "program").read_text().splitlines()[0].removeprefix("#!"))
    launcher = subprocess.Popen([python, "-c", code])
    deadline = time.monotonic() + 30
    while not all((program / f"started-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    while not all((program / f"said-{rank}.json").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [said(program, rank)["heard"] for rank in (0, 1)] == [["SIGTERM"]] * 2


# The real command under others' launchers.


@pytest.mark.long  # `--num-processes` starts processes in the same way
def test_torchrun_starts_a_run_of_two(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that `--num-processes 2` prints."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RANK", raising=False)
    run = tmp_path / "joined"
    arguments = ["train", str(recipe_file), f"run.directory={tmp_path}", "run.name=joined"]
    command = launch.equivalent([*arguments, "training.max_steps=3", "--json"], 2)
    finished = subprocess.run(
        shlex.split(command), capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == {"run": "joined", "path": str(run)}
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_slurms_variables_are_enough(recipe_file: Path, unused_job: Callable[[], str]) -> None:
    """Two processes meet and agree who speaks."""
    job = {
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": unused_job(),
        "SLURM_STEP_NODELIST": "localhost",
        "OMP_NUM_THREADS": "1",
    }
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    started = [
        subprocess.Popen(
            [sys.executable, *COMMAND, "train", str(recipe_file), "--dry-run"],
            env=kept | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    first, second = (process.communicate(timeout=300)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0], (first, second)
    assert "trainable parameters" in first
    assert second == ""


def test_deepspeeds_launcher_puts_an_option_before_the_command(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as leaving:
        app(["--local_rank=1", "tasks"], prog_name="mtl-lora")
    assert leaving.value.code == 0
    assert "glue/sst2" in capfd.readouterr().out


@pytest.fixture
def unused_job() -> Callable[[], str]:
    """A Slurm job's number whose port nobody uses."""

    def find() -> str:
        for job in range(10_000, 20_000):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", 20_000 + job)):
                    return str(job)
        raise AssertionError("all ports are used")

    return find


def test_processes_are_not_started_twice(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as leaving:
        app(["train", str(recipe_file), "--num-processes", "2"], prog_name="mtl-lora")
    assert leaving.value.code == 2
    assert "--num-processes starts processes, and this one was started as one of several" in (
        capfd.readouterr().err
    )
