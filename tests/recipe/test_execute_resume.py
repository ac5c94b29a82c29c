"""A run that stopped goes on to the bit, and refuses what does not belong to it."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from trihybrid.recipe.execute import execute
from trihybrid.recipe.load import dump_recipe, load_recipe
from trihybrid.run import Lineage, hash_file, read_log

MODELS = ["teacher", "operated", "aligned", "matched"]


@pytest.fixture
def copied(micro_run: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(micro_run, tmp_path / "run"))


def weights(folder: Path) -> dict[str, str]:
    return {name: hash_file(folder / name / "model.safetensors") for name in MODELS}


def forget(run: Path, *names: str) -> None:
    """Undo the last phases: their models and their records, not their checkpoints."""
    document = json.loads((run / "lineage.json").read_text())
    document["records"] = [record for record in document["records"] if record["stage"] not in names]
    (run / "lineage.json").write_text(json.dumps(document))
    for name in names:
        shutil.rmtree(run / name)


def test_a_finished_run_has_nothing_left_to_do(
    micro: ModuleType, micro_recipe: Path, micro_run: Path, copied: Path
) -> None:
    before = micro.listing(copied)
    rows = execute(load_recipe(micro_recipe), copied, resume=True)
    assert rows == json.loads((micro_run / "results.json").read_text())
    after = micro.listing(copied)
    assert {name for name in before if before[name] != after[name]} <= {"summary.json"}
    assert after.keys() == before.keys()
    seconds = sum(record.seconds for record in Lineage(copied / "lineage.json").records)
    assert json.loads((copied / "summary.json").read_text())["seconds"] >= round(seconds, 1)


def test_without_resume_a_used_directory_is_refused(
    micro: ModuleType, micro_recipe: Path, copied: Path
) -> None:
    before = micro.listing(copied)
    line = micro.refusal(micro.trihybrid("distill", micro_recipe, "--out", copied))
    assert line == f"error: {copied}: not empty; continue with --resume, or name another folder with --out"
    assert micro.listing(copied) == before


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("stages.0.loop.steps=31", "aligned"),
        ("stages.0.optimizer.learning_rate=0.02", "aligned"),
        ("stages.1.temperature=2", "matched"),
        ("stages.0.kind=match", "aligned"),
        ("surgery.rwkv7.gate=published", "operated"),
        ("teacher.pretrain.loop.seed=9", "teacher"),
    ],
)
def test_a_changed_stage_is_refused_on_resume(
    micro: ModuleType, micro_recipe: Path, copied: Path, override: str, name: str
) -> None:
    overrides = ["--set", override]
    if override == "stages.0.kind=match":
        overrides += ["--set", "stages.1.kind=align"]
    before = micro.listing(copied)
    line = micro.refusal(micro.trihybrid("distill", micro_recipe, "--out", copied, "--resume", *overrides))
    assert f"{copied / name}: this stage began with another recipe" in line
    assert "restore the recipe, or start a new run directory" in line
    assert micro.listing(copied) == before


def test_a_changed_stage_is_refused_by_its_hash_too(
    micro: ModuleType, micro_recipe: Path, copied: Path
) -> None:
    """Also where the run's own copy of the recipe was edited to look right."""
    changed = load_recipe(micro_recipe, ["stages.0.optimizer.learning_rate=0.02"])
    (copied / "recipe.yaml").write_text(dump_recipe(changed))
    with pytest.raises(ValueError, match=r"aligned: this stage was made with another recipe or parent"):
        execute(changed, copied, resume=True)
    forget(copied, "aligned", "matched")
    with pytest.raises(ValueError, match=r"step-000030: the recipe of this stage changed"):
        execute(changed, copied, resume=True)


@pytest.mark.parametrize(
    "override", ["data.seed=1", "data.recall.fraction=0.4", "data.validation_fraction=0.3"]
)
def test_other_data_is_refused_on_resume(
    micro: ModuleType, micro_recipe: Path, copied: Path, override: str
) -> None:
    before = micro.listing(copied)
    result = micro.trihybrid("distill", micro_recipe, "--out", copied, "--resume", "--set", override)
    assert "was made of other text or settings; restore them, or start a new run" in micro.refusal(result)
    assert micro.listing(copied) == before


def test_the_text_itself_counts_and_not_its_place(
    micro: ModuleType, micro_run: Path, copied: Path, tmp_path: Path
) -> None:
    recipe = micro.write_recipe(tmp_path)  # the same texts, elsewhere
    assert execute(load_recipe(recipe), copied, resume=True) == json.loads(
        (micro_run / "results.json").read_text()
    )
    before = micro.listing(copied)
    page = tmp_path / "texts" / "03.txt"
    page.write_text(page.read_text().replace("river", "water"))
    line = micro.refusal(micro.trihybrid("distill", recipe, "--out", copied, "--resume"))
    assert "was made of other text or settings" in line
    assert micro.listing(copied) == before


