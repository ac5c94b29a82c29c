"""The laws of the package as a whole: what it declares, the one-way order of its rooms, and what no source may hold."""

import ast
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trihybrid

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "trihybrid"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="ascii"))["project"]

# Imports run one way: a room imports from earlier lines of this table only, never from its own line's siblings.
ORDER = (
    ("ops", "data", "storage"),
    ("mixers",),
    ("models",),
    ("surgery", "compress", "testing"),
    ("infer",),
    ("evaluate",),
    ("run",),
    ("train",),
    ("distill", "pretrain"),
    ("recipe",),
    ("export", "report", "doctor"),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# What the order would allow, and the design does not: mixers are tensors only, and training knows no task.
FORBIDDEN = {("mixers", "data"), ("mixers", "storage"), ("train", "data")}
# Operators and mixers need torch, and nothing else that has to be there.
THIRD_PARTIES = {"ops": {"torch", "triton", "fla"}, "mixers": {"torch"}}

UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_NAMES = {"eval", "exec"}
UNSAFE_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("os", "environ"),
    ("os", "environb"),
    ("os", "getenv"),
    ("os", "putenv"),
}
# Import name -> distribution, where they differ. Triton comes with torch.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "fla": "fla-core",
    "lm_eval": "lm-eval",
    # Parts of what we declare: torch brings its own triton, transformers cannot be imported without the hub.
    "triton": "torch",
    "huggingface_hub": "transformers",
}


