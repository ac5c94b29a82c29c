"""The code of an exported folder, made from the package's own sources: which files, and where transformers begins."""

import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path

from trihybrid import __version__
from trihybrid.export.folder.flatten import flatten
from trihybrid.models.families import family_of_student

HEADER = f"""{{path}} of trihybrid {__version__} (Apache-2.0), written by `trihybrid export`.
Change the package and export again rather than this file."""

KERNELS = "trihybrid.ops.wkv7.triton"


def auto_map(model_type: str) -> dict[str, str]:
    """What `config.json` tells transformers' Auto classes: name of a class -> file and class in the folder.

    Raises:
        ValueError: not the model type of a student.
    """
    classes = _classes(model_type)
    roots = _roots(model_type)
    return {name: f"{roots[kind.__module__]}.{kind.__name__}" for name, kind in classes.items()}


@cache
def code_files(model_type: str) -> dict[str, str]:
    """File name -> text of all code that a student of this model type needs beside torch and transformers. Read once:
    sources do not change while they run.

    Raises:
        ValueError: not the model type of a student, or sources that cannot be laid flat (see `flatten`).
    """
    stand_in = (files("trihybrid") / "export" / "folder" / "kernels.py").read_text(encoding="ascii")
    return flatten(_roots(model_type), {KERNELS: stand_in}, HEADER)


def changed_files(folder: Path, model_type: str) -> list[str]:
    """Names of the Python files in a folder that are not what this version writes: changed, missing or more."""
    made = {name: hashlib.sha256(text.encode()).digest() for name, text in code_files(model_type).items()}
    found = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.glob("*.py")}
    return sorted(name for name in made.keys() | found.keys() if made.get(name) != found.get(name))


def _roots(model_type: str) -> dict[str, str]:
    """Modules of the classes that transformers asks for -> the names that it expects files to have."""
    classes = _classes(model_type)
    names = {classes["AutoConfig"].__module__: f"configuration_{model_type}"}
    return names | {classes["AutoModelForCausalLM"].__module__: f"modeling_{model_type}"}


def _classes(model_type: str) -> dict[str, type]:
    student = family_of_student(model_type).student
    return {
        "AutoConfig": student.config_class,
        "AutoModel": student.decoder,
        "AutoModelForCausalLM": student,
    }
