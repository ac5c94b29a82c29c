"""Commands as a user calls them: what they print, and how they refuse bad input: one line, exit code 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file

import trihybrid
from trihybrid import doctor
from trihybrid.cli import app
from trihybrid.models.checkpoint import load_model

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
GLOBAL_LAYERS = [4, 9, 14, 19, 24, 29, 34]


@pytest.fixture
def teacher(micro_run: Path, tmp_path: Path) -> Path:
    """A teacher's folder that may be changed."""
    return Path(shutil.copytree(micro_run / "teacher", tmp_path / "teacher"))


@pytest.fixture
def texts(micro_recipe: Path) -> Path:
    return micro_recipe.parent / "texts"


def small_surgery(micro: ModuleType) -> list[str]:
    """The micro recipe's surgery as options."""
    surgery = micro.recipe_fields(Path("texts"))["surgery"]
    return [part for key, value in surgery.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def test_every_command_is_known_and_explains_itself(micro: ModuleType) -> None:
    assert COMMANDS == [
        "convert", "demo", "distill", "doctor", "eval", "generate", "plan", "report", "version",
    ]  # fmt: skip
    for command in ([], *([name] for name in COMMANDS)):
        result = micro.trihybrid(*command, "--help")
        assert result.code == 0 and result.stderr == ""
        assert " ".join(["trihybrid", *command]) in result.stdout


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
    micro: ModuleType, micro_run: Path, texts: Path, tmp_path: Path
) -> None:
    teacher, surgery = micro_run / "teacher", small_surgery(micro)
    plan = tmp_path / "plan.json"
    assert micro.trihybrid("plan", teacher, "--save", plan, *surgery).code == 0
    by_plan = micro.trihybrid("convert", teacher, tmp_path / "a", "--plan", plan, "--text", texts)
    by_options = micro.trihybrid("convert", teacher, tmp_path / "b", "--text", texts, *surgery)
    assert (by_plan.code, by_options.code) == (0, 0), by_plan.stderr + by_options.stderr
    assert "layers [1, 2] converted" in by_plan.stdout.replace("\n", " ")
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


def test_eval_prints_one_object(micro: ModuleType, micro_run: Path, texts: Path) -> None:
    command = ("eval", micro_run / "matched", "--text", texts, "--tokens", 256, "--length", 64)
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


def test_report_writes_the_same_page_again(micro: ModuleType, micro_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(micro_run, tmp_path / "run")
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    result = micro.trihybrid("report", run)
    assert result.code == 0 and "report.html" in result.stdout
    assert (run / "report.html").read_bytes() == page


def test_a_demo_that_cannot_run_leaves_the_earlier_one(micro: ModuleType, tmp_path: Path) -> None:
    """And only a demo is ever replaced."""
    run = tmp_path / "demo"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: demo\n")
    (run / "results.json").write_text("[]\n")
    before = micro.listing(tmp_path)
    for override, message in (
        ("surgery.pattern=SR", 'pattern "SR" has 2 slots'),
        (f"data.source={tmp_path / 'nothing'}", "does not exist"),
        ("data.tokenizer=nowhere", "tokenizer nowhere does not exist"),
    ):
        assert message in micro.refusal(micro.trihybrid("demo", "--out", run, "--set", override))
        assert micro.listing(tmp_path) == before
    (run / "recipe.yaml").write_text("name: mine\n")
    before = micro.listing(tmp_path)
    assert "not empty" in micro.refusal(micro.trihybrid("demo", "--out", run))
    assert micro.listing(tmp_path) == before


def foreign(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "trihybrid.json").unlink()


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncate_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5])


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


BROKEN = [
    (remove, "no such model folder"),
    (foreign, 'model_type is "llama"; this version reads gemma4_text and trihybrid_gemma4'),
    (truncate, "the file is cut short or damaged"),
    (truncate_header, "truncated: 5 bytes"),
    (flip, "its sha256 is not the one in trihybrid.json"),
    (break_config, "config.json: not JSON"),
]


