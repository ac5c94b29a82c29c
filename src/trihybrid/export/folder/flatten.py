"""Modules of the package as files that lie side by side and import each other relatively.

transformers loads such files from a model's folder, and finds what they need by looking for lines `from .name import`.
So packages become parts of names (`mixers/rwkv7/mixer.py` is `trihybrid_mixers_rwkv7_mixer.py`), a package's own module
is the file without `__init__`, and no import of the package may stay absolute. Sources keep their prose: somebody has
to trust them.
"""

import ast
import sys
from collections.abc import Mapping

from trihybrid.export.closure import PACKAGE, closure, imports

LIBRARIES = frozenset({"torch", "transformers"})
"""All that is installed where a folder is loaded."""


def flatten(roots: Mapping[str, str], stand_ins: Mapping[str, str], header: str) -> dict[str, str]:
    """Everything that some modules need, as file name -> text, sorted.

    Args:
        roots: dotted name of a module -> what its file is called, without `.py`.
        stand_ins: dotted name of a module -> the text that takes the place of its own.
        header: a comment put before each file, in which `{path}` is the source's path in the package.

    Raises:
        ValueError: a module needs a library beyond `LIBRARIES` when it loads, or imports a module of the package in a
            form that transformers does not follow; names the file and the line.
    """
    program = "".join(f"import {name}\n" for name in roots)
    sources = closure(program, packages=False, stand_ins=stand_ins)
    names = {path: _dotted(path) for path in sources}
    flat = {name: roots.get(name, name.replace(".", "_")) for name in names.values()}
    if len(set(flat.values())) < len(flat):
        raise ValueError(f"bundle: two modules would have one file name among {sorted(flat.values())}")
    files = {}
    for path, text in sources.items():
        _check_libraries(path, text)
        comment = "".join(f"# {line}\n" for line in header.format(path=path).splitlines())
        files[f"{flat[names[path]]}.py"] = comment + _relative(path, text, flat)
    return dict(sorted(files.items()))


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _check_libraries(path: str, text: str) -> None:
    for item in imports(text, _dotted(path).rpartition(".")[0]):
        library = item.name.partition(".")[0]
        if library not in {*sys.stdlib_module_names, *LIBRARIES, PACKAGE}:
            raise ValueError(
                f"bundle: {path} imports {library}, which a folder of a student does without; give the module a "
                "stand-in, or keep what needs it out of the model"
            )


def _relative(path: str, text: str, flat: Mapping[str, str]) -> str:
    """A source with its imports of the package made relative, in place; all else is left as it stands."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(a.name.partition(".")[0] == PACKAGE for a in node.names):
            raise _unfollowed(path, node)
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if not node.level and module.partition(".")[0] != PACKAGE:
            continue
        modules = any(f"{module}.{alias.name}" in flat for alias in node.names)
        line = lines[node.lineno - 1]
        absolute = f"from {module} import"
        if node.level or modules or module not in flat or not line.lstrip().startswith(absolute):
            raise _unfollowed(path, node)
        lines[node.lineno - 1] = line.replace(absolute, f"from .{flat[module]} import", 1)
    return "".join(lines)


def _unfollowed(path: str, node: ast.stmt) -> ValueError:
    return ValueError(
        f"bundle: {path}, line {node.lineno}: `{ast.unparse(node)}` is followed by nobody in a flat folder; write "
        "`from module import names`, of a module that is reached, with names that are no modules"
    )