def flip_weight(run: Path, micro: ModuleType) -> None:
    micro.flip_byte(run / "aligned" / "model.safetensors")


def change_tokenizer(run: Path, micro: ModuleType) -> None:
    file = run / "teacher" / "tokenizer.json"
    file.write_text(file.read_text() + " ")


def remove_model(run: Path, micro: ModuleType) -> None:
    shutil.rmtree(run / "matched")


def rewrite_lineage(run: Path, micro: ModuleType) -> None:
    file = run / "lineage.json"
    file.write_text(file.read_text().replace('"seconds": ', '"seconds": 1'))


def shorten_shard(run: Path, micro: ModuleType) -> None:
    file = run / "data" / "train" / "00000.bin"
    file.write_bytes(file.read_bytes()[:-2])


def flip_token(run: Path, micro: ModuleType) -> None:
    micro.flip_byte(run / "data" / "validation" / "00000.bin", 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_weight, "aligned: changed since it was made; start a new run directory"),
        (change_tokenizer, "teacher: changed since it was made"),
        (remove_model, "matched: changed since it was made"),
        (rewrite_lineage, "record 0 (stage 'teacher'): broken chain"),
        (shorten_shard, "00000.bin: expected"),
        (flip_token, "00000.bin: expected sha256"),
    ],
)
def test_a_run_that_was_tampered_with_is_refused(
    micro: ModuleType,
    micro_recipe: Path,
    copied: Path,
    change: Callable[[Path, ModuleType], None],
    message: str,
) -> None:
    change(copied, micro)
    before = micro.listing(copied)
    line = micro.refusal(micro.trihybrid("distill", micro_recipe, "--out", copied, "--resume"))
    assert message in line
    assert micro.listing(copied) == before


def test_what_is_measured_may_change_on_resume(micro: ModuleType, micro_recipe: Path, copied: Path) -> None:
    overrides = ["evaluation.validation_tokens=300", "targets.bpb_gap=0", "targets.seconds=1000000"]
    options = [part for override in overrides for part in ("--set", override)]
    before = json.loads((copied / "results.json").read_text())
    models = weights(copied)
    result = micro.trihybrid("distill", micro_recipe, "--out", copied, "--resume", *options)
    after = json.loads((copied / "results.json").read_text())
    gap = after[3]["bpb"] - after[0]["bpb"]
    assert result.code == (1 if gap > 0 else 0)
    assert [line for line in result.stderr.splitlines() if line.startswith("missed: ")] == [
        f"missed: matched is {gap:.4f} bpb above the teacher, wanted 0.0"
    ][: result.code]
    assert all(row["bpb"] != old["bpb"] for row, old in zip(after, before, strict=True))
    assert weights(copied) == models
    assert load_recipe(copied / "recipe.yaml") == load_recipe(micro_recipe, overrides)


def test_a_stage_that_was_trained_and_not_saved_is_saved_from_its_checkpoint(
    micro_recipe: Path, micro_run: Path, copied: Path
) -> None:
    forget(copied, "matched")
    steps = len(read_log(copied / "log.jsonl"))
    execute(load_recipe(micro_recipe), copied, resume=True)
    assert weights(copied) == weights(micro_run)
    rows = read_log(copied / "log.jsonl")[steps:]
    assert rows == [{"kind": "event", "event": "resume", "stage": "matched", "from_step": 4}]


@pytest.mark.slow
def test_a_killed_stage_goes_on_to_the_bit(
    micro: ModuleType, micro_recipe: Path, micro_run: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle of stage align, then --resume: all models are those of the run that nobody disturbed."""
    run = tmp_path / "run"
    command = ("distill", micro_recipe, "--out", run)
    killed = micro.start(*command)
    awaited = run / "checkpoints" / "aligned" / "step-000002"
    deadline = time.monotonic() + 300.0
    while not awaited.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.kill()
    _, stderr = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, (
        f"it ended before it was killed; raise ALIGN_STEPS:\n{stderr}"
    )
    finished = f"step-{micro.ALIGN_STEPS:06d}"
    left = sorted(path.name for path in awaited.parent.glob("step-*"))
    assert left and finished not in left, f"align was over before it was killed; raise ALIGN_STEPS: {left}"
    assert not (run / "aligned").exists()
    assert [record.stage for record in Lineage(run / "lineage.json").records] == ["teacher", "operated"]

    resumed = micro.trihybrid(*command, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert weights(run) == weights(micro_run)
    assert json.loads((run / "results.json").read_text()) == json.loads(
        (micro_run / "results.json").read_text()
    )
    rows = [row for row in read_log(run / "log.jsonl") if row["stage"] == "aligned"]
    (event,) = (row for row in rows if row["kind"] == "event")
    assert 0 < event["from_step"] < micro.ALIGN_STEPS
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(micro.ALIGN_STEPS))
