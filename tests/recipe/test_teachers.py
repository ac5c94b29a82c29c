"""Teachers of other families from a folder: every command, from a plan to a measured student."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from tiny_teachers import build_teacher
from trihybrid.data import Tokenizer
from trihybrid.models.checkpoint import load_model, load_student, load_teacher
from trihybrid.storage.folder import save_folder

LEGEND = {"F": "full", "R": "rwkv7", "B": ["rwkv7", "tica"], "W": {"mixer": "sliding", "window": 8}}
# Family -> layout, window of teacher and student.
CASES = {"llama": ("WRBF", 8), "qwen3": ("RRRB", None)}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, str, int | None]:
    return request.param, *CASES[request.param]


@pytest.fixture(scope="module")
def teacher(case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny teacher that reads bytes."""
    model = build_teacher(case[0], vocab_size=260)
    folder = tmp_path_factory.mktemp("teachers") / case[0]

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        Tokenizer.bytes().save(partial)

    save_folder(folder, write)
    return folder


@pytest.fixture(scope="module")
def run(case, teacher: Path, micro: ModuleType, micro_texts: Path) -> Path:
    """The directory of a finished run."""
    fields: dict[str, Any] = micro.recipe_fields(micro_texts)
    fields["teacher"] = {"folder": str(teacher)}
    fields["data"]["tokenizer"] = str(teacher)
    fields["surgery"] |= {"pattern": case[1], "legend": LEGEND}
    for stage in fields["stages"]:
        stage["loop"]["steps"] = 4
    fields["targets"] = {"teacher_recall": 0.0}
    path = teacher.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    result = micro.trihybrid("distill", path, "--out", teacher.parent / "run")
    assert result.code == 0, result.stderr
    return teacher.parent / "run"


def test_a_run_leaves_students_of_the_teachers_family(case, run: Path) -> None:
    name, layout, window = case
    assert load_teacher(run / "teacher").config.model_type == name
    for stage in ("operated", "aligned", "matched"):
        student = load_student(run / stage)
        assert student.config.model_type == f"trihybrid_{name}"
        assert student.config.sliding_window == window
        assert len(student.config.slot_list()) == len(layout)
    rows = json.loads((run / "results.json").read_text())
    assert [row["stage"] for row in rows] == ["teacher", "operated", "aligned", "matched"]
    assert all((row["recall"] is None) == (window is None) for row in rows)
    assert rows[1]["kl"] > rows[3]["kl"] > 0
    assert json.loads((run / "summary.json").read_text())["window"] == window
    page = (run / "report.html").read_text()
    assert ("No sliding window is recorded" in page) == (window is None)


def test_only_new_mixers_have_trained(run: Path) -> None:
    before, after = (load_model(run / stage).state_dict() for stage in ("teacher", "matched"))
    shared = before.keys() & after.keys()
    assert all(torch.equal(before[key], after[key]) for key in shared)
    assert all(".self_attn.rwkv7." in key or ".self_attn.tica." in key for key in after.keys() - shared)


def test_plan_convert_eval_and_generate(
    case, teacher: Path, run: Path, micro: ModuleType, micro_texts: Path, tmp_path: Path
) -> None:
    _, layout, window = case
    options = ["--pattern", layout, *micro.surgery_options(), "--set", f"legend={json.dumps(LEGEND)}"]
    planned = micro.trihybrid("plan", teacher, *options, "--json")
    assert planned.code == 0, planned.stderr
    result = micro.trihybrid("convert", teacher, tmp_path / "student", *options, "--text", micro_texts)
    changed = [index for index, letter in enumerate(layout) if letter != "F"]
    assert result.code == 0, result.stderr
    assert f"layers {changed} converted" in result.stdout
    made = json.loads((tmp_path / "student" / "plan.json").read_text())
    assert made["after"] == json.loads(planned.stdout)["after"]
    student = load_student(tmp_path / "student")
    assert sum(parameter.numel() for parameter in student.parameters()) == made["after"]["parameters"]
    command = ("eval", tmp_path / "student", "--text", micro_texts, "--tokens", 256, "--length", 64)
    row = json.loads(micro.trihybrid(*command, "--teacher", teacher, "--json").stdout)
    assert row["kl"] > 0 and (row["recall"] is None) == (window is None)
    own = json.loads(micro.trihybrid("eval", teacher, *command[2:], "--teacher", teacher, "--json").stdout)
    assert own["kl"] == pytest.approx(0, abs=1e-9)
    words = ("the slow ", "--tokens", 8, "--temperature", 2)
    texts = [micro.trihybrid("generate", folder, *words) for folder in (run / "matched", run / "matched")]
    assert texts[0].code == 0 and texts[0].stdout.startswith("the slow ") and texts[0] == texts[1]


def test_a_promise_of_recall_without_a_window_counts_all_distances(
    case, run: Path, micro: ModuleType
) -> None:
    result = micro.trihybrid(
        "distill", run.parent / "recipe.yaml", "--out", run, "--resume", "--set", "targets.teacher_recall=1"
    )
    where = "beyond its window" if case[2] else "at all distances"
    assert result.code == 1
    assert f"missed: the teacher's recall {where} is" in result.stderr
