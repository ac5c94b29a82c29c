"""Bad input gets one line, exit code 2, and nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def teacher(micro_run: Path, tmp_path: Path) -> Path:
    """A teacher's folder that may be changed."""
    return Path(shutil.copytree(micro_run / "teacher", tmp_path / "teacher"))


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


def other_config(folder: Path, model_type: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 8}))
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "trihybrid.json").unlink()


def foreign(folder: Path) -> None:
    other_config(folder, "gpt2")


def impossible(folder: Path) -> None:
    other_config(folder, "llama")


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


def nest_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


BROKEN = [
    (remove, "no such model folder"),
    (foreign, 'model_type is "gpt2"; '),
    (
        impossible,
        "config.json cannot be: The hidden size (8) is not a multiple of the number of attention heads",
    ),
    (truncate, "the file is cut short or damaged"),
    (truncate_header, "truncated: 5 bytes"),
    (flip, "its sha256 is not the one in trihybrid.json"),
    (break_config, "config.json: not JSON"),
    (nest_config, "config.json: not JSON"),
]


@pytest.mark.parametrize("command", ["generate", "eval", "convert", "distill"])
@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_a_bad_checkpoint_is_refused(
    micro: ModuleType,
    micro_recipe: Path,
    micro_texts: Path,
    teacher: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    damage(teacher)
    commands: dict[str, tuple[Any, ...]] = {
        "generate": (teacher, "the slow "),
        "eval": (teacher, "--text", micro_texts),
        "convert": (teacher, tmp_path / "out", "--text", micro_texts),
        "distill": (
            micro_recipe, "--out", tmp_path / "out",
            "--set", "teacher.pretrain=null", "--set", f"teacher.folder={teacher}",
        ),
    }  # fmt: skip
    before = micro.listing(tmp_path)
    line = micro.refusal(micro.trihybrid(command, *commands[command]))
    assert line.startswith(f"error: {teacher}") and message in line
    assert micro.listing(tmp_path) == before


def test_nothing_to_align_is_found_before_the_teacher_trains(
    micro: ModuleType, micro_recipe: Path, tmp_path: Path
) -> None:
    command = ("distill", micro_recipe, "--out", tmp_path / "out", "--set", "surgery.pattern=SFF")
    before = micro.listing(tmp_path)
    assert "stage align: no slot holds rwkv7 or tica" in micro.refusal(micro.trihybrid(*command))
    assert micro.listing(tmp_path) == before


@pytest.mark.long
def test_a_real_process_refuses_in_one_line_too(micro: ModuleType, teacher: Path) -> None:
    """With the log handlers and warnings of all libraries in place; here three tensors have another shape."""
    weights = load_file(teacher / "model.safetensors")
    shapes = {name: tensor[1:].clone() if "o_proj" in name else tensor for name, tensor in weights.items()}
    save_file(shapes, teacher / "model.safetensors", {"format": "pt"})
    (teacher / "trihybrid.json").unlink()
    process = micro.start("generate", teacher, "the slow ")
    stdout, stderr = process.communicate(timeout=300)
    line = micro.refusal(micro.Result(process.returncode, stdout, stderr))
    name = "model.layers.0.self_attn.o_proj.weight"
    fault = "3 tensors are missing or have another shape, first"
    assert line == f"error: {teacher}: {fault} {name} ([15, 16], wanted [16, 16])"


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


def too_deep(micro: ModuleType, folder: Path) -> Path:
    path = folder / "plan.json"
    path.write_text("[" * 100_000)
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
        (too_deep, "plan.json: not JSON"),
        (no_plan, "not a plan: expected a JSON object"),
        (no_file, "plan.json: no such plan file"),
    ],
)
def test_a_bad_plan_is_refused(
    micro: ModuleType,
    micro_run: Path,
    micro_texts: Path,
    tmp_path: Path,
    make: Callable[[ModuleType, Path], Path],
    message: str,
) -> None:
    plan = make(micro, tmp_path)
    before = micro.listing(tmp_path)
    command = ("convert", micro_run / "teacher", tmp_path / "out", "--plan", plan, "--text", micro_texts)
    assert message in micro.refusal(micro.trihybrid(*command))
    assert micro.listing(tmp_path) == before


def test_conversions_that_cannot_be_are_refused(
    micro: ModuleType, micro_run: Path, micro_texts: Path, tmp_path: Path
) -> None:
    def refused(*arguments: object, out: Path = tmp_path / "out") -> str:
        before = micro.listing(tmp_path)
        line = micro.refusal(micro.trihybrid("convert", micro_run / "teacher", out, *arguments))
        assert micro.listing(tmp_path) == before
        return line

    surgery = micro.surgery_options()
    assert 'pattern "SRRR" has 4 slots' in refused("--pattern", "SRRR", *surgery)
    assert "slot 0 is a sliding layer" in refused("--pattern", "RRR", *surgery)
    assert "surgery: share_kv: Input should be 'own' or 'teacher'" in refused("--share-kv", "all", *surgery)
    assert "surgery: rwkv: Extra inputs are not permitted" in refused("--set", "rwkv.head_dim=8")
    assert "head_dim is 6; it must divide" in refused("--text", micro_texts, "--set", "rwkv7.head_dim=6")
    assert "leave --pattern, --share-kv and --set away" in refused("--plan", "plan.json", "--pattern", "SRR")
    assert "is neither a folder nor a .txt or .jsonl file" in refused(
        "--text", micro_run / "recipe.yaml", *surgery
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
    ]
    if b"one" not in content:
        commands.append(("eval", model, "--text", source))
        commands.append(("convert", model, out, "--text", source, *micro.surgery_options()))
    for command in commands:
        assert message in micro.refusal(micro.trihybrid(*command))
        assert micro.listing(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distill", "no-such"), "no-such: no such recipe file; shipped recipes are "),
        (("distill", "demo", "--set", "stages.0.loop.pace=1"), "loop.pace: Extra inputs are not permitted"),
        (
            ("distill", "demo", "--set", "stages.0.loop.steps=-1"),
            "Input should be greater than or equal to 1 (got -1)",
        ),
        (("plan", "no-such"), 'no built-in shape "no-such"; known: gemma-3-12b'),
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
