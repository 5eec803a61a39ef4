"""A run that is killed again and again, at any instruction, beside one that is left alone."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from .forks import Forks


def killed_and_left_alone(forks: Forks, place: Path, *longer: str, kills: int) -> int:
    """Train `recipe.yaml` twice: as run `still`, and as run `killed`, which goes on after each kill.

    When it is killed goes by the clock of the run that was left alone, so that neither a fast machine ends
    before the last kill nor a busy one comes to no step at all.

    Args:
        forks: commands.
        place: where the recipe is; it writes a checkpoint at every step.
        longer: overrides of it.
        kills: how many.

    Returns:
        Kills before which it had come to a checkpoint; as many as were asked for, or it ended too soon.
    """
    call = ("train", "recipe.yaml", *longer)
    began = time.monotonic()
    ended = forks.run(*call, "run.name=still", cwd=place)
    assert ended.returncode == 0, ended.stderr
    seconds = _seconds(place / "runs" / "still")
    starting, total = time.monotonic() - began - sum(seconds.values()), len(seconds)
    generator, killed = random.Random(0), place / "runs" / "killed"
    call, done, idle, before = (*call, "run.name=killed"), 0, 0, 0
    while True:
        share = (total - before) / (kills - done + 4)  # steps that it may come on in the mean
        pace = sum(seconds.values()) / len(seconds)
        late = generator.uniform(0.7 * starting, starting + 2 * pace * share) + idle / 2
        ended = forks.run(*call, cwd=place, seconds=late if done < kills else 300)
        if ended.returncode == 0:
            return done
        assert ended.returncode == -signal.SIGALRM, ended.stderr
        steps = [int(one.parent.name[5:]) for one in killed.glob("checkpoints/*/COMPLETE")]
        last = max(steps, default=0)
        idle = 0 if last > before else idle + 1
        if last > before:  # the machine may be another one by now: less is asked of it, or more
            seconds = {step: own for step, own in _seconds(killed).items() if step > before}
            starting = max(0.1, late - sum(seconds.values()))
        before = last
        done += bool(steps)
        if steps:
            call = ("train", "--resume", "--run", "killed")
        else:
            shutil.rmtree(killed, ignore_errors=True)


def _seconds(run: Path) -> dict[int, float]:
    """Of each step of a run; the last line may be cut off."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        with suppress(json.JSONDecodeError):
            event = json.loads(line)
            if event["event"] == "step":
                found[event["step"]] = event["seconds"]
    return found
