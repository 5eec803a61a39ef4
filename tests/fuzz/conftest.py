"""How many cases: few in every test run, ten thousand and more with `make fuzz`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

CASES = int(os.environ.get("MTL_LORA_FUZZ_CASES", "60"))

settings.register_profile(
    "fuzz",
    max_examples=CASES,
    deadline=None,
    # The same cases in every test run; new ones in a nightly one.
    derandomize="MTL_LORA_FUZZ_CASES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
