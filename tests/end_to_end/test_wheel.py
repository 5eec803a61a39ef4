"""What a user installs holds the recipes and templates, and finds them from anywhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network."""
    for module in ("hatchling", "pip"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"building a wheel needs {module}, which is not installed")
    target = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", target)
    built = subprocess.run(
        [sys.executable, "-m", "pip", *build, REPOSITORY],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = target.glob("mtl_lora-*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it would be installed."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_recipes_and_templates_stand_inside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    expected = {
        path.relative_to(REPOSITORY).as_posix(): path.read_bytes()
        for folder in ("recipes", "data_templates")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and path.suffix in (".yaml", ".jsonl")
    }
    assert expected
    for name, content in expected.items():
        assert inside.get(f"mtl_lora_cli/bundled/{name}") == content, name
    assert all(not name.startswith(("tests/", "docs/")) for name in inside)
    assert any(name.endswith("entry_points.txt") for name in inside)
    assert "mtl_lora_cli/py.typed" in inside


def test_the_source_archive_leaves_the_study_out(tmp_path: Path) -> None:
    built = (
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--target",
        "sdist",
        "--directory",
        tmp_path,
    )
    subprocess.run(built, cwd=REPOSITORY, capture_output=True, check=True, timeout=120)
    (path,) = tmp_path.glob("mtl_lora-*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CONTRIBUTING.md", "Makefile", "docs/study.md"} <= inside
    assert not any(name.startswith("docs/study/") for name in inside)


def test_they_are_found_from_any_folder(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import mtl_lora_cli\n"
        "from mtl_lora_cli.recipe.load import find_recipe\n"
        "from mtl_lora_cli.tasks.registry import template_names\n"
        "print(mtl_lora_cli.__file__)\n"
        "print(find_recipe('real-small'))\n"
        "print(template_names()['glue/sst2'])\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    for line in finished.stdout.splitlines():
        assert Path(line).is_relative_to(unpacked)
        assert Path(line).is_file()


def test_the_wheel_describes_itself(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("mtl_lora-*.dist-info")
    text = (metadata / "METADATA").read_text(encoding="utf-8")
    assert "Name: mtl-lora\n" in text
    assert "Requires-Python: >=3.11" in text
    assert "Requires-Dist: torch>=2.11" in text
    assert list(metadata.rglob("LICENSE"))
    entries = (metadata / "entry_points.txt").read_text(encoding="utf-8")
    assert "mtl-lora = mtl_lora_cli.cli.main:main" in entries
