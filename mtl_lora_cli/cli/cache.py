"""`mtl-lora cache` and `cache prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say
from mtl_lora_cli.cli.options import JsonOption
from mtl_lora_cli.cli.table import age, binary_size, table

if TYPE_CHECKING:
    from mtl_lora_cli.runs.kept import Entry


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="What the cache keeps.",
        invoke_without_command=True,
        epilog="Example: mtl-lora cache prune --older-than 30d",
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.callback()(show)
    group.command("prune", epilog="Example: mtl-lora cache prune --size 5GiB")(prune)
    app.add_typer(group, name="cache")


def show(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show the cache: by kind, how many entries, their size, and when they were used last."""
    if context.invoked_subcommand is not None:
        return
    with framed():
        from mtl_lora_cli.runs.kept import GIVEN_UP_ALONE, LIMIT, entries, limit
        from mtl_lora_cli.runs.paths import cache_folder

        found, most = entries(), limit()
        if as_json:
            emit_json(
                {
                    "folder": str(cache_folder()),
                    "limit": most,
                    "limited": list(GIVEN_UP_ALONE),
                    "entries": [_as_json(one) for one in found],
                }
            )
            return
        say(
            f"{cache_folder()}; of its own accord it keeps {binary_size(most)} of encoded data ({LIMIT})"
        )
        if not found:
            say("nothing is kept yet")
            return
        kinds = sorted({one.kind for one in found})
        rows = [_row(kind, [one for one in found if one.kind == kind]) for kind in kinds]
        header = ("kind", "entries", "size", "last used", "longest unused")
        emit(table(header, [*rows, _row("all", found)]))


def prune(
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="What was not used for longest leaves until this is left: 5GiB.",
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than",
            metavar="AGE",
            help="What was not used for so long leaves: 12h, 30d, 8w.",
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", metavar="KIND", help="Only entries of this kind, as `cache` names it."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what was not used for longest; all of it can be made again from recipe and data."""
    with framed():
        from mtl_lora_cli.errors import UsageError
        from mtl_lora_cli.runs.kept import bytes_of, entries, give_up, seconds_of

        if size is None and older_than is None:
            raise UsageError(
                "cache prune: say how much may stay (--size 5GiB), or --older-than 30d"
            )
        most = None if size is None else bytes_of(size, "--size")
        oldest = None if older_than is None else seconds_of(older_than, "--older-than")
        known = sorted({one.kind for one in entries()})
        unknown = [one for one in kind or () if one not in known]
        if unknown:
            raise UsageError(
                f"--kind {unknown[0]}: nothing of that kind is kept; there is {', '.join(known) or 'nothing'}"
            )
        left = give_up(size=most, age=oldest, kinds=tuple(kind or ()))
        if as_json:
            emit_json({"removed": [_as_json(one) for one in left]})
            return
        for one in left:
            say(f"removed: {one.path} ({binary_size(one.bytes)}, last used {age(one.used)} ago)")
        say(f"{len(left)} removed, {binary_size(sum(one.bytes for one in left))}")


def _row(kind: str, found: list[Entry]) -> tuple[str, ...]:
    used = [one.used for one in found]
    size = binary_size(sum(one.bytes for one in found))
    return kind, f"{len(found):,}", size, f"{age(max(used))} ago", age(min(used))


def _as_json(one: Entry) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "path": str(one.path),
        "bytes": one.bytes,
        "used": one.used,
        "finished": one.finished,
    }
