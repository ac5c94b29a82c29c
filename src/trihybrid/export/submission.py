"""The challenge's submission folder, made from finished runs, or nothing at all.

README.md  submission.json  requirements.txt  train_gpt.py  train_seed<N>.log  ledger_seed<N>.json  [further files]
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trihybrid.export.bundle import PROGRAM, REQUIREMENTS, write_bundle
from trihybrid.export.checked_run import CheckedRun, check_run, read_head
from trihybrid.export.significance import Comparison, compare_means
from trihybrid.export.texts import Credits, Size, log_text, readme, submission_fields
from trihybrid.run import write_json, write_text
from trihybrid.run.directory import sync_folder

LIMIT_BYTES = 16_000_000
"""The challenge's cap on code and compressed model, in decimal bytes."""
SEEDS = 3
"""Repetitions that the challenge asks for."""

CODEC_LIBRARIES = {"brotli": "brotli", "zstd": "zstandard; python_version < '3.14'"}
"""Entropy coder of an artifact -> line of requirements.txt."""

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class Submission:
    """What was written.

    Attributes:
        path: the folder.
        fields: submission.json.
        size: the bytes that count.
    """

    path: Path
    fields: dict[str, Any]
    size: Size


def write_submission(
    runs: Sequence[Path],
    out: Path,
    author: str,
    name: str,
    github_id: str | None = None,
    blurb: str | None = None,
    date: str | None = None,
    baseline: Sequence[float] = (),
    seeds: int = SEEDS,
    further: Sequence[Path] = (),
    rescore: bool = True,
    limit_bytes: int = LIMIT_BYTES,
) -> Submission:
    """Write a submission folder, after every claim of every run has been checked (see `check_run`).

    Args:
        runs: run folders, one a seed, all of one configuration.
        out: the folder to make; must not exist.
        author, name: for submission.json and the README.
        github_id: the author's account; the author if not given.
        blurb: one or two sentences on what this is; made from the recipe if not given.
        date: ISO 8601 (2026-04-30); today (UTC) if not given.
        baseline: bits per byte to be compared with, by the same protocol: one number or several repetitions; empty
            prints no p-value.
        seeds: fewest runs.
        further: files that the program needs when it is scored and the challenge does not ship, such as a tokenizer;
            copied, and counted under the limit.
        rescore: repeat the chunked score of each artifact on the run's own validation shards; False trusts the
            runs, and submission.json says so.
        limit_bytes: most bytes of train_gpt.py, further files and the largest artifact.

    Raises:
        ValueError: a claim is wrong, seeds are too few or doubled, configurations differ, the bytes exceed the limit,
            or an argument does not serve; nothing is left behind.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; give a path that does not")
    for field, value in (("author", author), ("name", name)):
        if not value.strip():
            raise ValueError(f"{field}: is empty; the challenge wants it in submission.json")
    date = datetime.now(UTC).date().isoformat() if date is None else date
    if not _DATE.match(date):
        raise ValueError(f"date: {date!r}; write it as 2026-04-30")
    if not runs:
        raise ValueError("runs: none given; give the folders of finished compact runs")
    doubled = [path for path in runs if list(runs).count(path) > 1]
    if doubled:
        raise ValueError(f"runs: {doubled[0]} is given twice; give each run once")
    _check_together({path: read_head(path) for path in runs}, seeds)
    checked = sorted((check_run(path, rescore) for path in runs), key=lambda run: run.seed)
    credits = Credits(author, github_id or author, name, blurb or _blurb(checked[0]), date)
    comparison = compare_means([run.score["decoded"] for run in checked], baseline) if baseline else None
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.temporary")
    partial.mkdir()
    try:
        size = _write_programs(checked, partial, further, limit_bytes)
        fields = _write_texts(checked, partial, credits, size, comparison, rescore)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    sync_folder(out.parent)
    return Submission(out, fields, size)


def _check_together(heads: Mapping[Path, dict[str, Any]], seeds: int) -> None:
    """What no run can say alone: enough seeds, each once, and one configuration."""
    found = [head["seed"] for head in heads.values()]
    doubled = sorted({seed for seed in found if found.count(seed) > 1})
    if doubled:
        raise ValueError(
            f"seed: {doubled[0]} has {found.count(doubled[0])} runs; give one run a seed, not the best of several"
        )
    if len(found) < max(seeds, 1):
        raise ValueError(f"seeds: {len(found)} runs, needs {max(seeds, 1)}; train the recipe with more seeds")
    hashes = {path: head["config_hash"] for path, head in heads.items()}
    if len(set(hashes.values())) > 1:
        listed = ", ".join(f"{value} in {path}" for path, value in hashes.items())
        raise ValueError(f"config_hash: differs ({listed}); only the seed may differ")


def _write_programs(runs: Sequence[CheckedRun], folder: Path, further: Sequence[Path], limit: int) -> Size:
    code = write_bundle(folder / PROGRAM, (runs[0].path / "recipe.yaml").read_text(encoding="utf-8"))
    counts = {}
    for file in further:
        if not file.is_file() or (folder / file.name).exists():
            raise ValueError(f"further: {file} is no file, or has a name that is taken; give other files")
        counts[file.name] = shutil.copyfile(file, folder / file.name).stat().st_size
    size = Size(code, {run.seed: run.results["artifact"]["bytes"] for run in runs}, counts, limit)
    if size.total > limit:
        raise ValueError(
            f"total_bytes: {size.total:,} ({code:,} of code, {max(size.artifacts.values()):,} of the largest artifact, "
            f"{sum(counts.values()):,} of further files) exceed {limit:,}; shrink the model, or quantise it more "
            "coarsely"
        )
    return size


def _write_texts(
    runs: Sequence[CheckedRun],
    folder: Path,
    credits: Credits,
    size: Size,
    comparison: Comparison | None,
    rescored: bool,
) -> dict[str, Any]:
    fields = submission_fields(runs, credits, size, comparison, rescored)
    write_json(folder / "submission.json", fields)
    write_text(folder / "README.md", readme(runs, credits, size, comparison, rescored))
    write_text(folder / "requirements.txt", requirements(runs))
    for run in runs:
        write_text(folder / f"train_seed{run.seed}.log", log_text(run))
        write_json(folder / f"ledger_seed{run.seed}.json", run.ledger.model_dump(mode="json"))
    return fields


def _blurb(run: CheckedRun) -> str:
    model = run.recipe.model
    bits = run.recipe.compress.bits["matrix"]
    return (
        f"Hybrid of layers {model.pattern}, {model.hidden_size} wide, {run.head['parameters']:,} parameters; "
        f"{bits}-bit matrices in an entropy-coded artifact."
    )


def requirements(runs: Sequence[CheckedRun]) -> str:
    """requirements.txt: what the program imports and what its artifacts are coded with; torch in the version that the
    runs had, where they agree on one."""
    lines = dict(REQUIREMENTS)
    versions = {str(run.head.get("torch", "")).partition("+")[0] for run in runs}
    if len(versions) == 1 and (version := versions.pop()):
        lines["torch"] = f"torch=={version}"
    if runs[0].ledger.configuration["tokenizer"]["kind"] == "sentencepiece":
        lines["sentencepiece"] = "sentencepiece"
    codecs = {part.codec for run in runs for tensor in run.ledger.tensors for part in tensor.parts}
    lines |= {codec: library for codec, library in CODEC_LIBRARIES.items() if codec in codecs}
    return "\n".join(sorted(lines.values(), key=str.lower)) + "\n"
