"""A run leaves what it promises, and nothing where it cannot run."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from tiny_published import write_published
from trihybrid.data.shards import TokenShards
from trihybrid.distill.match import MatchTask
from trihybrid.distill.section import ExtendSection
from trihybrid.models.checkpoint import load_model, load_student, load_teacher
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM
from trihybrid.recipe.execute import execute
from trihybrid.recipe.load import dump_recipe, load_recipe
from trihybrid.recipe.stage_task import stage_task
from trihybrid.run import Lineage, hash_file, hash_folder, read_log
from trihybrid.storage.folder import check_folder
from trihybrid.surgery.operate import read_plan
from trihybrid.train.distributed import ALONE

MODELS = ["teacher", "operated", "aligned", "matched"]


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


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.1.loop.sequence_length=100000"], "fewer than batch_size 2"),
        (["teacher.pretrain.loop.batch_size=5000"], "fewer than batch_size 5000"),
        (["teacher.pretrain.shape.sliding_window=400"], "no answer lies beyond the window of 400"),
        (["data.tokenizer=nowhere"], "tokenizer nowhere does not exist"),
        (["surgery.pattern=SR"], 'pattern "SR" has 2 slots, the model has 3 layers'),
        (["surgery.legend={S: sliding, R: mamba}"], "mamba"),
        (["teacher.pretrain.shape.nose=1"], "shape: unknown fields ['nose']"),
        (
            ["stages.0.tables=host", "teacher.pretrain.shape.hidden_size_per_layer_input=0"],
            "tables: host, but this model's only table is its head too",
        ),
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
        assert hash_file(tmp_path / "run" / name / "model.safetensors") == hash_file(
            micro_run / name / "model.safetensors"
        )
    foreign = micro_run / "operated"
    overrides = ["teacher.pretrain=null", f"teacher.folder={foreign}"]
    with pytest.raises(ValueError, match="a converted student, not a teacher"):
        execute(load_recipe(micro_recipe, overrides), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_three_stages_with_a_sliding_layer_in_the_last(
    micro_recipe: Path, micro_run: Path, tmp_path: Path
) -> None:
    """Stage 3 goes on from stage 2, on rows of three windows, and trains what its patterns name; the table that all
    stages leave on the host is in every model again."""
    loop = {"steps": 1, "batch_size": 2, "sequence_length": 16}
    stages: list[dict] = [
        {"kind": kind, "loop": loop, "tables": "host"} for kind in ("align", "match", "extend")
    ]
    sliding = "model.layers.0.self_attn.q_proj.weight"
    stages[2] |= {"loop": loop | {"sequence_length": 72}, "train": ["*.rwkv7.w0", sliding]}
    overrides = ["teacher.pretrain=null", f"teacher.folder={micro_run / 'teacher'}"]
    recipe = load_recipe(micro_recipe, [*overrides, f"stages={json.dumps(stages)}"])
    rows = execute(recipe, tmp_path / "run")
    assert [row["stage"] for row in rows] == [*MODELS, "extended"]
    before, after = (load_model(tmp_path / "run" / name).state_dict() for name in ("matched", "extended"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {sliding, *(name for name in before if name.endswith("rwkv7.w0"))}


def test_the_last_stage_by_kl_is_stage_two_without_its_alignment(micro_run: Path) -> None:
    fields = {"loop": {"steps": 1}, "loss": "kl", "chunk": 9, "kept_layers": 1, "train": ["*.rwkv7.w0"]}
    stage = ExtendSection.model_validate(fields)
    text = TokenShards(micro_run / "data" / "train")
    task = stage_task(stage, load_student(micro_run / "matched"), micro_run / "teacher", text, ALONE)
    assert isinstance(task, MatchTask) and all(name.endswith("w0") for name in task.parameters())
    module = task.module
    assert (module.alignment_weight, module.chunk, module.recomputed) == (0.0, 9, 2)


def test_a_published_teacher_serves_a_recipe(micro: ModuleType, micro_recipe: Path, tmp_path: Path) -> None:
    """Both stages on the text model of a multimodal folder, with scales from its weights alone; the operated student is
    the one that `convert` writes."""
    write_published(tmp_path / "published", dtype=torch.float32)
    surgery = {
        "rwkv7": {"head_dim": 16, "decay_rank": 6, "iclr_rank": 5, "gate_rank": 7},
        "tica": {"heads": 4, "kv_heads": 2, "head_dim": 8, "gate_rank": 3},
    }
    overrides = [
        "teacher.pretrain=null",
        f"teacher.folder={tmp_path / 'published'}",
        "surgery.calibration_tokens=0",
    ]
    overrides += [f"surgery.{name}={json.dumps(fields)}" for name, fields in surgery.items()]
    overrides += ["stages.0.loop.steps=1", "stages.1.loop.steps=1"]
    torch.set_num_threads(1)
    rows = execute(load_recipe(micro_recipe, overrides), tmp_path / "run")
    assert [row["stage"] for row in rows] == MODELS
    options = [part for name, fields in surgery.items() for part in ("--set", f"{name}={json.dumps(fields)}")]
    assert micro.trihybrid("convert", tmp_path / "published", tmp_path / "student", *options).code == 0
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("run/operated", "student"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert load_model(tmp_path / "run" / "matched").config.image_token_id == 250
