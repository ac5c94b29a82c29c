"""train_gpt.py in one file: a zip archive that Python runs, holding what the training of a compact model needs.

    #!/usr/bin/env python3
    __main__.py             trihybrid.export.entry
    members.json            name -> sha256 of each other member
    recipe.yaml             the recipe, without the seed and the paths of the machine that made it
    trihybrid/code_hash.txt the hash of the package's sources before they were stripped
    trihybrid/**.py         the modules that __main__ reaches, without comments and docstrings

Equal recipes and sources give equal bytes, as long as Python and its zlib are the same: times and order are fixed, and
a recipe's seed and paths do not count. Sources stay sources, since Triton compiles its kernels from them.
"""

import os
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePath

from trihybrid.export.archive import pack
from trihybrid.export.closure import closure, imports, strip
from trihybrid.export.entry import RECIPE
from trihybrid.recipe.compact import CompactRecipe
from trihybrid.recipe.fields import dump_recipe, parse_fields, validate
from trihybrid.run.code import CARRIED, code_hash
from trihybrid.run.directory import sync_folder

PROGRAM = "train_gpt.py"

LEFT_OUT = frozenset(
    {
        "cli",
        "distill",
        "doctor",
        "export",
        "models.anatomy",
        "models.cache",
        "models.checkpoint",
        "models.decoder",
        "models.families",
        "models.gemma4",
        "models.shapes",
        "recipe.execute",
        "recipe.schema",
        "report",
        "surgery",
        "testing",
    }
)
"""What compact training never enters: conversion, reports, commands."""

REQUIREMENTS = {
    "numpy": "numpy",
    "pydantic": "pydantic>=2.7,<3",
    "rich": "rich",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "torch": "torch>=2.11",
    "yaml": "PyYAML",
}
"""Name in an import -> line of requirements.txt, for what a bundle may import when it starts."""

BACKENDS = frozenset({"triton"})
"""Libraries of modules that only a function imports, where they are installed; torch brings them for its GPUs."""


def write_bundle(path: str | Path, recipe_text: str) -> int:
    """Write the bundle of a recipe, atomically, and return its size in bytes.

    Raises:
        ValueError: the text is no compact recipe, or the package cannot be bundled (see `build_bundle`).
    """
    path = Path(path)
    content = build_bundle(recipe_text)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.temporary")
    try:
        temporary.write_bytes(content)
        temporary.chmod(0o755)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return len(content)


def bundle_size(recipe_text: str) -> int:
    """Bytes of the bundle of a recipe: what its code counts under the challenge's limit.

    Raises:
        ValueError: as `write_bundle`.
    """
    return len(build_bundle(recipe_text))


def build_bundle(recipe_text: str) -> bytes:
    """The bundle of a recipe (YAML), shebang line included.

    Raises:
        ValueError: the text is no compact recipe; or a module that is reached needs, when it loads, a room that is left
            out or a library beyond `REQUIREMENTS`.
    """
    return pack({**_code(), RECIPE: portable_recipe(recipe_text)})


def portable_recipe(recipe_text: str) -> str:
    """The recipe that a bundle carries: resolved, with seed 0, and words in the place of paths.

    Seeds are given on the command line, and so is where the data lies. So the program is one for all seeds and
    machines, and tells nothing about the one that it was made on.

    Raises:
        ValueError: not a compact recipe.
    """
    recipe = validate(CompactRecipe, parse_fields(recipe_text.encode("utf-8"), "recipe"), "recipe")
    fields = recipe.model_dump()
    fields["train"]["loop"]["seed"] = 0
    data = fields["data"]
    for name in ("train", "validation"):
        if data[name] not in (None, "builtin"):
            data[name] = f"{name}-data"
    if data["tokenizer"] != "bytes":
        data["tokenizer"] = f"tokenizer{PurePath(data['tokenizer']).suffix}"
    return dump_recipe(validate(CompactRecipe, fields, "recipe"))


@cache
def _code() -> dict[str, str]:
    """Name inside the archive -> text of all but the recipe. Read once: sources do not change while they run."""
    program = (files("trihybrid") / "export" / "entry.py").read_text(encoding="utf-8")
    sources = closure(program, LEFT_OUT)
    _check_libraries(sources)
    texts = {name: strip(text) for name, text in sources.items()}
    return texts | {"__main__.py": strip(program), f"trihybrid/{CARRIED}": f"{code_hash()}\n"}


def _check_libraries(sources: dict[str, str]) -> None:
    for path, text in sources.items():
        package = path.rpartition("/")[0].replace("/", ".")
        for item in imports(text, package):
            library = item.name.partition(".")[0]
            known = {*sys.stdlib_module_names, *REQUIREMENTS, *BACKENDS, "trihybrid"}
            if not item.deferred and library not in known:
                raise ValueError(
                    f"bundle: {path} imports {library} when it loads, which a bundle does without; move that "
                    "import into the function that needs it"
                )
