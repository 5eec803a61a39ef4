"""Finding templates by name, path and entry point."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks import registry
from mtl_lora_cli.tasks.registry import find_template, template_names

MINE = "description: mine\nprompt: '{{ q }}'\nanswer: '{{ a }}'\n"


class Point:
    """Stands for an installed package's entry point."""

    def __init__(self, name: str, target: object) -> None:
        self.name, self.value, self.target = name, f"plugin:{name}", target

    def load(self) -> object:
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


def install(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    def entry_points(*, group: str) -> tuple[Point, ...]:
        assert group == "mtl_lora.templates"
        return points

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_full_name_and_last_part_mean_the_same() -> None:
    full, path, template = find_template("glue/sst2", None)
    assert (full, path.name) == ("glue/sst2", "sst2.yaml")
    assert find_template("sst2", None) == (full, path, template)


def test_a_path_starts_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(MINE)
    name, path, template = find_template("tasks/mine.yaml", tmp_path)
    assert (name, path) == ("tasks/mine.yaml", tmp_path / "tasks" / "mine.yaml")
    assert template.description == "mine"


def test_a_path_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find_template("mine.yaml", tmp_path)
    assert caught.value.lines == [f"{tmp_path}/mine.yaml: no such template file"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bolq", "unknown template 'bolq'; did you mean 'boolq'?"),
        ("glue/sst-2", "unknown template 'glue/sst-2'; did you mean 'glue/sst2'?"),
        ("zzzzzz", "unknown template 'zzzzzz'; `mtl-lora tasks` lists them"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_template(name, None)
    assert caught.value.lines == [message]


def test_a_last_part_that_two_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(MINE)
    monkeypatch.setattr(registry, "bundled", lambda name: tmp_path)
    assert list(template_names()) == ["a/mine", "b/mine"]
    with pytest.raises(UsageError) as caught:
        find_template("mine", None)
    assert caught.value.lines == [
        "the template 'mine' could be a/mine or b/mine; write its full name"
    ]


def test_installed_packages_bring_files_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.yaml").write_text(MINE)
    (tmp_path / "sst2.yaml").write_text(MINE)
    install(
        monkeypatch,
        Point("solo", tmp_path / "one.yaml"),
        Point("shop", lambda: str(tmp_path)),
    )
    assert find_template("solo", None)[:2] == ("solo", tmp_path / "one.yaml")
    assert find_template("shop/one", None)[:2] == ("shop/one", tmp_path / "one.yaml")
    assert find_template("one", None)[0] == "shop/one"
    assert find_template("sst2", None)[0] == "glue/sst2"  # bundled names come first
    with pytest.raises(UsageError, match="did you mean 'shop/one'"):
        find_template("shop/onne", None)


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("broken", ImportError("no module named 'lost'")))
    with pytest.raises(UsageError) as caught:
        find_template("anything", None)
    assert caught.value.lines == [
        "the installed templates 'broken' (plugin:broken) cannot be loaded: "
        "ImportError: no module named 'lost'"
    ]
