"""The directory of one execution: where each part lies, and how a file gets there whole.

A run directory holds

    recipe.yaml     the resolved recipe          data/                   token shards
    lineage.json    the hash chain of stages     checkpoints/<stage>/    resumable states of a stage
    log.jsonl       one row a step               teacher/ operated/      model folders, one a stage
    results.json    what was measured            aligned/ matched/ ...
    samples.json    generated text               plan.json, report.html

and one of a compact model, instead of the folders of stages and the plan,

    model/          weights after training       model.artifact          the quantised model, one file
    ledger.json     the account of its bytes     summary.json            machine, time, broken promises

Files are replaced, never edited: a reader sees the old one or the new one, also after a crash.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_RESERVED = ("data", "checkpoints")


class RunDirectory:
    """The parts of one run, by name.

    Args:
        path: the run's root folder.
        create: make the root, `data/` and `checkpoints/` when they are missing. With False the root must
            exist, and nothing is written (for readers such as a report).

    Raises:
        ValueError: the path is a file, or does not exist and `create` is False.
    """

    def __init__(self, path: str | Path, create: bool = True) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"run directory: {self.path} is a file; give a folder, or a path that does not exist yet"
            )
        if create:
            self.data.mkdir(parents=True, exist_ok=True)
            (self.path / "checkpoints").mkdir(exist_ok=True)
        elif not self.path.is_dir():
            raise ValueError(f"run directory: {self.path} does not exist; give the folder of a run")

    @property
    def recipe(self) -> Path:
        """The resolved recipe, `recipe.yaml`."""
        return self.path / "recipe.yaml"

    @property
    def lineage(self) -> Path:
        """The hash chain of the stages, `lineage.json`."""
        return self.path / "lineage.json"

    @property
    def log(self) -> Path:
        """The log of all stages, `log.jsonl`."""
        return self.path / "log.jsonl"

    @property
    def results(self) -> Path:
        """What was measured, `results.json`."""
        return self.path / "results.json"

    @property
    def samples(self) -> Path:
        """Generated text, `samples.json`."""
        return self.path / "samples.json"

    @property
    def plan(self) -> Path:
        """The surgery's plan, `plan.json`."""
        return self.path / "plan.json"

    @property
    def report(self) -> Path:
        """The page about this run, `report.html`."""
        return self.path / "report.html"

    @property
    def data(self) -> Path:
        """The folder of token shards, `data/`."""
        return self.path / "data"

    def checkpoints(self, stage: str) -> Path:
        """The folder of a stage's checkpoints, `checkpoints/<stage>/`; made by whoever saves the first one.

        Raises:
            ValueError: the stage's name is not a plain file name.
        """
        return self.path / "checkpoints" / _plain_name("stage", stage)

    def model(self, name: str) -> Path:
        """The folder of a model, such as `teacher`, `operated`, `aligned` or `matched`; made by whoever saves
        it, so that its existence says that the model is there.

        Raises:
            ValueError: the name is not a plain file name, or belongs to another part.
        """
        if name in _RESERVED:
            raise ValueError(
                f"model: the name {name!r} belongs to another part of a run directory; choose another"
            )
        return self.path / _plain_name("model", name)


def write_text(path: str | Path, text: str) -> None:
    """Replace the file at `path` by `text` (UTF-8), atomically and durably: temporary file, fsync, rename,
    fsync of the folder. A crash leaves the old file or the new one. The parent folder must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.temporary")
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Replace the file at `path` by `value` as indented JSON, like `write_text`.

    Raises:
        ValueError: the value is not plain JSON (an object of another type, or a number that is not finite);
            the file that was there stays.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not plain JSON ({error}); use dicts, lists, strings, finite numbers, None"
        ) from error
    write_text(path, text + "\n")


def sync_folder(path: str | Path) -> None:
    """Make the names in a folder durable (a rename is safe against power loss only after this)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain_name(field: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{field}: {name!r} is not a plain name; use letters, digits, '_', '-' and '.', "
            "beginning with a letter or a digit"
        )
    return name
