"""Parts through the models of a Ray cluster: actors that load the run once and answer whole parts.

A part that an actor had in hand when it was killed is answered by another one. What that one writes takes the place of
what was there, and is the same.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.prediction.course import Course
from mtl_lora_cli.prediction.in_hand import Job
from mtl_lora_cli.prediction.inputs import Part
from mtl_lora_cli.prediction.manifest import Done
from mtl_lora_cli.recipe.load import load_extensions_of
from mtl_lora_cli.runs.folder import RunFolder

LOCAL = "local"
_PATIENCE = 10.0  # seconds
_PARTS_A_CALL = 4  # that an actor with a card has in hand


def require_ray() -> None:
    """Refuse where Ray is not installed.

    Raises:
        UsageError: it is not.
    """
    try:
        import ray.data  # noqa: F401
    except ImportError:
        raise UsageError("--ray needs Ray: pip install 'mtl-lora[ray]'") from None


class PartActor:
    """A model that answers parts; Ray Data's `map_batches` makes some of it.

    Args:
        job: what is asked.
        threads: of its own processor time; None: as torch picks.
    """

    def __init__(self, job: Job, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        load_extensions_of(RunFolder(job.run).recipe)
        self._course = Course(Run(RunFolder(job.run), force=job.force), job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Answer parts: a batch with the column `part`, to one with the column `done`.

        What the user can mend comes back as `fault`, a line; anything else is raised.
        """
        parts = [Part(**one) for one in batch["part"]]
        try:
            done = [asdict(one) for one in self._course.run(parts)]
        except UsageError as error:
            return {"done": [None], "fault": ["\n".join(error.lines)]}
        return {"done": list(done), "fault": [None] * len(done)}


def answers_of(
    job: Job, parts: Sequence[Part], *, address: str, actors: int | None
) -> Iterator[Done]:
    """Answer parts on a cluster, in any order.

    Args:
        job: what is asked; its folders are there on all hosts.
        parts: those that are not done.
        address: of the cluster, or "local": this host alone.
        actors: how many; None: one for each card, and without cards for each core.

    Raises:
        UsageError: a row cannot be answered, or the cluster cannot be reached.
    """
    import ray

    _join(address)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of Ray Data, which says how it works and sets its own levels
    try:
        resources = ray.cluster_resources()
        cards = int(resources.get("GPU", 0))
        count = min(actors or cards or int(resources.get("CPU", 1)), len(parts))
        rows = ray.data.from_items(
            [{"part": asdict(part)} for part in parts], override_num_blocks=len(parts)
        )
        answered = rows.map_batches(
            PartActor,
            batch_size=_PARTS_A_CALL if cards else 1,
            batch_format="numpy",
            fn_constructor_args=(job, None if cards else 1),
            compute=ray.data.ActorPoolStrategy(size=count),
            num_gpus=1 if cards else 0,
            num_cpus=1,
        )
        for one in answered.iter_rows():
            if one["fault"] is not None:
                raise UsageError(one["fault"])
            yield Done(**one["done"])
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise MtlLoraError(f"--ray {address}: {said[-1]:.300}") from None
    finally:
        logging.disable(before)
        ray.shutdown()


def _join(address: str) -> None:
    """Start Ray, or join the cluster.

    Raises:
        UsageError: there is none at that address.
    """
    import ray

    if address not in (LOCAL, "auto"):
        _require_listening(address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what is of use comes as an exception
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with _unheard():
            ray.init(
                address=None if address == LOCAL else address,
                include_dashboard=False if address == LOCAL else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"--ray {address}: no cluster can be reached: {said:.200}") from None


@contextmanager
def _unheard() -> Iterator[None]:
    """What Ray's own processes print as they start; what is wrong comes as an exception."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _require_listening(address: str) -> None:
    """Refuse an address at which nobody answers: Ray itself tries for minutes.

    Raises:
        UsageError: it is none, or nobody does.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UsageError(
            f"--ray {address}: expected local, auto, or HOST:PORT, where `ray start --head` listens"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise UsageError(f"--ray {address}: no cluster can be reached: {said}") from None
