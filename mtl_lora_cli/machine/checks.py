"""Whether this machine can do what a run asks of it, one check after the other.

Each check stands alone: what a broken library raises is that check's finding and stops no other one.
Nothing is imported before the check that needs it.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

from mtl_lora_cli.machine.cores import cores
from mtl_lora_cli.runs.listing import files_of
from mtl_lora_cli.runs.paths import cache_folder

GIB = 2**30
PACKAGE = "mtl-lora"
_LITTLE_DISK, _NO_DISK = 5 * GIB, GIB // 4
_LITTLE_MEMORY = 2 * GIB
_HUB = "https://huggingface.co"
_HUB_SECONDS = 3.0
_CUDA = "https://download.pytorch.org/whl/cu128"
# What to install again where a check's first word raises, as pip calls it.
_LIBRARIES = {
    "python": "packaging",
    "libraries": "packaging",
    "torch": "torch",
    "cards": "torch",
    "card": "torch",
    "triton": "triton",
    "deepspeed": "deepspeed",
    "bitsandbytes": "bitsandbytes",
    "liger": "liger-kernel",
    "memory": "psutil",
}
_ON_TORCH = ("cards", "triton", "deepspeed", "bitsandbytes")
_OPTIONAL = ("liger", "extras", "caches")  # nothing fails without them
_YES = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its variables


class Verdict(StrEnum):
    """What a check says."""

    OK = "ok"
    WARN = "warn"  # something is missing or slow; what does not need it works
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        verdict: see `Verdict`.
        finding: why, in one line.
        remedy: the command or setting that mends it; None where nothing has to be mended.
    """

    name: str
    verdict: Verdict
    finding: str
    remedy: str | None = None


def ok(name: str, finding: str) -> Check:
    return Check(name, Verdict.OK, finding)


def examine(runs: Path, told: Callable[[str], None] = lambda name: None) -> list[Check]:
    """Check Python, libraries, cards, memory, disks, caches, the hub and the environment.

    Args:
        runs: folder in which runs lie.
        told: is told of each check before it begins.
    """
    checks: dict[str, Callable[[], Iterator[Check]]] = {
        "python": _python,
        "libraries": _libraries,
        "torch": _torch,
        "cards": _cards,
        "triton": _triton,
        "deepspeed": _deepspeed,
        "bitsandbytes": _bitsandbytes,
        "liger": _liger,
        "extras": _extras,
        "memory": _memory,
        "runs folder": lambda: _folder("runs folder", runs),
        "cache folder": lambda: _folder("cache folder", cache_folder()),
        "caches": _caches,
        "hub": _hub,
        "variables": _variables,
        "encoding": _encoding,
    }
    found: list[Check] = []
    remarks = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what libraries say while they are tried is not the finding
    try:
        for name, check in checks.items():
            told(name)
            found += isolated(name, check)
    finally:
        logging.disable(remarks)
    return _by_cause(found)


def _by_cause(checks: list[Check]) -> list[Check]:
    """Where torch is broken, all that stands on it is mended with it."""
    torch = next(check for check in checks if check.name == "torch")
    if torch.verdict != Verdict.FAIL:
        return checks
    return [
        replace(check, remedy=torch.remedy)
        if check.name in _ON_TORCH and check.verdict == Verdict.FAIL
        else check
        for check in checks
    ]


