"""Commands as a user calls them, and what they print."""

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file

import trihybrid
from trihybrid import doctor
from trihybrid.cli import app
from trihybrid.models.checkpoint import load_model

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
GLOBAL_LAYERS = [4, 9, 14, 19, 24, 29, 34]


def test_every_command_is_known_and_explains_itself(micro: ModuleType) -> None:
    assert COMMANDS == [
        "bench", "budget", "chat", "convert", "data", "demo", "distill", "doctor", "eval", "export", "generate",
        "import", "plan", "report", "serve", "submit", "train", "vectors", "version",
    ]  # fmt: skip
    for command in ([], *([name] for name in COMMANDS)):
        result = micro.trihybrid(*command, "--help")
        assert result.code == 0 and result.stderr == ""
        assert " ".join(["trihybrid", *command]) in result.stdout


@pytest.mark.parametrize("command", ["distill", "train"])
def test_help_names_the_run_directory_that_is_taken(micro: ModuleType, command: str) -> None:
    """Outside of backticks Markdown takes the brackets for HTML, and drops them."""
    words = " ".join(re.findall(r"[\w./<>;-]+", micro.trihybrid(command, "--help").stdout))
    assert "Run directory; runs/<recipe name> if not given." in words


def test_version(micro: ModuleType) -> None:
    assert micro.trihybrid("version") == micro.Result(0, trihybrid.__version__ + "\n", "")


@pytest.mark.parametrize("code", [0, 1])
def test_doctor_hands_its_verdict_on(micro: ModuleType, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(doctor, "main", lambda: code)
    assert micro.trihybrid("doctor").code == code


def test_the_dry_run_of_the_demo_is_its_recipe(micro: ModuleType, tmp_path: Path) -> None:
    result = micro.trihybrid(
        "demo", "--dry-run", "--out", tmp_path / "demo", "--set", "stages.0.loop.steps=200"
    )
    assert result.code == 0
    fields = yaml.safe_load(result.stdout)
    assert (fields["name"], fields["stages"][0]["loop"]["steps"]) == ("demo", 200)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_gemma_4_e2b(micro: ModuleType) -> None:
    """Numbers of the model card's plan, by hand."""
    result = micro.trihybrid("plan", "gemma-4-e2b", "--json")
    assert (result.code, result.stderr) == (0, "")
    plan = json.loads(result.stdout)
    before, after = plan["before"], plan["after"]
    keys = ("parameters", "global_kv_bytes_per_token", "recurrent_state_bytes", "sliding_cache_bytes")
    # 3 global layers own keys and values: 2 * 512 * 2 bytes; 12 sliding ones: 2 * 256 * 2 bytes of 511 tokens.
    assert [before[key] for key in keys] == [4_628_569_344, 3 * 2048, 0, 12 * 1024 * 511]
    # 7 TICAs of 2 heads of 128; 7 RWKV-7s of 32 heads of 128 x 128 float32.
    assert [after[key] for key in keys] == [4_683_544_320, 7 * 1024, 7 * 32 * 128 * 128 * 4, 12 * 1024 * 511]
    slots = [layer["after"] for layer in plan["layers"]]
    assert [index for index, slot in enumerate(slots) if slot == ["rwkv7", "tica"]] == GLOBAL_LAYERS
    assert slots.count(["sliding"]) == 28 and len(slots) == 35
    assert any("6,144 to 7,168 bytes a token" in warning for warning in plan["warnings"])


def test_the_plan_with_shared_keys_and_values(micro: ModuleType) -> None:
    result = micro.trihybrid("plan", "google/gemma-4-E2B", "--share-kv", "teacher", "--json")
    after = json.loads(result.stdout)["after"]
    assert (after["parameters"], after["global_kv_bytes_per_token"]) == (4_680_398_080, 3072)
    tables = micro.trihybrid("plan", "gemma-4-e2b", "--share-kv", "teacher")
    assert "4,680,398,080" in tables.stdout and "3,072" in tables.stdout


def test_converting_by_a_saved_plan_is_converting_by_its_options(
    micro: ModuleType, micro_run: Path, micro_texts: Path, tmp_path: Path
) -> None:
    teacher, surgery = micro_run / "teacher", micro.surgery_options()
    plan = tmp_path / "plan.json"
    assert micro.trihybrid("plan", teacher, "--save", plan, *surgery).code == 0
    by_plan = micro.trihybrid("convert", teacher, tmp_path / "a", "--plan", plan, "--text", micro_texts)
    by_options = micro.trihybrid("convert", teacher, tmp_path / "b", "--text", micro_texts, *surgery)
    assert (by_plan.code, by_options.code) == (0, 0), by_plan.stderr + by_options.stderr
    assert "layers [1, 2] converted" in " ".join(by_plan.stdout.split())
    saved = json.loads(plan.read_text())
    assert json.loads((tmp_path / "a" / "plan.json").read_text()) == saved
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    student = load_model(tmp_path / "a")
    assert sum(parameter.numel() for parameter in student.parameters()) == saved["after"]["parameters"]


def test_generate_continues_the_prompt_by_its_seed(micro: ModuleType, micro_run: Path) -> None:
    command = ("generate", micro_run / "matched", "the slow ", "--tokens", 12, "--temperature", 2)
    first, again, other = (micro.trihybrid(*command, "--seed", seed) for seed in (1, 1, 2))
    assert (first.code, first.stderr) == (0, "")
    assert first.stdout.startswith("the slow ") and first.stdout.endswith("\n")
    assert first == again != other


def test_eval_prints_one_object(micro: ModuleType, micro_run: Path, micro_texts: Path) -> None:
    command = ("eval", micro_run / "matched", "--text", micro_texts, "--tokens", 256, "--length", 64)
    result = micro.trihybrid(*command, "--teacher", micro_run / "teacher", "--json")
    assert (result.code, result.stderr) == (0, "")
    row = json.loads(result.stdout)
    assert {"bpb", "raw_bpb", "kl", "agreement", "recall", "recall_by_distance", "loss_by_position"} <= set(
        row
    )
    assert row["bpb"] == row["raw_bpb"] > 0
    assert row["kl"] > 0 and row["agreement"] < 1
    own = micro.trihybrid(
        "eval", micro_run / "teacher", *command[2:], "--teacher", micro_run / "teacher", "--json"
    )
    same = json.loads(own.stdout)
    assert same["kl"] == pytest.approx(0, abs=1e-9) and same["agreement"] == 1
    alone = micro.trihybrid(*command)
    assert alone.code == 0 and f"{row['bpb']:.4f}" in alone.stdout
    assert alone.stdout.count("not measured") == 2  # KL and agreement, without a teacher


def test_eval_scores_all_of_a_text(micro: ModuleType, micro_run: Path, tmp_path: Path) -> None:
    texts = [f"document {number}: some words" for number in range(20)]
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "one.txt").write_text(texts[0])
    for name, wanted in (("many.jsonl", texts), ("one.txt", texts[:1])):
        command = ("eval", micro_run / "matched", "--text", tmp_path / name, "--length", 100_000, "--json")
        result = micro.trihybrid(*command)
        assert result.code == 0, result.stderr
        row = json.loads(result.stdout)
        assert sum(part["count"] for part in row["loss_by_position"]) == sum(map(len, wanted))
        assert row["kl"] is row["agreement"] is None


def test_report_writes_the_same_page_again(micro: ModuleType, micro_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(micro_run, tmp_path / "run")
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    result = micro.trihybrid("report", run)
    assert result.code == 0 and "report.html" in result.stdout
    assert (run / "report.html").read_bytes() == page
