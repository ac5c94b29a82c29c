"""English that every Python carries: the text behind the source "builtin", so that a demo needs no download.

Two parts: the language reference that `help()` prints, and the long docstrings of the standard library. The
library's source files are parsed, never imported, so nothing of theirs runs.
"""

import ast
import inspect
import logging
import sysconfig
import warnings
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

logger = logging.getLogger(__name__)

SHORTEST_DOCSTRING = 200  # characters; shorter ones are mostly one-line summaries

# Modules with much prose for the time of parsing them; every Python from 3.11 to 3.14 has them all.
# fmt: off
MODULES = (
    "abc", "argparse", "ast", "asyncio", "base64", "bdb", "bisect", "bz2", "cmd", "code", "codecs",
    "codeop", "collections", "compileall", "concurrent", "configparser", "contextlib", "copy", "csv",
    "ctypes", "dataclasses", "dbm", "difflib", "dis", "doctest", "email", "enum", "filecmp", "fileinput",
    "fnmatch", "fractions", "ftplib", "functools", "getopt", "getpass", "glob", "graphlib", "gzip",
    "hashlib", "heapq", "hmac", "http", "imaplib", "importlib", "inspect", "io", "ipaddress", "json",
    "keyword", "linecache", "locale", "logging", "lzma", "mimetypes", "numbers", "operator", "optparse",
    "os", "pathlib", "pdb", "pickle", "pickletools", "pkgutil", "platform", "plistlib", "poplib", "profile",
    "pstats", "py_compile", "pyclbr", "queue", "quopri", "random", "re", "rlcompleter", "runpy", "sched",
    "secrets", "selectors", "shelve", "shutil", "smtplib", "socket", "socketserver", "sqlite3", "ssl",
    "statistics", "string", "subprocess", "sysconfig", "tempfile", "textwrap", "threading", "timeit",
    "tkinter", "trace", "traceback", "turtle", "types", "typing", "unittest", "urllib", "uuid", "venv",
    "warnings", "wave", "weakref", "wsgiref", "xml", "xmlrpc", "zipapp", "zipfile", "zipimport",
)
# fmt: on


def python_documentation() -> list[str]:
    """The documents: every help topic, then every docstring of `MODULES` longer than `SHORTEST_DOCSTRING`.

    Returns:
        Distinct texts (whitespace apart), always in the same order for the same Python; about 1.4 MB in
        UTF-8.

    Modules that this installation lacks are left out, with one log line that names them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents = [topics[name] for name in sorted(topics)]
    missing = []
    for module in MODULES:
        files = _source_files(library, module)
        if not files:
            missing.append(module)
        for file in files:
            documents.extend(_docstrings(file))
    if missing:
        logger.warning("builtin text: no source of %s under %s, left out", ", ".join(missing), library)
    distinct: dict[str, str] = {}
    for document in documents:
        distinct.setdefault(" ".join(document.split()), document)
    distinct.pop("", None)
    return list(distinct.values())


def _source_files(library: Path, module: str) -> list[Path]:
    """The module's own file, or the files of the package without its tests, sorted."""
    if (library / f"{module}.py").is_file():
        return [library / f"{module}.py"]
    package = library / module
    return sorted(
        file for file in package.rglob("*.py") if not {"test", "tests"} & set(file.relative_to(package).parts)
    )


@cache
def _docstrings(file: Path) -> tuple[str, ...]:
    """The long docstrings of one source file: its module, classes and functions. Kept, since parsing the library takes
    seconds and a corpus asks for the documents several times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a SyntaxWarning about somebody else's escapes is no news here
        tree = ast.parse(file.read_bytes(), filename=str(file))
    found = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None and len(cleaned := inspect.cleandoc(docstring)) > SHORTEST_DOCSTRING:
                found.append(cleaned)
        # Most nodes are expressions, and those hold no definitions. Reversed: in the order of the source.
        children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        pending.extend(reversed(children))
    return tuple(found)