def isolated(name: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """What a check finds; whatever it raises is a finding, too."""
    found: list[Check] = []
    try:
        for one in check():
            found.append(one)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a library that ends the process, too
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        library = _LIBRARIES.get(name.split()[0])
        remedy = library and f"pip install --force-reinstall --no-deps {library}"
        verdict = Verdict.WARN if name in _OPTIONAL else Verdict.FAIL
        found.append(Check(name, verdict, text, remedy))
    return found


def _installed(name: str) -> str | None:
    """The version of a distribution; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata(PACKAGE)["Requires-Python"]
    found = f"{platform.python_version()}, {sys.executable}, {platform.platform()}"
    if platform.python_version() in SpecifierSet(wanted, prereleases=True):
        yield ok("python", found)
    else:
        yield Check(
            "python", Verdict.FAIL, f"{found}: expected {wanted}", "python3.12 -m venv .venv"
        )


def _requirements(extra: str) -> list[Any]:
    """Of the package itself (`""`) or of one of its extras alone."""
    from packaging.requirements import Requirement

    every = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    return [
        one
        for one in every
        if (one.marker is None and not extra)
        or (one.marker is not None and one.marker.evaluate({"extra": extra}))
    ]


def _missing(requirements: list[Any]) -> list[tuple[Any, str]]:
    """Those that are not met, each with the version that is here, or `no version`."""
    found = []
    for one in requirements:
        version = _installed(one.name)
        if version is None or not one.specifier.contains(version, prereleases=True):
            found.append((one, version or "no version"))
    return found


def _libraries() -> Iterator[Check]:
    needed = _requirements("")
    missing = _missing(needed)
    if not missing:
        yield ok("libraries", f"all {len(needed)} at the versions that are asked for")
        return
    texts = [f"{one.name}{one.specifier} (found {version})" for one, version in missing]
    wanted = " ".join(f"'{one.name}{one.specifier}'" for one, _ in missing)
    yield Check("libraries", Verdict.FAIL, f"missing: {', '.join(texts)}", f"pip install {wanted}")


def _torch() -> Iterator[Check]:
    import torch

    build = torch.version.cuda or torch.version.hip
    made_for = f"CUDA {build}" if torch.version.cuda else f"ROCm {build}" if build else "the CPU"
    value = torch.ones(4, 4) @ torch.ones(4, 4)  # its libraries are there
    assert float(value.sum()) == 64.0, f"a product of ones gives {value.tolist()}"
    text = f"{torch.__version__}, built for {made_for}, {torch.get_num_threads()} threads"
    if build is None and _card_is_here():
        yield Check(
            "torch",
            Verdict.FAIL,
            f"{text}; this machine has a card, which this build does not use",
            f"pip install --force-reinstall torch --index-url {_CUDA}",
        )
    else:
        yield ok("torch", text)


def _card_is_here() -> bool:
    """Whether the system shows a card of NVIDIA's, Windows' Linux included."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _cards() -> Iterator[Check]:
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield from isolated(f"card {number}", partial(_card, number))
    elif torch.backends.mps.is_available():
        why = "losses are summed in float64, which it has not"
        yield ok("cards", f"Apple's (mps) is not supported: {why}; models run on the CPU")
    elif torch.version.cuda is None or not _card_is_here():
        yield ok("cards", "none: models run on the CPU")
    elif hidden in ("", "-1"):
        yield ok("cards", f"hidden by CUDA_VISIBLE_DEVICES={hidden}: models run on the CPU")
    else:
        yield Check(
            "cards",
            Verdict.FAIL,
            f"none can be used: {_why_no_card()}",
            f"update the driver that nvidia-smi shows, or: pip install --force-reinstall torch "
            f"--index-url {_CUDA}",
        )


def _why_no_card() -> str:
    """What CUDA says when it is started."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return " ".join(str(error).split())[:200]
    return "CUDA finds no device"


def _card(number: int) -> Iterator[Check]:
    """One card: its memory, what its matrix units multiply, and whether it really does."""
    import torch

    from mtl_lora_cli.kernels.fp8 import supported

    name, device = f"card {number}", torch.device("cuda", number)
    capability = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    # torch.cuda.is_bf16_supported says yes where bfloat16 is emulated, too.
    brain = capability >= (8, 0)
    square = torch.ones(16, 16, device=device, dtype=torch.bfloat16 if brain else torch.float32)
    assert float((square @ square).sum()) == 4096.0, "a product of ones on it is wrong"
    eight = "yes" if supported(device) else "no"
    if not supported(device) and capability >= (8, 9):
        eight = "no (the card knows it, base_compute: fp8 needs capability 9.0)"
    text = (
        f"{torch.cuda.get_device_name(device)}: {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
        f"capability {capability[0]}.{capability[1]}, bfloat16 {'yes' if brain else 'no'}, "
        f"fp8 {eight}"
    )
    if not brain:
        yield Check(name, Verdict.WARN, text, "mtl-lora train RECIPE dtype=float32")
    elif free < _LITTLE_MEMORY:
        yield Check(name, Verdict.WARN, f"{text}; somebody else uses it", "nvidia-smi")
    else:
        yield ok(name, text)


def _triton() -> Iterator[Check]:
    import torch

    version = _installed("triton")
    if not torch.cuda.is_available():
        yield ok("triton", f"{version or 'not installed'}; kernels run on a card only")
    elif util.find_spec("triton") is None:
        yield Check("triton", Verdict.WARN, "not installed: kernels run as plain torch", "pip install triton")  # fmt: skip
    else:
        importlib.import_module("triton")
        yield ok("triton", f"{version}")


def _deepspeed() -> Iterator[Check]:
    import torch

    on_card = torch.cuda.is_available()
    if not on_card:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    deepspeed = importlib.import_module("deepspeed")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    lacking = [] if compiler else ["a C++ compiler"]
    if shutil.which("ninja") is None and util.find_spec("ninja") is None:
        lacking.append("ninja")
    text = f"{deepspeed.__version__}, compiler {compiler or 'none'}"
    if lacking and not on_card:
        remedies = {"a C++ compiler": "apt-get install g++", "ninja": "pip install ninja"}
        yield Check(
            "deepspeed",
            Verdict.WARN,
            f"{text}; zero_stage 1 to 3 on a CPU compiles with {' and '.join(lacking)}",
            " && ".join(remedies[one] for one in lacking),
        )
    else:
        yield ok("deepspeed", text)


def _bitsandbytes() -> Iterator[Check]:
    """A small tensor to 4 bits and back, on the card where there is one."""
    import torch

    functional = importlib.import_module("bitsandbytes.functional")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    quantised, state = functional.quantize_4bit(values, quant_type="nf4")
    error = float((functional.dequantize_4bit(quantised, state) - values).abs().max())
    text = f"{_installed('bitsandbytes')}: NF4 on {device.type}, largest error {error:.3f} of ±1"
    # The widest step of NF4's sixteen levels is 0.304: its half, and what float32 rounds.
    if error < 0.153:
        yield ok("bitsandbytes", text)
    else:
        yield Check(
            "bitsandbytes",
            Verdict.FAIL,
            f"{text}, expected 0.152 at most",
            "pip install --force-reinstall --no-deps bitsandbytes",
        )


def _liger() -> Iterator[Check]:
    if util.find_spec("liger_kernel") is None:
        yield ok(
            "liger", "not installed, and not needed: only bench --vs packed measures beside it"
        )
        return
    importlib.import_module("liger_kernel")
    yield ok("liger", f"{_installed('liger-kernel')}: one of the rivals of bench --vs packed")


def _extras() -> Iterator[Check]:
    names = [name for name in metadata.metadata(PACKAGE).get_all("Provides-Extra") or () if name != "dev"]  # fmt: skip
    absent = [name for name in names if _missing(_requirements(name))]
    here = ", ".join(name for name in names if name not in absent) or "none"
    text = f"here: {here}"
    if absent:
        text += f"; optional: pip install 'mtl-lora[{','.join(absent)}]'"
    yield ok("extras", text)


def _memory() -> Iterator[Check]:
    import psutil

    found = psutil.virtual_memory()
    text = f"{found.available / GIB:.1f} of {found.total / GIB:.1f} GiB free, {cores()} cores"
    if found.available < _LITTLE_MEMORY:
        yield Check("memory", Verdict.WARN, f"{text}: little for a model", "ps aux --sort=-rss")
    else:
        yield ok("memory", text)


def _folder(name: str, folder: Path) -> Iterator[Check]:
    """Whether a folder, or the one in which it would be made, takes files, and how many."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    where = str(folder.absolute()) + ("" if place == folder.absolute() else " (not there yet)")
    variable = "MTL_LORA_RUNS" if name == "runs folder" else "MTL_LORA_CACHE"
    elsewhere = f"export {variable}=/a/larger/disk"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"mtl-lora")
            file.flush()
    except OSError as error:
        yield Check(name, Verdict.FAIL, f"{where}: cannot be written: {error.strerror}", elsewhere)
        return
    free = shutil.disk_usage(place).free
    text = f"{where}: {free / GIB:.1f} GiB free"
    if free < _NO_DISK:
        yield Check(name, Verdict.FAIL, f"{text}: too little for a checkpoint", elsewhere)
    elif free < _LITTLE_DISK:
        yield Check(name, Verdict.WARN, f"{text}: little for a model", elsewhere)
    else:
        yield ok(name, text)