def room_of(path: Path) -> str:
    """The room that a source belongs to; "" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all that a source imports, inside functions too; `package` is the package that
    it lies in. `from a import b` gives a.b, which is right when b is a module and harmless when it is not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def wrong_imports(text: str, room: str, package: str) -> list[str]:
    """What breaks the order of the rooms in one source."""
    found = []
    for line, name in imports(ast.parse(text), package):
        top, *rest = name.split(".")
        if top == "trihybrid":
            other = rest[0] if rest and rest[0] in LEVEL else room
            if other != room and (LEVEL[other] >= LEVEL[room] or (room, other) in FORBIDDEN):
                found.append(f"line {line}: {room} imports {other}")
        elif room in THIRD_PARTIES and top not in sys.stdlib_module_names | THIRD_PARTIES[room]:
            found.append(f"line {line}: {room} imports {top}")
    return found


def unsafe(text: str) -> list[str]:
    """What could run foreign code or reads settings from the environment in one source."""
    tree = ast.parse(text)
    found = []
    for line, name in imports(tree, "trihybrid"):
        if name.split(".")[0] in UNSAFE_MODULES or tuple(name.split(".")) in UNSAFE_ATTRIBUTES:
            found.append(f"line {line}: {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNSAFE_NAMES:
            found.append(f"line {node.lineno}: {node.func.id}()")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in UNSAFE_ATTRIBUTES:
                found.append(f"line {node.lineno}: {node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(f"line {node.value.lineno}: allow_pickle")
    return found


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).parent.parts)


def test_every_room_is_in_the_order() -> None:
    assert {room_of(path) for path in SOURCES} - {""} <= set(LEVEL)


def test_imports_run_one_way() -> None:
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in SOURCES
        if room_of(path) and (found := wrong_imports(path.read_text(), room_of(path), package_of(path)))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("text", "room", "package", "wrong"),
    [
        ("import trihybrid.models.cache", "mixers", "trihybrid.mixers", "line 1: mixers imports models"),
        (
            "from trihybrid.compress import codec",
            "surgery",
            "trihybrid.surgery",
            "line 1: surgery imports compress",
        ),
        ("from trihybrid import distill", "train", "trihybrid.train", "line 1: train imports distill"),
        ("def f():\n    from ..train import loop", "run", "trihybrid.run", "line 2: run imports train"),
        ("from ...mixers.state import S", "ops", "trihybrid.ops.wkv7", "line 1: ops imports mixers"),
        ("from trihybrid.data import Batch", "train", "trihybrid.train", "line 1: train imports data"),
        ("import numpy as np", "ops", "trihybrid.ops", "line 1: ops imports numpy"),
        (
            "from transformers import Cache",
            "mixers",
            "trihybrid.mixers",
            "line 1: mixers imports transformers",
        ),
        ("from trihybrid import __version__\nimport math", "ops", "trihybrid.ops", None),
        ("from .state import State\nfrom trihybrid.ops import backend", "mixers", "trihybrid.mixers", None),
        ("from . import plots", "report", "trihybrid.report", None),
    ],
)
def test_the_order_is_read_right(text: str, room: str, package: str, wrong: str | None) -> None:
    assert wrong_imports(text, room, package) == ([] if wrong is None else [wrong])


def test_nothing_unsafe_in_the_sources() -> None:
    assert {str(path): found for path in SOURCES if (found := unsafe(path.read_text()))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import os\nos.environ['A']",
        "from os import getenv",
        "import yaml\nyaml.load(f)",
        "numpy.load(f, allow_pickle=True)",
    ],
)
def test_what_is_unsafe_is_seen(text: str) -> None:
    assert len(unsafe(text)) == 1


def test_what_is_safe_is_not_seen() -> None:
    assert unsafe("model.eval()\ntorch.compile(f)\nyaml.safe_load(f)\nload_file(p)") == []


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_sources_are_short_and_ascii(folder: str) -> None:
    """A file is one idea; 400 lines is where it has become two."""
    contents = {str(path.relative_to(ROOT)): path.read_bytes() for path in (ROOT / folder).rglob("*.py")}
    assert [name for name, content in contents.items() if not content.isascii()] == []
    lines = {name: content.count(b"\n") for name, content in contents.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def requirements() -> dict[str, Requirement]:
    texts = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in texts}


def test_every_third_party_that_is_imported_is_declared() -> None:
    imported = {
        name.split(".")[0]
        for path in SOURCES
        for _, name in imports(ast.parse(path.read_text()), package_of(path))
    }
    third_parties = imported - sys.stdlib_module_names - {"trihybrid"}
    undeclared = {
        name
        for name in third_parties
        if canonicalize_name(DISTRIBUTIONS.get(name, name)) not in requirements()
    }
    assert undeclared == set()


def test_the_version_is_one() -> None:
    assert PROJECT["version"] == trihybrid.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="ascii")
    assert re.search(r"^## \[(.+?)\]", changelog, re.MULTILINE)[1] == trihybrid.__version__


def test_the_constraint_on_torch_is_exact_and_allowed() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="ascii").splitlines()
    (pin,) = (Requirement(line) for line in lines if line and not line.startswith("#"))
    (specifier,) = pin.specifier
    assert (pin.name, specifier.operator) == ("torch", "==")
    assert requirements()["torch"].specifier.contains(specifier.version)


def test_the_makefile_tests_the_lower_bound_of_transformers() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="ascii")
    lowest = re.search(r"^LOWEST_TRANSFORMERS := (.+)$", makefile, re.MULTILINE)[1]
    allowed = requirements()["transformers"].specifier
    (bound,) = (part.version for part in allowed if part.operator == ">=")
    assert allowed.contains(lowest)
    assert lowest in (bound, f"{bound}.0")


def test_the_licence_is_there_and_is_the_one_that_is_declared() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="ascii")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_the_command_exists() -> None:
    module, function = PROJECT["scripts"]["trihybrid"].split(":")
    path = ROOT / "src" / Path(*module.split(".")) / "__init__.py"
    assert path.exists(), f"pyproject.toml names {path}, which is not there"
    defined = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert function in defined


def test_continuous_integration_runs_what_the_readme_names() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="ascii").splitlines()[-1] == "make test"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="ascii"), re.MULTILINE)
    assert {"test", "demo", "setup", "lint", "clean"} <= set(targets)
