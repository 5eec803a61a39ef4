"""Rows of a data set on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.file_formats import Rows, fingerprint, renamed
from mtl_lora_cli.data.large_files import LARGE, rows_renamed
from mtl_lora_cli.data.lazy_rows import (
    ArrowRows,
    Lazy,
    Places,
)
from mtl_lora_cli.errors import UsageError, file_problem
from mtl_lora_cli.recipe.source import Source

HUB_TIMEOUT = 10.0  # seconds until the hub counts as out of reach


def read_hub(source: Source, split: str) -> Rows | None:
    if source.splits:
        name = {str(ours): theirs for ours, theirs in source.splits.items()}.get(split)
    else:
        name = split if split in hub_builder(source).info.splits else None
    if name is None:
        return None
    builder = hub_builder(source)
    try:
        dataset = builder.as_dataset(split=name)
    except Exception as error:
        raise UsageError(f"{_hub_name(source)}: {_first_line(error)}") from None
    config = f"[{source.config}]" if source.config is not None else ""
    content = f"{source.hub} {source.config} {builder.hash} {name}"
    rows = _dataset_rows(dataset, f"hub:{source.hub}{config}/{name}", fingerprint(content.encode()))
    if not isinstance(source.columns, Mapping):
        return rows
    names = source.columns
    other = (
        rows_renamed(rows.rows, names, rows.file)
        if isinstance(rows.rows, Lazy)
        else renamed(list(rows.rows), names, rows.file)
    )
    return replace(
        rows, rows=other, fingerprint=fingerprint(f"{content} {source.columns}".encode())
    )


def _dataset_rows(dataset: Any, file: str, content: str) -> Rows:
    """The rows of a `datasets.Dataset`; class labels stay the numbers that they are stored as."""
    table = dataset.data.table
    if table.nbytes > LARGE:
        rows = ArrowRows(table, table.column_names)
        return Rows(rows, file, content, Places(file, len(rows)))
    rows = dataset.to_list()
    if not rows:
        raise file_problem(file, "has no rows, expected at least one")
    return Rows(rows, file, content, [f"{file}, row {number + 1}" for number in range(len(rows))])


def _hub_name(source: Source) -> str:
    config = f" (config '{source.config}')" if source.config is not None else ""
    return f"hub data set '{source.hub}'{config}"


def hub_builder(source: Source) -> Any:
    """A `datasets` builder whose data lie in the local cache, fetched from the hub if need be."""
    hub, name = str(source.hub), _hub_name(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub):
        raise UsageError(f"{name}: expected owner/name")
    if Path(hub).exists():  # `datasets` would read it in place of the hub's
        raise UsageError(f"{name} is also a local path; use source: {{path: {hub}}}")
    try:
        return _fetched(hub, source.config, source.revision)
    except ConnectionError as error:
        advice = "download it elsewhere and use source: {path: FOLDER}"
        raise UsageError(f"cannot reach {name}: {_first_line(error)}; {advice}") from None
    except Exception as error:  # of several libraries, by no single base class
        raise UsageError(f"cannot read {name}: {_first_line(error)}") from None


@lru_cache
def _fetched(hub: str, config: str | None, revision: str | None) -> Any:
    """Raises ConnectionError where the hub does not answer and the cache cannot stand in."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    offline, reason = datasets.config.HF_HUB_OFFLINE, ""
    try:
        HfApi().dataset_info(hub, revision=revision, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ValueError("no such data set or revision, or a token is needed") from None
    except Exception as error:  # the HTTP library's own; which library, depends on the version
        reason = _first_line(error)
        # Else `datasets` tries again for half a minute before it looks into its cache.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        builder = datasets.load_dataset_builder(hub, config, revision=revision)
        builder.download_and_prepare()
    except Exception as error:
        raise ConnectionError(reason) if reason else error from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if reason and revision not in (None, builder.hash):  # the cache does not look at revisions
        raise ConnectionError(f"{reason} and the copy in the cache is of revision {builder.hash}")
    return builder


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
