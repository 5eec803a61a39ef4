"""The live view: one screen that fits and is right, plain lines elsewhere, nothing garbled anywhere."""

from __future__ import annotations

import fcntl
import io
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mtl_lora_cli.training.progress import TrainingProgress, Trend, duration

BLOCKS = "▁▂▃▄▅▆▇█"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOR = re.compile(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7])[0-9;]*m")


class Screen:
    """What a terminal of so many columns shows after what was written to it, with all that scrolled."""

    def __init__(self, text: str, columns: int) -> None:
        self.lines: list[list[str]] = [[]]
        self._row = self._column = 0
        for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", text):
            if CONTROL.fullmatch(part):
                self._control(part[2:-1], part[-1])
            elif part == "\r":
                self._column = 0
            elif part == "\n":
                self._down()
                self._column = 0
            else:
                for character in part:
                    if self._column == columns:  # as a terminal wraps
                        self._down()
                        self._column = 0
                    self._put(character)

    def _control(self, number: str, what: str) -> None:
        if what == "A":
            self._row -= int(number or 1)
        elif what == "K":
            assert number == "2"
            self.lines[self._row] = []
        else:
            assert what in "mhl", f"unexpected control {number}{what}"

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self.lines):
            self.lines.append([])

    def _put(self, character: str) -> None:
        line = self.lines[self._row]
        line += [" "] * (self._column - len(line))
        line[self._column : self._column + 1] = [character]
        self._column += 1

    @property
    def text(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


def step_event(step: int, tasks: list[str], **more: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "step": step,
        "loss": 3 * math.exp(-step / 50),
        "task_loss": {name: 3 * math.exp(-step / (40 + 20 * i)) for i, name in enumerate(tasks)},
        "tokens_per_second": 21525.3,
        "learning_rate": 3e-4,
        **more,
    }


def look_event(step: int, tasks: list[str]) -> dict[str, Any]:
    return {
        "event": "validation",
        "step": step,
        "loss": dict.fromkeys(tasks, 0.51),
        "metric": {name: None if name == "odd" else 0.625 for name in tasks},
        "metric_name": dict.fromkeys(tasks, "accuracy"),
        "macro": {"loss": 0.51, "metric": 0.75},
    }


def shown(
    tasks: list[str], *, width: int = 80, height: int = 30, encoding: str = "utf-8", **event: Any
) -> tuple[list[str], str]:
    """A run of 100 steps, seen up to its 60th: the terminal's lines, and all that was written."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    console = Console(
        file=file, force_terminal=True, width=width, height=height, highlight=False, _environ={}
    )
    progress = TrainingProgress(
        100, 0, console, tasks=tasks, every={"validation": 25, "checkpoint": 40, "never": None}
    )
    for step in range(1, 61):
        progress.update(step_event(step, tasks, **event))
        if step % 25 == 0:
            progress.look(look_event(step, tasks), f"validation after step {step}/100")
            progress.look({"event": "best", "step": step, "value": 0.75, "of": "macro"}, None)
    progress.close()
    file.flush()
    text = file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    return Screen(text, width).text, text


def test_the_last_screen_stays_and_holds_everything() -> None:
    lines, _ = shown(["rte", "odd", "sst2"], memory_gib=31.44, floor_share=0.672)
    assert lines[:2] == ["validation after step 25/100", "validation after step 50/100"]
    head, loss, figures, best, heading, rte, odd, sst2, average, *rest = lines[2:]
    assert set(rest) <= {""}
    assert re.fullmatch(r"step 60/100  [━╸╺]+ +took 0 s", head)
    assert re.fullmatch(rf"loss 0\.\d+ [{BLOCKS}]+  learning rate 3\.00e-04", loss)
    assert figures == "21,525 tokens/s (67% of the floor)  31.4 GiB"
    assert best == "best: step 50, 0.750"
    assert heading.split() == ["task", "loss", "validation"]
    assert re.fullmatch(rf"rte +\d\.\d+ [{BLOCKS}]+ +0\.510 +accuracy 0\.625", rte)
    assert odd.endswith("accuracy undefined")
    assert sst2.startswith("sst2 ")
    assert average.split() == ["macro", "average", "0.510", "metric", "0.750"]


def test_while_it_runs_it_says_what_comes() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24, _environ={})
    every = {"validation": 25, "checkpoint": 40, "never": None}
    progress = TrainingProgress(100, 0, console, tasks=["rte"], every=every)
    progress.update(step_event(60, ["rte"]))
    progress._last_shown = 0.0
    progress.update(step_event(97, ["rte"]))
    lines = Screen(file.getvalue(), 80).text
    progress.close()
    assert re.fullmatch(r"step 97/100  [━╸╺]+ +\d+ s left", lines[0])
    assert lines[3] == "validation in 3 steps, checkpoint in 3 steps"
    assert "validation in 15 steps, checkpoint in 20 steps" in file.getvalue()


def test_before_the_first_step_and_the_first_look() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24, _environ={})
    progress = TrainingProgress(10, 4, console, tasks=["rte"])
    progress.close()
    lines = [line for line in Screen(file.getvalue(), 80).text if line]
    assert lines[0].startswith("step 4/10")
    assert [line.split() for line in lines[1:]] == [["task", "loss"], ["rte", "-"]]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("count", [1, 4, 40])
def test_no_line_is_wider_than_the_terminal_nor_the_screen_higher(width: int, count: int) -> None:
    tasks = [f"{'a_long_name_' * 6}{i}" for i in range(count)]
    for height in (24, 50):
        lines, text = shown(tasks, width=width, height=height, memory_gib=31.4, floor_share=0.6)
        written = [CONTROL.sub("", line) for line in re.split(r"\r|\n", text)]
        assert max(map(len, written)) <= width
        screen = [line for line in lines[2:] if line]
        assert len(screen) <= 20
        assert len({line for line in screen if line.startswith("step ")}) == 1
    rows = [line for line in screen if line.startswith("a_long_name_")]
    if count == 40:
        assert f"+ {40 - len(rows)} more" in screen
        assert len(rows) > 8
    else:
        assert len(rows) == count
        assert "more" not in "".join(screen)


def test_a_low_terminal_shows_fewer_tasks() -> None:
    lines, _ = shown([f"task{i}" for i in range(9)], height=12)
    assert len([line for line in lines[2:] if line]) <= 11
    assert any(re.fullmatch(r"\+ \d more", line) for line in lines)


def test_an_encoding_without_blocks_gets_letters() -> None:
    lines, text = shown(["rte", "x" * 70], encoding="ascii")
    assert text.isascii()
    assert re.search(r"loss 0\.\d+ [_.=+*%#-]+  learning", "\n".join(lines))
    assert "x" * 18 + "~" in "".join(lines)


def test_no_color_is_honoured() -> None:
    def written(**environment: str) -> str:
        file = io.StringIO()
        console = Console(
            file=file, force_terminal=True, width=80, color_system="256", _environ=environment
        )
        progress = TrainingProgress(2, 0, console, tasks=["rte"])
        progress.update(step_event(1, ["rte"]))
        progress.close()
        return file.getvalue()

    assert COLOR.search(written())
    assert not COLOR.search(written(NO_COLOR="1"))


@pytest.mark.parametrize(
    "terminal",
    [
        {"force_terminal": False, "width": 80},
        {"force_terminal": True, "width": 59},
        {"force_terminal": True, "width": 80, "_environ": {"TERM": "dumb"}},
    ],
    ids=["no terminal", "narrow", "dumb"],
)
def test_plain_lines_where_a_screen_cannot_be(terminal: dict[str, Any]) -> None:
    file = io.StringIO()
    progress = TrainingProgress(3, 0, Console(file=file, highlight=False, **terminal))
    for step in (1, 2, 3):
        progress.update(step_event(step, ["rte"], memory_gib=2.0))
    progress.look(look_event(3, ["rte"]), "validation after step 3/3")
    progress.close()
    first, last, look = file.getvalue().splitlines()  # the second step comes within five seconds
    assert first.startswith("step 1/3  loss 2.94")
    assert re.fullmatch(
        r"step 3/3  loss 2\.\d+  21,525 tokens/s  2\.0 GiB  0 s left  \|  rte \d\.\d+", last
    )
    assert look == "validation after step 3/3"


def test_who_is_quiet_draws_nothing() -> None:
    """Of many processes only one speaks; the others must not take over stdout for a screen."""
    before = sys.stdout
    progress = TrainingProgress(3, 0, Console(quiet=True, force_terminal=True, width=80))
    assert sys.stdout is before
    progress.update(step_event(1, ["rte"]))
    progress.close()


def test_a_trend_is_the_means_of_equal_stretches() -> None:
    trend = Trend(8)
    values = [float(step) for step in range(100)]
    for value in values:
        trend.add(value)
    span = trend._span
    assert 4 <= len(trend._means) < 8
    assert trend._means == [
        sum(values[i : i + span]) / span for i in range(0, 100 - 100 % span, span)
    ]
    assert trend.drawn("0123456789") == "".join(sorted(trend.drawn("0123456789")))
    assert (trend.drawn(BLOCKS)[0], trend.drawn(BLOCKS)[-1]) == ("▁", "█")
    level = Trend(8)
    assert level.drawn(BLOCKS) == ""
    level.add(2.0)
    assert level.drawn(BLOCKS) == "▁"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


@pytest.fixture
def on_a_terminal() -> Callable[..., str]:
    """Runs a command with stderr on a terminal of 80 by 30; what it wrote there."""

    def run(command: list[str], **changes: str) -> str:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
        process = subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment(**changes)
        )
        os.close(theirs)
        found, until = b"", time.monotonic() + 120
        while time.monotonic() < until:
            if not select.select([ours], [], [], 0.2)[0]:
                continue
            try:
                part = os.read(ours, 65536)
            except OSError:  # closed by the last who had it
                break
            if not part:
                break
            found += part
        os.close(ours)
        assert process.wait(timeout=30) == 0, found.decode()
        return found.decode()

    return run


@pytest.mark.slow
def test_a_real_terminal_shows_one_whole_screen(
    recipe_file: Path, tmp_path: Path, on_a_terminal: Callable[..., str]
) -> None:
    command = (sys.executable, "-m", "mtl_lora_cli.cli.main", "train", str(recipe_file))
    looking = "training.validation={every: 2, examples: 4, best: macro}"
    text = on_a_terminal(
        [*command, looking, f"run.directory={tmp_path}"], TERM="xterm-256color", LC_ALL="C.UTF-8"
    )
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    lines = Screen(text.replace("\r\n", "\n"), 80).text
    (head,) = (i for i, line in enumerate(lines) if line.startswith("step 6/6"))
    assert re.match(r"step 6/6  ━+  took \d", lines[head])
    assert [line.split()[0] for line in lines[head + 1 : head + 10]] == [
        "loss",
        lines[head + 2].split()[0],  # tokens/s
        "best:",
        "task",
        *("sst2", "rte", "cola", "home_depot"),
        "macro",
    ]
    assert lines[head + 2].endswith(" tokens/s")
    looks = [i for i, line in enumerate(lines) if line.startswith("validation after step ")]
    assert len(looks) == 3
    assert max(looks) < head
    behind = "\n".join(lines[head:])
    assert "the adapter is that of the best look: step " in behind
    assert "next: mtl-lora eval" in behind


def test_a_pipe_gets_plain_lines_whatever_is_said_of_colors() -> None:
    code = (
        "from mtl_lora_cli.training.progress import TrainingProgress\n"
        f"event = {step_event(1, ['rte'])}\n"
        "progress = TrainingProgress(1, 0)\n"
        "progress.update(event)\n"
        "progress.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=environment(FORCE_COLOR="1", TTY_COMPATIBLE="1", TERM="xterm-256color"),
    )
    assert done.stdout == ""
    assert re.fullmatch(
        r"step 1/1  loss 2\.\d+  21,525 tokens/s  0 s left  \|  rte .*\n", done.stderr
    )