def _caches() -> Iterator[Check]:
    """What they take; they can be removed at any time."""
    own = cache_folder()
    kept = {"encoded data": own / "encoded", "converted models": own / "models"}
    if util.find_spec("huggingface_hub") is not None:
        from huggingface_hub.constants import HF_HUB_CACHE

        kept["hub"] = Path(HF_HUB_CACHE)
    sizes = [
        f"{what} {sum(file.st_size for _, file in files_of(folder)) / GIB:.2f} GiB in {folder}"
        for what, folder in kept.items()
    ]
    yield ok("caches", "; ".join(sizes))


def _hub() -> Iterator[Check]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in _YES:
            yield ok("hub", f"not asked: {name} is set; models and data come from disk and cache")
            return
    endpoint = os.environ.get("HF_ENDPOINT") or _HUB
    answers: list[str] = []
    # In a thread: a name server that does not answer knows no timeout.
    asking = threading.Thread(target=lambda: answers.append(_asked(endpoint)), daemon=True)
    asking.start()
    asking.join(_HUB_SECONDS)
    reason = answers[0] if answers else f"no answer within {_HUB_SECONDS:.0f} s"
    if not reason:
        yield ok("hub", f"{endpoint} answers")
        return
    yield Check(
        "hub",
        Verdict.WARN,
        f"{endpoint}: {reason}; models and data come from disk and cache only",
        "export HF_HUB_OFFLINE=1 (or HF_ENDPOINT=… for a mirror, HTTPS_PROXY=… for a proxy)",
    )


def _asked(endpoint: str) -> str:
    """Why the hub cannot be had; empty where it answers."""
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=_HUB_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code < 500 else f"answers with {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        return " ".join(str(getattr(error, "reason", error)).split())[:200]


def _variables() -> Iterator[Check]:
    found = {name: value for name, value in os.environ.items() if name.startswith("MTL_LORA_")}
    text = ", ".join(f"{name}={value}" for name, value in sorted(found.items())) or "none set"
    kernels = found.get("MTL_LORA_KERNELS", "auto")
    if kernels not in ("auto", "plain", "triton"):
        yield Check(
            "variables",
            Verdict.WARN,
            f"{text}; MTL_LORA_KERNELS is auto, plain or triton, and counts as plain",
            "unset MTL_LORA_KERNELS",
        )
    else:
        yield ok("variables", text)


def _encoding() -> Iterator[Check]:
    name = (sys.stdout.encoding or "ascii").lower().replace("_", "-")
    if name == "utf-8":
        yield ok("encoding", "output is UTF-8")
    else:
        yield Check(
            "encoding",
            Verdict.WARN,
            f"output is {name}: text may be garbled or refused",
            "export PYTHONUTF8=1",
        )
