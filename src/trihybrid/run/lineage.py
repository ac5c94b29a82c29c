"""Lineage: the hash chain teacher -> stage -> stage -> export.

Each stage leaves one record {stage, parent, recipe, output, seconds, hash}. `parent` and `output` are content
hashes of the model that it started from and of the one that it made, so that a stage can refuse a wrong
parent; `hash` covers the record and the record before it, so that no record can be changed, dropped or moved
without breaking the chain. All hashes are sha256, as 64 lower-case hexadecimal digits.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trihybrid.run.directory import write_json

MODEL_PATTERNS = ("*.safetensors", "config.json", "tokenizer.json")
"""The files of a model folder that decide what the model computes."""


@dataclass(frozen=True)
class LineageRecord:
    """One finished stage.

    Attributes:
        stage: its name, unique in the lineage.
        parent: hash of the model that it started from ("" where it started from nothing).
        recipe: hash of the part of the recipe that decided it.
        output: hash of the model that it made.
        seconds: wall time that it took.
        hash: sha256 of the canonical JSON of {the fields above, "previous": hash of the record before it or
            ""}.
    """

    stage: str
    parent: str
    recipe: str
    output: str
    seconds: float
    hash: str


class Lineage:
    """The ordered records of one run, verified when they are loaded, written atomically at every append.

    Args:
        path: the JSON file; it may not exist yet (an empty lineage).

    Raises:
        ValueError: the file is not a lineage, or its chain is broken; names the record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._records = _load(self.path) if self.path.exists() else []

    @property
    def records(self) -> tuple[LineageRecord, ...]:
        """All records, oldest first."""
        return tuple(self._records)

    def record(self, stage: str) -> LineageRecord | None:
        """The record of a stage, or None where the stage has not finished."""
        return next((record for record in self._records if record.stage == stage), None)

    def append(
        self, stage: str, parent: str, recipe_hash: str, output_hash: str, seconds: float
    ) -> LineageRecord:
        """Record a finished stage and write the file.

        Args:
            stage: a name that the lineage does not hold yet.
            parent: hash of the model that the stage started from; free for the first record (the teacher's
                hash, or "" from scratch), afterwards the output of some earlier record.
            recipe_hash: hash of the part of the recipe that decided the stage.
            output_hash: hash of the model that the stage made.
            seconds: wall time that it took, not negative.

        Raises:
            ValueError: the stage is recorded already, or the parent is no earlier output.
        """
        previous = self._records[-1].hash if self._records else ""
        body: dict[str, Any] = {
            "stage": stage,
            "parent": parent,
            "recipe": recipe_hash,
            "output": output_hash,
            "seconds": float(seconds),
        }
        record = LineageRecord(**body, hash=_record_hash(body, previous))
        _verify(record, self._records, self.path)
        write_json(self.path, {"version": 1, "records": [asdict(item) for item in [*self._records, record]]})
        self._records.append(record)
        return record

    def require_parent(self, stage: str, parent_hash: str, parent_stage: str | None = None) -> None:
        """Refuse to start a stage from a wrong model.

        Args:
            stage: the stage that is about to run (again).
            parent_hash: hash of the model that it is about to start from.
            parent_stage: the stage whose output is wanted; by default the parent of this stage's own record
                where it has one, else the output of the last record.

        Raises:
            ValueError: the hash is not the wanted one, or there is no record to take the wanted one from.
        """
        own = self.record(stage)
        if parent_stage is None and own is not None:
            wanted, source = own.parent, "in its own record"
        else:
            last = self._records[-1] if self._records else None
            before = last if parent_stage is None else self.record(parent_stage)
            if before is None:
                raise ValueError(
                    f"stage {stage!r}: {self.path} holds no record of {parent_stage or 'any stage'} to "
                    "start from; "
                    "run the earlier stages first"
                )
            wanted, source = before.output, f"output of stage {before.stage!r}"
        if parent_hash != wanted:
            raise ValueError(
                f"stage {stage!r}: wrong parent: wanted {wanted} ({source}), found {parent_hash}; "
                "restore that model, or run the earlier stages again in a new run directory"
            )


def hash_json(value: Any) -> str:
    """sha256 of canonical JSON (sorted keys, no spaces, ASCII): equal values give equal hashes.

    Raises:
        ValueError: a number is not finite.  TypeError: a value is not JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def hash_file(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(path: str | Path, patterns: Sequence[str] = MODEL_PATTERNS) -> str:
    """sha256 over the names and contents of the files directly in a folder that match one of the patterns, in
    the order of their names. Other files (a README, an editor's leftovers) do not count.

    Raises:
        ValueError: the folder holds no such file.
    """
    folder = Path(path)
    files = {file.name: file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    if not files:
        raise ValueError(f"{folder}: no file matches {', '.join(patterns)}; give the folder of a saved model")
    return hash_json([[name, hash_file(files[name])] for name in sorted(files)])


def _load(path: Path) -> list[LineageRecord]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != 1:
            raise ValueError(f"version {document['version']!r}, not 1")
        candidates = [LineageRecord(**record) for record in document["records"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: not a lineage file ({error}); restore it, or start a new run directory"
        ) from error
    records: list[LineageRecord] = []
    for record in candidates:
        _verify(record, records, path)
        records.append(record)
    return records


def _verify(record: LineageRecord, earlier: Sequence[LineageRecord], path: Path) -> None:
    where = f"{path}: record {len(earlier)} (stage {record.stage!r})"
    cure = "restore the file, or start a new run directory"
    body = {key: value for key, value in asdict(record).items() if key != "hash"}
    expected = _record_hash(body, earlier[-1].hash if earlier else "")
    if record.hash != expected:
        raise ValueError(f"{where}: broken chain: hash wanted {expected}, found {record.hash}; {cure}")
    if any(other.stage == record.stage for other in earlier):
        raise ValueError(
            f"{where}: this stage is recorded already; rename the stage, or start a new run directory"
        )
    outputs = [other.output for other in earlier]
    if earlier and record.parent not in outputs:
        raise ValueError(
            f"{where}: its parent {record.parent or '(none)'} is no earlier output ({', '.join(outputs)}); "
            f"{cure}"
        )


def _record_hash(body: dict[str, Any], previous: str) -> str:
    return hash_json({**body, "previous": previous})
