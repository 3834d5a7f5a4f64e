"""A script as its syntax tree has it: imports, calls and attributes under the names of the libraries. It is not run."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.errors import InputError

UNKNOWN: Any = object()
"""Stands for a value that is only known when the script runs."""


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        module: it is of.
        name: what of the module; empty for the module itself.
        place: where.
        optional: whether the script goes on without it.
    """

    module: str
    name: str
    place: str
    optional: bool


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        name: of what is called, as ``transformers.TrainingArguments``; a method's begins with a dot.
        arguments: those without a name.
        keywords: those with one; ``**`` is left out.
        place: where.
    """

    name: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    place: str

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def owner(self) -> str:
        """What is before it, as ``AutoTokenizer`` of ``AutoTokenizer.from_pretrained``."""
        return self.name.rpartition(".")[0].rpartition(".")[2]


@dataclass
class Script:
    """What a script says.

    Attributes:
        imports: in order.
        calls: in order.
        attributes: dotted names that are read, by where.
        assigned: dotted targets and values of assignments to attributes, by where.
        shell: command lines of a notebook.
        strings: that are handed to calls by a name.
    """

    imports: list[Import] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)
    assigned: list[tuple[str, str, str]] = field(default_factory=list)
    shell: list[str] = field(default_factory=list)
    strings: set[str] = field(default_factory=set)

    @property
    def words(self) -> set[str]:
        """Every name that is imported, called or read, by its last part, and the modules."""
        found = {part for name in self.attributes for part in name.split(".")}
        found |= {call.last for call in self.calls} | {call.owner for call in self.calls}
        found |= {one.module.partition(".")[0] for one in self.imports}
        return found | {one.name for one in self.imports} | {one.module for one in self.imports}


def read_script(cells: Sequence[tuple[str, str]], name: str) -> Script:
    """Read a script, or the cells of a notebook.

    Args:
        cells: what each is called (empty for a script's only one), and its source.
        name: of the file.

    Raises:
        InputError: it is not Python of today.
    """
    reader = _Reader()
    for label, source in cells:
        text = _without_magics(source, reader.script.shell) if label else source
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            where = ", ".join(filter(None, [label, f"line {line}" if line else ""]))
            reason = getattr(error, "msg", None) or str(error)
            raise InputError(f"{name} is not Python that could be run ({where}: {reason}).") from None
        reader.read(tree, label)
    return reader.script


def _without_magics(source: str, shell: list[str]) -> str:
    """Return a cell without the lines that are IPython's, which are kept in ``shell``."""
    if source.lstrip().startswith("%%"):
        shell.append(source.strip())
        return ""
    lines = []
    for line in source.splitlines():
        bare = line.strip()
        if bare.startswith(("!", "%")):
            shell.append(bare)
            line = line[: len(line) - len(line.lstrip())] + "pass"
        lines.append(line)
    return "\n".join(lines)


class _Reader(ast.NodeVisitor):
    def __init__(self) -> None:
        self.script = Script()
        self._names: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        self._label = ""
        self._optional = 0

    def read(self, tree: ast.Module, label: str) -> None:
        self._label = label
        self.visit(tree)

    def _place(self, node: ast.AST) -> str:
        line = f"line {getattr(node, 'lineno', 0)}"
        return f"{self._label}, {line}" if self._label else line

    def _dotted(self, node: ast.AST) -> str:
        """Return a dotted name under its library's own; empty where it is none."""
        match node:
            case ast.Name(id=name):
                return self._names.get(name, name)
            case ast.Attribute(value=value, attr=attribute):
                return f"{self._dotted(value)}.{attribute}"
            case _:
                return ""

    def _value(self, node: ast.AST) -> Any:
        """Return what an expression comes to, as far as that stands in the script."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in self._values:
                return self._values[name]
            case ast.Attribute():
                return self._dotted(node)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._value(item) for item in items]
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
                return {self._value(key): self._value(value) for key, value in pairs if isinstance(key, ast.Constant)}
            case _:
                return UNKNOWN

    def visit_Try(self, node: ast.Try) -> None:
        caught = {self._dotted(handler.type) if handler.type else "" for handler in node.handlers}
        optional = bool(caught & {"", "ImportError", "ModuleNotFoundError", "Exception"})
        self._optional += optional
        for statement in node.body:
            self.visit(statement)
        self._optional -= optional
        for part in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(part)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._names[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )
            self.script.imports.append(Import(alias.name, "", self._place(node), bool(self._optional)))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or not node.module:
            return
        for alias in node.names:
            self._names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            self.script.imports.append(Import(node.module, alias.name, self._place(node), bool(self._optional)))

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self._value(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._values[target.id] = value
            elif isinstance(target, ast.Attribute):
                self.script.assigned.append((self._dotted(target), self._dotted(node.value), self._place(node)))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self._dotted(node):
            self.script.attributes.setdefault(name, self._place(node))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self._dotted(node.func)
        for keyword in node.keywords:
            self.script.strings |= set(texts(self._value(keyword.value)))
        if name:
            self.script.calls.append(
                Call(
                    name,
                    tuple(self._value(argument) for argument in node.args if not isinstance(argument, ast.Starred)),
                    {keyword.arg: self._value(keyword.value) for keyword in node.keywords if keyword.arg},
                    self._place(node),
                )
            )
        self.generic_visit(node)


def texts(values: Any) -> Iterator[str]:
    """Yield the strings in a value."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from texts(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from texts(value)
