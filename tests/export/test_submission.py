"""The submission folder, and every claim that makes it refuse."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from trihybrid.export.bundle import build_bundle
from trihybrid.export.submission import requirements, write_submission
from trihybrid.run import hash_file
from trihybrid.run.code import code_hash


@pytest.fixture
def runs(finished_runs: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of the finished runs, to be tampered with; without checkpoints, which nobody reads here."""
    ignored = shutil.ignore_patterns("checkpoints")
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name, ignore=ignored)) for run in finished_runs]


def submit(runs: list[Path], out: Path, **options: Any) -> Any:
    settings = {"author": "A. Author", "name": "Micro hybrid", "date": "2026-04-30"} | options
    return write_submission(runs, out, **settings)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_log(run: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    change(rows)
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_begin(run: Path, **values: Any) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row.get("event") == "begin").update(values)

    edit_log(run, change)


def edit_recipe(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = yaml.safe_load((run / "recipe.yaml").read_text())
    change(fields)
    (run / "recipe.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))


def restate(run: Path, **values: Any) -> None:
    """Change a claim everywhere that it is written down, as a forger would."""
    edit_begin(run, **values)
    edit_json(run / "results.json", lambda results: results.update(values))


def test_what_a_submission_holds(runs: list[Path], tmp_path: Path) -> None:
    made = submit(runs, tmp_path / "out", github_id="author", baseline=[9.0])
    assert {path.name for path in made.path.iterdir()} == {
        "README.md", "submission.json", "requirements.txt", "train_gpt.py",
        *(f"train_seed{seed}.log" for seed in (0, 7, 42)), *(f"ledger_seed{seed}.json" for seed in (0, 7, 42)),
    }  # fmt: skip
    fields = json.loads((made.path / "submission.json").read_text())
    assert list(fields)[:9] == [
        "author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb", "bytes_total", "bytes_code",
    ]  # fmt: skip
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    scores = [result["bpb"]["sliding"] for result in results]
    assert fields["val_bpb"] == pytest.approx(sum(score["decoded"] for score in scores) / 3, rel=1e-12)
    assert fields["val_loss"] == pytest.approx(sum(score["nats"] / score["tokens"] for score in scores) / 3)
    program = (made.path / "train_gpt.py").read_bytes()
    assert program == build_bundle((runs[2] / "recipe.yaml").read_text())
    largest = max((run / "model.artifact").stat().st_size for run in runs)
    assert (fields["bytes_code"], fields["bytes_total"]) == (len(program), len(program) + largest)
    assert fields["seeds"] == [0, 7, 42] and fields["rescored_from_artifact"]
    assert fields["comparison"]["p"] < 0.5 and math.isfinite(fields["val_bpb_std"])
    readme = (made.path / "README.md").read_text()
    assert (
        f"**val_bpb {fields['val_bpb']:.8f}**" in readme
        and "one-sided p =" in readme
        and "stride 32" in readme
    )
    assert f"| margin | {16_000_000 - fields['bytes_total']:,} |" in readme
    assert "torch==" in (made.path / "requirements.txt").read_text()


@pytest.mark.parametrize(("kind", "needed"), [("bytes", False), ("sentencepiece", True)])
def test_the_tokenizers_library_is_required_by_kind_wherever_its_file_lies(kind: str, needed: bool) -> None:
    ledger = SimpleNamespace(configuration={"tokenizer": {"kind": kind}}, tensors=[])
    lines = requirements([SimpleNamespace(head={"torch": "2.13.0+cu130"}, ledger=ledger)]).splitlines()
    assert ("sentencepiece" in lines) == needed
    assert "torch==2.13.0" in lines


def test_a_log_says_first_what_ran_and_then_every_step(runs: list[Path], tmp_path: Path) -> None:
    made = submit(runs, tmp_path / "out")
    lines = (made.path / "train_seed7.log").read_text().splitlines()
    results = json.loads((runs[1] / "results.json").read_text())
    assert lines[:4] == [
        f"parameters:{results['parameters']}", f"config_hash:{results['config_hash']}", f"code_hash:{code_hash()}",
        "seed:7",
    ]  # fmt: skip
    steps = [line.split()[0] for line in lines if line.startswith("step:")]
    assert steps == [f"step:{step}/4" for step in (1, 2, 3, 4)]
    assert f"artifact_sha256:{hash_file(runs[1] / 'model.artifact')}" in lines
    assert any(
        line.startswith(f"final_sliding decoded:{results['bpb']['sliding']['decoded']!r}") for line in lines
    )
    assert "p-value" not in (made.path / "README.md").read_text()


def forge_recipe(run: Path) -> None:
    """Another configuration, honestly hashed."""
    from trihybrid.recipe.compact import config_hash, read_compact

    edit_recipe(run, lambda fields: fields["train"]["optimizer"].update(weight_decay=0.05))
    restate(run, config_hash=config_hash(read_compact(run / "recipe.yaml")))


def forge_scores(run: Path) -> None:
    """The score of the weights before quantisation, or one that is a little better, with nats to match."""

    def change(results: dict[str, Any]) -> None:
        chunked = results["bpb"]["chunked"]
        chunked["nats"] *= 0.99
        chunked["decoded"] = chunked["nats"] / math.log(2) / chunked["bytes"]

    edit_json(run / "results.json", change)


def forge_artifact(run: Path) -> None:
    """Another seed's artifact, which is a good one."""
    shutil.copyfile(run.parent / "seed0" / "model.artifact", run / "model.artifact")


def forge_artifact_and_hash(run: Path) -> None:
    """The same, with its hash and size in the results: only the score is not its own."""
    forge_artifact(run)
    file = run / "model.artifact"

    def change(results: dict[str, Any]) -> None:
        results["artifact"].update(sha256=hash_file(file), bytes=file.stat().st_size)
        results["total_bytes"] = file.stat().st_size + results["code_bytes"]
        results["bpb"]["chunked"]["decoded"] -= 0.01
        chunked = results["bpb"]["chunked"]
        chunked["nats"] = chunked["decoded"] * math.log(2) * chunked["bytes"]

    edit_json(run / "results.json", change)


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A change of the results alone."""
    return lambda run: edit_json(run / "results.json", change)


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "code of another version": (
        lambda run: restate(run, code_hash="0" * 64),
        "code_hash is '0{64}' in its log",
    ),
    "log of other code than the results": (
        state(lambda results: results.update(code_hash="0" * 64)),
        "code_hash is .* in its log, but '0{64}' by its results",
    ),
    "log without a beginning": (
        lambda run: edit_log(run, lambda rows: rows.__delitem__(slice(0, None))),
        "no event `begin`",
    ),
    "resumed with other code": (
        lambda run: edit_log(
            run,
            lambda rows: rows.append(
                {**next(row for row in rows if row.get("event") == "begin"), "code_hash": "1" * 64}
            ),
        ),
        "code_hash is .* in its log at first, but '1{64}' by its log later",
    ),
    "another configuration": (forge_recipe, r"config_hash: differs \("),
    "configuration that the log does not name": (
        lambda run: edit_recipe(run, lambda fields: fields["train"]["optimizer"].update(weight_decay=0.05)),
        "config_hash is .* in its log, but .* by its recipe",
    ),
    "parameters of another model": (
        lambda run: restate(run, parameters=17_059_912),
        "parameters is 17059912 in its log",
    ),
    "seed of another run": (lambda run: restate(run, seed=5), "seed is 5 in its log, but 7 by its recipe"),
    "steps that the log lacks": (
        lambda run: edit_log(
            run, lambda rows: rows.remove(next(row for row in rows if row.get("step") == 2))
        ),
        "a log must hold every step",
    ),
    "bytes that are not the file's": (
        state(lambda results: results["artifact"].update(bytes=10)),
        "artifact bytes is 10",
    ),
    "code bytes of unpacked code": (
        state(lambda results: results.update(code_bytes=104_000)),
        "code_bytes is 104000 in its results",
    ),
    "total that is no sum": (
        state(lambda results: results.update(total_bytes=1)),
        "total_bytes is 1 in",
    ),
    "another artifact": (forge_artifact, "artifact sha256 is"),
    "another artifact with its hash": (forge_artifact_and_hash, "a score must be that of the artifact"),
    "score that is not the artifact's": (forge_scores, "a score must be that of the artifact"),
    "score that its nats do not make": (
        state(lambda results: results["bpb"]["chunked"].update(decoded=1.0)),
        "chunked bpb is 1.0, but its nats",
    ),
    "bytes counted twice": (
        state(lambda results: results["bpb"]["sliding"].update(bytes=10**6)),
        "bytes is 1000000 in sliding",
    ),
    "results that are no object": (
        lambda run: (run / "results.json").write_text("[]") and None,
        "must be one object",
    ),
    "results without a score": (
        state(lambda results: results.pop("bpb")),
        "not the results of a compact run",
    ),
    "score of a part of the text": (
        lambda run: edit_recipe(run, lambda fields: fields["evaluation"].update(validation_tokens=100)),
        "validation_tokens is 100, which scores a part",
    ),
    "no artifact": (lambda run: (run / "model.artifact").unlink(), "no model.artifact"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_run_is_refused_and_nothing_is_written(
    name: str, runs: list[Path], tmp_path: Path
) -> None:
    tamper, message = TAMPERED[name]
    tamper(runs[1])
    with pytest.raises(ValueError, match=message):
        submit(runs, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_seeds_must_be_enough_and_different(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds: 2 runs, needs 3"):
        submit(runs[:2], tmp_path / "out", rescore=False)
    with pytest.raises(ValueError, match="seed7 is given twice"):
        submit([*runs, runs[1]], tmp_path / "out", rescore=False)
    again = Path(shutil.copytree(runs[1], tmp_path / "again"))
    with pytest.raises(ValueError, match="seed: 7 has 2 runs"):
        submit([*runs, again], tmp_path / "out", rescore=False)
    with pytest.raises(ValueError, match="runs: none given"):
        submit([], tmp_path / "out")


def test_too_many_bytes_are_refused_and_further_files_count(runs: list[Path], tmp_path: Path) -> None:
    total = submit(runs, tmp_path / "whole", rescore=False).size.total
    assert submit(runs, tmp_path / "exact", rescore=False, limit_bytes=total).size.total == total
    with pytest.raises(ValueError, match=f"total_bytes: {total:,} .* exceed {total - 1:,}"):
        submit(runs, tmp_path / "over", rescore=False, limit_bytes=total - 1)
    tokenizer = tmp_path / "own.model"
    tokenizer.write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="11 of further files"):
        submit(runs, tmp_path / "over", rescore=False, limit_bytes=total + 10, further=[tokenizer])
    made = submit(runs, tmp_path / "further", rescore=False, further=[tokenizer])
    assert made.size.total == total + 11 and (made.path / "own.model").read_bytes() == b"x" * 11
    assert not (tmp_path / "over").exists() and not made.fields["rescored_from_artifact"]


def test_wrong_arguments_are_refused(runs: list[Path], tmp_path: Path) -> None:
    for options, message in (
        ({"author": " "}, "author"),
        ({"name": ""}, "name"),
        ({"date": "yesterday"}, "date"),
    ):
        with pytest.raises(ValueError, match=f"{message}: "):
            submit(runs, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="exists already"):
        submit(runs, runs[0])
