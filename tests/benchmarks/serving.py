"""Many clients at once, each answer held against `predict`'s: throughput, delays, and what was lost.

    python tests/benchmarks/serving.py runs/NAME ROWS.jsonl --clients 200 --seconds 60

ROWS has rows of any tasks, which they name in the field `task`. Every client asks for one row after another over a
connection of its own. Beside it stands `predict` from Python, one row a call, for a few seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import mtl_lora_cli

ALONE = 10.0  # seconds of one-by-one predictions


async def client(
    place: tuple[str, int], number: int, rows: list[Any], right: list[Any], until: float
) -> tuple[list[float], int]:
    """Delays in seconds, and how many answers were not `predict`'s."""
    reader, writer = await asyncio.open_connection(*place)
    delays, wrong = [], 0
    step = number
    while time.monotonic() < until:
        step = (step * 31 + 7) % len(rows)
        body = json.dumps({"task_column": "task", "rows": [rows[step]]}).encode()
        head = (
            f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        began = time.monotonic()
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()[1]
        length = 0
        while (line := await reader.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        content = json.loads(await reader.readexactly(length))
        delays.append(time.monotonic() - began)
        wrong += status != b"200" or not same(content["predictions"][0], right[step])
    writer.close()
    return delays, wrong


def same(one: Any, other: Any) -> bool:
    """The same answer with the same probabilities."""
    if (one["task"], one["answer"]) != (other["task"], other["answer"]):
        return False
    ours, theirs = one.get("probabilities", {}), other.get("probabilities", {})
    return ours.keys() == theirs.keys() and all(abs(ours[k] - theirs[k]) < 1e-3 for k in ours)


async def load(
    place: tuple[str, int], wanted: argparse.Namespace, rows: list[Any], right: list[Any]
) -> tuple[list[float], int]:
    until = time.monotonic() + wanted.seconds
    asked = (client(place, n, rows, right, until) for n in range(wanted.clients))
    found = await asyncio.gather(*asked)
    return [delay for delays, _ in found for delay in delays], sum(wrong for _, wrong in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    wanted = parser.parse_args()
    rows = [json.loads(line) for line in wanted.rows.read_text(encoding="utf-8").splitlines()]
    predictor: Any = mtl_lora_cli.load(wanted.run)
    right = predictor.predict(rows, task_column="task")
    began, alone = time.monotonic(), 0
    while time.monotonic() - began < ALONE:
        predictor.predict([rows[alone % len(rows)]], task_column="task")
        alone += 1
    print(
        f"predict, one by one: {alone / (time.monotonic() - began):,.0f} rows a second", flush=True
    )
    command = [
        sys.executable,
        "-m",
        "mtl_lora_cli.cli.main",
        "serve",
        str(wanted.run),
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = urlsplit(process.stdout.readline().strip())
        place = str(address.hostname), int(address.port or 0)
        delays, wrong = asyncio.run(load(place, wanted, rows, right))
    finally:
        process.terminate()
        code = process.wait(60)
    middle, high = np.quantile(delays, [0.5, 0.99])
    print(
        f"{wanted.clients} clients: {len(delays) / wanted.seconds:,.0f} rows a second, median "
        f"{1000 * middle:.0f} ms, p99 {1000 * high:.0f} ms; {len(delays):,} answers, {wrong} wrong; exit {code}"
    )


if __name__ == "__main__":
    main()
