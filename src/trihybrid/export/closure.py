"""Which modules of the package a program needs, found by reading sources, and those sources without their prose.

Nothing is imported: a module that could not run here is found all the same.
"""

import ast
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

_logger = logging.getLogger(__name__)

PACKAGE = "trihybrid"


@dataclass(frozen=True)
class Import:
    """One import in a source.

    Attributes:
        name: absolute dotted name; `from a import b` gives a.b, whether b is a module or not.
        deferred: it stands inside a function, so that it happens when that runs and not when the module loads.
    """

    name: str
    deferred: bool


def closure(
    source: str,
    left_out: frozenset[str] = frozenset(),
    packages: bool = True,
    stand_ins: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The modules of the package that a program reaches, imports inside functions included.

    Args:
        source: text of the program, outside of the package.
        left_out: rooms (`surgery`) and packages (`models.gemma4`) that the program never enters. A function that
            imports one of them stays, and fails if it is called.
        packages: whether the packages above a module count as modules, as they do to Python; not where modules will
            lie side by side in one folder.
        stand_ins: dotted name of a module -> the text that takes the place of its own, and is followed instead.

    Returns:
        Path inside the archive ("trihybrid/ops/attention.py") -> source text, sorted.

    Raises:
        ValueError: a module that is reached imports one of `left_out` when it loads; names the chain of imports.
    """
    found: dict[str, tuple[str, str]] = {}
    pending = [("", PACKAGE, item) for item in imports(source, "")]
    while pending:
        importer, package, item = pending.pop()
        for name in _modules(item.name) if packages else _modules(item.name)[-1:]:
            if name in found:
                continue
            if any(f"{name}.".startswith(f"{PACKAGE}.{room}.") for room in left_out):
                if not item.deferred:
                    raise ValueError(
                        f"bundle: {importer or 'the program'} imports {name} when it loads, which a bundle leaves out; "
                        "move that import into the function that needs it"
                    )
                _logger.info("bundle: %s is left out, which a function of %s imports", name, importer)
                continue
            path, text = _read(name)
            text = (stand_ins or {}).get(name, text)
            found[name] = (path, text)
            package = name if path.endswith("/__init__.py") else name.rpartition(".")[0]
            pending.extend((name, package, inner) for inner in imports(text, package))
    return dict(sorted(found.values()))


def imports(source: str, package: str) -> Iterator[Import]:
    """All imports of a source that lies in `package`, in no particular order; those for type checkers only are not.

    Raises:
        SyntaxError: the source is not Python.
    """
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while pending:
        node, deferred = pending.pop()
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from (Import(f"{base}.{alias.name}", deferred) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending.extend((child, deferred) for child in node.orelse)
        else:
            inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            pending.extend((child, inside) for child in _statements(node))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """What stands in a statement's blocks, clauses included: an expression holds no import."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        yield from getattr(node, field, ())


def strip(source: str) -> str:
    """The same program without comments and docstrings, as the running Python prints its syntax tree.

    Bare strings in the bodies of modules, classes, functions and blocks go; all else is kept, annotations too
    (pydantic and dataclasses read them).

    Raises:
        SyntaxError: the source is not Python.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        kept = [statement for statement in body if not _is_text(statement)]
        node.body = kept if kept or isinstance(node, ast.Module) else [ast.Pass()]  # type: ignore[attr-defined]
    text = ast.unparse(tree)
    compile(text, "stripped", "exec", dont_inherit=True)
    return f"{text}\n" if text else ""


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _modules(name: str) -> list[str]:
    """The modules that importing a dotted name loads: the packages on the way, and itself where it is a module."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return []
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return [module for module in names if _find(module) is not None]


def _find(name: str) -> tuple[str, Traversable] | None:
    """(path inside the archive, file) of a module of the package, or None."""
    place = files(PACKAGE)
    parts = name.split(".")[1:]
    folder = place.joinpath(*parts) if parts else place
    inner = "/".join([PACKAGE, *parts])
    if (folder / "__init__.py").is_file():
        return f"{inner}/__init__.py", folder / "__init__.py"
    if not parts:
        return None
    file = place.joinpath(*parts[:-1], f"{parts[-1]}.py")
    return (f"{inner}.py", file) if file.is_file() else None


def _read(name: str) -> tuple[str, str]:
    found = _find(name)
    assert found is not None
    path, file = found
    return path, file.read_text(encoding="utf-8")
