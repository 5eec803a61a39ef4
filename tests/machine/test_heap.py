"""Memory that a CPU's tensors give back is there for the next ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from types import SimpleNamespace
from mtl_lora_cli.machine.heap import keep_freed
if sys.argv[1] == "kept":
    keep_freed(SimpleNamespace(type="cpu"))  # a device; torch takes seconds to load
for _ in range(6):  # what lies in between finds its places
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    everything = [b"x" * 2**22 for _ in range(12)]
    del everything
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_is_freed_stays_with_the_process() -> None:
    """48 MiB, taken and given back: the last time its pages are there already."""
    usual, kept = (
        int(subprocess.check_output([sys.executable, "-c", PROGRAM, kind]))
        for kind in ("usual", "kept")
    )
    assert kept < 2**20 < 40 * 2**20 < usual
