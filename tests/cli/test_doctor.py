"""`doctor` finds what is broken, says what mends it, and is stopped by none of it."""

from __future__ import annotations

import http.server
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from mtl_lora_cli.machine import checks as room
from mtl_lora_cli.machine.cards import pick_device
from mtl_lora_cli.machine.checks import Check, Verdict, isolated

Finished = subprocess.CompletedProcess[str]

NAMES = [
    "python", "libraries", "torch", "triton", "deepspeed", "bitsandbytes", "liger", "extras",
    "memory", "runs folder", "cache folder", "caches", "hub", "variables", "encoding",
]  # fmt: skip


def found(finished: Finished) -> dict[str, dict[str, str | None]]:
    """The checks by name; the exit code must be theirs, and stderr a line for what failed."""
    checks = {check["name"]: check for check in json.loads(finished.stdout)["checks"]}
    failed = [name for name, check in checks.items() if check["verdict"] == "fail"]
    assert finished.returncode == (3 if failed else 0), finished.stderr
    if failed:
        said = f"error: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}"
        assert finished.stderr.splitlines()[-1] == said
    assert "Traceback" not in finished.stderr
    for check in checks.values():
        assert check["verdict"] in ("ok", "warn", "fail")
        assert "\n" not in str(check["finding"])
    return checks


