"""What a run folder holds, read and checked once, so that the page never meets a half-written or misshapen file.

Every part is optional: a part that is missing is None (or empty) and the page names it as not measured.
"""

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trihybrid.run import RunDirectory, read_log

_logger = logging.getLogger(__name__)

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """The parts of one run folder.

    recipe: text of recipe.yaml. lineage: records, oldest first. training: stage -> train rows of log.jsonl by rising
    step. plan: plan.json. results: stage -> its row of results.json. samples: rows of samples.json. summary:
    summary.json, empty when it is missing. compact: results.json of a run that trained a compact model, where it is one
    object. ledger: ledger.json, the account of such a model's bytes.
    """

    recipe: str | None
    lineage: list[Row] | None
    training: dict[str, list[Row]]
    plan: Row | None
    results: dict[str, Row]
    samples: list[Row] | None
    summary: Row
    compact: Row | None = None
    ledger: Row | None = None


def read_run(folder: Path) -> RunRecord:
    """Read every part of `folder` that exists.

    Raises ValueError when the folder is missing, holds none of the parts, or a part is not what it should be; the
    message names the file and the place in it.
    """
    parts = RunDirectory(folder, create=False)
    summary = folder / "summary.json"
    ledger = folder / "ledger.json"
    readable = (parts.recipe, parts.lineage, parts.log, parts.plan, parts.results, parts.samples, summary)
    if not any(path.is_file() for path in readable):
        names = ", ".join(path.name for path in readable)
        raise ValueError(
            f"run folder: {folder} holds none of {names}; give the folder of a run that has started"
        )
    return RunRecord(
        recipe=_text(parts.recipe) if parts.recipe.is_file() else None,
        lineage=_lineage(parts.lineage),
        training=_training(parts.log),
        plan=_object(parts.plan),
        results=_results(parts.results),
        compact=_compact(parts.results),
        ledger=_object(ledger),
        samples=_samples(parts.samples),
        summary=_object(summary) or {},
    )


def number(row: Row, key: str) -> float | None:
    """`row[key]` as a number; None when it is absent or null. ValueError when it is something else."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"{key}: {value!r} is not a number; write a number, or null where it was not measured"
        )
    return value


def finite(row: Row, key: str) -> float | None:
    """`number`, with infinity and not-a-number taken as absent: for figures, which cannot draw them."""
    value = number(row, key)
    return value if value is not None and math.isfinite(value) else None


def rows_of(row: Row, key: str) -> list[Row]:
    """`row[key]` as a list of objects; empty when absent or null. ValueError when it is something else."""
    return _checked_rows(row.get(key) or [], key)


def list_of(row: Row, key: str) -> list[Any]:
    """`row[key]` as a list; empty when absent or null. ValueError when it is something else."""
    value = row.get(key)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{key}: {value!r} is not a list; correct it")
    return value or []


def object_of(row: Row, key: str) -> Row:
    """`row[key]` as an object; empty when absent or null. ValueError when it is something else."""
    value = row.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key}: {value!r} is not an object; correct it")
    return value or {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 text ({error}); restore the file or remove it") from error


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON ({error}); restore the file or remove it") from error


def _object(path: Path) -> Row | None:
    value = _json(path)
    if value is not None and not isinstance(value, dict):
        raise ValueError(
            f"{path.name}: holds a {type(value).__name__}, must be an object; restore the file or remove it"
        )
    return value


def _rows(path: Path) -> list[Row] | None:
    value = _json(path)
    return None if value is None else _checked_rows(value, path.name)


def _lineage(path: Path) -> list[Row] | None:
    """The records, as they stand: whoever resumes the run checks the chain, the page only shows it."""
    value = _object(path)
    return None if value is None else _checked_rows(value.get("records"), f"{path.name}: records")


def _checked_rows(value: Any, name: str) -> list[Row]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{name}: must be a list of objects; restore the file or remove it")
    return value


def _stage(row: Row, name: str, position: int) -> str:
    stage = row.get("stage")
    if not isinstance(stage, str) or not STAGE_NAME.fullmatch(stage):
        raise ValueError(
            f"{name}, row {position}: stage {stage!r} must be 1 to 40 letters, digits, '-' or '_'; correct it"
        )
    return stage


def _compact(path: Path) -> Row | None:
    value = _json(path)
    return value if isinstance(value, dict) and "bpb" in value else None


def _results(path: Path) -> dict[str, Row]:
    results: dict[str, Row] = {}
    if _compact(path) is not None:
        return results
    for position, row in enumerate(_rows(path) or [], start=1):
        stage = _stage(row, path.name, position)
        if stage in results:
            _logger.info(
                "%s, row %d: stage %s was measured again, the later row is shown", path.name, position, stage
            )
        results[stage] = row
    return results


def _samples(path: Path) -> list[Row] | None:
    rows = _rows(path)
    for position, row in enumerate(rows or [], start=1):
        _stage(row, path.name, position)
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("text"), str):
            raise ValueError(f"{path.name}, row {position}: prompt and text must be strings; correct the row")
    return rows


def _training(path: Path) -> dict[str, list[Row]]:
    """The rows of kind "train" by stage, each by rising step."""
    stages: dict[str, list[Row]] = {}
    for position, row in enumerate(read_log(path), start=1):
        if row.get("kind") != "train":
            continue
        if not isinstance(row.get("step"), int):
            raise ValueError(
                f"{path.name}, row {position}: step {row.get('step')!r} is no integer; remove the row"
            )
        stages.setdefault(_stage(row, path.name, position), []).append(row)
    for rows in stages.values():
        rows.sort(key=lambda row: row["step"])
    return stages
