"""Checkpoints are written while the next steps run, and hold what they would hold if nobody had gone on."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtl_lora_cli.training import checkpoints, saving
from mtl_lora_cli.training.checkpoints import newest_checkpoint, write_checkpoint
from mtl_lora_cli.training.saving import Saver

BINARY = (
    "mtl_lora.safetensors",
    "mtl_lora_config.json",
    "optimizer.safetensors",
    "random.safetensors",
)
AT_MOST = 20  # seconds that a step is waited for


class Later:
    """Holds a checkpoint's writer back until a later step is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, by: int = 1) -> None:
        self.done = 0
        self.by = by
        self._moved = threading.Condition()
        self.seen: list[tuple[int, int]] = []  # the checkpoint's step, and how far the run is
        monkeypatch.setattr(saving, "write_checkpoint", self.write)

    def write(self, folder: Path, snapshot: Any, keep: int) -> Path:
        own = snapshot.position.step
        with self._moved:
            if own < 6:
                assert self._moved.wait_for(lambda: self.done >= own + self.by, AT_MOST)
            self.seen.append((own, self.done))
        return write_checkpoint(folder, snapshot, keep)

    def after(self, step: int) -> None:
        with self._moved:
            self.done = step
            self._moved.notify_all()


def test_steps_go_on_while_a_checkpoint_is_written_and_change_nothing_in_it(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a run that waits for each of its checkpoints: every file is the same, the seconds aside."""
    save = Saver.save
    with monkeypatch.context() as waiting:
        waiting.setattr(Saver, "save", lambda self, *what: (save(self, *what), self.wait()))
        foreground = small().train()
    later = Later(monkeypatch)
    background = small().train(after=later.after)
    assert later.seen[:2] == [(2, 3), (4, 5)]
    one, other = foreground.run.checkpoints, background.run.checkpoints
    for step in ("step-000002", "step-000004", "step-000006"):
        for name in BINARY:
            assert (one / step / name).read_bytes() == (other / step / name).read_bytes(), name
        states = [json.loads((place / step / "state.json").read_text()) for place in (one, other)]
        timed = ("seconds", "metrics_bytes")  # the lines say how long steps took
        assert all(state.pop(name) > 0 for state in states for name in timed)
        assert states[0] == states[1]


def test_what_follows_the_losses_is_copied_too(small: Callable[..., Any], tmp_path: Path) -> None:
    run = small().trainer
    following = {"x": {"sums": [1.0]}}
    position = checkpoints.Position(1, 0, 0.0, 0, following=following)
    held = threading.Event()
    saver = Saver(tmp_path / "checkpoints", 1, run.adapter.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            saving,
            "write_checkpoint",
            lambda *what: (held.wait(AT_MOST), write_checkpoint(*what)),
        )
        saver.save(position, saving.AdapterState({}, {}), {}, [])
        following["x"]["sums"].append(2.0)
        held.set()
        saver.wait()
    state = json.loads((tmp_path / "checkpoints" / "step-000001" / "state.json").read_text())
    assert state["following"] == {"x": {"sums": [1.0]}}


def full(folder: Path, snapshot: Any, keep: int) -> Path:
    """A disk that has room for the first checkpoint only."""
    if snapshot.position.step > 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write_checkpoint(folder, snapshot, keep)


def test_a_writer_that_fails_ends_the_run_at_the_next_step(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "write_checkpoint", full)
    run = small(steps=40, checkpoint_every=2)

    def wait(step: int) -> None:
        if step == 5:  # so that it is known when the step after this one begins
            thread = run.trainer.saver._thread
            assert thread is not None
            thread.join(AT_MOST)

    with pytest.raises(OSError, match="No space left"):
        run.train(after=wait)
    assert run.events[-1]["step"] in (4, 5)
    good = newest_checkpoint(run.run.checkpoints)
    assert good is not None and good.name == "step-000002"


def test_a_last_checkpoint_that_fails_is_told(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "write_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        small(checkpoint_every=None).train()


def test_whatever_ends_a_run_its_last_checkpoint_is_whole(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    later = Later(monkeypatch)

    def stop(step: int) -> None:
        later.after(step)
        if step == 3:
            raise KeyboardInterrupt

    run = small()
    with pytest.raises(KeyboardInterrupt):
        run.train(after=stop)
    good = newest_checkpoint(run.run.checkpoints)
    assert good is not None and good.name == "step-000002"


def test_an_interrupted_run_has_saved_when_it_says_so(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = threading.Event()

    def write(folder: Path, snapshot: Any, keep: int) -> Path:
        slow.wait(0.2)
        return write_checkpoint(folder, snapshot, keep)

    monkeypatch.setattr(saving, "write_checkpoint", write)
    run = small(checkpoint_every=None).train(stop_after=3)
    good = newest_checkpoint(run.run.checkpoints)
    assert good is not None and good.name == "step-000003"


def test_a_kill_while_one_is_written_leaves_the_one_before(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps have gone on when the process is killed, and what goes on from there ends like a run left alone."""
    whole = small().train()
    run = small()
    later = Later(monkeypatch)
    write_text = checkpoints.write_text

    def kill(path: Path, text: str) -> None:
        if path.parent.name.startswith(".step-000004"):
            os.kill(os.getpid(), signal.SIGKILL)
        write_text(path, text)

    child = os.fork()
    if not child:
        checkpoints.write_text = kill  # type: ignore[attr-defined]
        run.train(after=later.after)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert run.events[-1]["step"] >= 5
    names = sorted(
        path.name.partition(".")[0] or "partial" for path in run.run.checkpoints.iterdir()
    )
    assert names == ["partial", "step-000002"]
    monkeypatch.undo()
    good = newest_checkpoint(run.run.checkpoints)
    assert good is not None
    again = small(folder=run.run.path)
    again.trainer.resume(good)
    again.train()
    assert all((again.tensors[name] == tensor).all() for name, tensor in whole.tensors.items())
    assert again.losses == whole.losses
    assert not list(run.run.checkpoints.glob(".*"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("room", [0.0, 1.0])
def test_a_cards_tensors_are_those_of_the_moment(
    room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for copies on the card and without; the next step changes them at once."""
    monkeypatch.setattr(saving, "_SHARE", room)
    card = torch.device("cuda", 0)
    tensor = torch.rand(2**24, device=card)
    before = tensor.cpu()
    saver = Saver(tmp_path / "checkpoints", 1, card)
    for _ in range(200):  # the copy waits behind other work
        tensor.add_(0)
    position = checkpoints.Position(1, 0, 0.0, 0)
    saver.save(position, saving.AdapterState({}, {"x": tensor}), {"x/exp_avg": tensor}, [])
    tensor.zero_()
    saver.wait()
    folder = tmp_path / "checkpoints" / "step-000001"
    assert torch.equal(load_file(folder / "mtl_lora.safetensors")["x"], before)
    assert torch.equal(load_file(folder / "optimizer.safetensors")["x/exp_avg"], before)