def module(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_this_machine_and_a_recipe(
    command: Callable[..., Finished], stories_folder: Path, tmp_path: Path
) -> None:
    finished = command(
        "doctor", "quickstart", f"base_model={stories_folder}", "--json", cwd=tmp_path
    )
    checks = found(finished)
    assert {*NAMES, "recipe", "fit"} <= set(checks)
    for name in ("python", "torch", "bitsandbytes", "recipe", "fit"):
        assert checks[name]["verdict"] == "ok", checks[name]
    assert torch.__version__ in str(checks["torch"]["finding"])
    assert str(checks["hub"]["finding"]).startswith("not asked: HF_HUB_OFFLINE is set")
    memory = json.loads(finished.stdout)["memory"]
    assert sum(memory["parts"].values()) == memory["needed"] <= memory["free"]
    assert memory["fits"] is True
    assert not (tmp_path / "runs").exists(), "doctor writes nothing"


def test_broken_libraries_are_findings(command: Callable[..., Finished], tmp_path: Path) -> None:
    site = tmp_path / "site"
    module(site, "deepspeed", "import no_such_module_of_deepspeed")
    module(site, "bitsandbytes", "raise SystemExit('goodbye')")
    module(site, "liger_kernel", "raise OSError('libfoo.so: cannot open')")
    finished = command(
        "doctor", "--json", cwd=tmp_path,
        PYTHONPATH=str(site), PYTHONIOENCODING="latin-1", MTL_LORA_KERNELS="fast",
    )  # fmt: skip
    checks = found(finished)
    for name, verdict, finding, remedy in (
        ("deepspeed", "fail", "No module named 'no_such_module_of_deepspeed'", "deepspeed"),
        ("bitsandbytes", "fail", "SystemExit: goodbye", "bitsandbytes"),
        ("liger", "warn", "OSError: libfoo.so: cannot open", "liger-kernel"),
        ("encoding", "warn", "output is iso8859-1", "PYTHONUTF8=1"),
        ("variables", "warn", "MTL_LORA_KERNELS=fast", "unset MTL_LORA_KERNELS"),
        ("torch", "ok", torch.__version__, ""),
    ):
        assert checks[name]["verdict"] == verdict, checks[name]
        assert finding in str(checks[name]["finding"])
        assert remedy in str(checks[name]["remedy"])


def test_apples_card_is_said_not_to_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    (check,) = room._cards()
    assert (check.verdict, check.finding) == (
        Verdict.OK,
        "Apple's (mps) is not supported: losses are summed in float64, which it has not; models run on the CPU",
    )
    assert pick_device() == torch.device("cpu")


def test_without_torch_the_rest_is_still_told(
    command: Callable[..., Finished], tmp_path: Path
) -> None:
    module(tmp_path / "site", "torch", "raise ImportError('libcudart.so.12: no such file')")
    checks = found(
        command("doctor", "quickstart", "--json", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    )
    for name in ("torch", "cards", "bitsandbytes", "recipe"):
        assert checks[name]["verdict"] == "fail"
        assert "libcudart.so.12: no such file" in str(checks[name]["finding"])
        if name != "recipe":
            assert checks[name]["remedy"] == "pip install --force-reinstall --no-deps torch"
    for name in ("python", "memory", "runs folder", "encoding"):
        assert checks[name]["verdict"] == "ok"


def test_a_faulty_recipe_is_told_before_anything_else(invoke: Callable[..., Finished]) -> None:
    finished = invoke("doctor", "quickstart", "adapter.rank=0")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("error: command line: adapter.rank: ")


def test_on_a_terminal_it_has_colours_and_its_width(
    at_a_terminal: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    module(tmp_path / "site", "torch", "raise ImportError('libcudart.so.12: ' + 'very ' * 40)")
    code, text = at_a_terminal(["doctor"], [], cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert code == 3
    assert "\x1b[32mok" in text and "\x1b[1;31mfail" in text
    table = re.sub(r"\x1b\[[0-9;]*m", "", text[text.index("verdict") :]).split("mend ")[0]
    assert len(table.splitlines()) > len(NAMES)
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80
    quiet = at_a_terminal(
        ["doctor"], [], cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), NO_COLOR="1"
    )[1]
    assert "\x1b[" not in quiet


def test_whatever_a_check_raises_is_its_finding() -> None:
    def broken() -> Iterator[Check]:
        yield room.ok("triton", "so far")
        raise RuntimeError("no\n  more")

    first, second = isolated("triton", broken)
    assert first.verdict == Verdict.OK
    assert second.finding == "RuntimeError: no more"
    assert second.remedy == "pip install --force-reinstall --no-deps triton"


def test_ctrl_c_is_no_finding() -> None:
    def stopped() -> Iterator[Check]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        isolated("torch", stopped)


def test_versions_that_are_not_met_are_found() -> None:
    wanted = [Requirement(text) for text in ("torch>=2", "torch>=99", "no-such-distribution")]
    missing = room._missing(wanted)
    assert [(str(one), version) for one, version in missing] == [
        ("torch>=99", torch.__version__),
        ("no-such-distribution", "no version"),
    ]


@contextmanager
def server(answer: int) -> Iterator[str]:
    """An endpoint that answers each request with one code."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Check]:
    """`hub(endpoint)`: what the hub's check says of it."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def ask(endpoint: str) -> Check:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        (check,) = room._hub()
        return check

    return ask


@pytest.mark.parametrize(("answer", "verdict"), [(200, "ok"), (404, "ok"), (503, "warn")])
def test_a_hub_that_answers(hub: Callable[[str], Check], answer: int, verdict: str) -> None:
    with server(answer) as endpoint:
        check = hub(endpoint)
    assert check.verdict == verdict
    assert check.finding.startswith(endpoint)


def test_a_hub_that_is_not_there(hub: Callable[[str], Check]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        check = hub(f"http://127.0.0.1:{free.getsockname()[1]}")
    assert check.verdict == Verdict.WARN
    assert "refused" in check.finding
    assert "HF_HUB_OFFLINE=1" in str(check.remedy)
    assert hub("no address").verdict == Verdict.WARN


def test_a_hub_that_never_answers_is_not_waited_for(
    hub: Callable[[str], Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert room._HUB_SECONDS <= 3
    monkeypatch.setattr(room, "_HUB_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        check = hub(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - started < 1.5
    assert check.verdict == Verdict.WARN


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    (check,) = room._folder("runs folder", tmp_path / "file" / "runs")
    assert check.verdict == Verdict.FAIL
    assert "cannot be written" in check.finding
    assert str(check.remedy).startswith("export MTL_LORA_RUNS=")
    (check,) = room._folder("cache folder", tmp_path / "new" / "cache")
    assert check.verdict != Verdict.FAIL
    assert "(not there yet)" in check.finding
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_device_that_is_there_and_not_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    (check,) = isolated("cards", room._cards)
    assert check.verdict == Verdict.OK
    assert "(mps) is not supported: losses are summed in float64" in check.finding


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_card_is_told() -> None:
    checks = isolated("cards", room._cards)
    assert len(checks) == torch.cuda.device_count()
    assert all(torch.cuda.get_device_name(0) in check.finding for check in checks[:1])
    assert all(check.verdict != Verdict.FAIL for check in checks)
