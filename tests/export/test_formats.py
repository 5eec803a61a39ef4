"""What is known of formats and metrics before anything large is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.formats import FORMATS, Format, export_format, find_format

CODE = """
import sys
import mtl_lora_cli.export.formats, mtl_lora_cli.metrics
from mtl_lora_cli.metrics import METRICS
assert len(METRICS) > 9
print([one for one in ("torch", "scipy", "sklearn", "transformers", "gguf", "peft") if one in sys.modules])
"""


def test_declarations_load_nothing_large() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_each_format_is_known_by_a_file_of_its_own() -> None:
    assert list(FORMATS) == ["merged", "peft", "gguf", "gguf-merged", "onnx"]
    assert len({kind.marker for kind in FORMATS.values()}) == len(FORMATS)
    assert [str(kind().root) for kind in FORMATS.values()] == [
        *("merged", "exported", "exported/gguf", "exported/gguf-merged", "exported/onnx")
    ]
    with pytest.raises(UsageError, match="received 'guf'; did you mean 'gguf'"):
        find_format("guf")


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"name": None}, "the format Own has no name"),
        ({"name": "My Own"}, "'My Own' cannot name a format"),
        ({"write": Format.write}, "the format 'own' has no write"),
        ({"name": "peft"}, "a format 'peft' is there already"),
    ],
)
def test_a_declaration_that_cannot_be(attributes: dict[str, object], said: str) -> None:
    whole = {"name": "own", "about": "x", "marker": "own.bin", "write": len, "read": len}
    with pytest.raises(UsageError, match=said):
        export_format(type("Own", (Format,), {**whole, **attributes}))
    assert "own" not in FORMATS