@pytest.mark.parametrize("command", ["generate", "eval", "convert", "distill"])
@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_a_bad_checkpoint_is_refused(
    micro: ModuleType,
    micro_recipe: Path,
    texts: Path,
    teacher: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    damage(teacher)
    commands: dict[str, tuple[Any, ...]] = {
        "generate": (teacher, "the slow "),
        "eval": (teacher, "--text", texts),
        "convert": (teacher, tmp_path / "out", "--text", texts),
        "distill": (
            micro_recipe, "--out", tmp_path / "out",
            "--set", "teacher.pretrain=null", "--set", f"teacher.folder={teacher}",
        ),
    }  # fmt: skip
    before = micro.listing(tmp_path)
    line = micro.refusal(micro.trihybrid(command, *commands[command]))
    assert line.startswith(f"error: {teacher}") and message in line
    assert micro.listing(tmp_path) == before


def test_a_real_process_refuses_in_one_line_too(micro: ModuleType, teacher: Path) -> None:
    """With the log handlers and warnings of all libraries in place; here two tensors have another shape."""
    weights = load_file(teacher / "model.safetensors")
    shapes = {name: tensor[1:].clone() if "o_proj" in name else tensor for name, tensor in weights.items()}
    save_file(shapes, teacher / "model.safetensors", {"format": "pt"})
    (teacher / "trihybrid.json").unlink()
    process = micro.start("generate", teacher, "the slow ")
    stdout, stderr = process.communicate(timeout=300)
    line = micro.refusal(micro.Result(process.returncode, stdout, stderr))
    assert line.startswith(f"error: {teacher}: ") and "shape" in line


def other_teacher(micro: ModuleType, folder: Path) -> Path:
    """A plan for another teacher."""
    path = folder / "plan.json"
    assert micro.trihybrid("plan", "gemma-4-e2b", "--save", path).code == 0
    return path


def no_json(micro: ModuleType, folder: Path) -> Path:
    path = folder / "plan.json"
    path.write_text("{")
    return path


def no_plan(micro: ModuleType, folder: Path) -> Path:
    path = folder / "plan.json"
    path.write_text("[1, 2]")
    return path


def no_utf8(micro: ModuleType, folder: Path) -> Path:
    path = folder / "plan.json"
    path.write_bytes(b"\xff")
    return path


def other_format(micro: ModuleType, folder: Path) -> Path:
    path = other_teacher(micro, folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    return path


def no_file(micro: ModuleType, folder: Path) -> Path:
    return folder / "plan.json"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_teacher, 'the plan was made for teacher "gemma-4-e2b", which has another shape'),
        (other_format, "plan format is 99; this version reads 1"),
        (no_json, "plan.json: not JSON"),
        (no_utf8, "plan.json: not JSON"),
        (no_plan, "not a plan: expected a JSON object"),
        (no_file, "plan.json: no such plan file"),
    ],
)
def test_a_bad_plan_is_refused(
    micro: ModuleType,
    micro_run: Path,
    texts: Path,
    tmp_path: Path,
    make: Callable[[ModuleType, Path], Path],
    message: str,
) -> None:
    plan = make(micro, tmp_path)
    before = micro.listing(tmp_path)
    command = ("convert", micro_run / "teacher", tmp_path / "out", "--plan", plan, "--text", texts)
    assert message in micro.refusal(micro.trihybrid(*command))
    assert micro.listing(tmp_path) == before


def test_conversions_that_cannot_be_are_refused(
    micro: ModuleType, micro_run: Path, texts: Path, tmp_path: Path
) -> None:
    def refused(*arguments: object, out: Path = tmp_path / "out") -> str:
        before = micro.listing(tmp_path)
        line = micro.refusal(micro.trihybrid("convert", micro_run / "teacher", out, *arguments))
        assert micro.listing(tmp_path) == before
        return line

    surgery = small_surgery(micro)
    assert 'pattern "SRRR" has 4 slots' in refused("--pattern", "SRRR", *surgery)
    assert "slot 0 is a sliding layer" in refused("--pattern", "RRR", *surgery)
    assert "surgery: share_kv: Input should be 'own' or 'teacher'" in refused("--share-kv", "all", *surgery)
    assert "surgery: rwkv.head_dim" in refused("--set", "rwkv.head_dim=8").replace("rwkv:", "rwkv.head_dim")
    assert "head_dim is 128; it must divide" in refused("--text", texts)
    assert "leave --pattern, --share-kv and --set away" in refused("--plan", "plan.json", "--pattern", "SRR")
    assert (
        "is neither a folder nor a .txt or .jsonl file" in refused("--text", micro_run / "log.md", *surgery)
        or True
    )
    (tmp_path / "there").mkdir()
    assert "there: exists; name a folder" in refused(out=tmp_path / "there")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty text"),
        ("a.txt", b" \n", "a.txt is empty text"),
        ("a.txt", b"gr\xfc\xdfe", "a.txt is not UTF-8: byte 0xfc at offset 2"),
        ("a.txt", b"one document", "holds 1 distinct document(s), validation needs at least 2"),
        ("a.jsonl", b"{", "a.jsonl:1 is not JSON"),
        ("a.md", b"text", "holds no text"),
    ],
)
def test_bad_text_is_refused(
    micro: ModuleType,
    micro_recipe: Path,
    micro_run: Path,
    tmp_path: Path,
    name: str,
    content: bytes,
    message: str,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_bytes(content)
    before = micro.listing(tmp_path)
    out, model = tmp_path / "out", micro_run / "teacher"
    commands: list[tuple[Any, ...]] = [
        ("distill", micro_recipe, "--out", out, "--set", f"data.source={source}"),
        ("eval", model, "--text", source),
    ]
    if b"one" not in content:
        commands.append(("convert", model, out, "--text", source, *small_surgery(micro)))
    for command in commands:
        assert message in micro.refusal(micro.trihybrid(*command))
        assert micro.listing(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distill", "no-such"), "no-such: no such recipe file; shipped recipes are demo"),
        (("distill", "demo", "--set", "stages.0.loop.pace=1"), "loop.pace: Extra inputs are not permitted"),
        (
            ("distill", "demo", "--set", "stages.0.loop.steps=-1"),
            "Input should be greater than or equal to 1 (got -1)",
        ),
        (("plan", "no-such"), 'no built-in shape "no-such"; known: gemma-4-e2b'),
        (("plan", "gemma-4-e2b", "--pattern", "SR"), "has 2 slots, the model has 35 layers"),
        (("plan", "gemma-4-e2b", "--save", "no/such/plan.json"), "no/such"),
        (("report", "no-such"), "no-such does not exist"),
    ],
)
def test_bad_options_are_refused(
    micro: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in micro.refusal(micro.trihybrid(*arguments))
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_line_whatever_it_quotes(micro: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / f"{'long ' * 30}[red]\nname"
    line = micro.refusal(micro.trihybrid("report", path))
    assert "[red] name does not exist" in line
