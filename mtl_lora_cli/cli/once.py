"""`--task` is given once where it takes one task: the first one would be lost without a word.

Of other options the last one counts, as in most programs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand


class OnceCommand(TyperCommand):
    """A command that refuses `--task a --task b` where `--task` takes one value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click; ends with exit code 2 where an option stands twice."""
        if args and not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for option, times in Counter(order).items():
                if times > 1 and "--task" in option.opts and not option.multiple:
                    ctx.fail(f"--task is given {times} times, expected once.")
        return super().parse_args(ctx, args)


def take_each_once(app: typer.Typer) -> None:
    """Have all commands of an app, and of the groups in it, refuse an option that is given twice."""
    for command in app.registered_commands:
        command.cls = OnceCommand
    for group in app.registered_groups:
        if group.typer_instance is not None:
            take_each_once(group.typer_instance)
