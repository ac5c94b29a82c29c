"""A run leaves what it promises, goes on to the bit after a kill, and refuses what does not belong to it."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trihybrid.models.checkpoint import check_folder, load_model, load_teacher
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM
from trihybrid.recipe.execute import execute
from trihybrid.recipe.load import dump_recipe, load_recipe
from trihybrid.recipe.measure import missed_targets
from trihybrid.recipe.schema import Recipe
from trihybrid.run import Lineage, hash_file, hash_folder, read_log
from trihybrid.surgery.operate import read_plan

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


def test_every_model_loads_and_is_what_its_name_says(micro_run: Path) -> None:
    teacher = load_teacher(micro_run / "teacher")
    assert teacher.config.vocab_size == 260
    for name in MODELS[1:]:
        student = load_model(micro_run / name)
        assert isinstance(student, TrihybridGemma4ForCausalLM)
        slots = [list(slot.mixers) for slot in student.config.slot_list()]
        assert slots == [["sliding"], ["rwkv7", "tica"], ["rwkv7", "tica"]]
        assert read_plan(micro_run / name) == json.loads((micro_run / "plan.json").read_text())
        assert check_folder(micro_run / name)["model_type"] == "trihybrid_gemma4"


def test_stages_train_the_new_mixers_and_nothing_else(micro_run: Path) -> None:
    before, *after = (load_model(micro_run / name).state_dict() for name in MODELS[1:])
    for state in after:
        changed = {name for name in before if not torch.equal(before[name], state[name])}
        assert changed
        assert all(".self_attn.rwkv7." in name or ".self_attn.tica." in name for name in changed)
        before = state


def test_the_lineage_is_the_chain_of_the_folders(micro_run: Path) -> None:
    records = Lineage(micro_run / "lineage.json").records
    assert [record.stage for record in records] == MODELS
    outputs = [hash_folder(micro_run / name) for name in MODELS]
    assert [record.output for record in records] == outputs
    assert [record.parent for record in records] == ["", *outputs[:-1]]
    assert len(set(outputs)) == len({record.recipe for record in records}) == 4


def test_results_have_one_row_a_model(micro_run: Path) -> None:
    rows = json.loads((micro_run / "results.json").read_text())
    assert [row["stage"] for row in rows] == MODELS
    for row in rows:
        assert 0 < row["bpb"] < 20 and 0 <= row["agreement"] <= 1 and 0 <= row["recall"] <= 1
    assert (rows[0]["kl"], rows[0]["agreement"]) == (0.0, 1.0)
    # Trained, the student is nearer to its teacher than freshly operated.
    assert rows[1]["kl"] > rows[3]["kl"] > 0
    assert rows[1]["agreement"] < rows[3]["agreement"]
    samples = json.loads((micro_run / "samples.json").read_text())
    assert [(row["stage"], row["prompt"]) for row in samples] == [
        ("teacher", "the slow "),
        ("matched", "the slow "),
    ]


def test_the_recipe_and_the_report_are_there(micro_run: Path, micro_recipe: Path) -> None:
    assert (micro_run / "recipe.yaml").read_text() == dump_recipe(load_recipe(micro_recipe))
    page = (micro_run / "report.html").read_text(encoding="utf-8")
    assert all(f">{name}<" in page for name in MODELS)
    summary = json.loads((micro_run / "summary.json").read_text())
    assert summary["window"] == 8 and summary["targets"] == {}
    assert summary["seconds"] >= sum(record.seconds for record in Lineage(micro_run / "lineage.json").records)


def test_the_log_holds_every_step_once(micro: ModuleType, micro_run: Path) -> None:
    rows = [row for row in read_log(micro_run / "log.jsonl") if row["kind"] == "train"]
    steps = {
        name: [row["step"] for row in rows if row["stage"] == name]
        for name in ("teacher", "aligned", "matched")
    }
    assert steps == {
        "teacher": list(range(6)),
        "aligned": list(range(micro.ALIGN_STEPS)),
        "matched": list(range(4)),
    }


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

    resumed = micro.start(*command, "--resume")
    _, stderr = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, stderr
    assert weights(run) == weights(micro_run)
    assert json.loads((run / "results.json").read_text()) == json.loads(
        (micro_run / "results.json").read_text()
    )
    rows = [row for row in read_log(run / "log.jsonl") if row["stage"] == "aligned"]
    (event,) = (row for row in rows if row["kind"] == "event")
    assert 0 < event["from_step"] < micro.ALIGN_STEPS
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(micro.ALIGN_STEPS))


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.1.loop.sequence_length=100000"], "fewer than batch_size 2"),
        (["teacher.pretrain.loop.batch_size=5000"], "fewer than batch_size 5000"),
        (["teacher.pretrain.shape.sliding_window=400"], "no answer lies beyond the teacher's window of 400"),
        (["data.tokenizer=nowhere"], "tokenizer nowhere does not exist"),
        (["surgery.pattern=SR"], 'pattern "SR" has 2 slots, the model has 3 layers'),
        (["surgery.legend={S: sliding, R: mamba}"], "mamba"),
        (["teacher.pretrain.shape.nose=1"], "shape: unknown fields ['nose']"),
        (["teacher.pretrain=null", "teacher.folder=nowhere"], "nowhere: no such model folder"),
    ],
)
def test_what_cannot_run_leaves_nothing(
    micro: ModuleType,
    micro_recipe: Path,
    tmp_path: Path,
    overrides: list[str],
    message: str,
    existing: bool,
) -> None:
    if existing:
        (tmp_path / "run").mkdir()
    before = micro.listing(tmp_path)
    options = [part for override in overrides for part in ("--set", override)]
    line = micro.refusal(micro.trihybrid("distill", micro_recipe, "--out", tmp_path / "run", *options))
    assert message in line
    assert micro.listing(tmp_path) == before


def test_a_teacher_from_a_folder_is_copied_and_converted_alike(
    micro: ModuleType, micro_recipe: Path, micro_run: Path, tmp_path: Path
) -> None:
    """The run on a given teacher makes the student that the run that trained this teacher made."""
    overrides = ["teacher.pretrain=null", f"teacher.folder={micro_run / 'teacher'}", "stages=[]"]
    torch.set_num_threads(1)
    rows = execute(load_recipe(micro_recipe, overrides), tmp_path / "run")
    assert [row["stage"] for row in rows] == MODELS[:2]
    for name in MODELS[:2]:
        assert hash_file(tmp_path / "run" / name / "model.safetensors") == weights(micro_run)[name]
    foreign = micro_run / "operated"
    overrides = ["teacher.pretrain=null", f"teacher.folder={foreign}"]
    with pytest.raises(ValueError, match="a converted student, not a teacher"):
        execute(load_recipe(micro_recipe, overrides), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def row(stage: str, bpb: float, kl: float, recall: float = 0.5) -> dict:
    return {"stage": stage, "bpb": bpb, "kl": kl, "recall": recall}


def test_broken_promises_are_named_one_by_one() -> None:
    def missed(targets: dict, rows: list[dict], seconds: float = 10.0) -> list[str]:
        fields = {"name": "a", "teacher": {"folder": "a"}, "stages": [], "targets": targets}
        return missed_targets(Recipe.model_validate(fields), rows, seconds)

    rows = [
        row("teacher", 2.0, 0.0),
        row("operated", 3.0, 0.9),
        row("aligned", 2.5, 0.9),
        row("matched", 2.2, 0.1),
    ]
    kept = {"bpb_gap": 0.25, "teacher_recall": 0.5, "seconds": 10.0}
    assert missed(kept, rows) == []
    assert missed({"bpb_gap": 0.1}, rows) == ["matched is 0.2000 bpb above the teacher, wanted 0.1"]
    assert missed({"seconds": 9.0}, rows) == ["the run took 10 s, wanted at most 9"]
    assert missed({"improvement": True}, rows) == [
        "aligned is not better than operated in kl: 0.9000 against 0.9000"
    ]
    (line,) = missed({"teacher_recall": 0.6}, rows)
    assert line.startswith("the teacher's recall beyond its window is 0.50, wanted 0.60")
