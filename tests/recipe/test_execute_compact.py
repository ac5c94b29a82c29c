"""A compact run from text to scores: what is measured is what was read back, and a kill changes no byte of it."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trihybrid
import trihybrid.recipe.execute_compact as execution
from trihybrid.compress.artifact import read_artifact
from trihybrid.data.corpus import CorpusSection, prepare_corpus
from trihybrid.models.compact import CompactModel
from trihybrid.pretrain.compact import CompactTask
from trihybrid.recipe.artifact import load_artifact, rescore_run
from trihybrid.recipe.compact import CompactRecipe, config_hash
from trihybrid.recipe.execute_compact import execute_compact, missed_targets
from trihybrid.recipe.fields import dump_recipe
from trihybrid.recipe.load import load_compact
from trihybrid.recipe.train_compact import draw_model, train_compact
from trihybrid.run import Lineage, hash_file, read_log
from trihybrid.run.code import code_hash

CODE_BYTES = 12_345


@pytest.fixture
def recipe(compact_recipe: Path) -> CompactRecipe:
    return load_compact(compact_recipe, ["train.loop.checkpoint_every=2", "samples.prompts=[]"])


@pytest.fixture(scope="module")
def whole(compact_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, of the recipe above."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    recipe = load_compact(compact_recipe, ["train.loop.checkpoint_every=2", "samples.prompts=[]"])
    assert execute_compact(recipe, folder, code_bytes=CODE_BYTES) is not None
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_results_say_what_the_files_are(compact_run: Path, compact_recipe: Path) -> None:
    results, recipe = results_of(compact_run), load_compact(compact_recipe)
    artifact = compact_run / "model.artifact"
    assert results["artifact"] == {
        "file": "model.artifact",
        "bytes": artifact.stat().st_size,
        "sha256": hash_file(artifact),
    }
    assert results["total_bytes"] == artifact.stat().st_size + results["code_bytes"] <= results["limit_bytes"]
    assert (compact_run / "recipe.yaml").read_text() == dump_recipe(recipe)
    assert (results["config_hash"], results["code_hash"]) == (config_hash(recipe), code_hash())
    assert (results["steps"], results["tokens"], results["seed"]) == (4, 4 * 2 * 32, 0)
    weights = load_file(compact_run / "model" / "model.safetensors")
    assert results["parameters"] == sum(tensor.numel() for tensor in weights.values())
    ledger = read_artifact(artifact).ledger
    assert json.loads((compact_run / "ledger.json").read_text()) == ledger.model_dump(mode="json")
    assert ledger.total_bytes == results["total_bytes"]
    assert ledger.configuration["parameters"] == results["parameters"]
    lineage = Lineage(compact_run / "lineage.json")
    assert [record.stage for record in lineage.records] == ["trained", "quantised"]
    assert lineage.records[1].output == results["artifact"]["sha256"]


def test_the_score_is_that_of_the_reloaded_file(compact_run: Path, compact_recipe: Path) -> None:
    """And bits a byte are nats over bytes; every token of the validation text but the first was scored."""
    results = results_of(compact_run)
    found = rescore_run(
        load_artifact(compact_run / "model.artifact"), load_compact(compact_recipe), compact_run
    )
    assert found == results["bpb"]["chunked"]
    manifest = json.loads((compact_run / "data" / "validation" / "manifest.json").read_text())
    for name, score in results["bpb"].items():
        assert score["decoded"] == pytest.approx(score["nats"] / math.log(2) / score["bytes"], rel=1e-12), (
            name
        )
        assert score["tokens"] == manifest["tokens"] - 1
        assert score["bytes"] == manifest["text_bytes"] and score["raw"] == score["decoded"]
    assert results["gap"] == pytest.approx(
        found["decoded"] - results["bpb"]["chunked_before_quantisation"]["decoded"], abs=1e-12
    )
    assert results["gap"] != 0 and abs(results["gap"]) < 0.05
    assert found["decoded"] < 8.03  # log2(260), the start
    ways = ("chunked", "sliding", "stateful")
    assert len({results["bpb"][way]["decoded"] for way in ways}) == len(ways)


def test_the_log_begins_with_what_ran(compact_run: Path) -> None:
    rows, results = read_log(compact_run / "log.jsonl"), results_of(compact_run)
    head = rows[0]
    assert (head["kind"], head["event"], head["torch"]) == ("event", "begin", torch.__version__)
    assert head["device"].startswith("1 x ")
    for name in ("parameters", "config_hash", "code_hash", "seed"):
        assert head[name] == results[name]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [0, 1, 2, 3]


class Killed(BaseException):
    """What ends a process, and nothing in it catches."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let a function end the run at its `call`-th call, counted from 1."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(1, 10**9))

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, killed)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (CompactTask, "loss", 2),
        (CompactTask, "loss", 4),
        (execution, "save_file", 1),
        (execution, "quantise_to_limit", 1),
        (execution.EncodedArtifact, "write", 1),
        (execution, "measure", 1),
    ],
    ids=["before a checkpoint", "after a checkpoint", "saving", "quantising", "writing", "measuring"],
)
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    recipe: CompactRecipe,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    call: int,
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            execute_compact(recipe, tmp_path / "run", code_bytes=CODE_BYTES)
    assert not (tmp_path / "run" / "results.json").exists()
    torch.rand(7)
    results = execute_compact(recipe, tmp_path / "run", resume=True, code_bytes=CODE_BYTES)
    assert results is not None
    assert (tmp_path / "run" / "model.artifact").read_bytes() == (whole / "model.artifact").read_bytes()
    expected = results_of(whole)
    for field in ("bpb", "gap", "steps", "tokens", "artifact", "total_bytes"):
        assert results[field] == expected[field], field
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [0, 1, 2, 3]
    assert [row.get("event") for row in rows].count("begin") == 1


