"""The small language of templates: Jinja texts and expressions, in a sandbox.

Templates come from strangers as files, so they run sandboxed: they read the row that they are
given and change nothing. They must also be the same on every reading, hence no random functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from jinja2 import (
    StrictUndefined,
    TemplateSyntaxError,
    Undefined,
    UndefinedError,
    meta,
    nodes,
)
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from mtl_lora_cli.errors import did_you_mean
from mtl_lora_cli.tasks.printing import PRINTING_FILTERS, NotPrintableError, printable

Path = tuple[str | int, ...]
_MOST_FIELDS = 20  # named in an error
_AS_IT_STANDS = frozenset({"trim", "string", "safe"})  # filters
_WORDS_KEPT = _AS_IT_STANDS | {"lower", "upper", "title", "capitalize"}


class _Generator(CodeGenerator):
    """Code in which what is joined by `~` is printed, and only what is called is a method."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("str_join(map(environment.finalize, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if isinstance(node.node, nodes.Getattr):
            name = nodes.Const(node.node.attr)
            node.node = nodes.Getitem(node.node.node, name, "method")
        super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if node.ctx != "method":
            super().visit_Getitem(node, frame)
            return
        self.write("environment.method(")
        self.visit(node.node, frame)
        self.write(", ")
        self.visit(node.arg, frame)
        self.write(")")


class _Formatter(SandboxedFormatter):
    def convert_field(self, value: Any, conversion: Any) -> Any:
        kept = value if conversion in ("r", "a") else printable(value)
        return super().convert_field(kept, conversion)


class _Environment(ImmutableSandboxedEnvironment):
    """Reads a row's fields before Python's methods, and prints only what is a text or a number."""

    code_generator_class = _Generator
    intercepted_binops = frozenset("%")

    def make_globals(self, d: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
        """One plain dictionary for all templates; Jinja's ChainMap takes half the time of a row."""
        return self.globals

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`basket.items` is the field of that name, where there is one."""
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def method(self, obj: Any, attribute: str) -> Any:
        """What is called in `basket.items()`: the method, whatever fields there are."""
        return super().getattr(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, formatter = value.__self__, _Formatter(self)
        if value.__name__ == "format_map":
            return lambda fields: formatter.vformat(text, (), fields)
        return lambda *values, **named: formatter.vformat(text, values, named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str):
            several = right.values() if isinstance(right, Mapping) else right
            for value in several if isinstance(right, tuple | Mapping) else [right]:
                printable(value)
        return super().call_binop(context, operator, left, right)


_environment = _Environment(
    undefined=StrictUndefined,
    finalize=printable,
    autoescape=False,
    trim_blocks=True,  # a line that holds only {% … %} leaves no empty line behind
    lstrip_blocks=True,
)
del _environment.globals["lipsum"]
del _environment.filters["random"]
_environment.filters |= PRINTING_FILTERS


class Text:
    """A compiled Jinja text, `Review: {{ sentence }}`; call it with the row's variables.

    Attributes:
        names: of the variables that it reads.
        paths: the fields that it reads anywhere, `basket.items` as ("basket", "items").
        printed: those that it prints whatever the row is like.
        plain: those of them that it prints as they stand, but for white space around them.
        kept: those of them whose words it prints, in capitals perhaps.

    Raises:
        ValueError: it is not valid Jinja, or reads no variable and fails all the same.
    """

    def __init__(self, source: str) -> None:
        try:
            tree = _environment.parse(source)
            self.names = _names(tree)
            self.paths = tuple(dict.fromkeys(_paths(tree)))
            printed = list(_printed(tree))
            self.printed = tuple(dict.fromkeys(path for path, _ in printed))
            self.plain = frozenset(path for path, through in printed if through <= _AS_IT_STANDS)
            self.kept = frozenset(path for path, through in printed if through <= _WORDS_KEPT)
            self._template = _environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(_syntax(error, source)) from None
        self._constant: str | None = None
        if not self.names:
            try:
                self._constant = self._template.render()
            except Exception as error:  # whatever the sandbox, a filter or Python has against it
                raise ValueError(explain(error, {})) from None

    def __call__(self, variables: dict[str, Any]) -> str:
        return self._template.render(variables) if self._constant is None else self._constant


class Expression:
    """A compiled Jinja expression, `label - 1`; call it with the row's variables.

    Attributes:
        names, paths: of the variables and of the fields that it reads.
        joined: those whose texts it is, one or several joined by `~`; (): it is something else.

    Raises:
        ValueError: it is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        try:
            self._expression = _environment.compile_expression(source, undefined_to_none=False)
        except TemplateSyntaxError as error:
            raise ValueError(_syntax(error, source)) from None
        self._name = source if source.isidentifier() else ""
        tree = _environment.parse("{{ (" + source + ") }}")
        self.names = _names(tree)
        self.paths = tuple(dict.fromkeys(_paths(tree)))
        self.joined = tuple(_joined(tree))

    def __call__(self, variables: dict[str, Any]) -> Any:
        if self._name in variables:  # `label` is most of all expressions, and Jinja is slow
            return variables[self._name]
        value = self._expression(variables)
        if isinstance(value, Undefined):
            str(value)  # says what is undefined, by raising
        return printable(value) if callable(value) else value


def _names(tree: nodes.Template) -> frozenset[str]:
    """The variables that a template reads; a field may have the name of a function of Jinja's."""
    read = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    functions = read & set(_environment.globals)
    return frozenset(meta.find_undeclared_variables(tree) | functions)


def _path(node: nodes.Node) -> Path | None:
    """`row['a b'].c[0]` as its parts; None for anything else."""
    if isinstance(node, nodes.Name):
        return (node.name,) if node.ctx == "load" else None
    if isinstance(node, nodes.Getattr):
        before, part = _path(node.node), node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        before, part = _path(node.node), node.arg.value
    else:
        return None
    return None if before is None else (*before, part)


def _paths(node: nodes.Node) -> Iterator[Path]:
    """Every field that is read below a node, each as a whole."""
    path = _path(node)
    if path is not None:
        yield path
        return
    for below in node.iter_child_nodes():
        called = isinstance(node, nodes.Call) and below is node.node
        yield from _paths(below.node if called and isinstance(below, nodes.Getattr) else below)


def _printed(tree: nodes.Template) -> Iterator[tuple[Path, frozenset[str]]]:
    """The fields that are printed under no condition, and through which filters."""
    for output in tree.body:
        for shown in output.nodes if isinstance(output, nodes.Output) else ():
            node: nodes.Node | None = shown
            filters = []
            while isinstance(node, nodes.Filter) and node.name not in ("default", "d"):
                filters.append(node.name)
                node = node.node
            path = None if node is None else _path(node)
            if path is not None:
                yield path, frozenset(filters)


def _joined(tree: nodes.Template) -> list[Path]:
    """The fields that an expression joins; none where it does anything else."""
    (output,) = tree.body
    (node,) = output.nodes if isinstance(output, nodes.Output) else (output,)
    parts = node.nodes if isinstance(node, nodes.Concat) else [node]
    paths = [_path(part) for part in parts if not isinstance(part, nodes.Const)]
    return [path for path in paths if path is not None] if None not in paths else []


def value_at(variables: Mapping[str, Any], path: Path) -> Any:
    """What stands at a path; None where there is nothing."""
    value: Any = variables
    for part in path:
        try:
            value = value[part]
        except (LookupError, TypeError):
            return None
    return value


def spelled(path: Path) -> str:
    """A path as a user writes it: `a b` of the row, `basket.items`."""
    parts = path[1:] if path[0] == "row" and len(path) > 1 else path
    return ".".join(map(str, parts))


def explain(error: Exception, row: Mapping[str, Any]) -> str:
    """What went wrong in a text or expression, in the words of the row that it read."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, NotPrintableError):
        function = [name for name, known in _environment.globals.items() if known is error.value]
        if not function:
            return f"{message}; {error.advice(row)}"
        message = f"'{function[0]}' is undefined"
    missing = re.fullmatch(r"'(.+)' is undefined", message)
    if isinstance(error, UndefinedError | NotPrintableError) and missing:
        known = [str(name) for name in row]
        listed = ", ".join(known[:_MOST_FIELDS]) + (", …" if len(known) > _MOST_FIELDS else "")
        near = did_you_mean(missing[1], known)
        return f"the row has no field '{missing[1]}'; it has: {listed or 'no fields'}{near}"
    return message


def _syntax(error: TemplateSyntaxError, source: str) -> str:
    place = f" (line {error.lineno} of the text)" if "\n" in source.strip() else ""
    return f"not valid Jinja: {error.message}{place}"