def test_a_finished_run_is_measured_again_and_not_trained(
    recipe: CompactRecipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(CompactTask, "loss", None)
    monkeypatch.setattr(execution, "quantise_to_limit", None)
    results = execute_compact(recipe, run, resume=True, code_bytes=CODE_BYTES)
    assert results == results_of(whole)


def test_training_may_stand_alone(recipe: CompactRecipe, whole: Path, tmp_path: Path) -> None:
    """What packs and scores it later ends with the bytes of a run in one go."""
    summary = train_compact(recipe, tmp_path / "run")
    assert summary.steps == 4 and not (tmp_path / "run" / "model.artifact").exists()
    assert execute_compact(recipe, tmp_path / "run", resume=True, code_bytes=CODE_BYTES) is not None
    assert hash_file(tmp_path / "run" / "model.artifact") == hash_file(whole / "model.artifact")
    assert results_of(tmp_path / "run")["train_seconds"] == summary.seconds


def test_a_seed_is_a_model(recipe: CompactRecipe, whole: Path, tmp_path: Path) -> None:
    recipe.train.loop.seed = 5
    execute_compact(recipe, tmp_path / "run", code_bytes=CODE_BYTES)
    first, second = (read_artifact(run / "model.artifact").tensors for run in (whole, tmp_path / "run"))
    assert first.keys() == second.keys()
    assert not torch.equal(first["front.tokens"], second["front.tokens"])


def test_the_averaged_weights_are_what_is_stored(recipe: CompactRecipe, whole: Path, tmp_path: Path) -> None:
    fields = recipe.train.model_dump() | {"average": {"decay": 0.5}}
    recipe = CompactRecipe.model_validate(recipe.model_dump() | {"train": fields})
    assert execute_compact(recipe, tmp_path / "run", code_bytes=CODE_BYTES) is not None
    last, average = (load_file(run / "model" / "model.safetensors") for run in (whole, tmp_path / "run"))
    stored = load_artifact(tmp_path / "run" / "model.artifact").model.front.tokens
    assert not torch.equal(last["front.tokens"], average["front.tokens"])
    distance = [(tensors["front.tokens"] - stored).norm() for tensors in (last, average)]
    assert distance[1] < 0.5 * distance[0]


def test_test_time_training_is_reported_apart(recipe: CompactRecipe, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    fields = {"adaptation": {"chunk_tokens": 128, "epochs": 1, "learning_rate": 0.0}}
    recipe = CompactRecipe.model_validate(
        recipe.model_dump() | {"evaluation": recipe.evaluation.model_dump() | fields}
    )
    results = execute_compact(recipe, run, resume=True, code_bytes=CODE_BYTES)
    assert results is not None
    adaptation = results["adaptation"]
    assert adaptation["label"] == "score-first test-time training" and adaptation["updates"] > 0
    # At a learning rate of 0 it is the fixed model's.
    assert adaptation["decoded"] == pytest.approx(results["bpb"]["chunked"]["decoded"], rel=1e-5)
    assert results["bpb"] == results_of(whole)["bpb"]


def test_a_folder_in_use_is_refused(recipe: CompactRecipe, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="not empty; continue with --resume"):
        execute_compact(recipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda recipe, run: setattr(recipe.train.loop, "steps", 6), "training began with another recipe"),
        (lambda recipe, run: setattr(recipe.model, "softcap", 15.0), "training began with another recipe"),
        (
            lambda recipe, run: setattr(recipe.data, "validation_fraction", 0.5),
            "made of other text or settings",
        ),
        (lambda recipe, run: setattr(recipe.compress, "clip", 4.0), "training began with another recipe"),
        (
            lambda recipe, run: setattr(recipe.compress, "limit_bytes", 900_000),
            "quantised was made with another recipe",
        ),
        (lambda recipe, run: flip(run / "model.artifact"), "what was quantised changed since it was made"),
        (lambda recipe, run: (run / "model.artifact").unlink(), "what was quantised changed since"),
        (lambda recipe, run: flip(run / "model" / "model.safetensors"), "what was trained changed since"),
        (lambda recipe, run: shutil.rmtree(run / "model"), "what was trained changed since it was made"),
    ],
)
def test_a_run_that_was_changed_is_not_resumed(
    recipe: CompactRecipe,
    whole: Path,
    micro: ModuleType,
    tmp_path: Path,
    change: Callable[[CompactRecipe, Path], object],
    message: str,
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    change(recipe, run)
    before = micro.listing(run)
    with pytest.raises(ValueError, match=message):
        execute_compact(recipe, run, resume=True, code_bytes=CODE_BYTES)
    changed = {name for name, digest in micro.listing(run).items() if before.get(name) != digest}
    assert changed <= {"log.jsonl", "recipe.yaml"}


def test_too_little_text_leaves_no_folder(recipe: CompactRecipe, tmp_path: Path) -> None:
    recipe.train.loop.batch_size = 10_000
    with pytest.raises(ValueError, match="fewer than batch_size 10000"):
        execute_compact(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_text_leaves_what_stood_before(recipe: CompactRecipe, tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.touch()
    bad = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": str(text)})})
    (tmp_path / "given").mkdir()
    for name in ("run", "given"):
        with pytest.raises(ValueError, match=r"empty\.txt is empty text"):
            execute_compact(bad, tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"empty.txt", "given"}


def test_too_little_text_of_shards_elsewhere_is_said(recipe: CompactRecipe, tmp_path: Path) -> None:
    """No folder was made, so there is none to take away."""
    text = tmp_path / "short.jsonl"
    text.write_text('{"text": "one"}\n{"text": "two"}\n')
    shards = prepare_corpus(CorpusSection(train=str(text)), tmp_path / "shards").train
    data = recipe.data.model_copy(update={"train": str(tmp_path / "shards")})
    with pytest.raises(ValueError, match=f"{len(shards)} tokens"):
        execute_compact(recipe.model_copy(update={"data": data}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_said(recipe: CompactRecipe, tmp_path: Path) -> None:
    recipe.compress.limit_bytes = CODE_BYTES + 1000
    with pytest.raises(ValueError, match=r"compress\.limit_bytes is 13,345, but the model takes"):
        execute_compact(recipe, tmp_path / "run", code_bytes=CODE_BYTES)
    assert not (tmp_path / "run" / "model.artifact").exists()


def test_code_that_alone_exceeds_the_limit_is_found_before_training(
    recipe: CompactRecipe, tmp_path: Path
) -> None:
    recipe.compress.limit_bytes = CODE_BYTES
    with pytest.raises(ValueError, match=r"limit_bytes is 12,345, but the code alone takes 12,345; raise"):
        execute_compact(recipe, tmp_path / "run", code_bytes=CODE_BYTES)
    assert not list(tmp_path.iterdir())


def test_promises(recipe: CompactRecipe, whole: Path) -> None:
    results = results_of(whole)
    assert missed_targets(recipe, results, 1e9) == []
    bpb = results["bpb"]["chunked"]["decoded"]
    recipe.targets.bpb, recipe.targets.gap, recipe.targets.seconds = bpb, results["gap"], 10.0
    assert missed_targets(recipe, results, 10.0) == []
    recipe.targets.bpb, recipe.targets.gap = bpb - 0.01, results["gap"] - 0.01
    results["limit_bytes"] = results["total_bytes"] - 1
    missed = missed_targets(recipe, results, 11.0)
    for line, start in zip(
        missed,
        ("artifact and code take", "the artifact has", "quantisation costs", "the run took 11 s"),
        strict=True,
    ):
        assert line.startswith(start)


def test_the_model_is_drawn_alike_whatever_was_drawn_before(recipe: CompactRecipe) -> None:
    from trihybrid.data import Tokenizer

    torch.manual_seed(1)
    first = draw_model(recipe, Tokenizer.bytes(), torch.device("cpu"))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    second = draw_model(recipe, Tokenizer.bytes(), torch.device("cpu"))
    assert isinstance(first, CompactModel)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


@pytest.mark.long
def test_two_processes_train_one_model(
    micro: ModuleType, compact_recipe: Path, compact_run: Path, tmp_path: Path
) -> None:
    """Each takes half of the rows; the first does all else."""
    script = tmp_path / "command.py"
    script.write_text(micro.SCRIPT)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), "train"]
    done = subprocess.run(
        [sys.executable, *command, str(compact_recipe), "--out", str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(Path(trihybrid.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("quantisation gap") == 1
    alone, together = (
        [row for row in read_log(run / "log.jsonl") if row["kind"] == "train"]
        for run in (compact_run, tmp_path / "run")
    )
    assert [row["tokens"] for row in together] == [row["tokens"] for row in alone]
    for one, two in zip(alone, together, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    scores = [results_of(run)["bpb"]["chunked"]["decoded"] for run in (compact_run, tmp_path / "run")]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
